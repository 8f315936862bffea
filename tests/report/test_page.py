"""The page in a real browser: Debian's Chromium, driven by Playwright."""

from dataclasses import replace

import pytest
from reference import make_trace
from report.browsing import ROUNDING, assert_replays, assert_whole, numbers_of, set_threshold, settle

from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence
from shallowdeep.report.html import write_report
from shallowdeep.runs.run import Run


@pytest.fixture(scope="module")
def digits_page(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    report = write_report([digits["plain"], digits["joint"]], out)
    assert not report.left_out
    return out


@pytest.mark.slow
def test_the_slider_replays(digits, digits_page, open_page):
    page, test = open_page(digits_page), digits["joint"].trace("test")
    chapter = page.locator("[data-run=run1]")
    assert_replays(chapter, test, digits["joint"].policy())
    exactly = test.confidences[17, 0].item()  # who is exactly as sure as asked for leaves
    for threshold in (0.0, 0.35, 0.8, exactly, exactly + 1e-10, 1.01):  # float32 tells the two apart no more
        assert_replays(set_threshold(page, "run1", threshold), test, Confidence(threshold))
    chapter.locator("input[type=range]").fill("0.6")
    assert chapter.locator("input[type=number]").input_value() == "0.6"
    settle(page)
    assert_replays(chapter, test, Confidence(0.6))
    drawn = page.evaluate("document.querySelector('[data-plot=run1-curve]').data.at(-1)")
    assert drawn["x"][0] == pytest.approx(100 * replay(test, Confidence(0.6)).cost)
    assert "not a fair figure" in chapter.locator("[data-words]").inner_text()
    chapter.get_by_role("button", name="Back").click()
    settle(page)
    assert_replays(chapter, test, digits["joint"].policy())
    assert "validation" in chapter.locator("[data-words]").inner_text()
    assert page.said == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "colour"), [(1200, "light"), (380, "dark")])
def test_everything_is_drawn_and_nothing_is_asked_for(digits_page, open_page, width, colour):
    page = open_page(digits_page, width, colour)
    plots = page.locator("[data-run=run1] .plot, #compare ~ figure .plot")
    assert plots.count() == 8
    assert page.locator(".plot svg.main-svg:visible").count() >= 8
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="plain", exact=True).click()
    assert page.locator("[data-run=run1]").is_hidden()
    assert_whole(page)


@pytest.mark.slow
def test_some_exits_switched_off_and_the_most_confident_answer(make_run, tmp_path, open_page):
    """Also with agreement instead of accuracy, where there are no labels."""
    policy = Confidence(0.6, exits=(0, 2), answer="most_confident")
    unlabelled = {split: replace(make_trace(60, seed=3), labels=None) for split in ("train", "val", "test")}
    runs = [make_run("some", policy=policy), make_run("unlabelled", **unlabelled)]
    write_report(runs, tmp_path / "report.html", galleries=False)
    page = open_page(tmp_path / "report.html")
    for threshold in (0.5, 0.9, 1.01):
        chapter = set_threshold(page, "run0", threshold)
        assert_replays(chapter, runs[0].trace("test"), replace(policy, threshold=threshold))
    page.get_by_role("button", name="unlabelled").click()
    live, _ = numbers_of(set_threshold(page, "run1", 0.7))
    assert live["agreement"] == pytest.approx(replay(runs[1].trace("test"), Confidence(0.7)).agreement, abs=ROUNDING)
    assert page.said == []


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.parametrize("name", ["joint", "distil"])
def test_the_pages_of_real_images(repository, cifar_dir, tmp_path, open_page, monkeypatch, name):
    """ResNet-56 on CIFAR-10, as it is kept beside the package."""
    monkeypatch.setenv("SHALLOWDEEP_DATA", str(cifar_dir))
    run = Run.open(repository / "results" / "cifar10-resnet56" / name)
    report = write_report([run], tmp_path / "report.html")
    assert report.left_out == ()
    assert report.size < 8_000_000
    page, test = open_page(report.path), run.trace("test")
    assert_replays(page.locator("[data-run=run0]"), test, run.policy())
    for threshold in (0.5, 0.99, test.confidences[4321, 3].item()):
        assert_replays(set_threshold(page, "run0", threshold), test, Confidence(threshold))
    assert_whole(page)
