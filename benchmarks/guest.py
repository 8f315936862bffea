"""Does an application's own ONNX Runtime session keep its speed beside an engine in the same process?

Both are of the run's network, on the same cores. In every round the application's session is timed three times, in
another order each time: with nothing beside it, right after a batch of the engine (whose threads would still spin if
it let them), and right after one of an engine whose threads do spin, for comparison::

    python benchmarks/guest.py runs/ic_only --threads 2 --rounds 30

Prints JSON on standard output: median milliseconds and the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from shallowdeep.inference.engine import Engine
from shallowdeep.inference.onnx.export import export
from shallowdeep.inference.timing.speed import spread
from shallowdeep.policies.rules import Confidence
from shallowdeep.provenance import describe_environment
from shallowdeep.runs.run import Run
from shallowdeep.versions import versions_of

WARM_UP = 2  # rounds that do not count


def milliseconds_after(other: Callable[[], object], call: Callable[[], object]) -> float:
    """Of a call, right after another that is not timed."""
    other()
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def rotated(names: list[str], by: int) -> list[str]:
    """Another one first each time."""
    by %= len(names)
    return names[by:] + names[:by]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5, help="in a round, whose mean counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run.open(args.run)
    sdn = run.load()
    data = run.load_data(sdn.backbone)
    images = next(iter(data.split("test").batches(args.batch_size))).inputs
    policy = Confidence(0.9)
    with tempfile.TemporaryDirectory() as folder:
        never = export(sdn, Confidence(2.0), Path(folder) / "out", example_inputs=images[:4])
        # what an application would have: a session of its own, with ONNX Runtime's defaults
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        session = onnxruntime.InferenceSession(str(never.folder / "batched.onnx"), options)
        feeds = {
            node.name: images.numpy() if node.shape else np.array(2.0, np.float32) for node in session.get_inputs()
        }

        def own() -> object:
            return session.run(None, feeds)

        engines = {
            "beside": Engine(sdn, policy, backend="onnx", example_inputs=images[:4]),
            "beside_spinning": Engine(sdn, policy, backend="onnx", example_inputs=images[:4], spinning=True),
        }
        before: dict[str, Callable[[], object]] = {"alone": lambda: None}  # what runs right before each timed call
        before |= {name: partial(engine, images) for name, engine in engines.items()}
        times: dict[str, list[float]] = {name: [] for name in before}
        for number in range(-WARM_UP, args.rounds):
            for name in rotated(list(before), number):
                time.sleep(0.2)  # whatever spun has gone to sleep
                found = [milliseconds_after(before[name], own) for _ in range(args.repeats)]
                if number >= 0:
                    times[name].append(float(np.mean(found)))
    ratios = {name: asdict(spread(np.divide(times[name], times["alone"]))) for name in engines}
    values = {
        "command": " ".join(["python", "benchmarks/guest.py", *sys.argv[1:]]),
        "environment": describe_environment(data, "cpu"),
        "run_times": versions_of(("onnxruntime",)),
        "network": run.config.network,
        "policy": policy.to_dict(),
        "batch_size": args.batch_size,
        "threads": args.threads,
        "milliseconds": {name: asdict(spread(found)) for name, found in times.items()},
        "ratio_to_alone": ratios,
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
