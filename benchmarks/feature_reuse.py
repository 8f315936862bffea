"""IC-only training on recorded features against running the frozen network in every epoch: accuracy and time.

The exits of a trained run are trained anew, online and on each number of recorded passes, from the same initial
weights::

    python benchmarks/feature_reuse.py runs/plain --passes 0 1 2 4 8 --epochs 10 --threads 1

Prints JSON on standard output. Seconds are of the processor: on a machine that others use, the clock on the wall
says little; with one thread they are the same on an idle one. Recording is timed apart from training: a folder of
features serves every strategy that leaves the backbone alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from shallowdeep.data.samples import Splits
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.provenance import describe_environment
from shallowdeep.runs.run import Run
from shallowdeep.traces.record import record
from shallowdeep.training.features import FeatureReuse
from shallowdeep.training.loop import fit


def build(run: Run, data: Splits, seed: int) -> ShallowDeepNetwork:
    """The run's backbone with fresh exits."""
    config = run.config.model_copy(update={"strategy": "ic_only", "init": str(run.folder), "seed": seed, "taps": None})
    return Run(run.folder, config).build(data)


def measure(sdn: ShallowDeepNetwork, data: Splits, options: dict[str, Any]) -> dict[str, Any]:
    """Train the exits; seconds of the processor, and accuracy of every exit."""
    started = time.process_time()
    fit(sdn, data, strategy="ic_only", validate_every=0, progress=False, **options)
    seconds = time.process_time() - started
    correct = {split: record(sdn, data.split(split)).correct.double().mean(0).tolist() for split in ("val", "test")}
    return {"processor_seconds": seconds, **{f"{split}_accuracy": found for split, found in correct.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run whose backbone is trained")
    parser.add_argument("--passes", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="0: online")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run.open(args.run)
    data = run.load_data()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for passes in sorted(args.passes):
                reuse = FeatureReuse(passes=passes, folder=f"{folder}/{seed}", dtype=args.dtype)
                options = {"epochs": args.epochs, "seed": seed, "features": reuse, "device": "cpu"}
                first = measure(build(run, data, seed), data, options)
                # What was not recorded yet was recorded in the first; again, and only training is left.
                again = measure(build(run, data, seed), data, options) if passes else first
                trained = again["processor_seconds"]
                row = {"seed": seed, "passes": passes, **again, "newly_recorded_seconds": None}
                if passes:
                    row["newly_recorded_seconds"] = first["processor_seconds"] - trained
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    values = {
        "command": " ".join(["python", "benchmarks/feature_reuse.py", *sys.argv[1:]]),
        "environment": describe_environment(data, "cpu"),
        "network": run.config.network,
        "rows": rows,
    }
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    main()
