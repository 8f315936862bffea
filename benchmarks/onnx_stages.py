"""What ONNX Runtime's settings and layout are worth to the stages of a network.

All stages run one after another on one batch, nobody leaving: as the engine runs them, with threads that sleep as soon
as they have no work (not only after a run), with threads that spin on after a run, and without the pooling of one pixel
that keeps residual sums in the blocked layout. In turn, in another order each round::

    python benchmarks/onnx_stages.py RUN --threads 2 --rounds 15

Prints JSON on standard output: median milliseconds, and the ratios to the engine's way within a round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from shallowdeep.inference.cascade import Values
from shallowdeep.inference.onnx.convert import convert
from shallowdeep.inference.onnx.layout import kept_blocked
from shallowdeep.inference.runner.sessions import Settings
from shallowdeep.inference.runner.stages import OnnxStages
from shallowdeep.inference.timing.speed import spread
from shallowdeep.policies.rules import Confidence
from shallowdeep.provenance import describe_environment
from shallowdeep.runs.run import Run
from shallowdeep.versions import versions_of

ENGINE, WARM_UP, SAMPLES = "as the engine", 2, 64  # samples at least in a round


def asleep(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def milliseconds(stages: OnnxStages, inputs: Values) -> float:
    """Of a batch through all stages."""
    repeats = max(1, SAMPLES // len(inputs["inputs"]))
    started = time.perf_counter()
    for _ in range(repeats):
        values = inputs
        for stage in range(len(stages.exits)):
            values = stages.run(stage, values).values
    return (time.perf_counter() - started) * 1000 / repeats


def in_turn(ways: dict[str, OnnxStages], inputs: Values, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    names: Sequence[str] = list(ways)
    for number in range(-WARM_UP, rounds):
        for name in np.roll(names, number):
            time.sleep(0.1)  # whatever spun has gone to sleep
            found = milliseconds(ways[name], inputs)
            if number >= 0:
                times[name].append(found)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run.open(args.run)
    sdn = run.load()
    data = run.load_data(sdn.backbone)
    images = next(iter(data.split("test").batches(max(args.batch_sizes)))).inputs
    converted = convert(sdn, Confidence(2.0), images[:4])
    exits = [model.exit for model in converted.models]
    unblocked = [model.model.SerializeToString() for model in converted.models]
    blocked = [kept_blocked(model).model.SerializeToString() for model in converted.models]

    def stages(models: list[bytes], *, spinning: bool = False) -> OnnxStages:
        return OnnxStages(models, exits, {"threshold": 2.0}, Settings(threads=args.threads, spinning=spinning))

    ways = {
        ENGINE: stages(blocked),
        "threads sleep within a run": stages(blocked),
        "threads spin after a run": stages(blocked, spinning=True),
        "sums not blocked": stages(unblocked),
    }
    ways["threads sleep within a run"].sessions = [asleep(model, args.threads) for model in blocked]
    found = {}
    for size in args.batch_sizes:
        times = in_turn(ways, {"inputs": images[:size].numpy()}, args.rounds)
        found[size] = {
            name: {"milliseconds": asdict(spread(one)), "of_engine": asdict(spread(np.divide(one, times[ENGINE])))}
            for name, one in times.items()
        }
    values = {
        "command": " ".join(["python", "benchmarks/onnx_stages.py", *sys.argv[1:]]),
        "environment": describe_environment(data, "cpu"),
        "run_times": versions_of(("onnxruntime",)),
        "network": run.config.network,
        "threads": args.threads,
        "batch_sizes": found,
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
