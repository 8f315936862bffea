"""What several rooms' tests need."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from operator_schema import define_operators

define_operators()  # before anything imports torchvision: timm, Lightning, the image networks of transformers

settings.register_profile("shallowdeep", deadline=None)  # a busy machine's pauses are no failures
settings.load_profile("shallowdeep")


@pytest.fixture(scope="session")
def cifar_dir() -> Path:
    """Folder that holds cifar10/ and cifar100/, complete."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SHALLOWDEEP_DATA") or beside)
    if not (folder / "cifar10").is_dir() or not (folder / "cifar100").is_dir():
        pytest.skip(f"no complete CIFAR under {folder}")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers share the cores; and sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line as the entry point does: exit code, standard output, standard error."""
    from shallowdeep.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shallowdeep", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capsys.readouterr()

    return run
