import math
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallowdeep.data.labels import LabelTree
from shallowdeep.errors import FileFormatError, TraceError
from shallowdeep.networks.costs import Costs
from shallowdeep.storage import save_tensors
from shallowdeep.traces.trace import Trace, TraceInfo

COSTS = Costs((40, 100), (10, 0), (1, 2), (3, 0), (0.4, 1.0))
TREE = LabelTree((0, 1, 1), ("oak", "cat", "dog"), ("plant", "animal"))
INFO = TraceInfo(
    model="tiny",
    data="toys",
    split="val",
    label_spaces={"labels": 3},
    class_names=("oak", "cat", "dog"),
    tree=TREE,
    strategy="joint",
    versions={"torch": "2"},
)
# softmax of the rows by hand: a logarithm of a weight gives its share of the sum
FIRST = torch.tensor([[2.0, 1, 1], [1, 6, 1], [1, 1, 2], [3, 3, 2]]).log()
LAST = torch.tensor([[1.0, 8, 1], [1, 18, 1], [1, 1, 3], [1, 1, 1]]).log()


def make(**changes):
    parts = {
        "logits": (FIRST, LAST),
        "labels": torch.tensor([1, 1, 2, 2]),
        "ids": torch.tensor([7, 3, 9, 5]),
        "costs": COSTS,
        "info": INFO,
    }
    return Trace(**(parts | changes))


def equal(one, other):
    return (
        len(one.logits) == len(other.logits)
        and all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
        and torch.equal(one.ids, other.ids)
        and (one.labels is other.labels is None or torch.equal(one.labels, other.labels))
        and (one.costs, one.info) == (other.costs, other.info)
    )


def test_predictions_confidences_and_correctness_by_hand():
    trace = make()
    assert (len(trace), trace.num_exits, trace.num_outputs) == (4, 2, 3)
    assert trace.predictions.tolist() == [[0, 1], [1, 1], [2, 2], [0, 0]]  # the first of equals
    expected = torch.tensor([[2 / 4, 8 / 10], [6 / 8, 18 / 20], [2 / 4, 3 / 5], [3 / 8, 1 / 3]])
    # softmax sums three exponentials in float32: a few units of the 24th bit
    torch.testing.assert_close(trace.confidences, expected, atol=1e-6, rtol=0)
    assert trace.correct.tolist() == [[False, True], [True, True], [True, True], [False, False]]


def test_exits_may_have_different_widths():
    trace = make(logits=(torch.tensor([[0.0, 1.0]]).expand(4, 2), LAST))
    assert trace.predictions[:, 0].tolist() == [1, 1, 1, 1]
    assert trace.confidences[0, 0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert trace.num_outputs == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": ()}, "same number of samples"),
        ({"logits": (FIRST, LAST[:3])}, r"same number of samples.* got \[3, 4\]"),
        ({"labels": torch.tensor([0])}, r"got \[1, 4\]"),
        ({"ids": torch.arange(5)}, r"got \[4, 5\]"),
        ({"logits": (FIRST,)}, "has 1 exits, its costs have 2"),
        ({"ids": torch.tensor([1, 2, 1, 1])}, "2 ids occur twice"),
        ({"logits": (FIRST, LAST * math.nan)}, "not finite"),
        ({"logits": (FIRST, LAST + math.inf)}, "not finite"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels run from 0 to 3, the last exit has outputs 0 to 2"),
        ({"labels": torch.tensor([0, -1, 2, 1])}, "labels run from -1 to 2"),
    ],
)
def test_parts_must_fit_together(change, message, monkeypatch):
    # outside the tests no annotation is checked, and the class has to notice by itself
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TraceError, match=message):
        make(**change)


def test_an_empty_trace_is_none():
    with pytest.raises(TraceError, match=r"at least 1, everywhere; got \[0\]"):
        make(logits=(FIRST[:0], LAST[:0]), labels=torch.zeros(0, dtype=torch.int64), ids=torch.arange(0))


def test_without_labels_only_what_needs_them_fails():
    trace = make(labels=None)
    assert trace.predictions.shape == (4, 2)
    for ask in (lambda: trace.correct, lambda: trace.true_labels):
        with pytest.raises(TraceError, match="needs labels, and the Trace has none"):
            ask()
    assert trace.select(torch.tensor([0])).labels is None


def test_select_by_index_and_by_mask():
    trace = make()
    by_index = trace.select(torch.tensor([2, 0]))
    assert by_index.ids.tolist() == [9, 7]
    assert by_index.true_labels.tolist() == [2, 1]
    assert torch.equal(by_index.logits[0], FIRST[[2, 0]])
    assert torch.equal(by_index.logits[1], LAST[[2, 0]])
    assert by_index.predictions.tolist() == [[2, 2], [0, 1]]
    assert equal(trace.select(torch.tensor([True, False, True, False])), trace.select(torch.tensor([0, 2])))
    assert trace.ids.tolist() == [7, 3, 9, 5]


