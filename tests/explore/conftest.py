"""Runs that were really trained, and the page served for a while."""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from studies.tiny_network import RUN

from shallowdeep.config import load_config
from shallowdeep.explore.app import make_app
from shallowdeep.explore.server import address_of, listen
from shallowdeep.explore.setting import Setting, open_setting
from shallowdeep.runs.run import Run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small network with two internal exits on real digits, recorded and calibrated; not to be changed."""
    changes = RUN | {"strategy": "joint", "taps": ("1", "3")}
    run = Run.create(tmp_path_factory.mktemp("explored") / "digits", load_config(changes=changes))
    run.fit(progress=False)
    run.record(progress=False)
    run.calibrate(max_cost=0.5)
    return run


@pytest.fixture(scope="session")
def setting(digits: Run) -> Setting:
    """What a page about that run needs."""
    return open_setting(digits)


@contextmanager
def served(setting: Setting, **options: Any) -> Iterator[str]:
    """The page's address, for as long as the context lasts."""
    with listen("127.0.0.1", 0) as door:
        config = uvicorn.Config(make_app(setting, **options), log_level="warning", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        try:
            yield address_of(door)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def address(setting: Setting) -> Iterator[str]:
    """The page of that run."""
    with served(setting) as address:
        yield address


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[str]]:
    """Serves a page for as long as a context lasts."""
    return served


@pytest.fixture
def serve_page() -> Iterator[Callable[..., str]]:
    """Serves pages until the test ends."""
    with ExitStack() as stack:
        yield lambda setting, **options: stack.enter_context(served(setting, **options))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Run], Run]:
    """Copies a run folder, to be changed."""

    def copy(run: Run) -> Run:
        shutil.copytree(run.folder, tmp_path / "copy")
        return Run.open(tmp_path / "copy")

    return copy
