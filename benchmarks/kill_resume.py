"""Kill -9 at random moments and resume, until a hundred kills: what is left in the end, against runs left in peace.

A run trains ResNet-20 on 128 digits (strategy ``mixed``: two phases of two epochs), saves it and records three splits.
It is killed as often as its plan says, each time by a signal that nothing can catch: at a random time of training or
of recording, in the middle of writing a file (after a random number of its bytes), before or after a rename. Then it
goes on in peace, and weights, Traces and history are compared byte by byte with those of a run of the same seed that
nobody disturbed. One thread; PyTorch is imported once and every attempt is a fork::

    python benchmarks/kill_resume.py --kills 100 --seed 0 --out results/benchmarks/kill_resume.json
"""

import argparse
import json
import os
import platform
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import lightning_fabric  # noqa: F401  imported here once, not in every fork
import safetensors.torch
import torch

import shallowdeep.storage
from shallowdeep.config import RunConfig, load_config
from shallowdeep.data.samples import Splits
from shallowdeep.data.sources import load_data
from shallowdeep.runs.run import Run
from shallowdeep.traces.trace import Trace

SEEDS = 3  # so many different runs are repeated
KILLS_PER_RUN = 8
OPTIONS = {
    "taps": ["layer1.0", "layer2.1"], "strategy": "mixed", "threads": 1, "device": "cpu", "validate_every": 2,
    "recipe.epochs": 2, "recipe.batch_size": 32,
}  # fmt: skip
MOMENTS = {
    "fit": ["at a random time of training", "writing a checkpoint", "before renaming", "after renaming"],
    "record": ["at a random time of recording", "writing a Trace", "before renaming a Trace"],
}


@cache
def data() -> Splits:
    whole = load_data("digits")
    return replace(whole, train=whole.train.sample(128), val=whole.val.sample(64), test=whole.test.sample(64))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """A file whose writer is killed after some bytes."""

    def __init__(self, file, num_bytes: int):
        self.file, self.left, self.flush = file, num_bytes, file.flush

    def write(self, content) -> int:
        """Write what is left to write."""
        content = bytes(content)
        self.file.write(content[: self.left])
        self.left -= len(content)
        if self.left <= 0:
            self.file.flush()
            die()
        return len(content)


def arrange(moment: str, chance: random.Random) -> None:
    """Make this process die at a moment that is no point in time."""
    countdown = chance.randrange(2)  # of checkpoints, renames or Traces that go well before

    def is_due() -> bool:
        nonlocal countdown
        countdown -= 1
        return countdown < 0

    if moment == "writing a checkpoint":
        save, share = torch.save, chance.random()
        num_bytes = max(1, int(share * 2_300_000))  # of about so many

        def save_half(state, file):
            save(state, Dying(file, num_bytes) if is_due() else file)

        torch.save = save_half
    elif moment == "writing a Trace":
        save, share = safetensors.torch.save_file, chance.random()

        def save_part(tensors, path, metadata):
            if is_due():
                content = safetensors.torch.save(tensors, metadata)
                path.write_bytes(content[: max(1, int(share * len(content)))])
                die()
            save(tensors, path, metadata=metadata)

        shallowdeep.storage.save_file = save_part
    elif "renaming" in moment:
        rename, ending = Path.replace, ".safetensors" if "Trace" in moment else ".pt"
        before = moment.startswith("before")

        def rename_or_not(path, target):
            due = Path(target).suffix in (ending, ".jsonl") and is_due()
            if due and before:
                die()
            rename(path, target)
            if due:
                die()

        Path.replace = rename_or_not


def attempt(folder: Path, config: RunConfig, moment: str | None, chance: random.Random, stage) -> None:
    """In a process of its own: go on with a run, to its end or to its death."""
    Run.load_data = lambda self, net=None: data()
    run = Run.create(folder, config, resume=True)
    if moment in MOMENTS["fit"]:
        arrange(moment, chance)
    stage("f")
    run.fit(resume=True, progress=False)
    if moment in MOMENTS["record"]:
        arrange(moment, chance)
    stage("r")
    run.record(progress=False)
    stage("d")


