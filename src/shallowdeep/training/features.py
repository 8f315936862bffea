"""What a frozen backbone shows its exits, recorded once: exits then train without running it again."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from shallowdeep.data.pytrees import map_tensors
from shallowdeep.data.samples import Augmentation, Batch, IndexedSamples, Samples, Splits
from shallowdeep.data.tensors import TensorSet
from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.networks.exits import ReducingHead
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import tapped
from shallowdeep.processes import shard
from shallowdeep.progress import track
from shallowdeep.storage import making, read_as, read_json, write_json
from shallowdeep.training.strategies import Strategy

MANIFEST = "manifest.json"
BATCH = 500  # samples in a forward of the recording


class FeatureReuse(BaseModel):
    """How often, and where to, a frozen backbone's features are recorded instead of computed in every epoch.

    Args:
        passes: over the training data, each with crops and flips of its own; epochs take turns among them. One is
            enough where nothing is augmented. 0: the backbone runs in every epoch.
        folder: where they lie and stay, for other runs on the same backbone and data; ``None``: beside the run's
            checkpoint, or in the system's folder for temporary files, until the phase is trained.
        dtype: what they are kept in. A half takes half the room and rounds them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: int = Field(default=0, ge=0)
    folder: str | None = None
    dtype: Literal["fp32", "fp16"] = "fp32"

    @property
    def kept_in(self) -> torch.dtype:
        """``dtype`` as PyTorch's."""
        return torch.float32 if self.dtype == "fp32" else torch.float16


class ExitsAlone(nn.Module):
    """The internal exits of a network over what was recorded of its backbone.

    - input: a tuple, for each internal exit what its head sees, then the last exit's logits
    - output: logits of every exit, the last being what came in
    """

    def __init__(self, sdn: ShallowDeepNetwork):
        super().__init__()
        self.exits = sdn.exits

    def forward(self, recorded: tuple[Tensor, ...]) -> list[Tensor]:
        """Logits of every exit."""
        *seen, last = (x.float() for x in recorded)
        return [*(_from_reduced(head, x) for head, x in zip(self.exits, seen, strict=True)), last]


@dataclass(frozen=True)
class Features:
    """What a frozen backbone showed: of the training data once per pass, of the validation data once."""

    passes: tuple[TensorSet, ...]
    val: TensorSet | None


@dataclass(frozen=True)
class Recorder:
    """Runs a frozen network over data, and keeps what its exits see, in memory-mapped files.

    Args:
        sdn: frozen, in the memory format and on the device it shall run.
        reuse: passes and type.
        place: the folder for the files.
        seed: of the passes' crops and flips.
        channels_last: give image inputs in that memory format.
        settings: what else decides the figures, such as the precision.
        progress: draw bars on the terminal.
    """

    sdn: ShallowDeepNetwork
    reuse: FeatureReuse
    place: Path
    seed: int
    channels_last: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True

    def record(self, data: Splits) -> Features:
        """Record what is not there yet, and open all of it.

        Raises:
            ConfigError: the folder holds features of another network, other data or other settings.
            FileFormatError: they are damaged.
        """
        weights = _weights_md5(self.sdn)
        seeded = data.augment not in (None, Augmentation())
        passes = tuple(
            self._part(f"train-{i}", data.train, data.augment, self.seed + i if seeded else None, weights)
            for i in range(self.reuse.passes)
        )
        return Features(passes, None if data.val is None else self._part("val", data.val, None, None, weights))

    def _part(
        self, name: str, samples: Samples, augment: Augmentation | None, seed: int | None, weights: str
    ) -> TensorSet:
        folder = self.place / name
        key = {
            "backbone": weights,
            "taps": list(self.sdn.taps),
            "heads": [type(head).__name__ for head in self.sdn.exits],
            "data": samples.name,
            "samples": samples.md5() if isinstance(samples, IndexedSamples) else len(samples),
            "augment": str(augment),
            "seed": seed,
            "dtype": self.reuse.dtype,
            **self.settings,
        }
        if not (folder / MANIFEST).exists():
            self.place.mkdir(parents=True, exist_ok=True)
            with making(folder) as partial:
                _write(partial, key, self._batches(name, samples, augment, seed), self.reuse.kept_in)
        found = _read(folder, key)
        columns = [found[f"exit{i}"] for i in range(self.sdn.num_exits)]
        return TensorSet(
            tuple(columns),
            found.get("labels"),
            found["ids"],
            num_classes=samples.num_classes,
            name=samples.name,
            split=samples.split or "train",
        )

    def _batches(
        self, name: str, samples: Samples, augment: Augmentation | None, seed: int | None
    ) -> Iterator[dict[str, Tensor | None]]:
        batches = samples.batches(BATCH, augment=augment, seed=seed, channels_last=self.channels_last)
        device = next(self.sdn.parameters()).device
        for batch in track(batches, samples.num_batches(BATCH), f"features {name}", shown=self.progress):
            yield self._seen(batch, device)

    def _seen(self, batch: Batch, device: torch.device) -> dict[str, Tensor | None]:
        sdn = self.sdn
        with torch.no_grad(), tapped(sdn.backbone, sdn.taps) as features:
            last = sdn.run_backbone(map_tensors(lambda t: t.to(device), batch.inputs))
            seen = [_reduced(head, features.pop(tap)) for head, tap in zip(sdn.exits, sdn.taps, strict=True)]
        named = {f"exit{i}": x for i, x in enumerate([*seen, last])}
        return {**named, "labels": batch.labels, "ids": batch.ids}


