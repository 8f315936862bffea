"""Run an exported Shallow-Deep Network stage by stage, and let every sample leave as soon as it may.

It needs numpy and onnxruntime alone: every exported folder holds it as ``run.py``, with all of the runner in one file.

    python run.py images.npy --out answers.npz
    python run.py --bench
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shallowdeep.inference.answers import Answers
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.manifest import FORMS
from shallowdeep.inference.runner.sessions import RunnerError, Settings, load_onnxruntime
from shallowdeep.inference.runner.timing import bench


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", nargs="?", type=Path, help="a .npy file, rows first; of several inputs an .npz file")
    parser.add_argument("--out", type=Path, help="where the answers go, as .npz; else a summary is printed alone")
    parser.add_argument("--bench", action="store_true", help="time this folder on this machine")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="default: this file's")
    parser.add_argument("--form", choices=FORMS, default="stages", help="what to run (default: stages)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="another threshold")
    parser.add_argument("--micro-batch", type=int, default=32, help="rows run at a time (default: 32)")
    parser.add_argument(
        "--provider", action="append", default=[], help="of onnxruntime (default: CPUExecutionProvider)"
    )
    parser.add_argument("--device-id", type=int, default=0, help="number of the GPU (default: 0)")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--spinning", action="store_true", help="threads wait actively between runs, too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sizes to time")
    parser.add_argument("--repeats", type=int, default=20, help="of every timing")
    given = parser.parse_args(arguments)
    try:
        # alone in this process: one pool for all sessions
        alone = hasattr(load_onnxruntime(), "set_global_thread_pool_sizes")
        providers = tuple(given.provider) or ("CPUExecutionProvider",)
        settings = Settings(given.threads, providers, given.spinning, alone, given.device_id)
        if given.bench:
            print(bench(given.folder, sizes=given.batch, repeats=given.repeats, settings=settings))
            return 0
        if given.images is None:
            raise RunnerError("name a file of images, or pass --bench.")
        runner = Runner(
            given.folder,
            given.form,
            thresholds=dict(map(_threshold, given.set)),
            micro_batch=given.micro_batch,
            settings=settings,
        )
        answers = runner(_load(given.images))
        if given.out is not None:
            _save(given.out, answers)
        print(answers)
        return 0
    except (RunnerError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


def _threshold(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise RunnerError(f"a threshold is set as NAME=NUMBER, got '{text}'.") from None


def _load(path: Path) -> Any:
    try:
        found = np.load(path, allow_pickle=False)
        return found if isinstance(found, np.ndarray) else dict(found)
    except FileNotFoundError:
        raise RunnerError(f"no file {path}.") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunnerError(f"{path} is no .npy or .npz file of numbers ({error}).") from None


def _save(path: Path, answers: Answers) -> None:
    """Write the answers as a whole, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **vars(answers))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
