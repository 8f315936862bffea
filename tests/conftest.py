"""What several rooms' tests need."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from operator_schema import define_operators

define_operators()  # before anything imports torchvision: timm, Lightning, the image networks of transformers

settings.register_profile("shallowdeep", deadline=None)  # a busy machine's pauses are no failures
settings.load_profile("shallowdeep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that no worker is left alone with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is there, driven by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file or an address; what the console says and what is asked for is kept with the page."""
    contexts = []

    def open_(place: Path | str, width: int = 1200, colour: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colour)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.said, page.asked_for = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked_for.append(request.url))
        page.goto(place.as_uri() if isinstance(place, Path) else place)
        # The pages' policy forbids Playwright's own waiting for conditions.
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return page

    yield open_
    for context in contexts:
        context.close()
