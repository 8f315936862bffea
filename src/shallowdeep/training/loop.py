"""The training loop: one, visible, resumable."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from shallowdeep.data.images import Augmentation, Batch, ImageSet, Splits
from shallowdeep.errors import ConfigError, NetworkError, TrainingDiverged
from shallowdeep.networks.calls import first_line
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.progress import Bar, bar
from shallowdeep.training.checkpoint import Checkpoint
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import Phase, RecipeFor, Strategy, named_strategy, with_epochs

REPORT_EVERY = 20  # batches between two looks at the loss: each waits for the device


def fit(
    sdn: ShallowDeepNetwork,
    data: Splits,
    *,
    strategy: str | Strategy = "joint",
    recipe: str | Recipe | RecipeFor = "fast",
    epochs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    folder: str | Path | None = None,
    resume: bool = False,
    validate_every: int = 1,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train a Shallow-Deep Network, in place.

    Every epoch draws its order, crops, flips and dropout from ``seed`` and its own number, so that a run
    resumed from an epoch's checkpoint ends at the same weights, on a CPU bit for bit at the same number
    of threads. The process's own random state is left as it was.

    Args:
        sdn: trained in place, and left on the device it was trained on, in evaluation mode; what was frozen
            before is so again.
        data: its training split is shuffled and augmented; its validation split is only looked at.
        strategy: a name (``plain``, ``ic_only``, ``joint``, ``mixed``) or a tuple of phases.
        recipe: of a strategy by name: a name (``paper``, ``fast``), a recipe, or a function from what a phase
            trains to one. A tuple of phases brings its own.
        epochs: length of each phase, instead of the recipe's own.
        seed: of everything random in training; initial weights are the caller's.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or another accelerator that Fabric knows.
        folder: for ``checkpoint.pt`` and ``history.jsonl`` after every epoch; ``None``: keep nothing.
        resume: go on from the folder's checkpoint, if there is one.
        validate_every: epochs between two looks at the validation split; 0: never.
        progress: draw a bar on the terminal.

    Returns:
        One record per epoch: ``phase`` (from 0), ``trains``, ``epoch`` (from 1), ``loss``, ``lr`` at its
        start, ``train_accuracy`` per exit, ``seconds`` of training, and, in epochs that look at the
        validation split, ``val_accuracy`` per exit. A phase that trains the backbone has one exit.

    Raises:
        TrainingDiverged: the loss or a weight is no longer a number; the last good checkpoint is kept.
        ConfigError: a batch is more than the training split, or a phase has nothing to train.
        NetworkError: the network has fewer outputs than the data has classes, or several label sets.
        FileFormatError: the checkpoint is damaged, or of another run.
    """
    phases = (
        tuple(replace(phase, recipe=with_epochs(phase.recipe, epochs)) for phase in strategy)
        if isinstance(strategy, tuple)
        else named_strategy(strategy, sdn, recipe, epochs=epochs)
    )
    _check(sdn, data, phases)
    checkpoint = Checkpoint(None if folder is None else Path(folder), _identity(data, seed, phases))
    checkpoint.sweep()
    run = _Run(sdn, data, seed, device, checkpoint, validate_every, progress)
    if resume:
        run.history = checkpoint.read_history()
    with torch.random.fork_rng():
        for number, phase in enumerate(phases):
            run.train_phase(number, phase, resume=resume)
    return run.history


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
        if phase.recipe.batch_size > len(data.train):
            raise ConfigError(
                f"a batch of {phase.recipe.batch_size} is more than the {len(data.train)} images to train on. "
                "Lower the batch size (recipe.batch_size)."
            )


def _identity(data: Splits, seed: int, phases: Strategy) -> str:
    """What run this is, in words; an objective that is a bare function has its address in them."""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{data.name} of {len(data.train)}, seed {seed}, {phases}")