def test_select_refuses_a_sample_twice_and_none_at_all():
    with pytest.raises(TraceError, match="1 ids occur twice"):
        make().select(torch.tensor([0, 0]))
    with pytest.raises(TraceError, match="at least 1"):
        make().select(torch.zeros(4, dtype=torch.bool))


three_exits = {
    "logits": (FIRST, 2 * FIRST, LAST),
    "costs": Costs((40, 60, 100), (10, 20, 0), (1, 2, 3), (3, 4, 0), (0.4, 0.6, 1.0)),
}


def test_select_exits_takes_their_costs_along():
    trace = make(**three_exits).select_exits([1, 2])
    assert torch.equal(trace.logits[0], 2 * FIRST)
    assert trace.costs == Costs((60, 100), (20, 0), (2, 3), (4, 0), (0.6, 1.0))
    assert trace.predictions.tolist() == make().predictions.tolist()
    only_last = make(**three_exits).select_exits([2])
    assert (only_last.num_exits, only_last.costs.relative().tolist()) == (1, [1.0])


@pytest.mark.parametrize("exits", [[], [0], [0, 1], [2, 1], [0, 3], [1, -1]])
def test_the_last_exit_stays(exits):
    with pytest.raises(TraceError, match="leave out the last one, 2"):
        make(**three_exits).select_exits(exits)


@pytest.mark.parametrize("exits", [[1, 0, 2], [0, 0, 2], [-2, 2], [7, 2], [2, 2]])
def test_exits_in_disorder_are_refused(exits):
    with pytest.raises(TraceError, match="not in order from 0, each once"):
        make(**three_exits).select_exits(exits)


def test_merge_orders_by_id_and_keeps_doubles_once():
    trace = make()
    parts = [trace.select(torch.tensor(rows)) for rows in ([0, 2], [1, 2], [3, 1, 0])]
    merged = Trace.merge(parts)
    assert merged.ids.tolist() == [3, 5, 7, 9]
    assert equal(merged, trace.select(torch.tensor([1, 3, 0, 2])))
    assert equal(Trace.merge([trace]), merged)


def test_merge_without_labels():
    merged = Trace.merge([make(labels=None).select(torch.tensor([i])) for i in range(4)])
    assert merged.labels is None
    assert merged.ids.tolist() == [3, 5, 7, 9]


@pytest.mark.parametrize(
    "other",
    [
        {"costs": replace(COSTS, head_flops=(11, 0))},
        {"info": replace(INFO, split="test")},
        {"info": replace(INFO, model="other")},
        {"info": replace(INFO, tree=None)},
    ],
)
def test_merge_refuses_parts_of_something_else(other):
    with pytest.raises(TraceError, match="different networks, data or splits"):
        Trace.merge([make(), make(**other)])


def test_merge_refuses_half_labelled_parts_and_nothing():
    with pytest.raises(TraceError, match="some parts have labels, and some have none"):
        Trace.merge([make(), make(labels=None)])
    with pytest.raises(TraceError, match="nothing to merge"):
        Trace.merge([])


@pytest.mark.parametrize("labels", [torch.tensor([1, 1, 2, 2]), None])
@pytest.mark.parametrize("info", [INFO, TraceInfo(), replace(INFO, tree=None)])
def test_saved_and_loaded_it_is_the_same(labels, info, tmp_path):
    trace = make(labels=labels, info=info)
    trace.save(tmp_path / "a.safetensors")
    loaded = Trace.load(tmp_path / "a.safetensors")
    assert equal(loaded, trace)
    assert loaded.info == info
    assert loaded.info.class_names == info.class_names
    assert equal(Trace.merge([loaded, trace]), Trace.merge([trace]))


def test_views_and_other_widths_are_saved(tmp_path):
    trace = make(logits=(FIRST[:, :2], LAST.T.contiguous().T), costs=replace(COSTS, nominal=None))
    trace.save(tmp_path / "deep" / "a.safetensors")
    assert equal(Trace.load(tmp_path / "deep" / "a.safetensors"), trace)


