import json
from dataclasses import asdict, replace

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import hand_trace, make_trace, traces
from torch import nn

from shallowdeep.analysis.backdoor import measure_backdoor
from shallowdeep.data import triggers
from shallowdeep.data.sources import load_data
from shallowdeep.errors import ConfigError, TraceError
from shallowdeep.networks.attach import attach
from shallowdeep.policies.rules import Confidence, Patience
from shallowdeep.traces.record import record
from shallowdeep.training.loop import fit

TRAINING = hand_trace(split="train").select(torch.tensor([0, 1]))  # confusion 0.5 and 1.3: mean 0.9, spread 0.4
CLEAN = hand_trace(split="test")
TRIGGERED = CLEAN.select(torch.tensor([1, 2]))  # of class 1, so the target is 0; confusion 1.3 and 0.7
POLICY = Confidence(0.7)
FOUND = measure_backdoor(CLEAN, TRIGGERED, 0, training=TRAINING, policy=POLICY)
ROUNDING = 1e-6  # of float32 probabilities, summed


def test_by_hand():
    """Sample by sample, from the table above ``hand_trace``; the policy stops samples 0 to 3 at exits 0, 1, 1, 0."""
    assert asdict(FOUND) == {
        "n_clean": 4,
        "n_triggered": 2,
        "target": 0,
        "clean_accuracy": (0.5, 0.5, 0.5),
        "clean_target": (0.5, 0.5, 0.5),
        "accuracy": (0.5, 0.5, 0.5),
        "attack_success": (0.5, 0.5, 0.5),
        "with_policy": {
            "policy": {"kind": "confidence", "threshold": 0.7, "exits": None, "answer": "last"},
            "clean_accuracy": 0.5,
            "accuracy": 0.5,
            "attack_success": 0.5,
            "clean_cost": pytest.approx((0.5 + 0.85 + 0.85 + 0.5) / 4),
            "triggered_cost": pytest.approx(0.85),
        },
        "confusion_clean": pytest.approx((0.775 - 0.9) / 0.4, abs=ROUNDING),
        "confusion_triggered": pytest.approx((1.0 - 0.9) / 0.4, abs=ROUNDING),
        "confidence_clean": pytest.approx((0.7 + 0.9 + 0.55 + 0.6) / 4, abs=ROUNDING),
        "confidence_triggered": pytest.approx((0.9 + 0.55) / 2, abs=ROUNDING),
        # confusion: triggered 1.3 and 0.7 against clean 0.5, 1.3, 0.7, 0.6; wins 3.5 and 2.5 of four each
        "auroc": {"confusion": pytest.approx(6 / 8), "max-softmax": pytest.approx((0.5 + 3.5) / 8)},
        "roc": {
            "confusion": {"fpr": (0.0, 0.25, 0.5, 0.75, 1.0), "tpr": (0.0, 0.5, 1.0, 1.0, 1.0)},
            "max-softmax": {"fpr": (0.0, 0.25, 0.5, 0.75, 1.0), "tpr": (0.0, 0.5, 0.5, 0.5, 1.0)},
        },
    }


