"""Early exits in a plain PyTorch loop: your network, your DataLoader, your optimiser; our exits and objective.

Two lines of the loop are new: the context that keeps the hooks on around it, and the loss. Ten seconds on one core,
offline::

    python examples/plain_loop.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shallowdeep as sd

SHARES = (0.25, 0.5, 0.75)  # of the computation: where exits sit, and what their losses weigh in the end


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


def train(sdn: sd.ShallowDeepNetwork, loader: DataLoader, epochs: int) -> None:
    """Backbone and exits together; the exits' weights rise with progress."""
    objective = sd.Joint(weights=SHARES)
    optimizer = torch.optim.AdamW(sdn.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * len(loader))
    sdn.train()
    with sdn.tapped():  # hooks on once, off at the end, also after an error
        for epoch in range(epochs):
            for step, (inputs, labels) in enumerate(loader):
                progress = (epoch + step / len(loader)) / epochs
                loss = objective(sdn(inputs), labels, progress)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


def main(epochs: int = 8, seed: int = 0) -> tuple[sd.ShallowDeepNetwork, sd.Trace, sd.Decisions]:
    """Train, record, calibrate on validation data, replay on test data."""
    torch.manual_seed(seed)
    data = sd.load_data("digits")
    sdn = sd.attach(build_network(), data.example_inputs, shares=SHARES)
    train(sdn, build_loader(data.train, shuffle=True), epochs)

    val, test = (sd.record(sdn, build_loader(data.split(split)), split=split) for split in ("val", "test"))
    print("accuracy of each exit:", [f"{accuracy:.3f}" for accuracy in test.correct.double().mean(0)])
    decisions = sd.replay(test, sd.calibrate(val, max_cost=0.5))
    print("at most half the cost:", decisions)
    return sdn, test, decisions


if __name__ == "__main__":
    main()
