"""The epochs of one phase: what is done with every batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shallowdeep.data.samples import Augmentation, Batch, Samples
from shallowdeep.errors import DataError, TrainingDiverged
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.processes import shard
from shallowdeep.progress import Bar
from shallowdeep.training.strategies import Phase
from shallowdeep.training.tally import Tally

if TYPE_CHECKING:
    from lightning_fabric import Fabric

REPORT_EVERY = 20  # batches between two looks at the loss: each waits for the device


@dataclass(frozen=True)
class Epochs:
    """One phase, set up on its device.

    Attributes:
        sdn: what is trained, or a part of it.
        phase: what is trained in it, by which objective and recipe.
        fabric: moves, casts and shares out.
        network: what gives the logits of the phase's exits, as a list.
        model: the same, as Fabric runs it in training.
        optimizer: as Fabric runs it.
        passes: over the training split; epochs take turns among them.
        val: on the device.
        augment: for the training split.
        seconds: that recording features took.
    """

    sdn: ShallowDeepNetwork
    phase: Phase
    fabric: Fabric
    network: nn.Module
    model: Any
    optimizer: Any
    passes: tuple[Samples, ...]
    val: Samples | None
    augment: Augmentation | None
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.passes[0].num_batches(self.phase.recipe.batch_size, drop_last=True)

    def train(self, epoch: int, seed: int, line: Bar) -> dict[str, Any]:
        """Go once through the training split.

        Args:
            epoch: from 0.
            seed: of its order, crops, flips and dropout.
            line: moves on by a step a batch.

        Returns:
            ``epoch`` (from 1), ``loss``, ``lr`` at its start, and the accuracy or agreement of each exit.

        Raises:
            TrainingDiverged: the loss is no longer a number.
            DataError: the split gives fewer batches than it announced, or no labels where the objective needs them.
        """
        recipe, steps, own = self.phase.recipe, self.steps, shard()
        tally, totalled = Tally(self.fabric.device), 0
        loss, shares = 0.0, []
        torch.manual_seed(seed)
        self.model.train()
        batches = (
            self.passes[epoch % len(self.passes)]
            .to(self.fabric.device)
            .batches(
                recipe.batch_size,
                augment=self.augment,
                seed=seed,
                drop_last=True,
                channels_last=recipe.channels_last,
                shard=own,
            )
        )
        for step, batch in enumerate(batches):
            if step == 0 and own[0]:
                torch.manual_seed(seed + own[0])  # after the order was drawn: dropout differs between processes
            tally.add(batch, *self._step(batch, (epoch + step / steps) / recipe.epochs))
            line.advance()
            if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
                totalled, (loss, shares) = step + 1, tally.total(self.fabric)
                _check_finite(loss, epoch)
                words = " ".join(f"{100 * share:.0f}" for share in shares)
                line.say(f"epoch {epoch + 1}/{recipe.epochs}  loss {loss:.3f}  {tally.name} {words}")
        if tally.num_batches > totalled:  # fewer batches than announced
            loss, shares = tally.total(self.fabric)
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

    def _step(self, batch: Batch, done: float) -> tuple[list[Tensor], Tensor]:
        recipe, objective = self.phase.recipe, self.phase.objective
        if batch.labels is None and getattr(objective, "needs_labels", False):
            raise DataError(
                f"{type(objective).__name__} needs labels, and the data has none. Train with strategy='distil'."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(done)
        logits = self.model(batch.inputs)
        loss = objective(logits, batch.labels, done)
        self.fabric.backward(loss)
        if recipe.clip_norm is not None:
            # an infinite norm makes the next loss no number, and that is reported with what to do about it
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=recipe.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [x.detach() for x in logits], loss.detach()

    def validate(self) -> dict[str, Any]:
        """Accuracy or agreement of each exit that the phase runs, in its own precision; nothing without a split."""
        if self.val is None:
            return {}
        self.model.eval()
        own = shard()
        tally = Tally(self.fabric.device, num_exits=1 if self.phase.trains == "backbone" else self.sdn.num_exits)
        # The same order in all processes, also of a loader that shuffles; and not through DDP, which counts steps.
        batches = self.val.batches(
            500, channels_last=self.phase.recipe.channels_last, shard=own, seed=0 if own[1] > 1 else None
        )
        with torch.no_grad(), self.fabric.autocast():
            for batch in batches:
                tally.add(batch, self.network(batch.inputs))
        return {f"val_{tally.name}": tally.total(self.fabric)[1]}


class LastExit(nn.Module):
    """The backbone seen as a network with one exit: no hooks, and no internal exit is run."""

    def __init__(self, sdn: ShallowDeepNetwork):
        super().__init__()
        self.sdn = sdn

    def forward(self, x: Any) -> list[Tensor]:
        """The last exit's logits, alone in a list."""
        return [self.sdn.run_backbone(x)]


def not_finite(sdn: ShallowDeepNetwork) -> list[str]:
    """Names of the weights and buffers that are not finite."""
    tensors = {name: tensor for name, tensor in sdn.state_dict().items() if isinstance(tensor, Tensor)}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()  # a GPU is asked once
    return [name for name, fine in zip(tensors, finite, strict=True) if not fine]


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise diverged(f"the loss became {loss}", epoch)


def diverged(what: str, epoch: int) -> TrainingDiverged:
    """The error for numbers that are none any more."""
    return TrainingDiverged(
        f"{what} in epoch {epoch + 1}. The checkpoint of the epoch before is kept. "
        "Lower the peak learning rate (recipe.lr) or clip gradients (recipe.clip_norm)."
    )
