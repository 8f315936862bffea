"""Early exits for a network that is in production: no labels, and not a bit of the network is changed.

Its own answers teach the exits, and they also choose the threshold: a sample leaves early where the answer stays the
same. Labels of the test digits are read at the very end, to see what that means for accuracy. Half a minute on one
core, offline::

    python examples/production.py
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import shallowdeep as sd


def train_a_network(images: sd.ImageSet, epochs: int) -> nn.Module:
    """Stands for the network you have: ResNet-20 from a loop that knows nothing of exits."""
    network = sd.load_network("resnet20", num_classes=10, image_size=64)  # with a stride in its stem: quick
    inputs, labels, _ = next(images.batches(len(images)))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return network.eval()


@torch.no_grad()
def assert_unchanged(network: nn.Module, before: nn.Module, inputs: Tensor) -> None:
    """Every weight, every batch-norm statistic and every answer, bit for bit."""
    weights, weights_before = network.state_dict(), before.state_dict()
    assert weights.keys() == weights_before.keys()
    assert all(torch.equal(weights[name], weights_before[name]) for name in weights)
    assert torch.equal(network(inputs), before(inputs))


def main(
    network_epochs: int = 6, exit_epochs: int = 10, seed: int = 0
) -> tuple[sd.ShallowDeepNetwork, sd.Trace, sd.Decisions]:
    """Attach exits to a finished network, train them, choose a threshold, look at what it does."""
    torch.manual_seed(seed)
    data = sd.load_data("digits", val_size=360)
    network = train_a_network(data.train, network_epochs)
    before = copy.deepcopy(network)

    seen, held_out = (next(images.batches(len(images))).inputs for images in (data.train, data.val))
    sdn = sd.attach(network, seen[:4])
    unlabelled = DataLoader(seen, batch_size=64, shuffle=True)
    sd.fit(sdn, unlabelled, strategy="distil", recipe="paper", epochs=exit_epochs, device="cpu")
    assert_unchanged(network, before, held_out)

    val = sd.record(sdn, DataLoader(held_out, batch_size=64), split="val")
    policy = sd.calibrate(val, min_agreement=0.99)
    print(f"{policy}\non held-out inputs: {sd.replay(val, policy)}")

    test = sd.record(sdn, data.test)  # the only labels that are looked at
    decisions = sd.replay(test, policy)
    print(f"on test digits: {decisions}")
    print(f"the network alone: accuracy {100 * test.correct[:, -1].double().mean():.2f} %")
    return sdn, test, decisions


if __name__ == "__main__":
    main()
