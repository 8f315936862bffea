import threading
from dataclasses import replace

import pytest
import torch

from shallowdeep.analysis.confusion import confusion_scores, usual_confusion
from shallowdeep.explore.evolution import KEPT, Answered, Begun, Confused, Decided, Looked, as_json, evolve
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Patience
from shallowdeep.report.missing import Missing

ALONE = 1e-5  # one image alone, and in a batch: sums in another order


def said(setting, row):
    """All events of a test image, by kind."""
    id = int(setting.test.ids[row])
    events = list(evolve(setting, setting.shelf.pixels(id), "some image", setting.shelf.label(id)))
    return {
        kind: [event for event in events if isinstance(event, kind)]
        for kind in (Begun, Answered, Decided, Confused, Looked)
    }


def lost_row(setting):
    """A sample that overthinking destroyed."""
    right = setting.test.correct
    return int((right[:, :-1].any(1) & ~right[:, -1]).nonzero()[0])


def test_what_the_exits_say_is_what_was_recorded(setting):
    test, (mean, spread) = setting.test, usual_confusion(setting.run.trace("train"))
    for row in (0, 17, lost_row(setting)):
        found = said(setting, row)
        assert found[Begun][0].label == int(test.labels[row])
        assert [answer.exit for answer in found[Answered]] == [0, 1, 2]
        assert [answer.classes[0] for answer in found[Answered]] == test.predictions[row].tolist()
        for answer, logits in zip(found[Answered], test.logits, strict=True):
            scores = logits[row].softmax(-1)
            assert list(answer.scores) == pytest.approx(scores[list(answer.classes)].tolist(), abs=ALONE)
            assert list(answer.scores) == sorted(answer.scores, reverse=True)
        times = [answer.elapsed_ms for answer in found[Answered]]
        assert 0 < times[0] <= times[1] <= times[2]
        (confused,) = found[Confused]
        wanted = confusion_scores(test)[row].item()
        assert confused.confusion == pytest.approx(wanted, abs=ALONE)
        assert sum(confused.distances) == pytest.approx(wanted, abs=ALONE)
        assert confused.distances[-1] == 0
        assert confused.normalised == pytest.approx((wanted - mean) / spread, abs=1e-4)


def test_where_a_sample_s_confusion_lies(setting):
    test, row = setting.test, 17
    (confused,) = said(setting, row)[Confused]
    scores, right = confusion_scores(test), test.correct[:, -1]
    one = 1 / min(int(right.sum()), int((~right).sum()))  # the sample itself may fall on either side of itself
    above = scores > scores[row]
    assert confused.right_above == pytest.approx(above[right].double().mean().item(), abs=1.01 * one)
    assert confused.wrong_above == pytest.approx(above[~right].double().mean().item(), abs=1.01 * one)


def test_a_policy_without_threshold_decides_as_its_replay(setting):
    for patience in (0, 1, 2):
        policy = Patience(patience)
        decisions = replay(setting.test, policy)
        for row in (0, lost_row(setting)):
            (decided,) = said(replace(setting, policy=policy), row)[Decided]
            assert decided.exit == int(decisions.exits[row])
            assert decided.label == int(decisions.predictions[row])
            assert decided.cost == pytest.approx(float(decisions.costs[row]))
    assert said(setting, 0)[Decided] == []


def test_every_exit_is_looked_into_and_the_network_stays_as_it_was(setting):
    sdn = setting.sdn
    state = {name: tensor.clone() for name, tensor in sdn.state_dict().items()}
    before = [(p.requires_grad, p.grad is None) for p in sdn.parameters()], [m.training for m in sdn.modules()]
    found = said(setting, 3)[Looked]
    assert [look.exit for look in found] == [0, 1, 2]
    assert len({look.image for look in found}) == 3
    assert all(look.image.startswith("data:image/png;base64,") for look in found)
    assert all(torch.equal(tensor, state[name]) for name, tensor in sdn.state_dict().items())
    assert (
        [(p.requires_grad, p.grad is None) for p in sdn.parameters()],
        [m.training for m in sdn.modules()],
    ) == before


def test_what_is_not_known_is_none(setting):
    unknown = Missing("not recorded")
    (confused,) = said(replace(setting, usual=unknown), 0)[Confused]
    assert confused.confusion > 0
    assert (confused.normalised, confused.right_above, confused.wrong_above) == (None, None, None)
    usual = replace(setting.usual, suspicion=unknown)
    (confused,) = said(replace(setting, usual=usual), 0)[Confused]
    assert confused.normalised is not None
    assert confused.right_above is None


def test_of_many_classes_the_likeliest_are_told(setting, monkeypatch):
    assert KEPT >= 5
    monkeypatch.setattr("shallowdeep.explore.evolution.KEPT", 3)
    answers = said(setting, 0)[Answered]
    assert [len(answer.classes) for answer in answers] == [3, 3, 3]


def test_events_name_themselves(setting):
    found = as_json(said(setting, 0)[Answered][0])
    assert found["event"] == "answered"
    assert found["exit"] == 0


def test_who_stops_listening_stops_the_network(setting):
    go_on, at_the_end = threading.Event(), []

    def waiting(*_):
        assert go_on.wait(20)

    hooks = [
        setting.sdn.exits[1].register_forward_pre_hook(waiting),
        setting.sdn.backbone[-1].register_forward_hook(lambda *_: at_the_end.append(True)),
    ]
    events = evolve(setting, setting.preparation.blank)
    assert [type(next(events)) for _ in range(2)] == [Begun, Answered]
    threading.Timer(0.3, go_on.set).start()  # when nobody listens any more
    events.close()
    for hook in hooks:
        hook.remove()
    assert at_the_end == []
    assert isinstance(next(evolve(setting, setting.preparation.blank)), Begun)
