"""Images per second of ``fit``'s epoch against a bare forward-backward loop, and where the difference goes.

Both train the same network with the same optimiser, batch size and precision on the same images, one after
the other in every round; the bare loop has its batches normalised and laid out beforehand. The parts of the
overhead are timed apart: making batches (shuffle, crop, flip, normalise), counting hits, clipping::

    python benchmarks/loop_overhead.py --data cifar10 --data-dir $SHALLOWDEEP_DATA --rounds 5

Prints JSON on standard output. Ratios are of medians over the rounds, with the smallest and the largest of the
rounds' own ratios. On a machine that others use, read the ratio of processor seconds, which counts a call of
``fit`` whole, its set-up included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from shallowdeep.data.images import ImageSet
from shallowdeep.data.samples import Batch
from shallowdeep.data.sources import load_data
from shallowdeep.networks.attach import attach
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network
from shallowdeep.training.loop import fit
from shallowdeep.training.place import computes_in_bf16
from shallowdeep.training.recipes import Recipe, named_recipe
from shallowdeep.training.strategies import named_strategy

TAPS = ("layer1.0", "layer1", "layer2.0", "layer2.1", "layer3.0", "layer3.1")


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the wall, and of the processor."""
    started = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started[0], time.process_time() - started[1]


class Bare:
    """The loop one would write by hand for exactly this case."""

    def __init__(self, sdn: ShallowDeepNetwork, recipe: Recipe, batches: list[Batch], device: torch.device):
        self.sdn, self.recipe, self.batches, self.device = sdn, recipe, batches, device
        self.objective = named_strategy("joint", sdn, recipe)[0].objective
        self.optimizer = recipe.build_optimizer(list(sdn.parameters()))

    def autocast(self) -> Any:
        """The recipe's precision, as ``fit`` understands it."""
        wanted = self.recipe.precision == "auto" and computes_in_bf16(self.device.type)
        wanted = wanted or self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if wanted else nullcontext()

    def epoch(self) -> None:
        """All batches once."""
        self.sdn.train()
        parameters = list(self.sdn.parameters())
        with self.sdn.tapped():
            for batch in self.batches:
                with self.autocast():
                    logits = self.sdn(batch.inputs)
                self.objective([x.float() for x in logits], batch.labels, 0.5).backward()
                if self.recipe.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()


def count_hits(logits: list[torch.Tensor], batches: list[Batch]) -> torch.Tensor:
    right: Any = 0
    for batch in batches:
        right = right + torch.stack([(x.argmax(1) == batch.labels).sum() for x in logits])
    return right / len(batches)


def make_batches(train: ImageSet, augment: Any, recipe: Recipe) -> list[Batch]:
    order = {"seed": 0, "augment": augment, "drop_last": True, "channels_last": recipe.channels_last}
    return list(train.batches(recipe.batch_size, **order))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Time both loops in turn, and the parts of the first."""
    torch.set_num_threads(args.threads)
    splits = load_data(args.data, data_dir=args.data_dir)
    whole, batch_size = splits.train, args.batch_size
    num_images = min(args.images, len(whole)) // batch_size * batch_size
    data = type(splits)(whole.subset(range(num_images)), splits.val.subset(range(2)), splits.test, splits.augment)
    recipe = named_recipe(args.recipe, "all", args.network).model_copy(update={"epochs": 1, "batch_size": batch_size})
    sdn = attach(load_network(args.network, num_classes=data.num_classes), data.example_inputs, taps=args.taps)

    epochs = []  # seconds of the epoch alone

    def ours() -> None:
        history = fit(sdn, data, recipe=recipe, device=args.device, validate_every=0, progress=not args.quiet)
        epochs.append(history[0]["seconds"])

    ours()  # warm up; the network is now where it will be trained
    epochs.clear()
    device = next(sdn.parameters()).device
    train = data.train.to(device)
    batches = make_batches(train, data.augment, recipe)
    bare = Bare(sdn, recipe, batches, device)
    bare.epoch()
    with torch.no_grad():
        logits = sdn(batches[0].inputs)
    work: dict[str, Callable[[], Any]] = {
        "bare": bare.epoch,
        "fit": ours,
        "batches": lambda: make_batches(train, data.augment, recipe),
        "hits": lambda: count_hits(logits, batches),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for turn in range(args.rounds):
        for name in sorted(work, reverse=bool(turn % 2)):  # each of the two loops is first every other time
            times[name].append(timed(work[name]))
    wall = {name: [wall for wall, _ in pairs] for name, pairs in times.items()} | {"fit": epochs}
    processor = {name: [cpu for _, cpu in pairs] for name, pairs in times.items()}
    return report(args, num_images, device, wall, processor)


def report(
    args: argparse.Namespace,
    num_images: int,
    device: torch.device,
    wall: dict[str, list[float]],
    processor: dict[str, list[float]],
) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in wall.items()}
    return {
        "settings": {**vars(args), "device": str(device), "torch": torch.__version__},
        "images": num_images,
        "images_per_s": {name: num_images / median[name] for name in ("fit", "bare")},
        "overhead": overhead(wall),
        "overhead_processor": overhead(processor),
        "share_of_bare": {name: median[name] / median["bare"] for name in ("batches", "hits")},
        "seconds": wall,
        "processor_seconds": processor,
    }


def overhead(times: dict[str, list[float]]) -> dict[str, float]:
    """What ``fit`` takes beyond the bare loop, as a share of that."""
    ratios = [ours / bare for ours, bare in zip(times["fit"], times["bare"], strict=True)]
    of_medians = statistics.median(times["fit"]) / statistics.median(times["bare"])
    return {"median": of_medians - 1, "min": min(ratios) - 1, "max": max(ratios) - 1}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--taps", nargs="*", default=TAPS)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar in fit")
    return parser.parse_args()


def main() -> None:
    found = compare(parse())
    print(json.dumps(found, indent=2))
    for kind in ("overhead", "overhead_processor"):
        median, low, high = (100 * found[kind][key] for key in ("median", "min", "max"))
        print(f"{kind}: fit {median:+.1f} % beyond the bare loop ({low:+.1f} to {high:+.1f})", file=sys.stderr)


if __name__ == "__main__":
    main()
