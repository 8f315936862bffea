"""Which precision, memory format, number of threads and compiler setting trains fastest on this machine?

One joint training step (forward with all exits, loss, backward, clipping, optimiser) on batches of 128 random images,
every combination of settings in turn in each round::

    python benchmarks/training_settings.py --networks resnet20 vgg16 --threads 1 2 --processes 1 2 --rounds 5

Prints JSON on standard output: images per second of each combination (of all processes together), and its time for
an image over that of the recipe ``fast`` (float32, channels last, not compiled, the same threads and processes) in the
same round; with several processes, each a training with its share of the threads, also over that of one with all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from shallowdeep.inference.timing.speed import spread
from shallowdeep.networks.attach import attach
from shallowdeep.networks.zoo import load_network
from shallowdeep.provenance import describe_machine
from shallowdeep.training.prepared import quick_in_bf16
from shallowdeep.training.strategies import named_strategy

BATCH = 128
PRECISIONS = ("fp32", "bf16", "bf16 throughout")  # the last also where `fit` takes float32, because it is quicker there


def build_step(name: str, setting: dict[str, Any], device: str, keeping: ExitStack) -> Callable[[], None]:
    """A training step under some settings; its hooks stay on until ``keeping`` ends."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)
    sdn = attach(load_network(name, num_classes=10, image_size=32).to(device), images[:4]).train()
    if setting["channels_last"]:
        sdn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    phase = named_strategy("joint", sdn, "fast")[0]
    if setting["precision"] == "bf16":
        keeping.enter_context(quick_in_bf16(sdn, phase, torch.device(device), "bf16"))
    optimizer = phase.recipe.build_optimizer(list(sdn.parameters()))
    keeping.enter_context(sdn.tapped())
    model = torch.compile(sdn) if setting["compiled"] else sdn

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=setting["precision"] != "fp32"):
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


class SideBySide:
    """The same steps in several processes at once, each with its share of the threads; this one is among them.

    Args:
        name: of the network.
        settings: what ``build_step`` takes, one of each step.
        device: where they compute.
        processes: how many, this one counted.
    """

    def __init__(self, name: str, settings: list[dict[str, Any]], device: str, processes: int):
        context = multiprocessing.get_context("spawn")
        self._gate = context.Barrier(processes)
        self._going = context.Event()
        self._place, self._threads = context.Value("i", -1), context.Value("i", 1)
        shared = (self._gate, self._going, self._place, self._threads)
        self._others = [
            context.Process(target=_accompany, args=(name, settings, device, *shared), daemon=True)
            for _ in range(processes - 1)
        ]
        for other in self._others:
            other.start()

    def seconds(self, step: Callable[[], None], place: int, steps: int, threads: int) -> float:
        """Of a step in this process while all others do the same one, the mean of some."""
        torch.set_num_threads(threads)
        self._place.value, self._threads.value = place, threads
        self._going.set()
        self._gate.wait()
        try:
            return seconds(step, steps)
        finally:
            self._going.clear()
            self._gate.wait()  # for the steps that others have begun

    def end(self) -> None:
        """Let the other processes go."""
        self._place.value = -1
        self._gate.wait()
        for other in self._others:
            other.join()


def _accompany(name: str, settings: list[dict[str, Any]], device: str, gate: Any, going: Any, place: Any, threads: Any):
    with ExitStack() as keeping:
        steps = [build_step(name, setting, device, keeping) for setting in settings]
        while True:
            gate.wait()
            if place.value < 0:
                return
            torch.set_num_threads(threads.value)
            while going.is_set():
                steps[place.value]()
            gate.wait()


def measure(name: str, settings: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one network, with every number of threads and of processes that share them."""
    ways = [(threads, count) for threads in args.threads for count in args.processes if threads % count == 0]
    with ExitStack() as keeping:
        torch.compiler.reset()  # it remembers eight networks of one class, and runs a ninth one uncompiled
        torch.set_num_threads(max(args.threads))
        steps = [build_step(name, setting, args.device, keeping) for setting in settings]
        crowds = {count: SideBySide(name, settings, args.device, count) for count in {count for _, count in ways}}

        def one_round(steps_each: int) -> list[list[float]]:
            return [
                [
                    crowds[count].seconds(step, place, steps_each, threads // count) / count
                    for place, step in enumerate(steps)
                ]
                for threads, count in ways
            ]

        one_round(1)  # to warm up
        times = np.array([one_round(args.steps) for _ in range(args.rounds)])  # (rounds, ways, settings)
        for crowd in crowds.values():
            crowd.end()
    for way, (threads, count) in enumerate(ways):
        for place, setting in enumerate(settings):
            own = times[:, way, place]
            row = {
                "network": name,
                "threads": threads,
                "processes": count,
                **setting,
                "images_per_s": asdict(spread(BATCH / own)),
                "time_of_fast_fp32": asdict(spread(own / times[:, way, 0])),
            }
            if count > 1 and (threads, 1) in ways:
                row["time_of_one_process"] = asdict(spread(own / times[:, ways.index((threads, 1)), place]))
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg16"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=PRECISIONS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="that share the threads, each a training")
    parser.add_argument("--compile", action="store_true", help="also compiled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in a round")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    environment, rows = describe_machine(args.device), []
    settings = [
        {"precision": precision, "channels_last": last, "compiled": compiled}
        for precision, last, compiled in itertools.product(
            sorted({"fp32", *args.precisions}, reverse=True),  # fp32 comes first: all others are compared to it
            (True, False),
            (False, True) if args.compile else (False,),
        )
    ]
    for name in args.networks:
        for row in measure(name, settings, args):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    values = {
        "command": " ".join(["python", "benchmarks/training_settings.py", *sys.argv[1:]]),
        "environment": environment,
        "rows": rows,
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
