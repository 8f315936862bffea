import dataclasses
from itertools import pairwise

import pytest
import torch
from reference import make_trace

from shallowdeep.analysis.budgets import measure_budgets
from shallowdeep.analysis.overthinking import measure_overthinking
from shallowdeep.errors import ConfigError, FileFormatError
from shallowdeep.policies.replay import replay, sweep_confidence
from shallowdeep.policies.rules import Confidence, Patience
from shallowdeep.report.content import make_page
from shallowdeep.report.drawing import ROW, draw
from shallowdeep.report.missing import Missing
from shallowdeep.report.plots.curves import thinned
from shallowdeep.report.words import SPACE, verdict
from shallowdeep.storage import write_json


def only(run, **options):
    """The only chapter of a page."""
    return make_page([run], galleries=False, **options).chapters[0]


def test_figures_are_the_analyses(make_run):
    run = make_run(policy=Confidence(0.7))
    test, early = run.trace("test"), only(run).early
    assert early.overthinking == measure_overthinking(test)
    assert early.budgets == measure_budgets(run.trace("val"), test)
    assert early.start.decisions.cost == replay(test, Confidence(0.7)).cost
    assert [exit.accuracy for exit in early.exits] == test.correct.double().mean(0).tolist()
    assert [exit.cost for exit in early.exits] == test.costs.relative().tolist()
    assert early.exits[0].alone == early.exits[0].cost  # nothing is before it
    assert early.exits[1].alone < early.exits[1].cost


def test_the_verdict_has_the_numbers(make_run):
    run = make_run(policy=Confidence(0.7))
    chapter = only(run)
    first, second, third = (sentence.replace(SPACE, " ") for sentence in verdict(chapter))
    found, decisions = measure_overthinking(run.trace("test")), replay(run.trace("test"), Confidence(0.7))
    assert f"{100 * found.accuracy[-1]:.2f} % of the 60" in first
    assert f"{100 * found.wasteful:.1f} %" in first
    assert f"{100 * found.destructive_of_errors:.1f} % of its errors" in second
    price = f"{100 * (decisions.accuracy - found.accuracy[-1]):+.2f} points".replace("-", "\N{MINUS SIGN}")
    assert f"{100 * decisions.accuracy:.2f} % ({price}) at {100 * decisions.cost:.1f} % of the cost" in third


def test_a_threshold_says_where_it_comes_from(make_run):
    by_hand = only(make_run("by_hand", policy=Confidence(0.7))).early.start
    assert (by_hand.threshold, by_hand.chosen) == (0.7, True)
    assert "does not say what data chose it" in by_hand.source
    run = make_run("calibrated")
    run.calibrate(max_cost=0.6)
    assert "chosen on validation data (--max-cost 0.6)" in only(run).early.start.source
    assert only(run).origins.commands == (
        "shallowdeep fit --out run", "shallowdeep record run", "shallowdeep analyze run",
        "shallowdeep calibrate run --max-cost 0.6", "shallowdeep replay run",
    )  # fmt: skip
    write_json(run.folder / "policy.json", Confidence(0.123).to_dict())
    anew = "# run/policy.json as above, or chosen anew: shallowdeep calibrate run …"
    assert only(run).origins.commands[-2] == anew
    assert "changed after the last calibration" in only(run).early.start.source


def test_without_a_policy_half_the_cost_is_taken_and_without_validation_data_nothing(make_run):
    run = make_run("half")
    row = next(row for row in measure_budgets(run.trace("val"), run.trace("test")).table if row.budget == 0.5)
    start = only(run).early.start
    assert start.threshold == row.threshold
    assert "on validation data" in start.source
    chapter = only(make_run("nothing", val=None))
    assert not chapter.early.start.chosen
    assert chapter.early.start.decisions.exit_shares[-1] == 1.0
    assert "calibrate nothing --max-cost 0.5" in verdict(chapter)[2]


def test_a_policy_without_threshold_stands_beside_the_slider(make_run):
    run = make_run(policy=Patience(1))
    chapter = only(run)
    assert chapter.early.other.decisions.cost == replay(run.trace("test"), Patience(1)).cost
    assert "its policy (patience)" in verdict(chapter)[2]
    assert isinstance(chapter.early.start.policy, Confidence)


def test_what_is_missing_says_why(make_run):
    run = make_run(val=None, train=None)
    page = make_page([run], galleries=False)
    early = page.chapters[0].early
    assert "no Trace of its val split" in early.budgets.reason
    assert "no Trace of its train split" in early.confusion.reason
    assert "on request" in early.galleries.reason
    assert {line.split(": ")[1] for line in page.left_out} == {
        "no policy", "no budgets", "no confusion", "no galleries, saliency",
    }  # fmt: skip


def test_without_labels_answers_are_judged_by_agreement(make_run):
    splits = {split: dataclasses.replace(make_trace(60), labels=None) for split in ("train", "val", "test")}
    run = make_run(policy=Confidence(0.7), **splits)
    chapter = only(run)
    assert (chapter.measure, chapter.accuracy) == ("agreement", 1.0)
    assert chapter.early.start.decisions.accuracy == replay(run.trace("test"), Confidence(0.7)).agreement
    for part in ("overthinking", "confusion", "oracle", "flows", "classes", "galleries"):
        assert "no" in getattr(chapter.early, part).reason
    assert not isinstance(chapter.early.budgets, Missing)
    assert "agreement, not accuracy" in verdict(chapter)[0]