@dataclass
class _Run:
    """What all phases of one ``fit`` share."""

    sdn: ShallowDeepNetwork
    data: Splits
    seed: int
    device: str
    checkpoint: Checkpoint
    validate_every: int
    progress: bool
    history: list[dict[str, Any]] = field(default_factory=list)

    def train_phase(self, number: int, phase: Phase, *, resume: bool) -> None:
        recipe = phase.recipe
        fabric = _fabric(recipe, self.device)
        self.sdn.to(device=fabric.device)
        if recipe.channels_last:
            self.sdn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with _frozen_for(self.sdn, phase):
            optimizer = recipe.build_optimizer(_trained(self.sdn, phase))
            first = self.checkpoint.load(self.sdn, optimizer, number) if resume else 0
            stage = self._set_up(fabric, phase, optimizer)
            total = recipe.epochs * stage.steps
            done = min(first, recipe.epochs) * stage.steps
            with bar(f"train {phase.trains}", total, done=done, shown=self.progress) as line:
                for epoch in range(first, recipe.epochs):
                    self.history.append({"phase": number, **self._epoch(stage, number, epoch, line)})
                    self.checkpoint.save(self.sdn, optimizer, number, epoch + 1, self.history)

    def _set_up(self, fabric: Fabric, phase: Phase, optimizer: torch.optim.Optimizer) -> _Stage:
        network: nn.Module = LastExit(self.sdn) if phase.trains == "backbone" else self.sdn
        model, wrapped = fabric.setup(network, optimizer)
        train, val = (images.to(fabric.device) for images in (self.data.train, self.data.val))
        return _Stage(self.sdn, phase, fabric, model, wrapped, train, val, self.data.augment)

    def _epoch(self, stage: _Stage, number: int, epoch: int, line: Bar) -> dict[str, Any]:
        started = time.perf_counter()
        record = _train_epoch(stage, epoch, _epoch_seed(self.seed, number, epoch), line)
        record = {"trains": stage.phase.trains, **record, "seconds": time.perf_counter() - started}
        _check_weights(self.sdn, epoch)
        if self.validate_every and (epoch + 1) % self.validate_every == 0:
            record["val_accuracy"] = _accuracy(stage)
        return record


@dataclass(frozen=True)
class _Stage:
    """One phase, set up on its device."""

    sdn: ShallowDeepNetwork
    phase: Phase
    fabric: Fabric
    model: Any
    optimizer: Any
    train: ImageSet
    val: ImageSet
    augment: Augmentation

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.train.num_batches(self.phase.recipe.batch_size, drop_last=True)

    def tapped(self) -> AbstractContextManager[None]:
        """The hooks, kept on around a loop, where the phase runs internal exits."""
        return nullcontext() if self.phase.trains == "backbone" else self.sdn.tapped()


class LastExit(nn.Module):
    """The backbone seen as a network with one exit: no hooks, and no internal exit is run."""

    def __init__(self, sdn: ShallowDeepNetwork):
        super().__init__()
        self.sdn = sdn

    def forward(self, x: Tensor) -> list[Tensor]:
        """The last exit's logits, alone in a list."""
        return [self.sdn.run_backbone(x)]


def _train_epoch(stage: _Stage, epoch: int, seed: int, line: Bar) -> dict[str, Any]:
    recipe, device, steps = stage.phase.recipe, stage.fabric.device, stage.steps
    loss_sum, right, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    torch.manual_seed(seed)
    stage.model.train()
    batches = stage.train.batches(
        recipe.batch_size, augment=stage.augment, seed=seed, drop_last=True, channels_last=recipe.channels_last
    )
    with stage.tapped():
        for step, batch in enumerate(batches):
            loss, logits = _train_batch(stage, batch, (epoch + step / steps) / recipe.epochs)
            loss_sum = loss_sum + loss
            right = right + _right(logits, batch.labels)
            seen += len(batch.labels)
            line.advance()
            if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
                mean_loss = _finite(loss_sum / (step + 1), epoch)
                shares = " ".join(f"{100 * accuracy:.0f}" for accuracy in (right / seen).tolist())
                line.say(f"epoch {epoch + 1}/{recipe.epochs}  loss {mean_loss:.3f}  accuracy {shares}")
    return {
        "epoch": epoch + 1,
        "loss": _finite(loss_sum / steps, epoch),
        "lr": recipe.rate(epoch / recipe.epochs),
        "train_accuracy": (right / seen).tolist(),
    }


