"""What a frozen backbone shows its exits, recorded once: exits then train without running it again."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from shallowdeep.data.pytrees import map_tensors
from shallowdeep.data.samples import Augmentation, IndexedSamples, Samples, Splits
from shallowdeep.data.tensors import TensorSet
from shallowdeep.errors import ConfigError
from shallowdeep.networks.exits import ReducingHead
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.taps import tapped
from shallowdeep.processes import shard
from shallowdeep.progress import track
from shallowdeep.storage import making
from shallowdeep.training.columns import MANIFEST, read_columns, write_columns
from shallowdeep.training.strategies import Strategy

BATCH = 500  # samples in a forward of the recording


class FeatureReuse(BaseModel):
    """How often, and where to, a frozen backbone's features are recorded instead of computed in every epoch.

    Args:
        passes: over the training data, each with crops and flips of its own; epochs take turns among them. One is
            enough where nothing is augmented. 0: the backbone runs in every epoch.
        folder: where they lie and stay, for other runs on the same backbone and data, of the same precision and (where
            there is augmentation) seed; ``None``: beside the run's checkpoint, or in the system's folder for temporary
            files, until the phase is trained. A stream has no use for one.
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
        seeded = data.augment not in (None, Augmentation())
        key = self._key(data.train)
        passes = tuple(
            self._part(f"train-{i}", data.train, data.augment, self.seed + i if seeded else None, key)
            for i in range(self.reuse.passes)
        )
        val = None if data.val is None else self._part("val", data.val, None, None, self._key(data.val))
        return Features(passes, val)

    def _part(
        self, name: str, samples: Samples, augment: Augmentation | None, seed: int | None, key: Mapping[str, Any]
    ) -> TensorSet:
        folder = self.place / name
        about = {**key, "augment": str(augment), "seed": seed}
        self.place.mkdir(parents=True, exist_ok=True)
        with FileLock(self.place / f"{name}.lock"):  # another run may be at the same features
            if not (folder / MANIFEST).exists():
                batches = self._batches(name, samples, augment, seed)
                with making(folder) as partial:
                    write_columns(partial, batches, kept_in=self.reuse.kept_in, num_rows=_size_of(samples), about=about)
        found, kept = read_columns(folder)
        others = [key for key in about if not _alike(about[key], kept.get(key))]
        if others:
            raise ConfigError(
                f"{folder} holds features of another run ({', '.join(others)} differ). "
                "Name another folder (features.folder), or remove it."
            )
        return TensorSet(
            tuple(found[f"exit{i}"] for i in range(self.sdn.num_exits)),
            found.get("labels"),
            found["ids"],
            num_classes=samples.num_classes,
            name=samples.name,
            split=samples.split or "train",
        )

    def _key(self, samples: Samples) -> dict[str, Any]:
        """What features depend on: weights, samples, and what becomes of some samples as the network gets them."""
        key: dict[str, Any] = {
            "backbone": _weights_md5(self.sdn),
            "taps": list(self.sdn.taps),
            "data": samples.name,
            "dtype": self.reuse.dtype,
            **self.settings,
        }
        if not isinstance(samples, IndexedSamples):  # a stream may give others when it is opened again
            return {**key, "samples": _size_of(samples)}
        inputs = samples.example_inputs
        digest = hashlib.md5(usedforsecurity=False)
        map_tensors(lambda t: digest.update(_bytes(t)) or t, inputs)
        seen = self._seen(inputs)
        return {
            **key,
            "samples": samples.md5(),
            "inputs": digest.hexdigest(),  # normalised or prepared otherwise, the same pixels are other inputs
            "features": [seen[f"exit{i}"].double().abs().mean().item() for i in range(self.sdn.num_exits)],
        }

    def _batches(
        self, name: str, samples: Samples, augment: Augmentation | None, seed: int | None
    ) -> Iterator[dict[str, Tensor | None]]:
        batches = samples.batches(BATCH, augment=augment, seed=seed, channels_last=self.channels_last)
        for batch in track(batches, samples.num_batches(BATCH), f"features {name}", shown=self.progress):
            yield {**self._seen(batch.inputs), "labels": batch.labels, "ids": batch.ids}

    def _seen(self, inputs: Any) -> dict[str, Tensor]:
        sdn, device = self.sdn, next(self.sdn.parameters()).device
        with torch.no_grad(), tapped(sdn.backbone, sdn.taps) as features:
            last = sdn.run_backbone(map_tensors(lambda t: t.to(device), inputs))
            seen = [_reduced(head, features.pop(tap)) for head, tap in zip(sdn.exits, sdn.taps, strict=True)]
        return {f"exit{i}": x for i, x in enumerate([*seen, last])}


def check_reuse(reuse: FeatureReuse, phases: Strategy, train: Samples) -> None:
    """Raise a ConfigError where features would change, could not be told from others, or several processes record."""
    if reuse.passes and not any(phase.trains == "exits" for phase in phases):
        trained = ", ".join(f"'{phase.trains}'" for phase in phases)
        raise ConfigError(
            f"features.passes={reuse.passes} is for a frozen backbone, and this trains {trained}. "
            "Leave it out, or train with strategy='ic_only' or 'distil'."
        )
    if reuse.passes and reuse.folder and not isinstance(train, IndexedSamples):
        raise ConfigError(
            f"features.folder is for samples that can be told apart, and {train.name} is a stream. Leave it out."
        )
    if reuse.passes and (shard()[1] > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise ConfigError("recorded features are for one process. Leave features.passes out, or start one process.")


@contextmanager
def features_folder(reuse: FeatureReuse, run: Path | None, *, resume: bool) -> Iterator[Path]:
    """Where features lie while a phase trains: they stay in a folder of their own, and go from any other."""
    if reuse.folder is not None:
        yield Path(reuse.folder).expanduser()
    elif run is None:
        with tempfile.TemporaryDirectory(prefix="shallowdeep-features-") as made:
            yield Path(made)
    else:
        if not resume:
            drop_features(run)  # of a run that was begun and not gone on with
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
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _size_of(samples: Samples) -> int | None:
    try:
        return len(samples)
    except (TypeError, ConfigError):  # a stream may not know
        return None


def _alike(asked: Any, kept: Any) -> bool:
    """Equal; of features, near: a CPU's sums depend on the number of threads."""
    if (
        isinstance(asked, list)
        and isinstance(kept, list)
        and len(asked) == len(kept)
        and asked
        and isinstance(asked[0], float)
    ):
        return all(abs(a - b) <= 1e-3 * abs(a) + 1e-6 for a, b in zip(asked, kept, strict=True))
    return asked == kept
