"""Which precision, memory format, number of threads and compiler setting trains fastest on this machine?

One joint training step (forward with all exits, loss, backward, clipping, optimiser) on batches of 128 random images,
every combination of settings in turn in each round::

    python benchmarks/training_settings.py --networks resnet20 vgg16 --threads 1 2 --rounds 5

Prints JSON on standard output: images per second of each combination, and its time over that of the recipe ``fast``
(float32, channels last, not compiled, the same threads) in the same round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from shallowdeep.inference.timing.speed import spread
from shallowdeep.networks.attach import attach
from shallowdeep.networks.zoo import load_network
from shallowdeep.provenance import describe_machine
from shallowdeep.training.strategies import named_strategy

BATCH = 128


def build_step(name: str, setting: dict[str, Any], device: str, keeping: ExitStack) -> Callable[[], None]:
    """A training step under some settings; its hooks stay on until ``keeping`` ends."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)
    sdn = attach(load_network(name, num_classes=10, image_size=32).to(device), images[:4]).train()
    if setting["channels_last"]:
        sdn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    phase = named_strategy("joint", sdn, "fast")[0]
    optimizer = phase.recipe.build_optimizer(list(sdn.parameters()))
    keeping.enter_context(sdn.tapped())
    model = torch.compile(sdn) if setting["compiled"] else sdn

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=setting["precision"] == "bf16"):
            logits = model(images)
        loss = phase.objective([x.float() for x in logits], labels, 0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sdn.parameters(), phase.recipe.clip_norm or 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], steps: int) -> float:
    """Of a step, the mean of some."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg16"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compile", action="store_true", help="also compiled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in a round")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = []
    settings = [
        {"precision": precision, "channels_last": last, "compiled": compiled}
        for precision, last, compiled in itertools.product(
            sorted({"fp32", *args.precisions}, reverse=True),  # fp32 comes first: all others are compared to it
            (True, False),
            (False, True) if args.compile else (False,),
        )
    ]
    for name in args.networks:
        with ExitStack() as keeping:
            torch.compiler.reset()  # it remembers eight networks of one class, and runs a ninth one uncompiled
            torch.set_num_threads(max(args.threads))
            steps = [build_step(name, setting, args.device, keeping) for setting in settings]
            for threads in args.threads:
                torch.set_num_threads(threads)
                for step in steps:
                    seconds(step, 1)  # to warm up
                times = np.array([[seconds(step, args.steps) for step in steps] for _ in range(args.rounds)])
                for place, setting in enumerate(settings):
                    row = {
                        "network": name,
                        "threads": threads,
                        **setting,
                        "images_per_s": asdict(spread(BATCH / times[:, place])),
                        "time_of_fast_fp32": asdict(spread(times[:, place] / times[:, 0])),
                    }
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    values = {
        "command": " ".join(["python", "benchmarks/training_settings.py", *sys.argv[1:]]),
        "environment": describe_machine(args.device),
        "rows": rows,
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
