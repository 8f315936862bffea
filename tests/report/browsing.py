"""A report in a browser: how it is used, and how it is checked."""

import pytest

from shallowdeep.policies.replay import replay

ROUNDING = 1e-9  # means of costs, summed in another order


def settle(page):
    """Wait until what was asked for is drawn; the page's policy forbids Playwright's own waiting for conditions."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def set_threshold(page, run, threshold):
    """Type a threshold, and wait for the numbers."""
    chapter = page.locator(f"[data-run={run}]")
    chapter.locator("input[type=number]").fill(repr(threshold))
    settle(page)
    return chapter


def numbers_of(chapter):
    """What a chapter shows, unrounded."""
    live = {
        element.get_attribute("data-live"): float(element.get_attribute("data-value"))
        for element in chapter.locator("[data-live]").all()
    }
    shares = [float(element.get_attribute("data-value")) for element in chapter.locator("[data-share]").all()]
    return live, shares


def assert_replays(chapter, trace, policy):
    live, shares = numbers_of(chapter)
    found = replay(trace, policy)
    assert live["accuracy"] == pytest.approx(found.accuracy, abs=ROUNDING)
    assert live["cost"] == pytest.approx(found.cost, abs=ROUNDING)
    at_the_end = trace.correct[:, -1].double().mean().item()
    assert live["difference"] == pytest.approx(found.accuracy - at_the_end, abs=ROUNDING)
    assert shares == pytest.approx(found.exit_shares, abs=ROUNDING)


def assert_whole(page):
    """Every image is there, the console is silent, and nothing was asked for outside the file."""
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") > 20
    assert page.said == []
    assert [url for url in page.asked_for if not url.startswith(("file:", "data:"))] == []
