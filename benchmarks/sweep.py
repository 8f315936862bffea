"""The exact sweep of all confidence thresholds, beside the naive way: one replay per threshold, over 1,000 of them.

10,000 samples x 7 exits x 100 classes, on one thread; every timing starts from a fresh Trace, softmax included.
The two ways take turns in one process, so that their ratio holds on a busy machine too. A round replays 20
of the 1,000 thresholds and counts 50 times their time: every replay does the same work::

    python benchmarks/sweep.py
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from shallowdeep.networks.costs import Costs
from shallowdeep.policies.replay import Curve, sweep, sweep_confidence
from shallowdeep.policies.rules import Confidence
from shallowdeep.traces.trace import Trace

N, NUM_EXITS, NUM_CLASSES = 10_000, 7, 100
NUM_THRESHOLDS, NUM_TIMED = 1_000, 20
ROUNDS = 7
TARGET_S = 0.2


def make_trace() -> Trace:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(NUM_CLASSES, (N,), generator=random)
    truth = torch.nn.functional.one_hot(labels, NUM_CLASSES)
    logits = tuple((exit + 1) * truth + torch.randn(N, NUM_CLASSES, generator=random) for exit in range(NUM_EXITS))
    flops = tuple(range(100, 100 * (NUM_EXITS + 1), 100))
    heads = (*(5,) * (NUM_EXITS - 1), 0)
    return Trace(logits, labels, torch.arange(N), Costs(flops, heads, flops, heads))


def timed(way: Callable[[Trace], Curve], trace: Trace) -> tuple[float, Curve]:
    fresh = replace(trace)  # nothing cached from the round before
    start = time.perf_counter()
    curve = way(fresh)
    return time.perf_counter() - start, curve


def naive(trace: Trace) -> Curve:
    return sweep(trace, Confidence, torch.linspace(0, 1.001, NUM_TIMED).tolist())


def main() -> None:
    torch.set_num_threads(1)
    trace = make_trace()
    timed(sweep_confidence, trace)  # warm up
    exact_s, naive_s = [], []
    for _ in range(ROUNDS):
        seconds, curve = timed(sweep_confidence, trace)
        exact_s.append(seconds)
        naive_s.append(timed(naive, trace)[0] * NUM_THRESHOLDS / NUM_TIMED)
    figures = {
        "samples": N,
        "exits": NUM_EXITS,
        "classes": NUM_CLASSES,
        "exact_s": median(exact_s),
        "exact_s_all": exact_s,
        "exact_thresholds": len(curve.thresholds),
        "target_s": TARGET_S,
        "naive_s": median(naive_s),
        "naive_s_all": naive_s,
        "naive_thresholds": NUM_THRESHOLDS,
        "naive_over_exact": median(naive_s) / median(exact_s),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
