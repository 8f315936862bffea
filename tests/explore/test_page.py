"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import io
import os
import re
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

from shallowdeep.explore import app as app_module
from shallowdeep.explore.setting import open_setting
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence, Patience
from shallowdeep.report.missing import Missing
from shallowdeep.storage import write_json

sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
ALONE = 1e-5  # one image alone, and in a batch: sums in another order
expect = sync_api.expect
pytestmark = pytest.mark.slow


def done(page):
    """Wait for the end of an evolution."""
    expect(page.locator("#status")).to_contain_text("The last exit answers", timeout=30_000)


def pick(page, setting, row):
    """Pick a sample of the test split, which the page shows, and wait for the end."""
    page.locator(f'[data-sample="{int(setting.test.ids[row])}"]').click()
    done(page)


@pytest.fixture
def send(tmp_path):
    """Chooses a file of that name and content."""

    def send_(page, name, content, size=None):
        path = tmp_path / name
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, size)
        page.locator("#file").set_input_files(path)

    return send_


def complaint(page):
    """What the page complains of, once it does."""
    expect(page.locator("#error")).to_be_visible(timeout=30_000)
    return page.locator("#error").inner_text()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def live(page, name):
    return page.locator(f'[data-live="{name}"]').get_attribute("data-value")


def assert_decides(page, test, row, policy):
    """The page marks the exit, the answer and the cost that a replay gives."""
    found = replay(test, policy)
    exit = int(found.exits[row])
    assert int(live(page, "exit")) == exit
    assert int(live(page, "answer")) == int(found.predictions[row])
    assert float(live(page, "cost")) == pytest.approx(float(found.costs[row]))
    assert float(live(page, "saved")) == pytest.approx(1 - float(found.costs[row]))
    assert page.locator(".exit.leaves").get_attribute("data-exit") == str(exit)
    assert page.locator(".exit.beyond").count() == test.num_exits - 1 - exit
    assert page.locator(".exit.leaves .marks").inner_text().startswith("leaves here")


def thresholds_of(test, row):
    """Below, between and above the confidences of a sample, well away from each of them."""
    bounds = [0.0, *sorted(test.confidences[row].tolist()), 1.01]
    return [(a + b) / 2 for a, b in pairwise(bounds) if b - a > 1e-3]


def test_a_picked_image_evolves_as_recorded_and_the_threshold_moves(setting, address, open_page):
    page, test = open_page(address), setting.test
    page.select_option("#group", "destroyed")
    row = int((test.correct[:, :-1].any(1) & ~test.correct[:, -1]).nonzero()[0])
    pick(page, setting, row)
    for exit in range(test.num_exits):
        line = page.locator(f'.exit[data-exit="{exit}"]')
        assert int(line.get_attribute("data-answer")) == int(test.predictions[row, exit])
        assert float(line.get_attribute("data-confidence")) == pytest.approx(
            test.confidences[row, exit].item(), abs=ALONE
        )
        assert line.get_attribute("data-right") == ("yes" if test.correct[row, exit] else "no")
        expect(line.locator("img")).to_be_visible()
        assert line.locator("img").get_attribute("src").startswith("data:image/png")
        shown = f"{100 * test.confidences[row, exit].item():.1f}\N{NO-BREAK SPACE}%"
        assert line.locator('[data-part="confidence"]').inner_text() == shown
    assert page.locator("#course polyline").count() >= 2
    assert float(page.locator("#confusion").get_attribute("data-confusion")) > 0
    assert page.locator("#histogram rect").count() > 10
    assert_decides(page, test, row, setting.slider)
    assert "validation" in page.locator("#source").inner_text()
    thresholds = thresholds_of(test, row)
    assert len(thresholds) >= 3
    for threshold in thresholds:
        page.locator("#exactly").fill(repr(threshold))
        assert_decides(page, test, row, Confidence(threshold))
    assert page.locator("#source").inner_text() == "Tried by hand: good for looking."
    page.locator("#threshold").fill("0")
    assert page.locator("#exactly").input_value() == "0"
    assert_decides(page, test, row, Confidence(0.0))
    page.locator("#threshold").press("End")
    assert_decides(page, test, row, Confidence(1.01))
    said = float(page.locator('.exit[data-exit="0"]').get_attribute("data-confidence"))
    page.locator("#exactly").fill(repr(said))  # exactly as sure as asked for: leaves
    assert live(page, "exit") == "0"
    page.locator("#exactly").fill(repr(said + 1e-10))  # float32 does not tell the two apart
    assert live(page, "exit") == "0"
    page.get_by_role("button", name="Back").click()
    assert_decides(page, test, row, setting.slider)
    assert page.said == []
    assert {url.split("/")[2] for url in page.asked_for if not url.startswith("data:")} == {address.split("/")[2]}


