import itertools
import statistics

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from shallowdeep.analysis.detection import MAX_POINTS, auroc, risk_at, risk_coverage, roc

FEW = [-1.5, 0.0, 0.25, 0.5, 3.0]


def many(n=5000, share=0.2):
    """Scores with ties, the positives higher."""
    random = torch.Generator().manual_seed(0)
    positive = torch.rand(n, generator=random) < share
    return (torch.randn(n, generator=random) + positive).mul(20).round() / 20, positive


@st.composite
def scored(draw, max_n=40):
    n = draw(st.integers(2, max_n))
    scores = draw(st.lists(st.sampled_from(FEW), min_size=n, max_size=n))
    positive = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    assume(any(positive) and not all(positive))
    return scores, positive


@given(scored())
def test_auroc_is_sklearns(drawn):
    scores, positive = drawn
    found = auroc(torch.tensor(scores), torch.tensor(positive))
    assert found == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert found == pytest.approx(reference.auroc(scores, positive), abs=1e-12)


def test_auroc_of_many_scores_is_sklearns():
    scores, positive = many()
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert auroc(positive.float(), positive) == 1.0
    assert auroc(torch.zeros(5000), positive) == 0.5


def naive_roc(scores, positive):
    """An alarm at each score and above, the highest first."""
    points = [(0.0, 0.0)]
    for level in sorted(set(scores), reverse=True):
        alarms = [p for score, p in zip(scores, positive, strict=True) if score >= level]
        points.append((alarms.count(False) / positive.count(False), alarms.count(True) / positive.count(True)))
    return points


@given(scored())
def test_roc_has_every_corner(drawn):
    scores, positive = drawn
    found = roc(torch.tensor(scores), torch.tensor(positive))
    assert list(zip(found.fpr, found.tpr, strict=True)) == naive_roc(scores, positive)
    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    assert (found.fpr, found.tpr) == (pytest.approx(tuple(fpr), abs=1e-12), pytest.approx(tuple(tpr), abs=1e-12))


def area(found):
    return torch.trapezoid(torch.tensor(found.tpr).double(), torch.tensor(found.fpr).double()).item()


def test_a_long_roc_is_thinned_evenly():
    scores, positive = many()
    scores = scores.double() + torch.arange(5000.0) / 1e6  # no ties: 5,001 corners
    whole, found = roc(scores, positive, max_points=10_000), roc(scores, positive)
    assert len(whole.fpr) == 5001
    assert len(found.fpr) == MAX_POINTS
    corners = set(zip(whole.fpr, whole.tpr, strict=True))
    points = list(zip(found.fpr, found.tpr, strict=True))
    assert set(points) <= corners
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    # its length, along the axes, is 2: no step is longer than a hundredth of it and a corner on each side
    steps = [b[0] - a[0] + b[1] - a[1] for a, b in itertools.pairwise(points)]
    assert max(steps) < 0.02 + 2 / 1000
    assert area(whole) == pytest.approx(auroc(scores, positive), abs=1e-9)
    assert area(found) == pytest.approx(area(whole), abs=1e-3)


def test_a_perfect_score_keeps_its_corner_when_thinned():
    positive = torch.arange(1000) >= 900
    found = roc(torch.arange(1000.0), positive, max_points=11)
    assert (0.0, 1.0) in zip(found.fpr, found.tpr, strict=True)
    assert len(found.fpr) == 11
    assert area(found) == 1.0


def naive_risks(scores, wrong):
    """The mean over all orders in which equal scores may stand."""
    n = len(scores)
    orders = [
        o for o in itertools.permutations(range(n)) if all(scores[a] <= scores[b] for a, b in itertools.pairwise(o))
    ]
    return [statistics.fmean(sum(wrong[i] for i in order[:k]) / k for order in orders) for k in range(1, n + 1)]


@given(scores=st.lists(st.sampled_from(FEW), min_size=1, max_size=6), data=st.data())
def test_risk_is_the_mean_over_all_orders(scores, data):
    wrong = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    found = risk_coverage(torch.tensor(scores), torch.tensor(wrong))
    assert found.tolist() == pytest.approx(naive_risks(scores, wrong), abs=1e-12)


def test_risk_of_the_best_and_the_worst_score():
    wrong = torch.arange(100) >= 75
    best, worst = risk_coverage(torch.arange(100.0), wrong), risk_coverage(-torch.arange(100.0), wrong)
    assert (best[:75] == 0).all()
    assert (worst[:25] == 1).all()
    assert best[-1] == worst[-1] == 0.25
    assert [risk_at(best, c) for c in (0.5, 0.75, 0.8, 1.0)] == [0.0, 0.0, 5 / 80, 0.25]
    blind = risk_coverage(torch.zeros(100), wrong)
    assert blind.tolist() == pytest.approx([0.25] * 100)


@pytest.mark.parametrize(
    ("coverage", "n", "answered"), [(0.8, 10, 8), (0.9, 10, 9), (0.55, 100, 55), (0.8, 4, 4), (0.5, 5, 3), (0.0, 3, 1)]
)
def test_at_least_the_coverage_is_answered(coverage, n, answered):
    assert risk_at(torch.arange(1.0, n + 1).double(), coverage) == answered
