import json

import pytest
from report.browsing import assert_replays, assert_whole, set_threshold

from shallowdeep import demo
from shallowdeep.policies.rules import Confidence


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """The demo with one epoch each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "EPOCHS", {"plain": 1, "ic_only": 1, "joint": 1})
        folder = tmp_path_factory.mktemp("demo")
        lines: list[str] = []
        runs = demo.run_demo(folder, say=lines.append)
        again: list[str] = []
        demo.run_demo(folder, say=again.append, resume=True)
    return runs, lines, again


def test_three_runs_whole(short_demo):
    runs, _, _ = short_demo
    assert list(runs) == ["plain", "ic_only", "joint"]
    for strategy, names in [
        ("plain", {"overthinking"}),
        ("joint", {"overthinking", "confusion", "budgets", "calibration", "replay"}),
    ]:
        found = {path.stem for path in (runs[strategy].folder / "results").iterdir()}
        assert found == names


def test_three_sentences_say_what_the_files_say(short_demo):
    runs, lines, _ = short_demo
    sentences = [line for line in lines if not line.startswith(("plain:", "ic_only:", "joint:"))]
    wasteful = json.loads((runs["ic_only"].folder / "results" / "overthinking.json").read_text())["wasteful"]
    assert f"{100 * wasteful:.1f} % were right at an exit before that" in sentences[0]
    assert "destructive overthinking" in sentences[1]
    assert "trained jointly" in sentences[2]


def test_it_ends_with_the_report(short_demo):
    runs, lines, _ = short_demo
    path = runs["plain"].folder.parent / "report.html"
    assert lines[-1] == f"{path} ({path.stat().st_size / 1e6:.1f} MB) opens in any browser."
    page = path.read_text(encoding="utf-8")
    assert all(f">{name}</button>" in page for name in runs)
    assert page.count("data:image/png;base64,") > 20


@pytest.mark.slow
def test_its_report_is_alive(short_demo, open_page):
    runs, _, _ = short_demo
    page, test = open_page(runs["plain"].folder.parent / "report.html"), runs["ic_only"].trace("test")
    assert_replays(page.locator("[data-run=run0]"), test, runs["ic_only"].policy())
    assert_replays(set_threshold(page, "run0", 0.4), test, Confidence(0.4))
    assert_whole(page)


def test_a_second_time_it_only_reads(short_demo):
    _, lines, again = short_demo
    assert again[-4:] == lines[-4:]
