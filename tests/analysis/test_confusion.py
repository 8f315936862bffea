import json
import statistics
from dataclasses import asdict, replace

import pytest
import reference
import torch
from hypothesis import assume, given
from reference import hand_trace, make_trace, traces

from shallowdeep.analysis.confusion import confusion_scores, measure_confusion, usual_confusion
from shallowdeep.errors import TraceError

TRACE = hand_trace()
TRAINING = hand_trace(split="train").select(torch.tensor([0, 1]))  # confusion 0.5 and 1.3: mean 0.9, spread 0.4
FOUND = measure_confusion(TRACE, TRAINING)
ROUNDING = 1e-6  # of float32 probabilities, summed


def test_by_hand():
    torch.testing.assert_close(confusion_scores(TRACE), torch.tensor([0.5, 1.3, 0.7, 0.6]))
    assert asdict(FOUND) == {
        "n": 4,
        "mean_correct": pytest.approx(0.0, abs=ROUNDING),
        "mean_wrong": pytest.approx(-0.625, abs=ROUNDING),
        "wrong_below_correct_mean": 1.0,
        "correct_above_wrong_mean": 0.5,
        "confidence_correct": pytest.approx(0.8, abs=ROUNDING),
        "confidence_wrong": pytest.approx(0.575, abs=ROUNDING),
        "wrong_above_correct_mean_confidence": 0.0,
        "auroc": {"confusion": 0.5, "max-softmax": 1.0, "entropy": 1.0},
        # least confused are samples 0, 3, 2, 1; surest (and of least entropy) 1, 0, 3, 2; wrong are 2 and 3
        "aurc": {
            "confusion": pytest.approx((0 + 1 / 2 + 2 / 3 + 2 / 4) / 4),
            "max-softmax": pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4),
            "entropy": pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4),
        },
        "risk_at_80": {"confusion": 0.5, "max-softmax": 0.5, "entropy": 0.5},
        "risk_at_90": {"confusion": 0.5, "max-softmax": 0.5, "entropy": 0.5},
    }


@given(traces())
def test_scores_are_the_naive_sums(trace):
    naive = [reference.confusion_score(trace, i) for i in range(len(trace))]
    assert confusion_scores(trace).tolist() == pytest.approx(naive, abs=ROUNDING)


def test_distances_are_exact():
    """Without the authors' 1e-6 per class: the last exit and exits that agree with it add nothing at all."""
    trace = make_trace(50, num_classes=200)
    alike = replace(trace, logits=(trace.logits[-1],) * 4)
    assert confusion_scores(alike).tolist() == [0.0] * 50
    assert confusion_scores(trace.select_exits([3])).tolist() == [0.0] * 50
    half_alike = replace(trace, logits=(trace.logits[0], *(trace.logits[-1],) * 3))
    assert torch.equal(confusion_scores(half_alike), confusion_scores(trace.select_exits([0, 3])))


def test_exits_sure_of_other_classes_are_two_apart():
    logits = (torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]), torch.tensor([[50.0, 0.0]]))
    assert confusion_scores(replace(TRACE.select(torch.tensor([0])), logits=logits)).tolist() == [2.0]


def naive_risks(scores, wrong):
    """Share of wrong answers among the k least suspicious, k = 1 … n; equal scores with the share among them."""
    expected = [
        statistics.fmean(w for w, other in zip(wrong, scores, strict=True) if other == score)
        for score in sorted(scores)
    ]
    return [statistics.fmean(expected[:k]) for k in range(1, len(scores) + 1)]


