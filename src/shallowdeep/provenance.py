"""Hardware, versions, data and command: what a figure's reader needs to know, and what a run keeps of each start."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from shallowdeep.config import RunConfig
from shallowdeep.data.samples import SPLITS, IndexedSamples, Splits
from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.processes import gather, is_first, shard, wait_for_all
from shallowdeep.storage import read_json, write_json, write_text
from shallowdeep.training.features import drop_features
from shallowdeep.versions import versions_of


def describe_environment(data: Splits, device: str) -> dict[str, Any]:
    """Hardware, versions, data and command: what a figure's reader needs to know."""
    fingerprints = {split: part.md5() for split in SPLITS if isinstance(part := getattr(data, split), IndexedSamples)}
    return {**describe_machine(device), "data_md5": fingerprints}


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware, versions and command, for a figure that rests on no data."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": _revision(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions_of(("shallowdeep", "torch", "numpy", "lightning-fabric")),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": shard()[1],
        "accelerator": torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None,
    }


@contextmanager
def trained_here(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder; of several processes, the first one does.

    Raises:
        ConfigError: another training is at it.
    """
    lock = folder / "fit.lock"
    held = FileLock(lock)
    refused = False
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            refused = True
    if any(gather(refused)):  # the others would wait for the first one
        raise ConfigError(f"another process trains in {folder}. Wait for its end, or name another folder.")
    try:
        yield
    finally:
        if is_first():
            lock.unlink(missing_ok=True)
            held.release()
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def started(folder: Path, config: RunConfig, data: Splits, origins: Sequence[RunConfig] = ()) -> Iterator[None]:
    """Write what a run is while it trains; where not even one epoch comes of it, leave no trace of it.

    Of several processes, the first one writes.

    Args:
        folder: of the run; what earlier starts said of their environment is kept.
        config: of the run.
        data: that it learns from.
        origins: of the runs whose weights it starts from, which may be gone one day.

    Raises:
        FileFormatError: what earlier starts left is damaged.
    """
    wait_for_all()  # all have seen the folder as it was
    if not is_first():
        yield
        return
    environment = describe_start(folder, describe_environment(data, config.device))
    if config.init is not None:
        environment["origins"] = [origin.model_dump(mode="json") for origin in origins]
    names = ("config.json", "environment.json", "history.jsonl")
    before = {name: (folder / name).read_text() for name in names if (folder / name).exists()}
    try:
        write_json(folder / "config.json", config.model_dump(mode="json"))
        write_json(folder / "environment.json", environment)
        yield
    except Exception:
        if not (folder / "checkpoint.pt").exists():
            drop_features(folder)
            for name in names:
                (folder / name).unlink(missing_ok=True)
                if name in before:  # an archived run has no checkpoint, and is a run all the same
                    write_text(folder / name, before[name])
        raise


def describe_start(folder: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """An environment, with those of a run's earlier starts as ``"earlier"``.

    Raises:
        FileFormatError: what they left is damaged.
    """
    path = folder / "environment.json"
    if not path.exists():
        return environment
    before = read_json(path)
    if not isinstance(before, dict) or not isinstance(before.get("earlier", []), list):
        raise FileFormatError(f"{path} describes no environment. Remove it to go on without what it said.")
    before.pop("origins", None)  # the same at every start
    return environment | {"earlier": [*before.pop("earlier", []), before]}


def _revision() -> str | None:
    """The commit of the checkout this package runs from, if it does."""
    git, root = shutil.which("git"), Path(__file__).parents[2]
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