def spawn(folder: Path, config: RunConfig, moment: str | None, seed: int, wait_s: float) -> tuple[int, str]:
    """An attempt in a fork, killed from here where its moment is a point in time.

    Returns:
        The exit status, and the stage it came to: ``f`` training, ``r`` recording, ``d`` done.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with redirect_stderr(sys.stdout):
            attempt(folder, config, moment, random.Random(seed), lambda word: os.write(writer, word.encode()))
        os._exit(0)
    os.close(writer)
    seen = ""
    if moment and "random time" in moment:
        wanted = "f" if moment in MOMENTS["fit"] else "r"
        while wanted not in seen and (word := os.read(reader, 1).decode()):
            seen += word
        time.sleep(wait_s)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen += os.read(reader, 9).decode()
    os.close(reader)
    return status, seen[-1:]


def result(folder: Path) -> dict[str, bytes]:
    """What a run leaves, the seconds of its epochs and the story of its starts left out."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    records = [json.loads(line) | {"seconds": 0} for line in found["history.jsonl"].decode().splitlines()]
    return found | {"history.jsonl": json.dumps(records).encode(), "environment.json": b"", "checkpoint.pt": b""}


def check_whole(folder: Path, expected: dict[str, bytes]) -> int:
    """Mismatches after a kill: what is there under its own name is whole, and is what it should be."""
    wrong = 0
    for path in [*folder.glob("*.safetensors"), *folder.glob("traces/*.safetensors")]:
        wrong += path.read_bytes() != expected[str(path.relative_to(folder))]
        if path.parent.name == "traces":
            Trace.load(path)
    if (folder / "checkpoint.pt").exists():
        torch.load(folder / "checkpoint.pt", weights_only=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data()
    chance, began = random.Random(options.seed), time.perf_counter()
    configs = [load_config(changes={**OPTIONS, "seed": seed}) for seed in range(SEEDS)]
    kills, mismatches, runs, leftovers, epochs = Counter(), 0, 0, 0, Counter()
    with tempfile.TemporaryDirectory() as place:
        expected, whole_s = [], []
        for number, config in enumerate(configs):
            start = time.perf_counter()
            assert spawn(Path(place) / f"whole{number}", config, None, 0, 0) == (0, "d")
            whole_s.append(time.perf_counter() - start)
            expected.append(result(Path(place) / f"whole{number}"))
        print(f"{SEEDS} runs in peace take {min(whole_s):.1f} to {max(whole_s):.1f} s each", flush=True)
        while kills.total() < options.kills:
            folder, which = Path(place) / f"run{runs}", runs % SEEDS
            plan = [chance.choice(MOMENTS["fit"]) for _ in range(KILLS_PER_RUN - 2)]
            plan += [chance.choice(MOMENTS["record"]) for _ in range(2)]
            for moment in plan[: options.kills - kills.total()]:
                if moment in MOMENTS["fit"] and (folder / "sdn.safetensors").exists():
                    continue  # it is trained
                share = 0.5 if moment in MOMENTS["fit"] else 0.15
                seed, wait_s = chance.randrange(2**32), chance.random() * share * max(whole_s)
                status, stage = spawn(folder, configs[which], moment, seed, wait_s)
                assert status in (0, -9), (status, moment)
                if status == -9:
                    if "random time" in moment:
                        moment = MOMENTS["record" if stage in "rd" else "fit"][0]
                    kills[moment] += 1
                    leftovers += len(list(folder.rglob("*.partial")))
                    history = folder / "history.jsonl"
                    epochs[len(history.read_text().splitlines()) if history.exists() else 0] += 1
                    mismatches += check_whole(folder, expected[which])
            assert spawn(folder, configs[which], None, 0, 0) == (0, "d")
            mismatches += result(folder) != expected[which]
            runs += 1
            print(f"{runs} runs, {kills.total()} kills, {mismatches} mismatches", flush=True)
    figures = {
        "command": shlex.join(["python", *sys.argv]),
        "kills": kills.total(),
        "kills_by_moment": dict(sorted(kills.items())),
        "kills_by_epochs_done": dict(sorted(epochs.items())),
        "half_written_files_left_by_kills": leftovers,
        "killed_runs": runs,
        "runs_in_peace": SEEDS,
        "mismatches": mismatches,
        "compared": "weights, three Traces, history and the names of all files, byte by byte",
        "seconds": round(time.perf_counter() - began),
        "seconds_of_a_run_in_peace": [round(seconds, 2) for seconds in whole_s],
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(mismatches > 0)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