def _train_batch(stage: _Stage, batch: Batch, done: float) -> tuple[Tensor, list[Tensor]]:
    recipe = stage.phase.recipe
    for group in stage.optimizer.param_groups:
        group["lr"] = recipe.rate(done)
    logits = stage.model(batch.inputs)
    loss = stage.phase.objective(logits, batch.labels, done)
    stage.fabric.backward(loss)
    if recipe.clip_norm is not None:
        # an infinite norm makes the next loss no number, and that is reported with what to do about it
        stage.fabric.clip_gradients(stage.model, stage.optimizer, max_norm=recipe.clip_norm, error_if_nonfinite=False)
    stage.optimizer.step()
    stage.optimizer.zero_grad()
    return loss.detach(), [x.detach() for x in logits]


def _right(logits: list[Tensor], labels: Tensor) -> Tensor:
    """How many labels each exit finds."""
    return torch.stack([(x.argmax(1) == labels).sum() for x in logits])


def _finite(loss: Tensor, epoch: int) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise _diverged(f"the loss became {value}", epoch)
    return value


def _check_weights(sdn: ShallowDeepNetwork, epoch: int) -> None:
    """The last step of an epoch can spoil weights that no loss has seen yet."""
    for name, tensor in sdn.state_dict().items():
        if not tensor.isfinite().all():
            raise _diverged(f"'{name}' is no longer finite", epoch)


def _diverged(what: str, epoch: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what} in epoch {epoch + 1}. The checkpoint of the epoch before is kept. "
        "Lower the peak learning rate (recipe.lr) or clip gradients (recipe.clip_norm)."
    )


def _accuracy(stage: _Stage) -> list[float]:
    """Accuracy of each exit that the phase runs, in the phase's own precision."""
    stage.model.eval()
    right: Any = 0
    with torch.no_grad(), stage.tapped():
        for batch in stage.val.batches(500, channels_last=stage.phase.recipe.channels_last):
            right = right + _right(stage.model(batch.inputs), batch.labels)
    return (right / len(stage.val)).tolist()


@contextmanager
def _frozen_for(sdn: ShallowDeepNetwork, phase: Phase) -> Iterator[None]:
    """Freeze what a phase does not train; afterwards, and after an error, all is as frozen as before."""
    frozen, needed = sdn.frozen, [(parameter, parameter.requires_grad) for parameter in sdn.parameters()]
    if frozen != (phase.trains == "exits"):
        sdn.freeze_backbone(not frozen)
    try:
        yield
    finally:
        sdn.frozen = frozen
        for parameter, need in needed:
            parameter.requires_grad_(need)
        sdn.zero_grad(set_to_none=True)
        sdn.eval()


def _trained(sdn: ShallowDeepNetwork, phase: Phase) -> list[nn.Parameter]:
    """What a phase moves; a final head of its own belongs to the backbone, whose last exit it is."""
    exits = set(sdn.exits.parameters())
    found = [
        parameter
        for parameter in sdn.parameters()
        if parameter.requires_grad and phase.trains in ("all", "exits" if parameter in exits else "backbone")
    ]
    if not found:
        raise ConfigError(f"a phase trains '{phase.trains}', and the network has no such weights to train.")
    return found


def _fabric(recipe: Recipe, device: str) -> Fabric:
    try:
        return Fabric(accelerator=device, devices=1, precision=_precision(recipe, device))
    except Exception as error:  # ValueError, RuntimeError or Fabric's own, as the accelerator has it
        raise ConfigError(
            f"device '{device}' cannot be used here: {first_line(error)}. "
            "Take 'auto', 'cpu', or 'cuda' where there is one."
        ) from None


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