def test_one_exit_is_said_and_is_no_error(make_run):
    trace = make_trace(40, num_exits=1, split="test")
    chapter = only(make_run(test=trace, val=None, train=None, config={"strategy": "plain"}))
    assert chapter.early is None
    assert chapter.accuracy == trace.correct.double().mean().item()
    assert len(verdict(chapter)) == 1


def test_the_first_run_with_exits_opens_the_page(make_run):
    plain = make_run("plain", test=make_trace(40, num_exits=1), val=None, train=None)
    assert make_page([plain, make_run("joint")], galleries=False).first == 1
    assert make_page([plain], galleries=False).first == 0


def test_a_damaged_test_split_is_an_error_and_other_damage_a_reason(make_run):
    run = make_run()
    (run.folder / "traces" / "val.safetensors").write_bytes(b"nothing")
    (run.folder / "policy.json").write_text("{", encoding="utf-8")
    assert "val.safetensors is truncated" in only(run).early.budgets.reason
    assert "policy.json" in only(run).early.policy.reason
    (run.folder / "traces" / "test.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match=r"test\.safetensors is truncated"):
        only(run)


def test_no_run_and_one_given_twice_are_refused(make_run):
    with pytest.raises(ConfigError, match="at least one run"):
        make_page([])
    with pytest.raises(ConfigError, match="given twice"):
        make_page([make_run("a"), make_run("a")])


def test_runs_of_one_name_are_told_apart(make_run):
    page = make_page([make_run("a/x"), make_run("b/x"), make_run("y")], galleries=False)
    assert [chapter.name for chapter in page.chapters] == ["a/x", "b/x", "y"]


def test_a_backdoor_is_shown_where_the_run_is_about_one(make_run):
    run = make_run(config={"backdoor.target": 1}, policy=Confidence(0.7))
    assert "no Trace of its triggered split" in only(run).early.backdoor.reason
    test = run.trace("test")
    test.select(test.labels != 1).save(run.folder / "traces" / "triggered.safetensors")
    effect = only(run).early.backdoor
    assert effect.n_triggered == int((test.labels != 1).sum())
    assert effect.with_policy is not None
    assert (only(run).early.wanted, only(make_run("clean")).early.wanted) == ("1", "")


def test_a_benchmark_is_read_and_another_file_is_named(make_run):
    run = make_run()
    assert only(run).early.speed is None
    ratio = {"median": 0.8, "low": 0.7, "high": 0.9, "n": 3}
    row = {
        "back end": "eager",
        "precision": "fp32",
        "device": "cpu",
        "batch": 1,
        "of plain": ratio,
        "cost": 0.5,
        "accuracy": 0.9,
        "n": 9,
    }
    write_json(run.folder / "results" / "bench.json", {"engines": [row, row | {"of plain": None}]})
    assert [found["time"]["median"] for found in only(run).early.speed] == [0.8]
    of_old = {name: value for name, value in row.items() if name != "device"}
    write_json(run.folder / "results" / "bench-cuda.json", {"engines": [of_old], "device": "cuda:0"})
    assert [found["device"] for found in only(run).early.speed] == ["cuda:0", "cpu"]
    write_json(run.folder / "results" / "bench.json", {"engines": [{}]})
    assert "no benchmark of this version" in only(run).early.speed.reason


def test_a_thinned_curve_keeps_its_ends_and_its_best():
    curve = sweep_confidence(make_trace(2000))
    few = thinned(curve, 50)
    assert len(few.cost) <= 51 < len(curve.cost)
    assert (few.cost[0], few.cost[-1], few.accuracy.max()) == (curve.cost[0], curve.cost[-1], curve.accuracy.max())
    assert bool((few.cost.diff() > 0).all())
    assert thinned(few, 51) is few


@pytest.mark.parametrize("depths", [[1.0], [0.1, 0.11, 0.12, 1.0], [0.97, 0.98, 0.99, 1.0], torch.linspace(0, 1, 30)])
def test_no_two_texts_of_the_drawing_overlap(depths):
    drawing = draw([float(depth) for depth in depths])
    rows = [branch.row for branch in drawing.branches]
    assert all(below - above >= ROW - 1e-6 for above, below in pairwise(rows))
    assert rows[0] >= 0
    assert rows[-1] + ROW <= drawing.height
    assert [branch.leaves_at for branch in drawing.branches] == sorted(branch.leaves_at for branch in drawing.branches)


@pytest.mark.parametrize(
    ("training", "place"),
    [
        ("shallowdeep fit --out runs/a --resume", "runs/a"),
        ("shallowdeep fit --out 'my runs/a'", "'my runs/a'"),
        ("shallowdeep fit --out=runs/b --seed 1", "runs/b"),
        ("shallowdeep demo --out runs/demo --resume", "here"),
        ("shallowdeep study paper --out docs/page.md", "here"),
        ("shallowdeep fit --out 'torn", "here"),
    ],
)
def test_commands_go_on_with_the_folder_that_was_trained(make_run, training, place):
    run = make_run("here")
    write_json(run.folder / "environment.json", {"command": training, "data_md5": {}})
    assert only(run).origins.commands == (training, f"shallowdeep record {place}", f"shallowdeep analyze {place}")
