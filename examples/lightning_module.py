"""Early exits in PyTorch Lightning: the network with exits is a module like any other, the objective its loss.

Fifteen seconds on one core, offline::

    pip install lightning
    python examples/lightning_module.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import shallowdeep as sd

SHARES = (0.25, 0.5, 0.75)  # of the computation: where exits sit, and what their losses weigh in the end


class EarlyExits(lightning.LightningModule):
    """Trains a network and its exits together, and logs the accuracy of each exit."""

    def __init__(self, sdn: sd.ShallowDeepNetwork):
        super().__init__()
        self.sdn = sdn
        self.objective = sd.Joint(weights=SHARES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The exits' weights rise with progress, which the trainer knows."""
        inputs, labels = batch
        progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
        return self.objective(self.sdn(inputs), labels, progress)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Every exit answers every sample."""
        inputs, labels = batch
        for exit, logits in enumerate(self.sdn(inputs)):
            self.log(f"val_accuracy/exit_{exit}", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> dict:
        """An optimiser over everything, its rate changed at every step."""
        optimizer = torch.optim.AdamW(self.sdn.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build_network() -> nn.Module:
    """Six convolutions, known to nobody: any module that returns logits will do."""

    def block(width: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    widths = [3, 16, 16, 32, 32, 64, 64]
    blocks = [block(*widths[i : i + 2], stride=2 if i % 2 == 0 else 1) for i in range(6)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def build_loader(images: sd.ImageSet, *, shuffle: bool = False) -> DataLoader:
    """A DataLoader of ``(inputs, labels)``, like any other."""
    inputs, labels, _ = next(images.batches(len(images)))
    return DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=shuffle)


def main(epochs: int = 8, seed: int = 0) -> tuple[sd.ShallowDeepNetwork, sd.Trace, sd.Decisions]:
    """Train, record, calibrate on validation data, replay on test data."""
    lightning.seed_everything(seed, verbose=False)
    data = sd.load_data("digits")
    sdn = sd.attach(build_network(), data.example_inputs, shares=SHARES)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,  # sdn.save(path) is enough, and pickles nothing
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(EarlyExits(sdn), build_loader(data.train, shuffle=True), build_loader(data.val))
    print({name: f"{float(value):.3f}" for name, value in trainer.callback_metrics.items()})

    val, test = (sd.record(sdn, build_loader(data.split(split)), split=split) for split in ("val", "test"))
    print("accuracy of each exit:", [f"{accuracy:.3f}" for accuracy in test.correct.double().mean(0)])
    decisions = sd.replay(test, sd.calibrate(val, max_cost=0.5))
    print("at most half the cost:", decisions)
    return sdn, test, decisions


if __name__ == "__main__":
    main()
