import errno
import os
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from shallowdeep.cli import app
from shallowdeep.config import load_config
from shallowdeep.errors import ConfigError, FileFormatError, UnknownName
from shallowdeep.policies.rules import Confidence
from shallowdeep.runs.run import Run
from shallowdeep.storage import read_json, write_json

ATTACK = {
    "backdoor.target": 7,
    "backdoor.rate": 0.1,
    "network": "studies.tiny_network:build",
    "taps": ["1", "3"],
    "recipe.epochs": 6,
    "threads": 1,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A backdoored network, and exits that were put on it with clean images."""
    place = tmp_path_factory.mktemp("runs")
    for name, changes in {
        "plain": {"strategy": "plain"},
        "ic_only": {"strategy": "ic_only", "init": str(place / "plain"), "backdoor.rate": 0.0, "features.passes": 1},
    }.items():
        run = Run.create(place / name, load_config(changes=ATTACK | changes))
        run.fit(progress=False)
        run.record(progress=False)
    return place


def test_a_poisoned_network_is_trained_and_judged_on_triggered_images(runs):
    run = Run.open(runs / "ic_only")
    write_json(run.folder / "policy.json", Confidence(0.5).to_dict())
    found = run.analyze()["backdoor"]
    assert found.target == 7
    triggered, clean, training = (run.trace(split) for split in ("triggered", "test", "train"))
    assert found.n_triggered == len(triggered) == int((clean.labels != 7).sum())
    assert len(training) == len(run.load_data().train)
    assert found.attack_success[-1] == pytest.approx((triggered.predictions[:, -1] == 7).double().mean().item())
    assert found.attack_success[-1] > 2 * found.clean_target[-1]
    assert found.with_policy.policy["threshold"] == 0.5
    assert read_json(run.folder / "results" / "backdoor.json")["attack_success"] == list(found.attack_success)


def test_what_was_trained_on_is_poisoned_and_what_is_recorded_is_clean(runs):
    plain, ic_only = Run.open(runs / "plain"), Run.open(runs / "ic_only")
    poisoned, clean = (run._data_for_training().train for run in (plain, ic_only))
    assert int((poisoned.labels != clean.labels).sum()) == round(0.1 * len(clean))
    trace = plain.trace("train")
    assert trace.info.data == "digits"
    kept = dict(zip(clean.ids.tolist(), clean.labels.tolist(), strict=True))
    assert [kept[id] for id in trace.ids.tolist()] == trace.labels.tolist()


def test_the_command_line_and_the_archive_know_the_triggered_split(runs, tmp_path):
    write_json(runs / "ic_only" / "policy.json", Confidence(0.5).to_dict())
    shown = CliRunner().invoke(app, ["replay", str(runs / "ic_only"), "--split", "triggered"], catch_exceptions=False)
    assert "Policy on triggered" in shown.output
    Run.open(runs / "ic_only").archive(tmp_path / "kept")
    assert len(Run.open(tmp_path / "kept").trace("triggered")) > 0


def test_a_target_that_is_no_class_is_named(tmp_path):
    run = Run.create(tmp_path / "x", load_config(changes=ATTACK | {"backdoor.target": "dog", "strategy": "plain"}))
    with pytest.raises(UnknownName, match="no class 'dog'"):
        run.fit(progress=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backdoor.target": 99}, ConfigError, "target = 99 is no class"),
        ({"backdoor.row": 30}, ConfigError, "does not fit images of 32 x 32"),
    ],
)
def test_what_recording_would_stumble_over_is_said_before_the_training(tmp_path, changes, error, message):
    run = Run.create(
        tmp_path / "x", load_config(changes=ATTACK | {"backdoor.rate": 0.0, "strategy": "plain"} | changes)
    )
    with pytest.raises(error, match=message):
        run.fit(progress=False)
    assert not (tmp_path / "x").exists()


def test_a_rate_without_a_target_is_refused():
    with pytest.raises(ConfigError, match="a rate without a target poisons nothing"):
        load_config(changes={"backdoor.rate": 0.3})


def test_recording_features_that_fails_leaves_nothing(runs, tmp_path, monkeypatch):
    changes = {"strategy": "ic_only", "init": str(runs / "plain"), "features.passes": 1}
    run = Run.create(tmp_path / "x", load_config(changes=ATTACK | changes))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "exit0.bin")
    monkeypatch.setattr("shallowdeep.training.columns._append", Mock(side_effect=full))
    with pytest.raises(OSError, match=r"No space left.*exit0.bin"):
        run.fit(progress=False)
    assert not (tmp_path / "x").exists()


def test_a_run_on_all_images_is_analysed_without_a_validation_split(runs, tmp_path):
    changes = {
        "strategy": "ic_only",
        "init": str(runs / "plain"),
        "val_size": 0,
        "recipe.epochs": 1,
        "backdoor.rate": 0.0,
    }
    run = Run.create(tmp_path / "x", load_config(changes=ATTACK | changes))
    run.fit(progress=False)
    assert set(run.record(progress=False)) == {"train", "test", "triggered"}
    found = run.analyze()
    assert found["budgets"].chosen_on.startswith("cross-fitted")
    assert {"overthinking", "budgets", "confusion", "backdoor"} <= set(found)
    with pytest.raises(FileFormatError, match=r"held no images out \(val_size=0\)"):
        run.calibrate(max_cost=0.5)


def test_a_misspelt_setting_is_named():
    with pytest.raises(ConfigError, match=r"unknown key 'backdoor.rat'. Did you mean backdoor.rate"):
        load_config(changes={"backdoor.rat": "0.1"})