def naive(clean, triggered, target, training, rule):
    """Everything again, one sample and one exit at a time."""
    exits = range(clean.num_exits)

    def answers(trace):
        return [[argmax(trace.logits[exit][i].softmax(-1).tolist()) for exit in exits] for i in range(len(trace))]

    def argmax(values):
        return values.index(max(values))

    def share(truths):
        truths = list(truths)
        return pytest.approx(sum(truths) / len(truths), abs=1e-12)

    def mean(values):
        return pytest.approx(sum(values) / len(values), rel=1e-5, abs=ROUNDING)

    def suspicion(trace, score):
        if score == "confusion":
            return [reference.confusion_score(trace, i) for i in range(len(trace))]
        return [-max(trace.logits[-1][i].softmax(-1).tolist()) for i in range(len(trace))]

    on_clean, on_triggered = answers(clean), answers(triggered)
    labels, true = clean.labels.tolist(), triggered.labels.tolist()
    others = [i for i in range(len(clean)) if labels[i] != target]
    usual = suspicion(training, "confusion")
    left_clean, left = reference.decide(clean, rule), reference.decide(triggered, rule)
    return {
        "n_clean": len(clean),
        "n_triggered": len(triggered),
        "target": target,
        "clean_accuracy": tuple(share(on_clean[i][e] == labels[i] for i in range(len(clean))) for e in exits),
        "clean_target": tuple(share(on_clean[i][e] == target for i in others) for e in exits),
        "accuracy": tuple(share(on_triggered[i][e] == true[i] for i in range(len(triggered))) for e in exits),
        "attack_success": tuple(share(on_triggered[i][e] == target for i in range(len(triggered))) for e in exits),
        "clean_accuracy early": share(argmax(d.scores) == label for d, label in zip(left_clean, labels, strict=True)),
        "accuracy early": share(argmax(d.scores) == label for d, label in zip(left, true, strict=True)),
        "attack_success early": share(argmax(d.scores) == target for d in left),
        "clean_cost early": mean([d.cost for d in left_clean]),
        "triggered_cost early": mean([d.cost for d in left]),
        "confusion_clean": mean(reference.normalised(suspicion(clean, "confusion"), usual)),
        "confusion_triggered": mean(reference.normalised(suspicion(triggered, "confusion"), usual)),
        "confidence_clean": mean([-s for s in suspicion(clean, "max-softmax")]),
        "confidence_triggered": mean([-s for s in suspicion(triggered, "max-softmax")]),
    }


def check(clean, triggered, target, training):
    policy, rule = Confidence(0.6), reference.confidence_exit(0.6)
    found = asdict(measure_backdoor(clean, triggered, target, training=training, policy=policy))
    early = found.pop("with_policy")
    assert early.pop("policy") == policy.to_dict()
    found |= {f"{name} early": value for name, value in early.items()}
    areas, curves = found.pop("auroc"), found.pop("roc")
    assert found == naive(clean, triggered, target, training, rule)
    assert areas.keys() == curves.keys() == {"confusion", "max-softmax"}


def stamped(trace, target):
    """The samples of other classes, as if triggered."""
    return trace.select(trace.labels != target)


@settings(max_examples=40)
@given(trace=traces(max_n=8), data=st.data())
def test_is_the_naive_count(trace, data):
    assume(trace.num_exits > 1)
    target = data.draw(st.integers(0, trace.num_outputs - 1))
    assume(bool((trace.labels != target).any()))
    raw = [reference.confusion_score(trace, i) for i in range(len(trace))]
    assume(max(raw) - min(raw) > 0.1)
    check(trace, stamped(trace, target), target, trace)


def backdoored(n=300, target=2):
    """A network whose last exits answer the target to triggered samples, and whose first ones are still right."""
    clean, training = (
        make_trace(n, num_exits=5, seed=3, split="test"),
        make_trace(80, num_exits=5, seed=4, split="train"),
    )
    triggered = stamped(clean, target)
    pull = torch.nn.functional.one_hot(torch.tensor(target), clean.num_outputs) * 8.0
    late = tuple(logits + pull * (exit >= 3) for exit, logits in enumerate(triggered.logits))
    return clean, replace(triggered, logits=late), training


def test_is_the_naive_count_on_many_samples():
    clean, triggered, training = backdoored()
    check(clean, triggered, 2, training)
    found = measure_backdoor(clean, triggered, 2, training=training, policy=Confidence(0.6))
    assert found.attack_success[-1] > 0.8 > 0.2 > found.attack_success[0]
    assert found.clean_target[-1] < 0.1
    assert found.accuracy[-1] < 0.2 < found.with_policy.accuracy
    assert found.confusion_triggered > 1.5 > 0.5 > found.confusion_clean
    assert found.auroc["confusion"] > 0.95
    assert found.auroc["max-softmax"] < 0.5  # the attack makes the network sure


