import shutil
from dataclasses import replace

import pytest
from reference import make_trace

from shallowdeep.config import load_config
from shallowdeep.errors import ConfigError, DataError, FileFormatError
from shallowdeep.explore.evolution import Answered, evolve
from shallowdeep.explore.setting import Usual, open_setting
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence, Patience
from shallowdeep.report.missing import Missing
from shallowdeep.report.operating import NOBODY
from shallowdeep.runs.run import Run
from shallowdeep.storage import write_json


def test_all_is_there(setting, digits):
    assert setting.notes == ()
    assert setting.slider == digits.policy()
    assert setting.source == "The run's own policy, chosen on validation data (--max-cost 0.5)."
    assert setting.class_names == tuple("0123456789")
    assert [exit.name for exit in setting.exits] == ["exit 0", "exit 1", "last"]
    assert [exit.tap for exit in setting.exits] == ["1", "3", "output"]
    assert [exit.cost for exit in setting.exits] == setting.test.costs.relative().tolist()
    assert [exit.accuracy for exit in setting.exits] == setting.test.correct.double().mean(0).tolist()
    leaving = {group.key: len(group.ids) for group in setting.shelf.groups if group.key.startswith("leaves")}
    shares = replay(setting.test, digits.policy()).exit_shares
    assert leaving == {f"leaves-{exit}": round(360 * share) for exit, share in enumerate(shares) if share}


def test_a_run_that_was_not_recorded_says_what_is_missing(digits, copy_of):
    run = copy_of(digits)
    shutil.rmtree(run.folder / "traces")
    (run.folder / "policy.json").unlink()
    setting = open_setting(run)
    assert setting.slider == Confidence(NOBODY)
    assert "No threshold was chosen" in setting.source
    assert len(setting.notes) == 2
    assert all("shallowdeep record" in note for note in setting.notes)
    assert [group.key for group in setting.shelf.groups] == ["all"]
    events = list(evolve(setting, setting.shelf.pixels(4)))
    assert sum(isinstance(event, Answered) for event in events) == 3


def test_without_its_own_policy_the_threshold_is_the_report_s(digits, copy_of):
    run = copy_of(digits)
    (run.folder / "policy.json").unlink()
    setting = open_setting(run)
    assert "the most accurate at no more than 50 % of the cost" in setting.source
    assert 0 < setting.slider.threshold < 1


def test_a_policy_that_skips_exits(digits, copy_of):
    run = copy_of(digits)
    write_json(run.folder / "policy.json", Confidence(0.8, exits=(1,), answer="most_confident").to_dict())
    setting = open_setting(run)
    costs = setting.test.costs.relative([1])
    assert [exit.cost for exit in setting.exits] == [None, costs[1].item(), costs[2].item()]


def test_patience_is_marked_beside_the_slider(digits, copy_of):
    run = copy_of(digits)
    write_json(run.folder / "policy.json", Patience(1).to_dict())
    setting = open_setting(run)
    assert setting.policy == Patience(1)
    assert isinstance(setting.slider, Confidence)


def test_traces_of_another_network_are_not_believed(digits, copy_of):
    run = copy_of(digits)
    for split in ("train", "test"):
        make_trace(60, num_exits=3, num_classes=10).save(run.folder / "traces" / f"{split}.safetensors")
    setting = open_setting(run)
    assert isinstance(setting.test, Missing)
    assert isinstance(setting.usual, Missing)
    assert all("recorded of another network" in note for note in setting.notes)


def test_a_network_without_errors_still_has_its_usual_confusion(setting, digits, copy_of):
    run = copy_of(digits)
    test = run.trace("test")
    replace(test, labels=test.predictions[:, -1]).save(run.folder / "traces" / "test.safetensors")
    found = open_setting(run)  # labels that are not the data's: not believed
    assert isinstance(found.test, Missing)
    assert isinstance(found.usual, Usual)
    assert found.usual.mean == setting.usual.mean


def test_one_exit_is_enough(tmp_path, digits):
    config = digits.config.model_copy(update={"strategy": "plain", "taps": None})
    run = Run.create(tmp_path / "plain", config)
    run.build(run.load_data()).save(run.weights)
    setting = open_setting(run)
    assert [exit.name for exit in setting.exits] == ["last"]
    assert [note.split(":")[0] for note in setting.notes] == ["nothing of the recorded test split"]
    events = [as_event.event for as_event in evolve(setting, setting.shelf.pixels(0))]
    assert events == ["begun", "answered", "looked"]


def test_text_is_refused(tmp_path):
    run = Run(tmp_path, load_config(changes={"data": "trec"}))
    with pytest.raises(ConfigError, match="explore shows images, and trec is text"):
        open_setting(run)


def test_an_untrained_run_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"holds no network, sdn\.safetensors"):
        open_setting(Run(tmp_path, load_config(changes={"data": "digits"})))


def test_data_that_are_not_at_hand(digits, tmp_path, monkeypatch):
    """Uploads work where the network says how large its images are."""
    config = digits.config.model_copy(update={"network": "resnet20", "image_size": 32, "taps": ("layer1.0",)})
    run = Run.create(tmp_path / "away", config)
    run.build(run.load_data()).save(run.weights)

    def gone(*args, **more):
        raise DataError("no folder /data/digits.")

    monkeypatch.setattr("shallowdeep.runs.folder.load_data", gone)
    setting = open_setting(run)
    assert isinstance(setting.shelf, Missing)
    assert setting.notes[0] == "no images of the test split to pick: no folder /data/digits."
    assert sum(isinstance(event, Answered) for event in evolve(setting, setting.preparation.blank)) == 2
    with pytest.raises(DataError, match=r"no folder /data/digits\. Without the data nothing says how"):
        open_setting(digits)
