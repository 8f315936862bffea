"""The training loop: one, visible, resumable."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shallowdeep.data.samples import Samples, Splits
from shallowdeep.data.streams import Stream, as_splits
from shallowdeep.errors import ConfigError, DataError, NetworkError
from shallowdeep.networks.compiler import check_compiler
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.processes import is_first
from shallowdeep.progress import Bar, bar
from shallowdeep.training.checkpoint import Checkpoint
from shallowdeep.training.epochs import Epochs, LastExit, diverged, not_finite
from shallowdeep.training.features import (
    ExitsAlone,
    FeatureReuse,
    Recorder,
    check_reuse,
    drop_features,
    features_folder,
)
from shallowdeep.training.place import Place
from shallowdeep.training.prepared import frozen_for, laid_out_for, quick_in_bf16, trained_by
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import Phase, RecipeFor, Strategy, named_strategy, with_epochs

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def fit(
    sdn: ShallowDeepNetwork,
    data: Splits | Samples | Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    strategy: str | Strategy = "joint",
    recipe: str | Recipe | RecipeFor = "fast",
    epochs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    devices: int | None = None,
    num_nodes: int = 1,
    folder: str | Path | None = None,
    resume: bool = False,
    validate_every: int = 1,
    features: FeatureReuse | None = None,
    compile: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train a Shallow-Deep Network, in place.

    Every epoch draws its order, crops, flips and dropout from ``seed`` and its own number, so that a run
    resumed from an epoch's checkpoint ends at the same weights, on a CPU bit for bit at the same number
    of threads. Where a recipe leaves the precision to the device, a run keeps the one it was begun in, wherever it is
    gone on with. The process's own random state is left as it was.

    Args:
        sdn: trained in place, and left on the device it was trained on, in evaluation mode; what was frozen
            before is so again.
        data: its training split is shuffled and augmented; its validation split, where there is one, is only
            looked at. Any iterable of batches ``(inputs, labels)``, such as a ``DataLoader``, is streamed as it is:
            its own order, batch size and transforms; without labels where the strategy needs none.
        strategy: a name (``plain``, ``ic_only``, ``joint``, ``mixed``, ``distil``) or a tuple of phases.
        recipe: of a strategy by name: a name (``paper``, ``fast``), a recipe, or a function from what a phase
            trains to one. A tuple of phases brings its own.
        epochs: length of each phase, instead of the recipe's own.
        seed: of everything random in training; initial weights are the caller's.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or another accelerator that Fabric knows.
        devices: processes on each machine, one a device; ``None``: as many as ``torchrun`` started, else one.
            A batch is shared out among all processes; batch-norm takes its statistics from each one's share.
        num_nodes: machines.
        folder: for ``checkpoint.pt`` and ``history.jsonl`` after every epoch; ``None``: keep nothing.
        resume: go on from the folder's checkpoint, if there is one.
        validate_every: epochs between two looks at the validation split; 0: never.
        features: for phases that train the exits of a frozen backbone: record what they see once, or a few times,
            instead of running the backbone in every epoch.
        compile: let PyTorch's compiler make the training step's network, its exits inside. It takes a minute or more
            at the start, and pays on a GPU; its sums are not those of the network as it is.
        progress: draw a bar on the terminal.

    Returns:
        One record per epoch: ``phase`` (from 0), ``trains``, ``precision`` (``"fp32"``, ``"bf16"``: that of the
        arithmetic), ``epoch`` (from 1), ``loss``, ``lr`` at its start, ``train_accuracy`` per exit, ``seconds`` of
        training, and, in epochs that look at the
        validation split, ``val_accuracy`` per exit. A phase that trains the backbone has one exit. Without
        labels it is ``train_agreement`` and ``val_agreement``: with the last exit's answer. Where features were
        recorded first, an epoch's record has ``features_seconds``.

    Raises:
        TrainingDiverged: the loss or a weight is no longer a number; the last good checkpoint is kept.
        ConfigError: a batch is more than the training split or cannot be shared out among the processes, or a
            phase has nothing to train; features are to be recorded where no phase freezes the backbone, or by
            several processes; there is no compiler.
        DataError: there are no samples, or no labels where the strategy needs them.
        NetworkError: it is no Shallow-Deep Network, or it has fewer outputs than the data has classes, or several
            label sets.
        FileFormatError: the checkpoint is damaged, or of another run.
    """
    if not isinstance(sdn, ShallowDeepNetwork):
        raise NetworkError(
            f"fit trains a Shallow-Deep Network, got {type(sdn).__name__}: attach(net, inputs) makes one."
        )
    phases = (
        tuple(replace(phase, recipe=with_epochs(phase.recipe, epochs)) for phase in strategy)
        if isinstance(strategy, tuple)
        else named_strategy(strategy, sdn, recipe, epochs=epochs)
    )
    splits = _knowing_classes(as_splits(data), sdn.num_outputs)
    _check(sdn, splits, phases)
    features = features or FeatureReuse()
    check_reuse(features, phases, splits.train)
    kept_in = None if folder is None else Path(folder)
    checkpoint = Checkpoint(kept_in, _identity(splits, seed, phases, features), sdn.taps)
    if is_first():
        checkpoint.sweep()
    run = _Run(
        sdn, splits, seed, Place(device, devices, num_nodes), checkpoint, validate_every, features, compile, progress
    )
    if resume:
        run.history = checkpoint.read_history()
    with torch.random.fork_rng():
        for number, phase in enumerate(phases):
            run.frozen = run.frozen and phase.trains == "exits"
            run.train_phase(number, phase, resume=resume)
    return run.history


