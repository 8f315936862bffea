"""The training loop: one, visible, resumable."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shallowdeep.data.samples import Augmentation, Batch, Samples, Splits
from shallowdeep.data.streams import Stream, as_splits
from shallowdeep.errors import ConfigError, DataError, NetworkError, TrainingDiverged
from shallowdeep.networks.compiler import check_compiler
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.processes import is_first, make_fabric, shard
from shallowdeep.progress import Bar, bar
from shallowdeep.training.checkpoint import Checkpoint
from shallowdeep.training.features import (
    ExitsAlone,
    FeatureReuse,
    Recorder,
    check_reuse,
    drop_features,
    features_folder,
)
from shallowdeep.training.prepared import frozen_for, laid_out_for, trained_by
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import Phase, RecipeFor, Strategy, named_strategy, with_epochs
from shallowdeep.training.tally import Tally

if TYPE_CHECKING:
    from lightning_fabric import Fabric

REPORT_EVERY = 20  # batches between two looks at the loss: each waits for the device


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
    of threads. The process's own random state is left as it was.

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
        One record per epoch: ``phase`` (from 0), ``trains``, ``epoch`` (from 1), ``loss``, ``lr`` at its
        start, ``train_accuracy`` per exit, ``seconds`` of training, and, in epochs that look at the
        validation split, ``val_accuracy`` per exit. A phase that trains the backbone has one exit. Without
        labels it is ``train_agreement`` and ``val_agreement``: with the last exit's answer. Where features were
        recorded first, an epoch's record has ``features_seconds``.

    Raises:
        TrainingDiverged: the loss or a weight is no longer a number; the last good checkpoint is kept.
        ConfigError: a batch is more than the training split or cannot be shared out among the processes, or a
            phase has nothing to train; features are to be recorded where no phase freezes the backbone, or by
            several processes; there is no compiler.
        DataError: the strategy needs labels, and the data has none.
        NetworkError: the network has fewer outputs than the data has classes, or several label sets.
        FileFormatError: the checkpoint is damaged, or of another run.
    """
    phases = (
        tuple(replace(phase, recipe=with_epochs(phase.recipe, epochs)) for phase in strategy)
        if isinstance(strategy, tuple)
        else named_strategy(strategy, sdn, recipe, epochs=epochs)
    )
    splits = _knowing_classes(as_splits(data), sdn.num_outputs)
    _check(sdn, splits, phases)
    features = features or FeatureReuse()
    check_reuse(features, phases, splits.train)
    checkpoint = Checkpoint(None if folder is None else Path(folder), _identity(splits, seed, phases, features))
    if is_first():
        checkpoint.sweep()
    place = _Place(device, devices, num_nodes)
    run = _Run(sdn, splits, seed, place, checkpoint, validate_every, features, compile, progress)
    if resume:
        run.history = checkpoint.read_history()
    with torch.random.fork_rng():
        for number, phase in enumerate(phases):
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
        if data.train.num_batches(phase.recipe.batch_size, drop_last=True) == 0:
            raise ConfigError(
                f"a batch of {phase.recipe.batch_size} is more than the {len(data.train)} samples to train on. "
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


@dataclass(frozen=True)
class _Place:
    """Where a run happens, in Fabric's words."""

    device: str
    devices: int | None
    num_nodes: int


@dataclass
class _Run:
    """What all phases of one ``fit`` share."""

    sdn: ShallowDeepNetwork
    data: Splits
    seed: int
    place: _Place
    checkpoint: Checkpoint
    validate_every: int
    features: FeatureReuse
    compile: bool
    progress: bool
    history: list[dict[str, Any]] = field(default_factory=list)

    def train_phase(self, number: int, phase: Phase, *, resume: bool) -> None:
        recipe = phase.recipe
        fabric = _fabric(phase, self.place)
        self.sdn.to(device=fabric.device)
        with laid_out_for(self.sdn, recipe), frozen_for(self.sdn, phase), ExitStack() as keeping:
            optimizer = recipe.build_optimizer(trained_by(self.sdn, phase))
            first = self.checkpoint.load(self.sdn, optimizer, number) if resume else 0
            if first >= recipe.epochs:
                drop_features(self.checkpoint.folder)  # killed before it came to that
                return
            stage = keeping.enter_context(self._set_up(fabric, phase, optimizer, number, resume))
            odd = _not_finite(self.sdn)  # a causal mask holds infinities
            total = recipe.epochs * stage.steps
            with bar(
                f"train {phase.trains}", total, done=first * stage.steps, shown=self.progress and is_first()
            ) as line:
                for epoch in range(first, recipe.epochs):
                    recording = {"features_seconds": stage.seconds} if stage.seconds and epoch == first else {}
                    self.history.append({"phase": number, **self._epoch(stage, number, epoch, line, odd), **recording})
                    if is_first():
                        self.checkpoint.save(self.sdn, optimizer, number, epoch + 1, self.history)
                    fabric.barrier()  # nobody reads, or ends, before it is written

    @contextmanager
    def _set_up(
        self, fabric: Fabric, phase: Phase, optimizer: torch.optim.Optimizer, number: int, resume: bool
    ) -> Iterator[_Stage]:
        data = self.data.to(fabric.device)
        if phase.trains != "exits" or not self.features.passes:
            network = LastExit(self.sdn) if phase.trains == "backbone" else self.sdn
            # the hooks stay on through the phase: a compiled network knows those alone that it was compiled with
            with self.sdn.tapped() if network is self.sdn else nullcontext():
                model, wrapped = fabric.setup(self._compiled(network, fabric.device), optimizer)
                yield _Stage(self.sdn, phase, fabric, network, model, wrapped, (data.train,), data.val, data.augment)
            return
        started = time.perf_counter()
        with features_folder(self.features, self.checkpoint.folder, resume=resume) as folder:
            recorder = Recorder(
                self.sdn,
                self.features,
                folder,
                seed=_epoch_seed(self.seed, number, 0),
                channels_last=phase.recipe.channels_last,
                settings={"precision": _precision(phase.recipe, self.place.device)},
                progress=self.progress,
            )
            self.sdn.eval()
            with fabric.autocast():
                found = recorder.record(data)
            network, val = ExitsAlone(self.sdn), None if found.val is None else found.val.to(fabric.device)
            model, wrapped = fabric.setup(self._compiled(network, fabric.device), optimizer)
            seconds = time.perf_counter() - started
            yield _Stage(self.sdn, phase, fabric, network, model, wrapped, found.passes, val, None, seconds)

    def _compiled(self, network: nn.Module, device: torch.device) -> Any:
        if not self.compile:
            return network
        check_compiler(device, "compile=True", "leave compile out")
        return torch.compile(network)

    def _epoch(self, stage: _Stage, number: int, epoch: int, line: Bar, odd: list[str]) -> dict[str, Any]:
        started = time.perf_counter()
        record = _train_epoch(stage, epoch, _epoch_seed(self.seed, number, epoch), line)
        record = {"trains": stage.phase.trains, **record, "seconds": time.perf_counter() - started}
        spoilt = [name for name in _not_finite(self.sdn) if name not in odd]
        if spoilt:  # the last step can spoil weights that no loss has seen yet
            raise _diverged(f"'{spoilt[0]}' is no longer finite", epoch)
        if stage.val is not None and self.validate_every and (epoch + 1) % self.validate_every == 0:
            record |= _validate(stage, stage.val)
        return record


@dataclass(frozen=True)
class _Stage:
    """One phase, set up on its device."""

    sdn: ShallowDeepNetwork
    phase: Phase
    fabric: Fabric
    network: nn.Module
    model: Any
    optimizer: Any
    passes: tuple[Samples, ...]  # epochs take turns among them
    val: Samples | None
    augment: Augmentation | None
    seconds: float = 0.0  # that recording features took

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.passes[0].num_batches(self.phase.recipe.batch_size, drop_last=True)

    def train(self, epoch: int) -> Samples:
        """What an epoch learns from, on the device."""
        return self.passes[epoch % len(self.passes)].to(self.fabric.device)


class LastExit(nn.Module):
    """The backbone seen as a network with one exit: no hooks, and no internal exit is run."""

    def __init__(self, sdn: ShallowDeepNetwork):
        super().__init__()
        self.sdn = sdn

    def forward(self, x: Any) -> list[Tensor]:
        """The last exit's logits, alone in a list."""
        return [self.sdn.run_backbone(x)]


def _train_epoch(stage: _Stage, epoch: int, seed: int, line: Bar) -> dict[str, Any]:
    recipe, steps, own = stage.phase.recipe, stage.steps, shard()
    tally, totalled = Tally(stage.fabric.device), 0
    loss, shares = 0.0, []
    torch.manual_seed(seed)
    stage.model.train()
    batches = stage.train(epoch).batches(
        recipe.batch_size,
        augment=stage.augment,
        seed=seed,
        drop_last=True,
        channels_last=recipe.channels_last,
        shard=own,
    )
    for step, batch in enumerate(batches):
        if step == 0 and own[0]:
            torch.manual_seed(seed + own[0])  # after the order was drawn: dropout differs between processes
        tally.add(batch, *_train_batch(stage, batch, (epoch + step / steps) / recipe.epochs))
        line.advance()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            totalled, (loss, shares) = step + 1, tally.total(stage.fabric)
            _check_finite(loss, epoch)
            words = " ".join(f"{100 * share:.0f}" for share in shares)
            line.say(f"epoch {epoch + 1}/{recipe.epochs}  loss {loss:.3f}  {tally.name} {words}")
    if tally.num_batches > totalled:  # fewer batches than announced
        loss, shares = tally.total(stage.fabric)
        _check_finite(loss, epoch)
    if tally.num_batches != steps and (own[1] == 1 or not shares):  # several leave out a batch too small for all
        raise DataError(
            f"epoch {epoch + 1} gave {tally.num_batches} batches of the {steps} that were announced. "
            "Give data that can be gone through again, or the right num_batches."
        )
    return {
        "epoch": epoch + 1,
        "loss": loss,
        "lr": recipe.rate(epoch / recipe.epochs),
        f"train_{tally.name}": shares,
    }


def _train_batch(stage: _Stage, batch: Batch, done: float) -> tuple[list[Tensor], Tensor]:
    recipe, objective = stage.phase.recipe, stage.phase.objective
    if batch.labels is None and getattr(objective, "needs_labels", False):
        raise DataError(
            f"{type(objective).__name__} needs labels, and the data has none. Train with strategy='distil'."
        )
    for group in stage.optimizer.param_groups:
        group["lr"] = recipe.rate(done)
    logits = stage.model(batch.inputs)
    loss = objective(logits, batch.labels, done)
    stage.fabric.backward(loss)
    if recipe.clip_norm is not None:
        # an infinite norm makes the next loss no number, and that is reported with what to do about it
        stage.fabric.clip_gradients(stage.model, stage.optimizer, max_norm=recipe.clip_norm, error_if_nonfinite=False)
    stage.optimizer.step()
    stage.optimizer.zero_grad()
    return [x.detach() for x in logits], loss.detach()


def _validate(stage: _Stage, val: Samples) -> dict[str, Any]:
    """Accuracy of each exit that the phase runs, in the phase's own precision."""
    stage.model.eval()
    own = shard()
    tally = Tally(stage.fabric.device, num_exits=1 if stage.phase.trains == "backbone" else stage.sdn.num_exits)
    # The same order in all processes, also of a loader that shuffles; and not through DDP, which counts steps.
    batches = val.batches(
        500, channels_last=stage.phase.recipe.channels_last, shard=own, seed=0 if own[1] > 1 else None
    )
    with torch.no_grad(), stage.fabric.autocast():
        for batch in batches:
            tally.add(batch, stage.network(batch.inputs))
    return {f"val_{tally.name}": tally.total(stage.fabric)[1]}


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise _diverged(f"the loss became {loss}", epoch)


def _not_finite(sdn: ShallowDeepNetwork) -> list[str]:
    """Names of the weights and buffers that are not finite."""
    tensors = {name: tensor for name, tensor in sdn.state_dict().items() if isinstance(tensor, Tensor)}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()  # a GPU is asked once
    return [name for name, fine in zip(tensors, finite, strict=True) if not fine]


def _diverged(what: str, epoch: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what} in epoch {epoch + 1}. The checkpoint of the epoch before is kept. "
        "Lower the peak learning rate (recipe.lr) or clip gradients (recipe.clip_norm)."
    )


def _fabric(phase: Phase, place: _Place) -> Fabric:
    recipe = phase.recipe
    fabric = make_fabric(
        place.device,
        devices=place.devices,
        num_nodes=place.num_nodes,
        precision=_precision(recipe, place.device),
        all_used=phase.trains == "exits",
    )
    if recipe.batch_size % fabric.world_size:
        raise ConfigError(
            f"a batch of {recipe.batch_size} cannot be shared out evenly among {fabric.world_size} processes. "
            "Take a multiple (recipe.batch_size)."
        )
    return fabric


def _precision(recipe: Recipe, device: str) -> Any:
    wanted = recipe.precision == "bf16" or (recipe.precision == "auto" and computes_in_bf16(device))
    return "bf16-mixed" if wanted else "32-true"


def computes_in_bf16(device: str) -> bool:
    """Whether a device multiplies in bf16, rather than emulating it."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _epoch_seed(seed: int, phase: int, epoch: int) -> int:
    return ((seed * 1_000_003 + phase) * 1_000_003 + epoch) % 2**64  # as many bits as PyTorch takes
