"""The benchmark of early exits: what it times, and that it says what it could not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import shallowdeep as sd
from shallowdeep.errors import ConfigError, MissingExtra, TraceError, UnknownName
from shallowdeep.inference.backends import BACKENDS
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.timing import lanes, one_at_a_time, rounds
from shallowdeep.inference.timing.bench import agreement, measure_speed
from shallowdeep.inference.timing.one_at_a_time import OneAtATime
from shallowdeep.inference.timing.speed import (
    ALL_EXITS,
    BOUND,
    EXITS,
    LINEAR,
    NOBODY,
    ONE_AT_A_TIME,
    PLAIN,
    STAGES,
    WHOLE_BATCH,
    SpeedReport,
    Timing,
    spread,
    static,
)
from shallowdeep.inference.timing.stage_times import stage_times

OF_ONE_ENGINE = {
    EXITS, PLAIN, WHOLE_BATCH, NOBODY, ALL_EXITS, BOUND, LINEAR, STAGES, *(static(exit) for exit in range(3))
}  # fmt: skip


@pytest.fixture(scope="module")
def labels(trace):
    return trace.predictions[:, -1] * (torch.arange(len(trace)) % 2)  # some right, some wrong


@pytest.fixture(scope="module")
def threshold(trace):
    """Where samples part ways."""
    confidences = torch.stack([logits.softmax(-1).amax(-1) for logits in trace.logits[:-1]])
    return confidences.quantile(0.7).item()


@pytest.fixture(scope="module")
def bodies(small, images):
    """The network cut at all its exits: exporting takes longer than all the rest."""
    return one_at_a_time.cut(small, images[:2], fold=False)


@pytest.fixture(autouse=True)
def cut_once(monkeypatch, bodies):
    monkeypatch.setattr(one_at_a_time, "cut", lambda *args, **options: bodies)


@pytest.fixture(scope="module")
def report(small, images, labels, threshold, bodies):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_at_a_time, "cut", lambda *args, **options: bodies)
        policy = sd.Confidence(threshold)
        return measure_speed(small, policy, images, labels, batch_sizes=(1, 8), backends=("eager",), rounds=2)


def test_everything_is_timed_in_every_round(report):
    found = {(t.batch_size, t.backend, t.variant) for t in report.timings}
    assert found == {(size, "eager", variant) for size in (1, 8) for variant in OF_ONE_ENGINE | {ONE_AT_A_TIME}}
    assert report.left_out == ()
    assert all(len(t.latencies_ms) == 2 and min(t.latencies_ms) > 0 for t in report.timings)
    assert all(t.n == (40 if t.batch_size == 1 else 32) for t in report.timings if t.accuracy is not None)


def test_accuracies_and_costs_are_those_of_replay(report, trace, labels, threshold):
    decisions = sd.replay(replace(trace, labels=labels), sd.Confidence(threshold))
    for one in report.engines:
        assert one.accuracy == pytest.approx((decisions.predictions == labels)[: one.n].double().mean().item())
        assert one.cost == pytest.approx(decisions.costs[: one.n].mean().item())
        assert sum(one.exit_shares) == pytest.approx(1)
        assert (one.differing, one.ties) == (0, 0)
        for exit in range(3):
            alone = (trace.predictions[:, exit] == labels)[: one.n].double().mean().item()
            assert report.beside(one, static(exit)).accuracy == pytest.approx(alone)
        plain = (trace.predictions[:, -1] == labels)[: one.n].double().mean().item()
        assert report.beside(one, PLAIN).accuracy == pytest.approx(plain)


def test_tables_hold_every_ratio(report):
    for rows in (report.rows(), report.bound_rows(), report.static_rows()):
        assert len(rows) == (6 if "ends at" in rows[0] else 2)
        empty = {name for row in rows for name, value in row.items() if value is None}
        assert empty == ({"of bare"} if "of bare" in rows[0] else set())  # eager has no other way
    assert "of the time without exits" in str(report)


def test_a_report_is_json(report):
    kept = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert kept["engines"][0]["of plain"]["n"] == 2
    assert len(kept["timings"]) == len(report.timings)
    assert kept["policies"]["fp32"]["kind"] == "confidence"


@pytest.mark.long
def test_stages_are_timed_as_the_network_itself_is(monkeypatch, small, images, labels, threshold):
    """The smaller networks are exported too, and no weight of the network changes."""
    monkeypatch.undo()
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    found = measure_speed(
        small,
        sd.Confidence(threshold),
        images,
        labels,
        batch_sizes=(8,),
        backends=("eager", "stages"),
        precisions=("fp32", "bf16"),
        rounds=1,
    )
    assert found.left_out == ()
    one, same = (found.find(8, backend, "fp32", EXITS) for backend in ("eager", "stages"))
    assert (one.accuracy, one.cost, same.differing) == (same.accuracy, same.cost, 0)
    for exit in range(3):
        small_ones = [found.find(8, backend, "fp32", static(exit)) for backend in ("eager", "stages")]
        assert small_ones[0].accuracy == small_ones[1].accuracy
    assert all(torch.equal(before[name], weight) for name, weight in small.state_dict().items())


def timing(backend, variant, *latencies, batch_size=8):
    return Timing(batch_size, backend, "fp32", variant, latencies)


def test_every_turn_begins_with_samples_that_are_not_timed(monkeypatch):
    clock, calls = [0.0], []

    def lane(name: str) -> lanes.Lane:
        def run(batch: torch.Tensor) -> None:
            cold = not calls or calls[-1][0] != name
            calls.append((name, len(batch)))
            clock[0] += 9.0 if cold else 1.0

        return lanes.Lane("eager", "fp32", name, "cpu", run)

    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])
    tallies = rounds.time_in_turn([lane(PLAIN), lane(ALL_EXITS)], torch.zeros(256, 1), 64, 2, lambda: None)
    assert [tally.latencies_ms for tally in tallies] == [[1000.0, 1000.0]] * 2
    turns = [calls[start : start + 3] for start in range(2, len(calls), 3)]
    assert [[rows for _, rows in turn] for turn in turns] == [[rounds.WARM_ROWS, 64, 64]] * 4


def test_ratios_are_taken_within_a_round():
    slow_second_round = [timing("eager", EXITS, 1.0, 10.0), timing("eager", PLAIN, 2.0, 20.0)]
    report = SpeedReport(tuple(slow_second_round), (), {}, (1.0,), (1.0,), 2, 1, "cpu", {})
    assert report.rows()[0]["of plain"] == spread([0.5, 0.5])
    assert report.rows()[0]["× one at a time"] is None


def test_the_bound_is_the_time_of_the_rows_that_arrive(monkeypatch, small, images):
    engine = sd.Engine(small, sd.Confidence(2.0), micro_batch=4, example_inputs=images)
    driver, _ = engine.ready(images)

    def measured(self, inputs, sizes, *, repeats):
        assert set(sizes) <= {1, 2, 3, 4}
        return Latency(tuple(sizes), tuple(tuple(10.0 + n for n in sizes) for _ in range(4)), ((0.0,),) * 4)

    monkeypatch.setattr(type(driver), "measure", measured)
    left = np.array([0, 0, 1, 3, 3, 3])  # 6 rows, 4, 3 and 3 arrive; four at a time
    found = stage_times(engine, [images[:6]], [left])
    assert found[BOUND] == pytest.approx((14 + 12) + 14 + 13 + 13)
    assert found[LINEAR] == pytest.approx(26 * (6 + 4 + 3 + 3) / 6)
    assert found[STAGES] == pytest.approx(4 * 26)


@pytest.mark.parametrize("policy", [sd.Confidence(0.6, answer="most_confident"), sd.Patience(1)])
def test_one_at_a_time_decides_like_replay(small, images, trace, policy):
    answers, decisions = OneAtATime(small, policy, images[:2])(images), sd.replay(trace, policy)
    np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
    np.testing.assert_array_equal(answers.labels, decisions.predictions.numpy())
    np.testing.assert_allclose(answers.costs, decisions.costs.numpy())


def test_answers_unlike_the_replay_are_counted_and_ties_told_apart(trace):
    confidence = trace.logits[0].softmax(-1).amax(-1)
    policy = sd.Confidence(confidence[3].item() + 4e-6)
    decisions = sd.replay(trace, policy)
    labels, exits = decisions.predictions.numpy().copy(), decisions.exits.numpy().copy()
    assert exits[3] > 0
    assert agreement(labels, exits, trace, policy) == {"differing": 0, "ties": 0}
    exits[3], labels[3] = 0, trace.predictions[3, 0]  # as rounding may decide
    labels[7] = (labels[7] + 1) % 5
    labels[9] = -1  # was not asked
    assert agreement(labels, exits, trace, policy) == {"differing": 2, "ties": 1}


def test_what_cannot_be_built_is_listed_with_its_reason(monkeypatch, small, images, labels):
    def broken(order):
        raise MissingExtra("this needs a compiler.")

    class Broken:
        precisions, on_tensors, build = ("fp32",), True, staticmethod(broken)

    monkeypatch.setitem(BACKENDS, "compiled", Broken())
    found = measure_speed(
        small,
        sd.Confidence(0.6),
        images,
        labels,
        batch_sizes=(8,),
        backends=("compiled", "eager"),
        precisions=("fp32", "int8"),
        rounds=1,
        smaller=False,
    )
    assert {(one.backend, one.precision) for one in found.left_out} == {
        ("compiled", "fp32"), ("compiled", "int8"), ("eager", "int8"),
    }  # fmt: skip
    assert "not measured: compiled fp32: this needs a compiler." in str(found)
    assert "not in 'int8'" in str(found)
    with pytest.raises(ConfigError, match=r"no back end could be built: .*needs a compiler"):
        measure_speed(small, sd.Confidence(0.6), images, labels, batch_sizes=(8,), backends=("compiled",), rounds=1)


def test_each_precision_may_have_a_policy_of_its_own(small, images, labels):
    policies = {"fp32": sd.Confidence(0.0), "bf16": sd.Confidence(1.5)}
    found = measure_speed(
        small,
        policies,
        images,
        labels,
        batch_sizes=(8,),
        backends=("eager",),
        precisions=("fp32", "bf16"),
        rounds=1,
        smaller=False,
    )
    shares = {one.precision: one.exit_shares for one in found.engines}
    assert (shares["fp32"][0], shares["bf16"][-1]) == (1.0, 1.0)
    assert [one.differing for one in found.engines] == [0, None]


def test_threads_are_put_back(small, images, labels, monkeypatch):
    before = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(lanes, "OneAtATime", lambda *args: lambda inputs: seen.append(torch.get_num_threads()))
    measure_speed(
        small, sd.Confidence(0.6), images, labels, batch_sizes=(8,), backends=("eager",), rounds=1, threads=before + 1
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


BAD = {
    "back end": ({"backends": ("onxx",)}, UnknownName, "no back end 'onxx'. Did you mean 'onnx'"),
    "precision": ({"precisions": ("fp8",)}, UnknownName, "no precision 'fp8'"),
    "plain": ({"backends": ("plain",)}, ConfigError, "compared to"),
    "batch size": ({"batch_sizes": (0,)}, ConfigError, "at least 1"),
    "rounds": ({"rounds": 0}, ConfigError, "rounds=0"),
    "samples": ({"num_samples": 0}, ConfigError, "num_samples=0"),
    "too few": ({"batch_sizes": (64,)}, ConfigError, "batches of 64 need as many samples at least, got 40"),
    "threads": ({"threads": 0}, ConfigError, "threads=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(small, images, labels, case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        measure_speed(small, sd.Confidence(0.6), images, labels, **{"batch_sizes": (8,), **options})


def test_labels_policies_and_traces_that_do_not_fit(small, images, labels, trace):
    with pytest.raises(ConfigError, match="39 labels for inputs of"):
        measure_speed(small, sd.Confidence(0.6), images, labels[1:])
    with pytest.raises(ConfigError, match="no policy for bf16"):
        measure_speed(
            small, {"fp32": sd.Confidence(0.6)}, images, labels, batch_sizes=(8,), precisions=("fp32", "bf16")
        )
    with pytest.raises(TraceError, match="not of these samples"):
        measure_speed(small, sd.Confidence(0.6), images, labels + 1, batch_sizes=(8,), trace=trace)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_plot_is_drawn(report, tmp_path, kind):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / f"speed.{kind}")
    data = (tmp_path / f"speed.{kind}").read_bytes()
    assert data.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert [path.name for path in tmp_path.iterdir()] == [f"speed.{kind}"]


def test_a_plot_of_an_unknown_format(report, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"cannot draw speed\.txt"):
        report.plot(tmp_path / "speed.txt")
    assert list(tmp_path.iterdir()) == []