def check_reuse(reuse: FeatureReuse, phases: Strategy) -> None:
    """Raise a ConfigError where features are to be recorded that would change, or by several processes."""
    if reuse.passes and not any(phase.trains == "exits" for phase in phases):
        trained = ", ".join(f"'{phase.trains}'" for phase in phases)
        raise ConfigError(
            f"features.passes={reuse.passes} is for a frozen backbone, and this trains {trained}. "
            "Leave it out, or train with strategy='ic_only' or 'distil'."
        )
    if reuse.passes and (shard()[1] > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise ConfigError("recorded features are for one process. Leave features.passes out, or start one process.")


@contextmanager
def features_folder(reuse: FeatureReuse, run: Path | None) -> Iterator[Path]:
    """Where features lie while a phase trains: they stay in a folder of their own, and go from any other."""
    if reuse.folder is not None:
        yield Path(reuse.folder).expanduser()
    elif run is None:
        with tempfile.TemporaryDirectory(prefix="shallowdeep-features-") as made:
            yield Path(made)
    else:
        yield run / "features"
        drop_features(run)  # an error leaves them, so that the run can go on


def drop_features(run: Path | None) -> None:
    """Remove a run's own features, if there are any."""
    if run is not None:
        shutil.rmtree(run / "features", ignore_errors=True)


def _reduced(head: nn.Module, features: Tensor) -> Tensor:
    return head.reduced(features) if isinstance(head, ReducingHead) else features


def _from_reduced(head: nn.Module, seen: Tensor) -> Tensor:
    return head.from_reduced(seen) if isinstance(head, ReducingHead) else head(seen)


def _weights_md5(sdn: ShallowDeepNetwork) -> str:
    """Fingerprint of everything in front of the last exit's logits."""
    digest = hashlib.md5(usedforsecurity=False)
    for name, tensor in sdn.state_dict().items():
        if not name.startswith("exits.") and isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Column:
    """One file: numbers of one type, rows first."""

    dtype: Literal["float32", "float16", "int64"]
    shape: tuple[int, ...]  # of a row

    def open(self, path: Path, rows: int) -> Tensor:
        """The file's numbers, read as they are asked for."""
        dtype, numbers = getattr(torch, self.dtype), rows * math.prod(self.shape)
        if path.stat().st_size != numbers * dtype.itemsize:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {numbers * dtype.itemsize}")
        return torch.from_file(str(path), size=numbers, dtype=dtype).view(rows, *self.shape)


def _write(
    folder: Path, key: Mapping[str, Any], batches: Iterator[dict[str, Tensor | None]], kept_in: torch.dtype
) -> None:
    """One file per column, batch after batch, and last of all what they are."""
    columns: dict[str, _Column] = {}
    rows = 0
    with ExitStack() as files:
        opened: dict[str, Any] = {}
        for batch in batches:
            rows += len(batch["ids"])  # type: ignore[arg-type]
            for name, tensor in batch.items():
                if tensor is None:
                    continue
                kept = tensor.cpu().to(kept_in if tensor.is_floating_point() else torch.int64).contiguous()
                if tensor.is_floating_point() and not kept.isfinite().all():
                    raise ConfigError(
                        f"features of {name} are not finite in {kept.dtype}. Keep them in fp32, or look at the network."
                    )
                if name not in opened:
                    opened[name] = files.enter_context((folder / f"{name}.bin").open("wb"))
                    columns[name] = _Column(str(kept.dtype).removeprefix("torch."), tuple(kept.shape[1:]))  # type: ignore[arg-type]
                opened[name].write(kept.numpy().data)
    described = {name: {"dtype": column.dtype, "shape": column.shape} for name, column in columns.items()}
    write_json(folder / MANIFEST, {"key": key, "rows": rows, "columns": described})


def _read(folder: Path, key: Mapping[str, Any]) -> dict[str, Tensor]:
    values = read_json(folder / MANIFEST)
    try:
        columns, rows = read_as(dict[str, _Column], values["columns"]), read_as(int, values["rows"])
        tensors = {name: column.open(folder / f"{name}.bin", rows) for name, column in columns.items()}
        others = [name for name in key if values["key"].get(name) != key[name]]
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise FileFormatError(f"{folder} is damaged ({error}). Remove it, and it is recorded anew.") from None
    if others:
        raise ConfigError(
            f"{folder} holds features of another run ({', '.join(others)} differ). Name another folder, or remove it."
        )
    return tensors
