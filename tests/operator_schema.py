"""Lets PyPI's torchvision import beside a CPU-only PyTorch, for tests and benchmarks; the package never does this.

That torchvision's compiled operators ask for CUDA and do not load, and its import then fails at the first operator it
describes (``operator torchvision::nms does not exist``), which takes timm, Lightning and the image networks of
transformers with it. The schemas alone are enough for it to import: no network here calls the operators.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")  # what torchvision/_meta_registrations.py describes even where they did not load


def define_operators() -> list[str]:
    """Define the operators that are missing; before torchvision is imported.

    Returns:
        The operators that were defined: none where torchvision is not installed, or loads by itself.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations or _loads(Path(found.submodule_search_locations[0])):
        return []
    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        torch.library.define(f"torchvision::{name}", SCHEMA)
    return missing


def _loads(folder: Path) -> bool:
    try:
        torch.ops.load_library(next(folder.glob("_C*")))
    except (StopIteration, OSError):
        return False
    return True
