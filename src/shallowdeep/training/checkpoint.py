"""The state of a training run after an epoch, whole on disk or the one before it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from shallowdeep.errors import FileFormatError
from shallowdeep.networks.calls import first_line
from shallowdeep.storage import misfits, parse_json, replacing, shown, sweep, write_text


@dataclass(frozen=True)
class Checkpoint:
    """A run's ``checkpoint.pt`` and ``history.jsonl``.

    Args:
        folder: where they lie; ``None``: nothing is kept.
        identity: what run this is; a checkpoint of another is refused.
        taps: where the run's exits are; a checkpoint with others is refused, one of an earlier version has none.
    """

    folder: Path | None
    identity: str
    taps: tuple[str, ...] = ()

    def sweep(self) -> None:
        """Remove what a killed process left half-written in the run folder, and nowhere deeper."""
        if self.folder is not None:
            sweep(self.folder)

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
            "taps": list(self.taps),
            "optimizer": optimizer.state_dict(),
            "history": json.dumps(history),
        }
        # The history first: killed between the two, the epoch is done again and both agree in the end.
        write_text(self.folder / "history.jsonl", "".join(json.dumps(record) + "\n" for record in history))
        with replacing(self.folder / "checkpoint.pt") as partial:
            try:
                with partial.open("wb") as file:  # an open file says why it cannot be written; a path does not
                    torch.save(state, file)
            except RuntimeError as error:  # PyTorch's words for it, the disk's own behind them
                why = first_line(error.__context__ if isinstance(error.__context__, OSError) else error)
                raise OSError(f"cannot write {self.folder / 'checkpoint.pt'}: {why}") from error

    def load(self, sdn: nn.Module, optimizer: optim.Optimizer, phase: int, *, frozen: Sequence[str] = ()) -> int:
        """Bring a phase to where it was left; a checkpoint that is refused changes nothing.

        Args:
            sdn: changed.
            optimizer: of the phase, changed.
            phase: its number.
            frozen: names of the tensors that no phase up to this one trains: the checkpoint has them as they are.

        Returns:
            Epochs of this phase that are done already; all of them (a large number) where a later phase
            has begun.

        Raises:
            FileFormatError: the checkpoint is damaged, of another run, or of another network.
        """
        state = self._read()
        if state is None or state["phase"] < phase:
            return 0
        taps = state.get("taps", list(self.taps))
        if taps != list(self.taps):
            raise FileFormatError(
                f"{self.folder}/checkpoint.pt has its exits at {shown(taps)}, this network at {list(self.taps)}. Use "
                "another folder."
            )
        wrong = misfits(sdn.state_dict(), state["sdn"])
        if wrong:
            raise FileFormatError(
                f"{self.folder}/checkpoint.pt is of another network ({len(wrong)} names or shapes differ, "
                f"first {shown(wrong[0])}). Use another folder."
            )
        if state["phase"] == phase:
            own = sdn.state_dict()
            moved = [name for name in frozen if not torch.equal(own[name].cpu(), state["sdn"][name])]
            if moved:
                raise FileFormatError(
                    f"{self.folder}/checkpoint.pt has other weights in the frozen network ({len(moved)} tensors, first "
                    f"{shown(moved[0])}): it is of another network. Use another folder."
                )
            if not _fits(optimizer, state["optimizer"].get("state")):
                raise FileFormatError(
                    f"{self.folder}/checkpoint.pt is of another network (its optimiser's). Use another folder."
                )
            # The settings are the recipe's own: those of the file could only be the same or damaged.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        sdn.load_state_dict(state["sdn"])
        return state["epochs"] if state["phase"] == phase else 1_000_000_000

    def read_history(self) -> list[dict[str, Any]]:
        """The records of the epochs done already."""
        state = self._read()
        return [] if state is None else state["history"]

    def _read(self) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / "checkpoint.pt").exists():
            return None
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise FileFormatError(f"{path} is damaged or foreign ({why}). Remove it to start anew.") from None
        found = state.get("identity") if isinstance(state, dict) else type(state).__name__
        if not isinstance(state, dict) or not isinstance(found, str) or found != self.identity:
            words = " ".join(found.split())[:1000] if isinstance(found, str) else shown(found)
            raise FileFormatError(
                f"{path} belongs to another run ({words}); this one is ({self.identity}). Use another folder."
            )
        try:
            return {**state, "history": _checked_history(state)}
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is damaged or foreign ({error}). Remove it to start anew.") from None


def _checked_history(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of the epochs done, once everything in a checkpoint is of its own type and agrees with them."""
    kinds = {"phase": int, "epochs": int, "history": str}
    for key, kind in kinds.items():
        if type(state[key]) is not kind:
            raise TypeError(f"its {key} is {shown(state[key])}")
    for key in ("sdn", "optimizer"):
        if not isinstance(state[key], dict):
            raise TypeError(f"its {key} is a {type(state[key]).__name__}")
    history = parse_json(state["history"])
    if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
        raise TypeError("its history is no list of records")
    for precision in (record["precision"] for record in history if "precision" in record):
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"its history names a precision {shown(precision)}")
    done = [record.get("phase") for record in history]
    if not done or done[-1] != state["phase"] or done.count(state["phase"]) != state["epochs"]:
        raise ValueError(f"its history ends before epoch {state['epochs']} of phase {state['phase']}, or after it")
    return history


def _fits(optimizer: optim.Optimizer, state: Any) -> bool:
    """Whether what a file keeps for each weight is what this optimiser keeps after a step."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    like = nn.Parameter(torch.zeros(2, device=weights[0].device))
    like.grad = torch.zeros_like(like)
    settings = inspect.signature(type(optimizer)).parameters  # AdamW has a default that it does not take
    stepped = type(optimizer)([like], **{key: v for key, v in optimizer.defaults.items() if key in settings})
    stepped.step()
    kept = stepped.state[like]
    return isinstance(state, dict) and all(
        type(number) is int
        and 0 <= number < len(weights)
        and isinstance(found, dict)
        and not misfits({key: weights[number] if value.ndim else value for key, value in kept.items()}, found)
        for number, found in state.items()
    )