def _knowing_classes(data: Splits, num_outputs: int) -> Splits:
    """Streams that do not know how many labels there are get to know how many there can be, and say which is none."""
    known = {
        name: part.with_classes(num_outputs)
        for name in ("train", "val")
        if isinstance(part := getattr(data, name), Stream) and not part.num_classes
    }
    return replace(data, **known)


def _check(sdn: ShallowDeepNetwork, data: Splits, phases: Strategy) -> None:
    if not data.train.num_batches(1):
        raise DataError("there are no samples to train on.")
    if sdn.num_outputs < data.num_classes:
        raise NetworkError(
            f"the network has {sdn.num_outputs} outputs, the data {data.num_classes} classes. "
            f"Build it with num_classes={data.num_classes}."
        )
    if len(sdn.label_spaces) > 1:
        raise NetworkError(
            f"this network answers in the label sets {', '.join(sdn.label_spaces)}; fit trains and counts one. "
            "Train it in a loop of your own."
        )
    for phase in phases:
        _check_batch(data.train, phase)


def _check_batch(samples: Samples, phase: Phase) -> None:
    if samples.num_batches(phase.recipe.batch_size, drop_last=True) == 0:
        raise ConfigError(
            f"a batch of {phase.recipe.batch_size} is more than the {len(samples)} samples to train on. "
            "Lower the batch size (recipe.batch_size)."
        )


def _identity(data: Splits, seed: int, phases: Strategy, features: FeatureReuse) -> str:
    """What run this is, in words; an objective that is a bare function has its address in them."""
    try:
        size = str(len(data.train))
    except (TypeError, ConfigError):  # a stream may not know
        size = f"{data.train.num_batches(1)} batches"
    reused = f", {features.passes} recorded passes in {features.dtype}" if features.passes else ""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{data.name} of {size}, seed {seed}, {phases}{reused}")