def test_saved_in_half_precision_it_takes_half_the_room(tmp_path):
    n = 5000
    logits = tuple(torch.randn(n, 10, generator=torch.Generator().manual_seed(i)) for i in range(2))
    trace = Trace(logits, None, torch.arange(n, dtype=torch.int32), COSTS)
    sizes = {}
    for dtype in (None, torch.float16):
        path = tmp_path / f"{dtype}.safetensors"
        trace.save(path, dtype=dtype)
        sizes[dtype] = path.stat().st_size
        loaded = Trace.load(path)
        assert {x.dtype for x in loaded.logits} == {torch.float32}
    for found, exact in zip(loaded.logits, trace.logits, strict=True):
        assert torch.equal(found, exact.half().float())
    assert sizes[None] - sizes[torch.float16] == pytest.approx(n * 10 * 2 * 2, abs=64)  # the header's words


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float16, r"exit 1 reach 7e\+04, which torch.float16 does not hold. .*torch.bfloat16"),
        (torch.float8_e4m3fn, r"exit 1 reach 7e\+04, which torch.float8_e4m3fn does not hold"),
        (torch.int8, "floating-point type, got dtype=torch.int8"),
        (torch.complex64, "floating-point type, got dtype=torch.complex64"),
    ],
)
def test_a_type_that_does_not_hold_the_logits_leaves_the_file_alone(dtype, message, tmp_path):
    make().save(tmp_path / "a.safetensors")
    with pytest.raises(TraceError, match=message):
        make(logits=(FIRST, 70_000 * FIRST.sign())).save(tmp_path / "a.safetensors", dtype=dtype)
    assert equal(Trace.load(tmp_path / "a.safetensors"), make())


def test_a_truncated_file(tmp_path):
    path = tmp_path / "a.safetensors"
    make().save(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=f"{path} is truncated or no safetensors file"):
            Trace.load(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileFormatError, match="no file"):
        Trace.load(path)
    path.write_text("hello")
    with pytest.raises(FileFormatError, match="no safetensors file"):
        Trace.load(path)
    save_tensors(path, {"x": torch.ones(1)}, kind="sdn", info={})
    with pytest.raises(FileFormatError, match=f"{path} is a sdn, not a trace"):
        Trace.load(path)


@pytest.mark.parametrize("lost", ["logits.0", "ids", "costs", "info"])
def test_a_file_that_lacks_a_part(lost, tmp_path):
    tensors = {"logits.0": FIRST, "logits.1": LAST, "ids": torch.arange(4)}
    info = {"costs": COSTS.to_dict(), "info": INFO.to_dict()}
    for place in (tensors, info):
        place.pop(lost, None)
    save_tensors(tmp_path / "a.safetensors", tensors, kind="trace", info=info)
    with pytest.raises(FileFormatError, match=r"a.safetensors lacks a part of a Trace"):
        Trace.load(tmp_path / "a.safetensors")


def test_a_saved_trace_replaces_the_one_before_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    make().save(path)
    make(labels=None).save(path)
    assert Trace.load(path).labels is None

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shallowdeep.storage.save_file", full)
    with pytest.raises(OSError, match="No space"):
        make().save(path)
    assert Trace.load(path).labels is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@given(st.permutations(range(6)), st.integers(0, 2**16))
def test_a_permuted_trace_is_permuted_in_everything(order, seed):
    random = torch.Generator().manual_seed(seed)
    trace = Trace(
        tuple(torch.randn(6, 3, generator=random) for _ in range(2)),
        torch.randint(3, (6,), generator=random),
        torch.arange(6) * 2 + 1,
        COSTS,
    )
    rows = torch.tensor(order)
    permuted = trace.select(rows)
    assert torch.equal(permuted.predictions, trace.predictions[rows])
    assert torch.equal(permuted.confidences, trace.confidences[rows])
    assert torch.equal(permuted.correct, trace.correct[rows])
    assert equal(permuted.select(rows.argsort()), trace)
    assert equal(Trace.merge([permuted]), trace)
    cut = [permuted.select(part) for part in torch.arange(6).split(4)]
    assert equal(Trace.merge(cut[::-1]), trace)


def test_from_logits_of_arrays_and_lists():
    arrays = [FIRST.numpy(), LAST.tolist()]
    trace = Trace.from_logits(
        arrays, labels=[1, 1, 2, 2], costs=[20, 50], split="val", class_names=("oak", "cat", "dog")
    )
    assert all(torch.equal(a, b) for a, b in zip(trace.logits, (FIRST, LAST), strict=True))
    assert trace.labels.tolist() == [1, 1, 2, 2]
    assert trace.ids.tolist() == [0, 1, 2, 3]
    assert trace.costs.relative().tolist() == [0.4, 1.0]
    assert (trace.info.split, trace.info.class_names) == ("val", ("oak", "cat", "dog"))


def test_from_logits_keeps_nothing_of_the_callers():
    logits, labels, ids = np.zeros((2, 3), np.float32), np.array([0, 1]), torch.tensor([4, 7])
    tensor = torch.zeros(2, 3)
    trace = Trace.from_logits([logits, tensor], labels, [0.4, 1.0], ids=ids)
    for mine in (logits, labels, ids, tensor):
        mine += 1
    assert [one.sum() for one in trace.logits] == [0, 0]
    assert (trace.labels.tolist(), trace.ids.tolist()) == ([0, 1], [4, 7])


