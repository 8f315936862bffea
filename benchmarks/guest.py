"""Does an application's own ONNX Runtime session keep its speed beside an engine in the same process?

Both are of the run's network, on the same cores. In every round the application's session is timed three times: with
nothing beside it, right after a batch of the engine (whose threads would still spin if it let them), and right after
one of an engine whose threads do spin, for comparison::

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
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from shallowdeep.inference.engine import Engine
from shallowdeep.inference.onnx.export import export
from shallowdeep.inference.speed import spread
from shallowdeep.policies.rules import Confidence
from shallowdeep.provenance import describe_machine
from shallowdeep.runs import Run


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Of a call, the mean of some."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) * 1000 / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run.open(args.run)
    sdn, data = run.load(), run.load_data()
    images = next(iter(data.split("test").batches(args.batch_size))).inputs
    policy = Confidence(0.9)
    with tempfile.TemporaryDirectory() as folder:
        never = export(sdn, Confidence(2.0), Path(folder) / "out", example_inputs=images[:4])
        # what an application would have: a session of its own, with ONNX Runtime's defaults
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        session = onnxruntime.InferenceSession(str(never.folder / "batched.onnx"), options)
        feeds = {node.name: images.numpy() if node.shape else np.float32(2.0) for node in session.get_inputs()}

        def own() -> object:
            return session.run(None, feeds)

        engines = {
            "beside": Engine(sdn, policy, backend="onnx", example_inputs=images[:4]),
            "beside_spinning": Engine(sdn, policy, backend="onnx", example_inputs=images[:4], spinning=True),
        }
        for call in (own, *(lambda engine=engine: engine(images) for engine in engines.values())):
            milliseconds(call, 3)
        times: dict[str, list[float]] = {"alone": [], **{name: [] for name in engines}}
        for _ in range(args.rounds):
            time.sleep(0.2)  # whatever spun has gone to sleep
            times["alone"].append(milliseconds(own, args.repeats))
            for name, engine in engines.items():
                time.sleep(0.2)
                found = []
                for _ in range(args.repeats):
                    engine(images)
                    found.append(milliseconds(own, 1))
                times[name].append(float(np.mean(found)))
    ratios = {name: spread(np.divide(times[name], times["alone"])) for name in engines}
    values = {
        "command": " ".join(["python", "benchmarks/guest.py", *sys.argv[1:]]),
        "environment": describe_machine("cpu"),
        "network": run.config.network,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "milliseconds": {name: spread(found).__dict__ for name, found in times.items()},
        "ratio_to_alone": {name: found.__dict__ for name, found in ratios.items()},
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
