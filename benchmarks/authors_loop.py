"""Images per second of ``fit`` against the authors' training loop, re-expressed, in one run.

Both train the same network jointly with its exits on CIFAR-10, taking turns. The authors' loop: a ``DataLoader``
with four workers that crop and flip one PIL image after the other, batches of 128, float32, SGD, and after every epoch
one pass over the augmented training images and one over the test images to read the accuracies. ``fit`` comes with
the recipe ``fast``, its data on the device, looking at no split (``validate_every=0``), compiled if asked::

    python benchmarks/authors_loop.py --network vgg16 --images 2560 --test-images 512 --rounds 3 --threads 2
    python benchmarks/authors_loop.py --network vgg16 --device cuda --compile

Prints JSON on standard output: seconds and images per second of every epoch, the ratio of the medians, and the
ratio where the authors' loop is spared its accuracy passes. Not counted: the first epoch of ``fit``, which compiles,
and some steps of theirs before the first round. Images are cut to whole batches.

Written from a description of that loop (Kaya, Hong & Dumitras, ICML 2019); no code of it is used.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shallowdeep.data.images import ImageSet
from shallowdeep.data.samples import Splits
from shallowdeep.data.sources import load_data
from shallowdeep.networks.attach import attach
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network
from shallowdeep.provenance import describe_environment
from shallowdeep.training.loop import fit
from shallowdeep.training.recipes import named_recipe

BATCH = 128
WARM_UP = 2  # steps
EPOCHS = 2  # of ``fit`` in a round; the first is not counted


class PilImages(Dataset):
    """Images as PIL has them, changed one at a time."""

    def __init__(self, images: ImageSet, augment: bool):
        self.images = [Image.fromarray(image) for image in images.images.permute(0, 2, 3, 1).cpu().numpy()]
        self.labels = images.labels.tolist()
        self.augment = augment
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augment:
            left, top = random.randint(0, 8), random.randint(0, 8)
            image = ImageOps.expand(image, 4).crop((left, top, left + 32, top + 32))
            image = ImageOps.mirror(image) if random.random() < 0.5 else image
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(255)
        return (pixels - self.mean) / self.std, self.labels[index]


class AuthorsLoop:
    """An epoch as their code spends it."""

    def __init__(self, sdn: ShallowDeepNetwork, data: Splits, device: torch.device, workers: int):
        self.sdn, self.device = sdn.to(device), device
        self.optimizer = torch.optim.SGD(sdn.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        options: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers}
        self.train = DataLoader(PilImages(data.train, True), shuffle=True, **options)  # type: ignore[arg-type]
        self.test = DataLoader(PilImages(data.test, False), shuffle=False, **options)  # type: ignore[arg-type]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One batch."""
        *internal, last = self.sdn(images.to(self.device))
        wanted = labels.to(self.device)
        loss = F.cross_entropy(last, wanted)
        for logits in internal:
            loss = loss + 0.5 * F.cross_entropy(logits, wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def epoch(self) -> tuple[float, float]:
        """Seconds of training, and of reading the accuracies."""
        started = time.perf_counter()
        self.sdn.train()
        for images, labels in self.train:
            self.step(images, labels)
        wait(self.device)
        trained = time.perf_counter()
        self.sdn.eval()
        for loader in (self.test, self.train):
            right = 0
            with torch.no_grad():
                for images, labels in loader:
                    right += int((self.sdn(images.to(self.device))[-1].argmax(1).cpu() == labels).sum())
        return trained - started, time.perf_counter() - trained


def ours(sdn: ShallowDeepNetwork, data: Splits, options: dict[str, Any]) -> float:
    """Seconds of an epoch of ``fit``, as it writes them down: of the last."""
    history = fit(sdn, data, strategy="joint", epochs=EPOCHS, validate_every=0, progress=False, **options)
    return history[-1]["seconds"]


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(name: str, data: Splits) -> ShallowDeepNetwork:
    """A network with its exits, the same each time."""
    torch.manual_seed(0)
    net: nn.Module = load_network(name, num_classes=data.num_classes, image_size=32)
    return attach(net, data.example_inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vgg16")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, help="to train on, at most; all where not given")
    parser.add_argument("--test-images", type=int, help="at most; all where not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_data(args.data, data_dir=args.data_dir)
    limited = {"train": args.images or len(data.train), "test": args.test_images or len(data.test)}  # type: ignore[arg-type]
    limited["train"] -= limited["train"] % BATCH  # fit leaves an incomplete batch out
    data = Splits(data.train.sample(limited["train"]), None, data.test.sample(limited["test"]), data.augment)  # type: ignore[union-attr]
    device = torch.device(args.device)
    authors = AuthorsLoop(build(args.network, data), data, device, args.workers)
    for _ in range(WARM_UP):
        authors.step(torch.zeros(BATCH, *data.example_inputs.shape[1:]), torch.zeros(BATCH, dtype=torch.int64))
    rounds: dict[str, list[float]] = {"authors_training": [], "authors_accuracies": [], "fit": []}
    for _ in range(args.rounds):
        training, accuracies = authors.epoch()
        rounds["authors_training"].append(training)
        rounds["authors_accuracies"].append(accuracies)
        options = {"device": args.device, "compile": args.compile}
        rounds["fit"].append(ours(build(args.network, data), data, options))
        print({name: round(found[-1], 2) for name, found in rounds.items()}, file=sys.stderr, flush=True)
    whole = [a + b for a, b in zip(rounds["authors_training"], rounds["authors_accuracies"], strict=True)]
    n = limited["train"]
    print(
        json.dumps(
            {
                "command": " ".join(["python", "benchmarks/authors_loop.py", *sys.argv[1:]]),
                "environment": describe_environment(data, args.device),
                "network": args.network,
                "recipe": named_recipe("fast", "all", args.network).model_copy(update={"epochs": EPOCHS}).model_dump(),
                "workers": args.workers,
                "compiled": args.compile,
                "training_images": n,
                "test_images": limited["test"],
                "seconds": rounds,
                "images_per_s": {
                    "authors": n / statistics.median(whole),
                    "authors_without_accuracies": n / statistics.median(rounds["authors_training"]),
                    "fit": n / statistics.median(rounds["fit"]),
                },
                "ratio": statistics.median(whole) / statistics.median(rounds["fit"]),
                "ratio_of_rounds": [a / b for a, b in zip(whole, rounds["fit"], strict=True)],
                "ratio_without_accuracies": statistics.median(rounds["authors_training"])
                / statistics.median(rounds["fit"]),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