@dataclass
class _Run:
    """What all phases of one ``fit`` share."""

    sdn: ShallowDeepNetwork
    data: Splits
    seed: int
    place: Place
    checkpoint: Checkpoint
    validate_every: int
    features: FeatureReuse
    compile: bool
    progress: bool
    history: list[dict[str, Any]] = field(default_factory=list)
    frozen: bool = True  # the backbone, in all phases so far

    def train_phase(self, number: int, phase: Phase, *, resume: bool) -> None:
        phase = self._in_its_precision(phase)
        recipe = phase.recipe
        fabric = self.place.fabric(phase)
        self.sdn.to(device=fabric.device)
        with laid_out_for(self.sdn, recipe), frozen_for(self.sdn, phase), ExitStack() as keeping:
            keeping.enter_context(quick_in_bf16(self.sdn, phase, fabric.device, recipe.precision))
            optimizer = recipe.build_optimizer(trained_by(self.sdn, phase))
            untouched = [name for name in self.sdn.state_dict() if self.frozen and not name.startswith("exits.")]
            first = self.checkpoint.load(self.sdn, optimizer, number, frozen=untouched) if resume else 0
            if first >= recipe.epochs:
                drop_features(self.checkpoint.folder)  # killed before it came to that
                return
            epochs = keeping.enter_context(self._set_up(fabric, phase, optimizer, number, resume))
            odd = not_finite(self.sdn)  # a causal mask holds infinities
            total = recipe.epochs * epochs.steps
            with bar(
                f"train {phase.trains}", total, done=first * epochs.steps, shown=self.progress and is_first()
            ) as line:
                for epoch in range(first, recipe.epochs):
                    recording = {"features_seconds": epochs.seconds} if epochs.seconds and epoch == first else {}
                    self.history.append({"phase": number, **self._epoch(epochs, number, epoch, line, odd), **recording})
                    if is_first():
                        self.checkpoint.save(self.sdn, optimizer, number, epoch + 1, self.history)
                    fabric.barrier()  # nobody reads, or ends, before it is written

    def _in_its_precision(self, phase: Phase) -> Phase:
        """The phase in the precision that the run was begun in, or has here where it begins."""
        begun = next((record["precision"] for record in self.history if "precision" in record), None)
        kept = begun if phase.recipe.precision == "auto" else None
        precision = kept or self.place.precision(phase.recipe)
        return replace(phase, recipe=phase.recipe.model_copy(update={"precision": precision}))

    @contextmanager
    def _set_up(
        self, fabric: Fabric, phase: Phase, optimizer: torch.optim.Optimizer, number: int, resume: bool
    ) -> Iterator[Epochs]:
        data = self.data.to(fabric.device)
        if phase.trains != "exits" or not self.features.passes:
            network = LastExit(self.sdn) if phase.trains == "backbone" else self.sdn
            # the hooks stay on through the phase: a compiled network knows those alone that it was compiled with
            with self.sdn.tapped() if network is self.sdn else nullcontext():
                model, wrapped = fabric.setup(self._compiled(network, fabric.device), optimizer)
                yield Epochs(self.sdn, phase, fabric, network, model, wrapped, (data.train,), data.val, data.augment)
            return
        started = time.perf_counter()
        with features_folder(self.features, self.checkpoint.folder, resume=resume) as folder:
            recorder = Recorder(
                self.sdn,
                self.features,
                folder,
                seed=_epoch_seed(self.seed, number, 0),
                channels_last=phase.recipe.channels_last,
                settings={"precision": phase.recipe.precision},
                progress=self.progress,
            )
            self.sdn.eval()
            with fabric.autocast():
                found = recorder.record(data)
            _check_batch(found.passes[0], phase)  # a stream's batches were its own
            network, val = ExitsAlone(self.sdn), None if found.val is None else found.val.to(fabric.device)
            model, wrapped = fabric.setup(self._compiled(network, fabric.device), optimizer)
            seconds = time.perf_counter() - started
            yield Epochs(self.sdn, phase, fabric, network, model, wrapped, found.passes, val, None, seconds)

    def _compiled(self, network: nn.Module, device: torch.device) -> Any:
        if not self.compile:
            return network
        check_compiler(device, "compile=True", "leave compile out")
        return torch.compile(network)

    def _epoch(self, epochs: Epochs, number: int, epoch: int, line: Bar, odd: list[str]) -> dict[str, Any]:
        started = time.perf_counter()
        record = epochs.train(epoch, _epoch_seed(self.seed, number, epoch), line)
        told = {"trains": epochs.phase.trains, "precision": epochs.phase.recipe.precision}
        record = {**told, **record, "seconds": time.perf_counter() - started}
        spoilt = [name for name in not_finite(self.sdn) if name not in odd]
        if spoilt:  # the last step can spoil weights that no loss has seen yet
            raise diverged(f"'{spoilt[0]}' is no longer finite", epoch)
        if self.validate_every and (epoch + 1) % self.validate_every == 0:
            record |= epochs.validate()
        return record


def _epoch_seed(seed: int, phase: int, epoch: int) -> int:
    return ((seed * 1_000_003 + phase) * 1_000_003 + epoch) % 2**64  # as many bits as PyTorch takes