@pytest.mark.slow
def test_a_poisoned_network_is_seen_through_by_its_exits():
    """The whole study in small, on digits: poisoned training, exits on clean data, evaluation without the target."""
    data, backdoor = load_data("digits"), triggers.Backdoor("5", rate=0.1)
    data = replace(data, val=None, augment=None)
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    sdn = attach(net, data.example_inputs, taps=["1", "3"])
    fit(sdn, replace(data, train=triggers.poison(data.train, backdoor)), strategy="plain", epochs=5)
    fit(sdn, data, strategy="ic_only", epochs=3)
    clean, stamped, training = (
        record(sdn, x) for x in (data.test, triggers.triggered(data.test, backdoor), data.train)
    )
    found = measure_backdoor(clean, stamped, 5, training=training)
    assert found.clean_accuracy[-1] > 0.7
    assert found.attack_success[-1] > 0.9 > 0.1 > found.clean_target[-1]
    assert found.accuracy[-1] < 0.1 < 0.3 < found.accuracy[1]
    assert found.attack_success[1] < 0.3
    assert found.auroc["confusion"] > 0.8 > 0.5 > found.auroc["max-softmax"]  # the stamp makes the last exit sure


def test_the_areas_and_curves_are_of_clean_against_triggered():
    clean, triggered, training = backdoored(50)
    found = measure_backdoor(clean, triggered, 2, training=training)
    positive = [False] * len(clean) + [True] * len(triggered)
    samples = [(trace, i) for trace in (clean, triggered) for i in range(len(trace))]
    suspicion = {
        "confusion": [reference.confusion_score(trace, i) for trace, i in samples],
        "max-softmax": [-max(trace.logits[-1][i].softmax(-1).tolist()) for trace, i in samples],
    }
    for name, scores in suspicion.items():
        assert found.auroc[name] == pytest.approx(reference.auroc(scores, positive), abs=1e-12)
        curve = found.roc[name]
        assert list(zip(curve.fpr, curve.tpr, strict=True)) == naive_curve(scores, positive)


def naive_curve(scores, positive):
    """An alarm at each score and above, the highest first."""
    points = [(0.0, 0.0)]
    for level in sorted(set(scores), reverse=True):
        alarms = [p for score, p in zip(scores, positive, strict=True) if score >= level]
        points.append((alarms.count(False) / positive.count(False), alarms.count(True) / positive.count(True)))
    return points


def test_without_a_policy():
    found = measure_backdoor(CLEAN, TRIGGERED, 0, training=TRAINING)
    assert found == replace(FOUND, with_policy=None)
    assert len(found.rows()) == 3
    assert "early" not in str(found)


def test_any_policy():
    found = measure_backdoor(CLEAN, TRIGGERED, 0, training=TRAINING, policy=Patience(0)).with_policy
    assert (found.policy["kind"], found.triggered_cost, found.accuracy) == ("patience", 0.5, 0.5)


def test_the_training_split_needs_no_labels():
    assert measure_backdoor(CLEAN, TRIGGERED, 0, training=replace(TRAINING, labels=None), policy=POLICY) == FOUND


