"""The state of a training run after an epoch, whole on disk or the one before it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from shallowdeep.errors import FileFormatError
from shallowdeep.storage import replacing, write_text


@dataclass(frozen=True)
class Checkpoint:
    """A run's ``checkpoint.pt`` and ``history.jsonl``.

    Args:
        folder: where they lie; ``None``: nothing is kept.
        identity: what run this is; a checkpoint of another is refused.
    """

    folder: Path | None
    identity: str

    def sweep(self) -> None:
        """Remove what a killed process left half-written in the run folder, and nowhere deeper."""
        if self.folder is None:
            return
        for place in (self.folder, self.folder / "traces", self.folder / "results"):
            for partial in place.glob(".*.partial"):
                partial.unlink(missing_ok=True)

    def save(
        self,
        sdn: nn.Module,
        optimizer: optim.Optimizer,
        phase: int,
        epochs: int,
        history: list[dict[str, Any]],
    ) -> None:
        """Keep the state after some epochs of a phase; the checkpoint before is replaced."""
        if self.folder is None:
            return
        state = {
            "identity": self.identity,
            "phase": phase,
            "epochs": epochs,
            "sdn": sdn.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": json.dumps(history),
        }
        # The history first: killed between the two, the epoch is done again and both agree in the end.
        write_text(self.folder / "history.jsonl", "".join(json.dumps(record) + "\n" for record in history))
        with replacing(self.folder / "checkpoint.pt") as partial:
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # how it reports a full disk
                raise OSError(f"cannot write {self.folder / 'checkpoint.pt'}: {error}") from error

    def load(self, sdn: nn.Module, optimizer: optim.Optimizer, phase: int) -> int:
        """Bring a phase to where it was left.

        Returns:
            Epochs of this phase that are done already; all of them (a large number) where a later phase
            has begun.

        Raises:
            FileFormatError: the checkpoint is damaged, of another run, or of another network.
        """
        state = self._read()
        if state is None or state["phase"] < phase:
            return 0
        try:
            sdn.load_state_dict(state["sdn"])
            if state["phase"] > phase:
                return 1_000_000_000
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise FileFormatError(
                f"{self.folder}/checkpoint.pt is of another network ({why}). Use another folder."
            ) from None
        return state["epochs"]

    def read_history(self) -> list[dict[str, Any]]:
        """The records of the epochs done already."""
        state = self._read()
        return [] if state is None else json.loads(state["history"])

    def _read(self) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return None
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise FileFormatError(f"{path} is damaged or foreign ({why}). Remove it to start anew.") from None
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            found = state.get("identity") if isinstance(state, dict) else type(state).__name__
            raise FileFormatError(
                f"{path} belongs to another run ({found}); this one is ({self.identity}). Use another folder."
            )
        return state
