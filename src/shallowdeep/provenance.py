"""Hardware, versions, data and command: what a figure's reader needs to know."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shallowdeep.data.samples import SPLITS, IndexedSamples, Splits
from shallowdeep.processes import shard


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
        "versions": {name: version(name) for name in ("shallowdeep", "torch", "numpy", "lightning-fabric")},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": shard()[1],
        "accelerator": torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else None,
    }


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