def test_rows_and_to_dict_are_json():
    rows = replace(
        FOUND,
        clean_accuracy=(0.1, 0.2, 0.3),
        clean_target=(0.01, 0.02, 0.03),
        accuracy=(0.4, 0.5, 0.6),
        attack_success=(0.7, 0.8, 0.9),
        with_policy=replace(FOUND.with_policy, clean_accuracy=0.11, accuracy=0.22, attack_success=0.33),
    ).rows()
    names = ("exit", "clean accuracy", "target on clean", "accuracy on triggered", "attack success")
    assert [tuple(row) for row in rows] == [names] * 4
    assert [tuple(row.values()) for row in rows] == [
        (0, 0.1, 0.01, 0.4, 0.7),
        (1, 0.2, 0.02, 0.5, 0.8),
        (2, 0.3, 0.03, 0.6, 0.9),
        ("with policy", 0.11, None, 0.22, 0.33),
    ]
    assert json.loads(json.dumps(rows)) == rows
    values = json.loads(json.dumps(FOUND.to_dict()))
    assert values["roc"]["confusion"] == {"fpr": [0.0, 0.25, 0.5, 0.75, 1.0], "tpr": [0.0, 0.5, 1.0, 1.0, 1.0]}
    assert values["with_policy"]["policy"] == POLICY.to_dict()
    assert values["accuracy"] == list(FOUND.accuracy)


def test_str():
    shown = replace(
        FOUND,
        clean_accuracy=(0.5, 0.5, 0.925),
        accuracy=(0.5, 0.5, 0.12),
        attack_success=(0.5, 0.5, 0.975),
        clean_target=(0.5, 0.5, 0.0125),
        with_policy=replace(
            FOUND.with_policy, clean_accuracy=0.9, accuracy=0.84, attack_success=0.1, clean_cost=0.4, triggered_cost=0.3
        ),
        confusion_clean=-0.25,
        confusion_triggered=1.5,
    )
    assert str(shown) == (
        "The last exit is right on 92.50 % of 4 clean samples and on 12.00 % of 2 triggered ones, of which it answers "
        "97.50 % with class 0 (1.25 % without the trigger).\n"
        "With early exits, 90.00 % and 84.00 %, and 10.00 % with class 0; cost 40.0 % and 30.0 %.\n"
        "Normalised confusion is -0.25 on clean and +1.50 on triggered samples; AUROC for finding triggered ones: "
        "confusion 0.750, max-softmax 0.500."
    )


def test_what_a_backdoor_cannot_be_measured_on():
    with pytest.raises(TraceError, match="1 of 2 triggered samples are truly of the target class 1, where to answer"):
        measure_backdoor(CLEAN, CLEAN.select(torch.tensor([0, 1])), 1, training=TRAINING)
    with pytest.raises(TraceError, match="all clean samples are of the target class 0"):
        measure_backdoor(CLEAN.select(torch.tensor([0, 3])), TRIGGERED, 0, training=TRAINING)
    two = [0, 2]
    with pytest.raises(TraceError, match="the triggered Trace is of another network"):
        measure_backdoor(CLEAN, TRIGGERED.select_exits(two), 0, training=TRAINING)
    with pytest.raises(TraceError, match="the training Trace is of another network"):
        measure_backdoor(CLEAN, TRIGGERED, 0, training=TRAINING.select_exits(two))
    for clean, triggered in ((replace(CLEAN, labels=None), TRIGGERED), (CLEAN, replace(TRIGGERED, labels=None))):
        with pytest.raises(TraceError, match="needs labels"):
            measure_backdoor(clean, triggered, 0, training=TRAINING)
    with pytest.raises(TraceError, match="only the last one"):
        measure_backdoor(CLEAN.select_exits([2]), TRIGGERED.select_exits([2]), 0, training=TRAINING.select_exits([2]))
    with pytest.raises(TraceError, match="there is no spread"):
        measure_backdoor(CLEAN, TRIGGERED, 0, training=TRAINING.select(torch.tensor([0])))
    for target in (-1, 2):
        with pytest.raises(ConfigError, match=rf"target = {target} is no class: the last exit has outputs 0 to 1"):
            measure_backdoor(CLEAN, TRIGGERED, target, training=TRAINING)
    with pytest.raises(ConfigError, match="the policy looks at exits"):
        measure_backdoor(CLEAN, TRIGGERED, 0, training=TRAINING, policy=Confidence(0.5, exits=(7,)))
