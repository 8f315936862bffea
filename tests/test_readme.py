"""Every Python block of README and docs runs, and every command in README exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from shallowdeep.cli import app, study_app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block, tmp_path):
    # A process of its own: without the run-time type checks of this suite, as a reader would run it.
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the suite's workers share the cores already
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip(), "a block that prints nothing shows nothing"


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


COMMANDS = {
    page: re.findall(r"\bshallowdeep ((?:study )?[a-z]+)\b([^#\n&|]*)", "\n".join(blocks).replace("\\\n", " "))
    for page in [*PAGES, ROOT / "results" / "README.md"]
    if (blocks := re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL))
}


def test_readme_goes_through_all_of_the_chain():
    assert {command for command, _ in COMMANDS[ROOT / "README.md"]} >= {
        "probe", "fit", "record", "analyze", "calibrate", "replay",
    }  # fmt: skip


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page):
    known = {
        f"{before}{command.callback.__name__}": [o for p in _parameters(command) for o in p]
        for before, group in {"": app, "study ": study_app}.items()
        for command in group.registered_commands
    }
    for command, rest in COMMANDS[page]:
        assert command in known
        unknown = set(re.findall(r"(?<!\S)--[\w-]+", rest)) - set(known[command]) - {"--help"}
        assert not unknown, f"{command} has no {unknown}"


def _parameters(command):
    click_command = typer.main.get_command_from_info(command, pretty_exceptions_short=True, rich_markup_mode=None)
    return [parameter.opts for parameter in click_command.params]