def check(trace, training):
    found = measure_confusion(trace, training)
    raw, usual = confusion_scores(trace).tolist(), confusion_scores(training).tolist()
    confusion, right = reference.normalised(raw, usual), trace.correct[:, -1].tolist()
    probabilities = trace.logits[-1].softmax(-1)
    confidence, entropy = probabilities.amax(1).tolist(), torch.special.entr(probabilities).sum(1).tolist()

    def of(scores, answer):
        return [score for score, r in zip(scores, right, strict=True) if r is answer]

    def mean(scores):
        return pytest.approx(sum(scores) / len(scores), rel=1e-9, abs=1e-9)

    wrong = [not r for r in right]
    suspicion = {"confusion": raw, "max-softmax": [-c for c in confidence], "entropy": entropy}
    risks = {name: naive_risks(scores, wrong) for name, scores in suspicion.items()}

    def risk_at(percent):
        answered = -(-percent * len(trace) // 100)  # rounded up
        return {name: pytest.approx(risk[answered - 1], abs=1e-9) for name, risk in risks.items()}

    assert asdict(found) == {
        "n": len(trace),
        "mean_correct": mean(of(confusion, True)),
        "mean_wrong": mean(of(confusion, False)),
        "wrong_below_correct_mean": reference.share_beyond(of(raw, False), of(raw, True), above=False),
        "correct_above_wrong_mean": reference.share_beyond(of(raw, True), of(raw, False), above=True),
        "confidence_correct": mean(of(confidence, True)),
        "confidence_wrong": mean(of(confidence, False)),
        "wrong_above_correct_mean_confidence": reference.share_beyond(
            of(confidence, False), of(confidence, True), above=True
        ),
        "auroc": {
            "confusion": pytest.approx(reference.auroc(raw, wrong)),
            "max-softmax": pytest.approx(reference.auroc([-c for c in confidence], wrong)),
            "entropy": pytest.approx(reference.auroc(entropy, wrong)),
        },
        "aurc": {name: mean(risk) for name, risk in risks.items()},
        "risk_at_80": risk_at(80),
        "risk_at_90": risk_at(90),
    }


@given(traces(max_n=8))
def test_is_the_naive_count(trace):
    right, raw = trace.correct[:, -1], confusion_scores(trace)
    assume(trace.num_exits > 1 and right.any() and not right.all() and raw.max() - raw.min() > 0.1)
    check(trace, trace)


def test_is_the_naive_count_on_many_samples():
    trace, training = make_trace(150, num_exits=6), make_trace(100, num_exits=6, seed=1, split="train", noise=0.5)
    check(trace, training)
    assert measure_confusion(trace, training).auroc["confusion"] > 0.55


def test_the_training_split_normalises():
    trace, training = make_trace(100), make_trace(80, seed=1, split="train", noise=0.3)
    found, own = measure_confusion(trace, training), measure_confusion(trace, trace)
    right = trace.correct[:, -1].double().mean().item()
    assert right * own.mean_correct + (1 - right) * own.mean_wrong == pytest.approx(0, abs=1e-9)
    assert abs(right * found.mean_correct + (1 - right) * found.mean_wrong) > 0.3
    assert (found.auroc, found.wrong_below_correct_mean) == (own.auroc, own.wrong_below_correct_mean)


def test_equal_scores_lie_on_neither_side_of_their_mean():
    same = [logits[:1].expand(2001, 2) for logits in TRACE.logits]  # sample 0, with either label
    trace = replace(TRACE, logits=tuple(same), labels=torch.arange(2001) % 2, ids=torch.arange(2001))
    scores = confusion_scores(trace)
    assert (scores == scores[0]).all()
    assert scores.mean() != scores[0]  # as float32 adds them up
    found = measure_confusion(trace, TRAINING)
    assert (found.wrong_below_correct_mean, found.correct_above_wrong_mean) == (0.0, 0.0)
    assert found.wrong_above_correct_mean_confidence == 0.0
    assert found.auroc == {"confusion": 0.5, "max-softmax": 0.5, "entropy": 0.5}
    same_risk = dict.fromkeys(found.auroc, pytest.approx(1000 / 2001, abs=1e-12))
    assert (found.aurc, found.risk_at_80, found.risk_at_90) == (same_risk,) * 3


def test_rows_and_to_dict_are_json():
    shown = replace(FOUND, risk_at_90={"confusion": 0.3, "max-softmax": 0.2, "entropy": 0.1})
    rows = shown.rows()
    names = ("score", "AUROC", "AURC", "risk at 80 %", "risk at 90 %")
    assert [tuple(row) for row in rows] == [names] * 3
    assert [tuple(row.values()) for row in rows] == [
        ("confusion", 0.5, FOUND.aurc["confusion"], 0.5, 0.3),
        ("max-softmax", 1.0, FOUND.aurc["max-softmax"], 0.5, 0.2),
        ("entropy", 1.0, FOUND.aurc["entropy"], 0.5, 0.1),
    ]
    assert json.loads(json.dumps(rows)) == rows
    assert json.loads(json.dumps(FOUND.to_dict())) == asdict(FOUND)


def test_str():
    far = replace(
        FOUND,
        mean_correct=-0.5,
        mean_wrong=1.25,
        confidence_wrong=0.625,
        wrong_above_correct_mean_confidence=0.25,
        risk_at_80={"confusion": 0.25, "max-softmax": 0.125, "entropy": 0.5},
    )
    assert str(far) == (
        "Normalised confusion is -0.50 on right and +1.25 on wrong answers; confidence 0.80 and 0.62.\n"
        "An alarm at the mean of the right answers misses 100.0 % of the wrong ones by confusion, "
        "25.0 % by confidence.\n"
        "AUROC for finding wrong answers: confusion 0.500, max-softmax 1.000, entropy 1.000. "
        "Wrong among the 80 % least suspicious: confusion 25.0 %, max-softmax 12.5 %, entropy 50.0 %."
    )


def test_what_confusion_cannot_be_measured_on():
    with pytest.raises(TraceError, match="only the last one"):
        measure_confusion(TRACE.select_exits([2]), TRAINING.select_exits([2]))
    with pytest.raises(TraceError, match="of another network"):
        measure_confusion(TRACE, TRAINING.select_exits([0, 2]))
    with pytest.raises(TraceError, match="needs labels"):
        measure_confusion(replace(TRACE, labels=None), TRAINING)
    for rows in ([0, 1], [2, 3]):
        with pytest.raises(TraceError, match="all right or all wrong"):
            measure_confusion(TRACE.select(torch.tensor(rows)), TRAINING)
    with pytest.raises(TraceError, match=r"confusion is 0\.5\d* on every training sample; there is no spread"):
        measure_confusion(TRACE, TRAINING.select(torch.tensor([0])))
    with pytest.raises(TraceError, match="differ in their number of outputs"):
        confusion_scores(replace(TRACE, logits=(torch.zeros(4, 3), *TRACE.logits[1:])))


def test_the_training_split_needs_no_labels():
    assert measure_confusion(TRACE, replace(TRAINING, labels=None)) == FOUND


def test_the_usual_confusion():
    assert usual_confusion(TRAINING) == (pytest.approx(0.9), pytest.approx(0.4))
    with pytest.raises(TraceError, match="only the last one"):
        usual_confusion(TRAINING.select_exits([2]))


def test_the_order_of_samples_does_not_matter():
    """Few logits make many equal scores, which an unstable sort would take in any order."""
    trace = make_trace(60, noise=1.5)
    coarse = replace(trace, logits=tuple((logits / 3).round() for logits in trace.logits))
    assert len(coarse.confidences[:, -1].unique()) < 30
    turned = coarse.select(torch.arange(59, -1, -1))
    found, again = measure_confusion(coarse, trace), measure_confusion(turned, trace)
    for name in ("auroc", "aurc", "risk_at_80", "risk_at_90"):
        assert getattr(found, name) == pytest.approx(getattr(again, name), abs=1e-12)
