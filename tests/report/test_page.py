"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import shutil
from dataclasses import replace

import pytest
from reference import make_trace

from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence
from shallowdeep.report.html import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
ROUNDING = 1e-9  # means of costs, summed in another order


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; what the console says and what is asked for is kept with it."""
    contexts = []

    def open_(path, width=1200, colour="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colour)
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked_for = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked_for.append(request.url))
        page.goto(path.as_uri())
        settle(page)
        return page

    yield open_
    for context in contexts:
        context.close()


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
    assert shares == pytest.approx(found.exit_shares, abs=ROUNDING)


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
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="plain", exact=True).click()
    assert page.locator("[data-run=run1]").is_hidden()
    assert page.said == []
    assert [url for url in page.asked_for if not url.startswith(("file:", "data:"))] == []


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