def test_exits_appear_one_after_the_other(setting, serve_page, open_page, monkeypatch):
    """What is computed is shown, while the rest is not there yet."""
    going = [threading.Event() for _ in range(3)]
    evolve = app_module.evolve

    def slow(*args):
        for event in evolve(*args):
            if event.event == "answered":
                assert going[event.exit].wait(30)
            yield event

    monkeypatch.setattr(app_module, "evolve", slow)
    page = open_page(serve_page(setting))
    page.locator("#threshold").fill("1.01")
    page.locator("[data-sample]").first.click()
    expect(page.locator("#image")).to_be_visible()
    for exit in range(3):
        assert page.locator(".exit[data-answer]").count() == exit
        assert live(page, "exit") == ""
        going[exit].set()
        expect(page.locator(f'.exit[data-exit="{exit}"]')).to_have_attribute("data-answer", re.compile(r"\d+"))
    done(page)
    assert live(page, "exit") == "2"


def test_uploads_good_and_bad(setting, address, open_page, send):
    page, test, row = open_page(address), setting.test, 12
    send(page, "digit.png", png(setting.shelf.pixels(int(test.ids[row]))))
    done(page)
    for exit in range(test.num_exits):
        line = page.locator(f'.exit[data-exit="{exit}"]')
        assert int(line.get_attribute("data-answer")) == int(test.predictions[row, exit])
        assert line.get_attribute("data-right") == "unknown"
    assert page.locator("#caption").inner_text() == "Your image, 32 × 32 pixels"
    assert_decides(page, test, row, setting.slider)

    send(page, "notes.png", b"these are notes, and no image\n" * 40)
    assert "whatever its name says" in complaint(page)
    assert page.locator(".exit[data-answer]").count() == 0
    before = len(page.asked_for)
    send(page, "large.png", b"\x89PNG\r\n\x1a\n", size=50_000_000)
    expect(page.locator("#error")).to_contain_text("larger than 10 MB")
    assert len(page.asked_for) == before  # it was not even sent
    send(page, "dot.png", png(torch.full((3, 1, 1), 200, dtype=torch.uint8)))
    done(page)
    assert page.locator("#error").is_hidden()
    assert page.locator("#caption").inner_text() == "Your image, 1 × 1 pixels, as the network sees it: 32 × 32"
    whole = png(setting.shelf.pixels(int(test.ids[row])))
    send(page, "torn.png", whole[: len(whole) // 2])
    assert "Copy or download it again" in complaint(page)
    pick(page, setting, 0)
    assert page.locator("#error").is_hidden()
    refused = [text for text in page.said if "Failed to load resource" not in text]  # of the browser: 415 and 422
    assert refused == []
    assert len(page.said) == 2


def test_the_server_says_the_same_where_the_page_does_not_check(address, open_page):
    page = open_page(address)
    told = page.evaluate("JSON.parse(document.getElementById('page-data').textContent).too_large")
    status, said = page.evaluate(
        """async () => {
             const body = new Blob([new Uint8Array(50000000)]);
             const response = await fetch("/evolve", { method: "POST", body });
             return [response.status, (await response.json()).error];
           }"""
    )
    assert (status, said) == (413, told)


def test_dropping_a_file(setting, address, open_page):
    page, row = open_page(address), 30
    content = list(png(setting.shelf.pixels(int(setting.test.ids[row]))))
    transfer = page.evaluate_handle(
        """(content) => {
             const transfer = new DataTransfer();
             transfer.items.add(new File([new Uint8Array(content)], "digit.png", { type: "image/png" }));
             return transfer;
           }""",
        content,
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    assert "over" in page.locator("#drop").get_attribute("class")
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    done(page)
    assert "over" not in page.locator("#drop").get_attribute("class")
    last = page.locator(".exit").last
    assert int(last.get_attribute("data-answer")) == int(setting.test.predictions[row, -1])
    words = page.evaluate_handle("() => { const t = new DataTransfer(); t.setData('text/plain', 'hello'); return t; }")
    page.dispatch_event("#drop", "drop", {"dataTransfer": words})
    assert "That was no file" in complaint(page)


def test_by_keyboard_alone(setting, address, open_page):
    page = open_page(address, 380, "dark")
    expect(page.locator("[data-sample]")).to_have_count(24)
    assert page.locator("#where").inner_text() == "1–24 of 360"
    page.locator("#after").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#where")).to_have_text("25–48 of 360")
    first = page.locator("[data-sample]").first
    assert int(first.get_attribute("data-sample")) == int(setting.shelf.groups[0].ids[24])
    first.focus()
    page.keyboard.press("Enter")
    done(page)
    assert first.get_attribute("aria-pressed") == "true"
    page.locator("#threshold").focus()
    page.keyboard.press("Home")
    assert live(page, "exit") == "0"
    assert page.locator("#threshold").get_attribute("aria-valuetext") == "confidence 0.000"
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.evaluate("[...document.querySelectorAll('img:not([hidden])')].every((image) => image.alt !== '')")
    page.get_by_role("button", name="Again, slowly").click()
    assert page.locator(".exit[data-answer]").count() < 3
    expect(page.locator(".exit[data-answer]")).to_have_count(3, timeout=10_000)
    assert page.said == []


def test_exits_left_out_and_the_most_confident_answer(setting, digits, copy_of, serve_page, open_page):
    run, test = copy_of(digits), setting.test
    policy = Confidence(1.01, exits=(1,), answer="most_confident")
    write_json(run.folder / "policy.json", policy.to_dict())
    own = open_setting(run)
    surer = test.confidences[:, 1] > test.confidences[:, -1]
    row = int((surer & (test.predictions[:, 1] != test.predictions[:, -1])).nonzero()[0])
    page = open_page(serve_page(own))
    page.select_option("#group", next(g.key for g in own.shelf.groups[1:] if int(test.ids[row]) in g.ids[:24]))
    pick(page, own, row)
    assert "the policy does not look here" in page.locator('.exit[data-exit="0"]').inner_text()
    for threshold in (1.01, *thresholds_of(test, row)):
        page.locator("#exactly").fill(repr(threshold))
        assert_decides(page, test, row, replace(policy, threshold=threshold))
    page.locator("#exactly").fill("1.01")
    assert "its answer counts" in page.locator('.exit[data-exit="1"] .marks').inner_text()


def test_a_run_without_threshold_samples_or_traces(setting, serve_page, open_page, send):
    lost = Missing("the data are not at hand.")
    bare = replace(setting, policy=Patience(1), shelf=lost, test=lost, usual=lost)
    page = open_page(serve_page(bare))
    assert page.locator("#group").count() == 0
    assert page.get_by_text("Not shown: no images of the test split to pick: the data are not at hand.").count() == 1
    send(page, "digit.png", png(setting.shelf.pixels(int(setting.test.ids[0]))))
    done(page)
    exit = int(replay(setting.test, Patience(1)).exits[0])
    marks = page.locator(f'.exit[data-exit="{exit}"] .marks').inner_text()
    assert "the run's own policy (patience) leaves here" in marks
    assert "usual" not in page.locator("#confused").inner_text()
    assert page.locator("#spread").is_hidden()
    assert page.said == []


def test_a_server_that_is_gone(setting, serving, open_page):
    with serving(setting) as address:
        page = open_page(address)
        expect(page.locator("[data-sample]")).to_have_count(24)
    page.locator("[data-sample]").first.click()
    assert "Is shallowdeep explore still running?" in complaint(page)
