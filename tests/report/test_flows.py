import pytest
from hypothesis import given
from reference import hand_trace, make_trace, traces

from shallowdeep.analysis.overthinking import measure_overthinking
from shallowdeep.errors import TraceError
from shallowdeep.report.flows import measure_flows


def test_by_hand():
    """From the table above ``hand_trace``: sample 1 is gained at exit 1, sample 2 lost there for good."""
    found = measure_flows(hand_trace())
    assert found.counts == ((2, 0, 2), (2, 1, 1), (2, 1, 1))
    assert found.moves == (((1, 1, 0), (0, 0, 0), (1, 0, 1)), ((2, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert (found.gained, found.lost) == ((1, 0), (1, 0))


@given(traces())
def test_as_one_counts_on_fingers(trace):
    if trace.num_exits < 2:
        with pytest.raises(TraceError, match="only the last"):
            measure_flows(trace)
        return
    found = measure_flows(trace)
    right = trace.correct.tolist()
    for exit in range(1, trace.num_exits):
        assert found.gained[exit - 1] == sum(row[exit] and not row[exit - 1] for row in right)
        assert found.lost[exit - 1] == sum(row[exit - 1] and not row[exit] for row in right)
    assert found.counts[-1][1] == round(measure_overthinking(trace).destructive * len(trace))


def test_fewer_columns_remember_all_exits():
    """A sample that was right only between two columns is lost all the same."""
    trace = make_trace(200, num_exits=5)
    found = measure_flows(trace, (0, 4))
    assert found.counts[1] == measure_flows(trace).counts[-1]
    assert sum(sum(row) for row in found.moves[0]) == 200
