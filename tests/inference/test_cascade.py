"""The cascade, over stages that are a few lines of numpy and write down what they were run on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallowdeep.inference.answers import collect, settle
from shallowdeep.inference.cascade import MAX_WAIT, Cascade, Step
from shallowdeep.inference.latency import Latency

COSTS = (0.25, 0.5, 1.0)


class Planned:
    """Stages of a network whose input says, row by row, at which exit its sample stops and what it is answered."""

    exits = (0, 2, 5)

    def __init__(self, sizes=None, most=None):
        self.sizes, self.most = sizes, most
        self.ran = []  # (stage, rows)

    def run(self, stage, values):
        x = values["x"]
        assert len(x) > 0
        assert self.sizes is None or len(x) in self.sizes
        assert self.most is None or len(x) <= self.most
        self.ran.append((stage, len(x)))
        scores = np.stack([x[:, 1] + stage, np.zeros(len(x))], axis=1)
        return Step({"x": x.copy()}, x[:, 0] <= stage, scores, scores)

    def fetch(self, step):
        return step.stop, step.scores

    def take(self, values, rows):
        return {name: value[rows] for name, value in values.items()}

    def join(self, parts):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def wait(self):
        pass


def inputs(stops, start=0):
    marks = 100.0 * (1 + start + np.arange(len(stops)))
    return {"x": np.stack([np.asarray(stops, dtype=float), marks], axis=1)}


def check(answers, stops):
    stages = np.minimum(stops, 2)
    np.testing.assert_array_equal(answers.ids, np.arange(len(stops)))
    np.testing.assert_array_equal(answers.exits, np.asarray(Planned.exits)[stages])
    np.testing.assert_array_equal(answers.scores[:, 0], 100.0 * (1 + np.arange(len(stops))) + stages)
    np.testing.assert_array_equal(answers.costs, np.asarray(COSTS)[stages])
    np.testing.assert_array_equal(answers.labels, 0)


def table(run, take=0.0):
    """A stage takes ``run(rows)`` milliseconds."""
    sizes = (1, 2, 4, 8, 16, 32)
    runs = tuple(tuple(float(run(size)) for size in sizes) for _ in COSTS)
    return Latency(sizes, runs, tuple((float(take),) * len(sizes) for _ in COSTS))


TABLES = {"none": None, "proportional": table(lambda n: n), "flat": table(lambda n: 1.0, take=9.0)}
STOPS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(
    stops=STOPS,
    micro_batch=st.sampled_from([None, 1, 3, 8]),
    sizes=st.sampled_from([None, (1, 4, 16), (8,)]),
    latency=st.sampled_from(list(TABLES)),
)
def test_every_sample_is_answered_once_where_it_stops(stops, micro_batch, sizes, latency):
    stages = Planned(sizes, most=None if sizes else micro_batch)
    cascade = Cascade(stages, COSTS, TABLES[latency], micro_batch)
    check(cascade.answer(inputs(stops)), stops)


@given(batches=st.lists(STOPS, min_size=1, max_size=5), refill=st.booleans(), latency=st.sampled_from(list(TABLES)))
def test_a_stream_loses_and_doubles_nothing(batches, refill, latency):
    cascade = Cascade(Planned(), COSTS, TABLES[latency], 8)
    starts = np.cumsum([0, *map(len, batches)])
    given_out = cascade.stream([inputs(b, s) for b, s in zip(batches, starts, strict=False)], refill=refill)
    check(collect(given_out, Planned.exits, COSTS), [stop for batch in batches for stop in batch])


def test_finished_rows_are_dropped_at_once_without_a_table():
    stages = Planned()
    Cascade(stages, COSTS).answer(inputs([0, 1, 1, 2, 2, 2]))
    assert stages.ran == [(0, 6), (1, 5), (2, 3)]


def test_finished_rows_are_carried_where_dropping_costs_more_than_it_saves():
    stages = Planned()
    Cascade(stages, COSTS, TABLES["flat"]).answer(inputs([0, 1, 1, 2, 2, 2]))
    assert stages.ran == [(0, 6), (1, 6), (2, 6)]


def test_the_network_is_left_with_the_last_sample():
    stages = Planned()
    Cascade(stages, COSTS, TABLES["flat"]).answer(inputs([0, 1, 1]))
    assert stages.ran == [(0, 3), (1, 3)]


def test_survivors_of_micro_batches_go_on_together():
    stages = Planned()
    Cascade(stages, COSTS, micro_batch=4).answer(inputs([0, 0, 2, 2] * 4))
    assert stages.ran == [(0, 4), (0, 4), (1, 4), (2, 4)] * 2


def test_no_more_rows_meet_than_a_micro_batch():
    stages = Planned(most=3)
    check(Cascade(stages, COSTS, micro_batch=3).answer(inputs([3, 3, 0] * 4)), [3, 3, 0] * 4)
    assert [rows for stage, rows in stages.ran if stage == 1] == [3, 3, 2]


def test_survivors_wait_only_where_a_full_batch_is_faster():
    alone, together = Planned(), Planned()
    batches = [inputs([0, 0, 2, 2], start) for start in (0, 4)]
    list(Cascade(alone, COSTS, TABLES["proportional"], 4).stream(batches, refill=True))
    list(Cascade(together, COSTS, TABLES["flat"], 4).stream(batches, refill=True))
    assert alone.ran == [(0, 4), (1, 2), (2, 2)] * 2
    assert together.ran == [(0, 4), (0, 4), (1, 4), (2, 4)]


def test_refilling_waits_without_a_micro_batch_too():
    stages = Planned()
    batches = [inputs([0, 0, 2, 2], start) for start in (0, 4)]
    list(Cascade(stages, COSTS, TABLES["flat"]).stream(batches, refill=True))
    assert stages.ran == [(0, 4), (0, 4), (1, 4), (2, 4)]


def test_refilling_waits_for_nobody_without_a_table():
    stages = Planned()
    list(Cascade(stages, COSTS, micro_batch=4).stream([inputs([2, 0], start) for start in (0, 2)], refill=True))
    assert stages.ran == [(0, 2), (1, 1), (2, 1)] * 2


def test_no_sample_waits_for_more_than_some_batches():
    read, answered = 0, {}

    def batches():
        nonlocal read
        for number in range(40):
            read = number
            yield inputs([2 if number == 0 else 0], number)

    for leaving in Cascade(Planned(), COSTS, TABLES["flat"], 64).stream(batches(), refill=True):
        answered |= dict.fromkeys(leaving.ids.tolist(), read)
    assert answered[0] <= 3 * MAX_WAIT
    assert len(answered) == 40


def test_who_waits_is_answered_before_an_error_goes_on():
    def batches():
        yield inputs([2, 0])
        raise OSError("the camera is gone")

    stream = Cascade(Planned(), COSTS, TABLES["flat"], 8).stream(batches(), refill=True)
    assert sorted(next(stream).ids.tolist() + next(stream).ids.tolist()) == [0, 1]
    with pytest.raises(OSError, match="the camera is gone"):
        next(stream)


def test_a_source_may_use_its_buffer_again_while_samples_wait():
    buffer = inputs([0, 0])

    def batches():
        for number in range(4):
            buffer["x"][:] = inputs([2, 0], 2 * number)["x"]
            yield buffer

    answers = collect(Cascade(Planned(), COSTS, TABLES["flat"], 8).stream(batches(), refill=True), Planned.exits, COSTS)
    check(answers, [2, 0] * 4)


def test_a_stream_hands_a_sample_out_before_it_reads_the_next_batch():
    read = []

    def batches():
        for number in range(3):
            read.append(number)
            yield inputs([number], number)

    for number, leaving in enumerate(Cascade(Planned(), COSTS).stream(batches())):
        assert read == list(range(number + 1))
        assert leaving.ids.tolist() == [number]


def test_bucketed_sizes_are_filled_up_and_the_filling_is_never_answered():
    stages = Planned(sizes=(4, 16))
    answers = Cascade(stages, COSTS).answer(inputs([0, 1, 2, 2, 1]))
    check(answers, [0, 1, 2, 2, 1])
    assert stages.ran == [(0, 16), (1, 4), (2, 4)]


def test_a_plan_takes_the_place_of_the_decisions():
    answers = Cascade(Planned(), COSTS, micro_batch=2).answer(inputs([0] * 4), plan=np.array([5, 2, 0, 5]))
    assert answers.exits.tolist() == [5, 2, 0, 5]


def test_anytime_tells_of_everyone_still_in_the_network():
    leaving = list(Cascade(Planned(), COSTS, micro_batch=2).anytime(inputs([0, 1, 2, 1])))
    assert [(one.exit, one.ids.tolist()) for one in leaving] == [(0, [0, 1, 2, 3]), (2, [1, 2, 3]), (5, [2])]
    assert len(list(Cascade(Planned(), COSTS).anytime(inputs([0, 0])))) == 1


def test_logits_are_those_of_all_samples_at_all_exits():
    logits = Cascade(Planned(sizes=(4,)), COSTS).logits(inputs([0, 3, 1, 2, 0, 0]))
    assert [one[:, 0].tolist() for one in logits] == [[100.0 * (1 + i) + stage for i in range(6)] for stage in range(3)]


def test_measuring_times_every_stage_at_every_size():
    stages = Planned()
    latency = Cascade(stages, COSTS).measure(inputs([2, 2, 2]), [4, 1, 4], repeats=2)
    assert latency.sizes == (1, 4)
    assert np.shape(latency.run_ms) == np.shape(latency.take_ms) == (3, 2)
    assert np.min(latency.run_ms) > 0
    assert sorted(set(stages.ran)) == [(stage, rows) for stage in range(3) for rows in (1, 4)]


class Asynchronous(Planned):
    """Stages on a device that is told what to do, and does it when it is waited for."""

    told = False

    def take(self, values, rows):
        self.told = True
        return super().take(values, rows)

    def wait(self):
        self.told = False

    def run(self, stage, values):
        assert not self.told, "the time of taking rows would be counted as the stage's"
        return super().run(stage, values)


def test_measuring_waits_for_the_rows_it_took():
    assert Cascade(Asynchronous(), COSTS).measure(inputs([2, 2, 2]), [4], repeats=1).sizes == (4,)


def test_latency_is_a_straight_line_between_the_sizes_and_beyond_them():
    latency = Latency((1, 2, 4), ((1.0, 2.0, 6.0),), ((0.0, 0.0, 0.0),))
    assert [latency.run(0, rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 2.0, 4.0, 6.0, 10.0]
    assert Latency((4,), ((8.0,),), ((0.0,),)).run(0, 8) == 16.0
    falling = Latency((1, 2), ((3.0, 2.0),), ((0.0, 0.0),))
    assert falling.run(0, 4) == 2.0


def test_the_bound_leaves_out_stages_that_no_row_reaches():
    latency = Latency((1, 4), ((1.0, 4.0),) * 3, ((0.0, 0.0),) * 3)
    assert latency.bound([4, 2, 0]) == pytest.approx(6.0)


def test_settling_leaves_a_finished_row_alone():
    ids, scores = np.array([3, -1, 5]), np.eye(3)
    leaving, left = settle(ids, np.array([True, True, False]), scores, 7, last=False)
    assert (leaving.exit, leaving.ids.tolist(), left.tolist()) == (7, [3], [-1, -1, 5])
    leaving, left = settle(left, np.array([False, False, False]), scores, 8, last=True)
    assert (leaving.ids.tolist(), left.tolist()) == ([5], [-1, -1, -1])
