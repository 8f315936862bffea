import math

import pytest
import torch
import torch.nn.functional as F

from shallowdeep.errors import ConfigError
from shallowdeep.training.objectives import Distil, Exits, Joint, Plain

SHARES = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)
# softmax of these is (1/4, 3/4), (1/2, 1/2) and (3/5, 2/5)
LOGITS = [torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(1.5), 0.0]])]
LABELS = torch.tensor([0])
LOSSES = (math.log(4), math.log(2), math.log(5 / 3))  # -log of the probabilities of label 0
ROUNDING = {"abs": 1e-6}  # sums of three float32 numbers near 1


def test_plain_looks_at_the_last_exit_only():
    assert float(Plain()(LOGITS, LABELS, 0.5)) == pytest.approx(LOSSES[2], **ROUNDING)
    assert float(Plain()(LOGITS[2:], LABELS, 0.5)) == pytest.approx(LOSSES[2], **ROUNDING)


def test_exits_sum_without_weights_and_without_the_last():
    assert float(Exits()(LOGITS, LABELS, 0.5)) == pytest.approx(LOSSES[0] + LOSSES[1], **ROUNDING)


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.99])
def test_joint_weighs_internal_exits_by_tau(progress):
    taus = [min(c, 0.01 + c * progress) for c in (0.15, 0.9)]
    expected = LOSSES[2] + taus[0] * LOSSES[0] + taus[1] * LOSSES[1]
    loss = Joint((0.15, 0.9))(LOGITS, LABELS, progress)
    assert float(loss) == pytest.approx(expected, **ROUNDING)


def test_losses_are_means_over_the_batch():
    logits = [torch.cat([LOGITS[0], LOGITS[1]]), torch.cat([LOGITS[1], LOGITS[2]])]
    labels = torch.tensor([0, 0])
    assert float(Plain()(logits, labels, 0.0)) == pytest.approx((LOSSES[1] + LOSSES[2]) / 2, **ROUNDING)
    assert float(Exits()(logits, labels, 0.0)) == pytest.approx((LOSSES[0] + LOSSES[1]) / 2, **ROUNDING)


@pytest.mark.parametrize(
    ("objective", "weights"),
    [(Plain(0.2), (0, 0, 1)), (Exits(0.2), (1, 1, 0)), (Joint((0.15, 0.9), 0.2), (0.01, 0.01, 1))],
)
def test_label_smoothing_reaches_every_loss(objective, weights):
    # of two classes, a smoothing of 0.2 gives the true one 0.9 and the other 0.1
    smoothed = [-0.9 * F.log_softmax(x, 1)[0, 0] - 0.1 * F.log_softmax(x, 1)[0, 1] for x in LOGITS]
    expected = sum(weight * loss for weight, loss in zip(weights, smoothed, strict=True))
    assert float(objective(LOGITS, LABELS, 0.0)) == pytest.approx(float(expected), **ROUNDING)


def test_gradients_reach_exactly_the_exits_that_count():
    for objective, counted in [(Plain(), (0, 0, 1)), (Exits(), (1, 1, 0)), (Joint((0.15, 0.9)), (1, 1, 1))]:
        logits = [x.clone().requires_grad_() for x in LOGITS]
        objective(logits, LABELS, 0.0).backward()
        assert tuple(int(x.grad is not None and bool(x.grad.any())) for x in logits) == counted


def test_joint_refuses_another_number_of_exits():
    with pytest.raises(ValueError, match="shorter"):
        Joint(SHARES)(LOGITS, LABELS, 0.0)


def authors_tau(share, epoch):
    """tau of an epoch, counted from 1, of 100: once per epoch (facts/sdn.md, 2.5)."""
    return min(share, 0.01 + epoch * share / 100)


@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_taus_stay_within_a_hundredth_of_the_authors_steps(position):
    for epoch in range(1, 101):
        taus = Joint(SHARES).taus((epoch - 1 + position) / 100)
        for share, tau in zip(SHARES, taus, strict=True):
            # 1e-12: the sums are rounded in float64
            assert 0 <= authors_tau(share, epoch) - tau <= share / 100 + 1e-12


def test_taus_of_the_authors_first_epoch_and_their_caps():
    joint = Joint(SHARES)
    assert joint.taus(0.01) == pytest.approx([0.0115, 0.013, 0.0145, 0.016, 0.0175, 0.019], rel=1e-12)
    caps = [next(e for e in range(1, 101) if joint.taus(e / 100)[i] == share) for i, share in enumerate(SHARES)]
    assert caps == [94, 97, 98, 99, 99, 99]
    assert joint.taus(0.0) == [0.01] * 6


def test_a_weight_below_the_start_is_never_exceeded():
    assert Joint((0.005,)).taus(0.0) == [0.005]


def test_distil_by_hand():
    # KL((3/5, 2/5) || (1/4, 3/4)) and KL((3/5, 2/5) || (1/2, 1/2)); labels are not looked at
    first = 0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75)
    second = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5)
    assert float(Distil()(LOGITS, None, 0.5)) == pytest.approx(first + second, **ROUNDING)
    assert float(Distil()(LOGITS, LABELS, 0.5)) == pytest.approx(first + second, **ROUNDING)


def test_distil_softens_and_keeps_its_size():
    # at temperature 2 the odds 3 : 2 become sqrt(3) : sqrt(2)
    share = math.sqrt(3) / (math.sqrt(3) + math.sqrt(2))
    expected = 4 * (share * math.log(share / 0.5) + (1 - share) * math.log((1 - share) / 0.5))
    assert float(Distil(temperature=2.0)(LOGITS[1:], None, 0.0)) == pytest.approx(expected, **ROUNDING)


def test_distil_is_a_mean_over_the_batch_and_teaches_the_internal_exits_alone():
    logits = [torch.cat([x, x]).requires_grad_() for x in LOGITS]
    loss = Distil()(logits, None, 0.0)
    assert loss.item() == pytest.approx(float(Distil()(LOGITS, None, 0.0)), **ROUNDING)
    loss.backward()
    assert [x.grad is not None for x in logits] == [True, True, False]


def test_distil_refuses_a_temperature_of_nothing():
    with pytest.raises(ConfigError, match=r"a temperature is above 0, got 0\.0"):
        Distil(temperature=0.0)
