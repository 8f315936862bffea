"""The training loop: one, visible, resumable."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from shallowdeep.data.images import ImageSet, Splits
from shallowdeep.errors import NetworkError, TrainingDiverged
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.progress import Bar, bar
from shallowdeep.training.checkpoint import Checkpoint
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import Phase, RecipeFor, Strategy, named_strategy

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
        sdn: trained in place, and left on the device it was trained on, in evaluation mode.
        data: its training split is shuffled and augmented; its validation split is only looked at.
        strategy: a name (``plain``, ``ic_only``, ``joint``, ``mixed``) or a tuple of phases.
        recipe: a name (``paper``, ``fast``), a recipe, or a function from what a phase trains to one.
        epochs: length of each phase, instead of the recipe's own.
        seed: of everything random in training; initial weights are the caller's.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or another accelerator that Fabric knows.
        folder: for ``checkpoint.pt`` and ``history.jsonl`` after every epoch; ``None``: keep nothing.
        resume: go on from the folder's checkpoint, if there is one.
        validate_every: epochs between two looks at the validation split; 0: never.
        progress: draw a bar on the terminal.

    Returns:
        One record per epoch: phase, epoch, loss, training and validation accuracy per exit, seconds.

    Raises:
        TrainingDiverged: the loss is no longer a number; the last good checkpoint is kept.
        NetworkError: the network has fewer outputs than the data has classes.
        FileFormatError: the checkpoint is damaged, or of another run.
    """
    if sdn.num_outputs < data.num_classes:
        raise NetworkError(
            f"the network has {sdn.num_outputs} outputs, the data {data.num_classes} classes. "
            f"Build it with num_classes={data.num_classes}."
        )
    phases = strategy if isinstance(strategy, tuple) else named_strategy(strategy, sdn, recipe, epochs=epochs)
    identity = f"{data.name} of {len(data.train)}, seed {seed}, {phases}"
    checkpoint = Checkpoint(None if folder is None else Path(folder), identity)
    run = _Run(sdn, data, seed, device, checkpoint, validate_every, progress)
    if resume:
        run.history = checkpoint.read_history()
    with torch.random.fork_rng():
        for number, phase in enumerate(phases):
            run.train_phase(number, phase, resume=resume)
    sdn.eval()
    return run.history


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
        fabric = Fabric(accelerator=self.device, devices=1, precision=_precision(recipe, self.device))
        self.sdn.to(device=fabric.device)
        if recipe.channels_last:
            self.sdn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sdn.freeze_backbone(phase.trains == "exits")
        network: nn.Module = LastExit(self.sdn) if phase.trains == "backbone" else self.sdn
        optimizer = recipe.build_optimizer(_trained(self.sdn, phase))
        first = self.checkpoint.load(self.sdn, optimizer, number) if resume else 0
        model, wrapped = fabric.setup(network, optimizer)
        train = self.data.train.to(fabric.device)
        for epoch in range(first, recipe.epochs):
            started = time.perf_counter()
            with self.sdn.tapped():
                record = _train_epoch(
                    fabric,
                    model,
                    wrapped,
                    train,
                    self.data,
                    phase,
                    epoch,
                    _epoch_seed(self.seed, number, epoch),
                    self.progress,
                )
            record = {
                "phase": number,
                "trains": phase.trains,
                **record,
                "seconds": time.perf_counter() - started,
            }
            if self.validate_every and (epoch + 1) % self.validate_every == 0:
                record["val_accuracy"] = _accuracy(model, self.sdn, self.data.val.to(fabric.device), recipe)
            self.history.append(record)
            self.checkpoint.save(self.sdn, optimizer, number, epoch + 1, self.history)
        self.sdn.freeze_backbone(False)
        self.sdn.zero_grad(set_to_none=True)


class LastExit(nn.Module):
    """The backbone seen as a network with one exit: no hooks, and no internal exit is run."""

    def __init__(self, sdn: ShallowDeepNetwork):
        super().__init__()
        self.sdn = sdn

    def forward(self, x: Tensor) -> list[Tensor]:
        """The last exit's logits, alone in a list."""
        return [self.sdn.run_backbone(x)]


def _train_epoch(
    fabric: Fabric,
    model: Any,
    optimizer: Any,
    train: ImageSet,
    data: Splits,
    phase: Phase,
    epoch: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    recipe = phase.recipe
    steps = train.num_batches(recipe.batch_size, drop_last=True)
    loss_sum, right, seen = torch.zeros((), device=fabric.device), torch.zeros((), device=fabric.device), 0
    torch.manual_seed(seed)
    model.train()
    batches = train.batches(
        recipe.batch_size, augment=data.augment, seed=seed, drop_last=True, channels_last=recipe.channels_last
    )
    with bar(f"{phase.trains} {epoch + 1}/{recipe.epochs}", steps, shown=progress) as line:
        for step, batch in enumerate(batches):
            done = (epoch + step / steps) / recipe.epochs
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(done)
            logits = model(batch.inputs)
            loss = phase.objective(logits, batch.labels, done)
            fabric.backward(loss)
            if recipe.clip_norm is not None:
                fabric.clip_gradients(model, optimizer, max_norm=recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum = loss_sum + loss.detach()
            right = right + torch.stack([(x.argmax(1) == batch.labels).sum() for x in logits])
            seen += len(batch.labels)
            line.advance()
            if (step + 1) % REPORT_EVERY == 0:
                _report(line, loss_sum / (step + 1), right / seen, epoch)
    mean_loss = _finite(loss_sum / steps, epoch)
    return {
        "epoch": epoch + 1,
        "loss": mean_loss,
        "lr": recipe.rate(epoch / recipe.epochs),
        "train_accuracy": (right / seen).tolist(),
    }


def _report(line: Bar, loss: Tensor, accuracy: Tensor, epoch: int) -> None:
    shares = " ".join(f"{100 * a:.0f}" for a in accuracy.tolist())
    line.say(f"loss {_finite(loss, epoch):.3f}  accuracy {shares}")


def _finite(loss: Tensor, epoch: int) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise TrainingDiverged(
            f"the loss became {value} in epoch {epoch + 1}. The checkpoint of the epoch before is kept. "
            "Lower the peak learning rate (recipe.lr) or clip gradients (recipe.clip_norm)."
        )
    return value


def _accuracy(model: Any, sdn: ShallowDeepNetwork, images: ImageSet, recipe: Recipe) -> list[float]:
    """Accuracy of each exit that the phase runs, in the phase's own precision."""
    model.eval()
    right: Any = 0
    with torch.no_grad(), sdn.tapped():
        for batch in images.batches(500, channels_last=recipe.channels_last):
            right = right + torch.stack([(x.argmax(1) == batch.labels).sum() for x in model(batch.inputs)])
    return (right / len(images)).tolist()


def _trained(sdn: ShallowDeepNetwork, phase: Phase) -> list[nn.Parameter]:
    part: nn.Module = {"backbone": sdn.backbone, "exits": sdn.exits, "all": sdn}[phase.trains]
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def _precision(recipe: Recipe, device: str) -> Any:
    wanted = recipe.precision == "bf16" or (recipe.precision == "auto" and computes_in_bf16(device))
    return "bf16-mixed" if wanted else "32-true"


def computes_in_bf16(device: str) -> bool:
    """Whether a device multiplies in bf16, rather than emulating it."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _epoch_seed(seed: int, phase: int, epoch: int) -> int:
    return (seed * 1_000_003 + phase) * 1_000_003 + epoch
