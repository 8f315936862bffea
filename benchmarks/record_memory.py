"""What ``record`` adds to a process's memory: the logits, and otherwise the same at n and at 4n images.

Each size runs several times in a process of its own, whose highest resident memory is read at the end; images
and logits, which must grow, are taken off. Equal runs differ by some 15 MiB, as the allocator has it.
Prints JSON on standard output and a sentence on standard error::

    python benchmarks/record_memory.py --network resnet20 --images 2000
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

import torch

from shallowdeep.data.images import ImageSet
from shallowdeep.networks.attach import attach
from shallowdeep.networks.zoo import load_network
from shallowdeep.traces.record import record

MIB = 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def measure(args: argparse.Namespace, num_images: int) -> dict[str, float]:
    """Record that many images in this process."""
    torch.set_num_threads(args.threads)
    sdn = attach(load_network(args.network, num_classes=100), torch.zeros(1, 3, 32, 32), taps=args.taps or ("layer1",))
    pixels = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8)
    images = ImageSet(
        pixels,
        torch.zeros(num_images, dtype=torch.int64),
        torch.arange(num_images),
        (0.5,) * 3,
        (0.25,) * 3,
        tuple(map(str, range(100))),
        split="test",
    )
    before = peak_mib()
    trace = record(sdn, images, batch_size=args.batch_size)
    return {
        "images": num_images,
        "before_mib": before,
        "peak_mib": peak_mib(),
        "pixels_mib": pixels.nbytes / MIB,
        "logits_mib": sum(x.nbytes for x in trace.logits) / MIB,
    }


def spawn(num_images: int) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", str(num_images)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rest(size: dict[str, float]) -> float:
    """The peak without what must grow."""
    return size["peak_mib"] - size["pixels_mib"] - size["logits_mib"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--taps", nargs="*", help="names of submodules (layer1)")
    parser.add_argument("--images", type=int, default=2000, help="n; the other size is 4n")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.alone:
        print(json.dumps(measure(args, args.alone)))
        return
    rests = {n: [rest(spawn(n)) for _ in range(args.repeats)] for n in (args.images, 4 * args.images)}
    (small, few), (large, many) = rests.items()
    grown = statistics.median(many) - statistics.median(few)
    print(json.dumps({"settings": vars(args), "rest_mib": rests, "rest_grown_mib": grown}, indent=2))
    print(
        f"{small} -> {large} images: without pixels and logits, the peak goes from {min(few):.0f}-{max(few):.0f} "
        f"to {min(many):.0f}-{max(many):.0f} MiB in {args.repeats} runs each, {grown:+.0f} MiB between medians.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