def test_from_logits_of_half_precision_on_a_graph_and_of_probabilities():
    half = [FIRST.half().requires_grad_(), LAST.bfloat16()]
    trace = Trace.from_logits(half, costs=COSTS, ids=[4, 3, 2, 1])
    assert [x.dtype for x in trace.logits] == [torch.float32] * 2
    assert (trace.labels, trace.ids.tolist(), trace.costs) == (None, [4, 3, 2, 1], COSTS)
    shares = Trace.from_logits([FIRST.softmax(1), LAST.softmax(1)], costs=[0.4, 1.0], probabilities=True)
    torch.testing.assert_close(shares.confidences, make().confidences)
    certain = Trace.from_logits([[[0.0, 1.0]]], costs=[1.0], probabilities=True)
    assert certain.confidences.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": None}, "costs are missing"),
        ({"costs": [0.5]}, "has 2 exits, its costs have 1"),
        ({"costs": [0.5, math.nan]}, "costs are finite numbers"),
        ({"costs": [0.0, 0.0]}, "the last above 0"),
        ({"costs": [2.0, 1.0]}, "must rise"),
        ({"labels": [0.5, 1, 1, 1]}, "labels are torch.float64"),
        ({"per_exit_logits": [FIRST[0], LAST]}, r"exit 0 has logits of shape \(3,\)"),
        ({"probabilities": True}, "exit 0 holds no probabilities"),
    ],
)
def test_from_logits_says_what_does_not_fit(changes, message):
    parts = {"per_exit_logits": [FIRST, LAST], "labels": [1, 1, 2, 2], "costs": [0.4, 1.0]}
    with pytest.raises(TraceError, match=message):
        Trace.from_logits(**(parts | changes))


def test_a_cascade_by_hand():
    small = Trace.from_logits([FIRST], [1, 1, 2, 2], [25], ids=[5, 3, 7, 9], split="val", model="small")
    large = make(costs=Costs((40, 100), (10, 0), (1, 2), (3, 0)))  # ids 7 3 9 5
    both = Trace.cascade(small, Trace(large.logits, torch.tensor([2, 1, 2, 1]), large.ids, large.costs, large.info))
    assert both.ids.tolist() == [7, 3, 9, 5]
    assert torch.equal(both.logits[0], FIRST[[2, 1, 3, 0]])
    assert torch.equal(both.logits[1], FIRST)
    # alone the large network is 1.0: the small one adds its quarter, and its own exit a tenth
    assert both.costs.relative().tolist() == [0.25, 0.75, 1.35]
    assert both.costs.relative(exits=[0]).tolist() == [0.25, 0.65, 1.25]
    assert (both.info.model, both.info.split) == ("small + tiny", "val")


def test_a_cascade_of_costs_survives_a_file_and_a_selection(tmp_path):
    small = Trace.from_logits([FIRST], [1, 1, 2, 2], [25], ids=[7, 3, 9, 5])
    both = Trace.cascade(small, make())
    both.save(tmp_path / "both.safetensors")
    assert equal(Trace.load(tmp_path / "both.safetensors"), both)
    assert both.select_exits([0, 2]).costs.relative().tolist() == [0.25, 1.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [7, 3, 9, 6]}, "different samples"),
        ({"labels": [1, 1, 2, 0]}, "label the same samples differently"),
        ({"split": "test"}, "are of the splits test and val"),
        ({"per_exit_logits": [FIRST.repeat(1, 2)]}, "have 6 and 3 outputs"),
    ],
)
def test_a_cascade_is_of_the_same_samples(changes, message):
    parts = {"per_exit_logits": [FIRST], "labels": [1, 1, 2, 2], "costs": [25], "ids": [7, 3, 9, 5]}
    with pytest.raises(TraceError, match=message):
        Trace.cascade(Trace.from_logits(**(parts | changes)), make())


def test_a_cascade_is_of_the_split_that_either_says():
    parts = [Trace.from_logits([FIRST], [1, 1, 2, 2], [25], split=split) for split in ("test", "")]
    assert Trace.cascade(*parts).info.split == Trace.cascade(*parts[::-1]).info.split == "test"


def test_agreement_takes_the_last_answers_for_labels():
    assert make(labels=None).as_agreement().labels.tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize(("small", "large", "share"), [(2.5, 9.5, 2.5 / 9.5), (2.5, 9.0, 2.5 / 9), (2.0, 9.5, 2 / 9.5)])
def test_a_cascade_in_any_one_unit(small, large, share):
    parts = [Trace.from_logits([LAST], [1, 1, 2, 2], [cost]) for cost in (small, large)]
    assert Trace.cascade(*parts).costs.relative().tolist() == pytest.approx([share, 1 + share])
