"""The commands as a user types them, on digits."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from shallowdeep.cli import app
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.replay import replay
from shallowdeep.provenance import trained_here
from shallowdeep.runs.run import Run
from shallowdeep.storage import load_tensors, save_tensors
from shallowdeep.traces.trace import Trace

FEW = """
from torch import nn

def small(num_classes):
    net = [nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plain and an IC-only run on digits, recorded."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--network", "resnet20", "--epochs", "1", "--set", "recipe.batch_size=64"]
    for words in (
        ["fit", "--strategy", "plain", *options, "--out", folder / "plain"],
        ["fit", "--strategy", "ic_only", "--init", folder / "plain", *options, "--out", folder / "ic"],
        ["record", folder / "plain"],
        ["record", folder / "ic"],
    ):
        found = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert found.exit_code == 0, found.output
    return folder


def test_a_run_folder_is_whole(runs):
    names = {path.name for path in (runs / "ic").iterdir()}
    assert names == {
        "checkpoint.pt", "config.json", "environment.json", "history.jsonl", "sdn.safetensors", "traces",
    }  # fmt: skip
    assert {path.name for path in (runs / "ic" / "traces").iterdir()} == {
        f"{split}.safetensors" for split in ("train", "val", "test")
    }
    environment = json.loads((runs / "ic" / "environment.json").read_text())
    assert {"command", "python", "versions", "processor", "cores", "threads"} <= set(environment)
    assert len((runs / "ic" / "history.jsonl").read_text().splitlines()) == 1


def test_traces_hold_the_splits(runs):
    traces = {split: Trace.load(runs / "ic" / "traces" / f"{split}.safetensors") for split in ("train", "val", "test")}
    assert {split: (len(t), t.num_exits, t.info.split) for split, t in traces.items()} == {
        "train": (1257, 7, "train"), "val": (180, 7, "val"), "test": (360, 7, "test"),
    }  # fmt: skip
    assert traces["test"].info.strategy == "ic_only"


def test_ic_only_keeps_the_plain_network(runs):
    plain, ic = (Trace.load(runs / name / "traces" / "test.safetensors") for name in ("plain", "ic"))
    assert plain.num_exits == 1
    assert bool((plain.logits[-1] == ic.logits[-1]).all())


def test_analyze(runs, shell):
    code, out, _ = shell("analyze", runs / "ic")
    assert code == 0
    for word in ("Overthinking", "Confusion", "Budgets", "≤ 50 %", "AUROC", "destructive"):
        assert word in out
    results = {path.stem: json.loads(path.read_text()) for path in (runs / "ic" / "results").glob("*.json")}
    assert set(results) >= {"overthinking", "confusion", "budgets"}
    assert results["overthinking"]["n"] == 360
    assert results["budgets"]["config"]["strategy"] == "ic_only"
    assert results["budgets"]["environment"]["threads"] >= 1


def test_analyze_a_plain_run_and_a_file(runs, shell):
    code, out, _ = shell("analyze", runs / "plain")
    assert code == 0
    assert "Confusion" not in out
    code, out, _ = shell("analyze", runs / "ic" / "traces" / "val.safetensors")
    assert code == 0
    assert "Of 180 samples" in out


def test_calibrate_then_replay(runs, shell):
    code, out, _ = shell("calibrate", runs / "ic", "--max-cost", 0.5)
    assert code == 0
    policy = json.loads((runs / "ic" / "policy.json").read_text())
    assert policy["kind"] == "confidence"
    assert "Confidence(threshold=" in out
    code, out, _ = shell("replay", runs / "ic")
    assert code == 0
    kept = json.loads((runs / "ic" / "results" / "replay.json").read_text())
    assert kept["policy"] == policy
    assert kept["n"] == 360
    assert f"{100 * kept['cost']:.1f} %" in out
    # Validation met the budget; test may pass it a little.
    calibration = json.loads((runs / "ic" / "results" / "calibration.json").read_text())
    assert calibration["cost"] <= calibration["demand"]["max_cost"] == 0.5
    assert kept["cost"] < 0.6


def test_calibrate_by_drop_from_the_original(runs, shell):
    code, _, _ = shell(
        "calibrate", runs / "ic", "--max-accuracy-drop", 0.02, "--reference", "original", "--original", runs / "plain"
    )
    assert code == 0
    kept = json.loads((runs / "ic" / "results" / "calibration.json").read_text())
    val = Trace.load(runs / "plain" / "traces" / "val.safetensors")
    assert kept["accuracy"] >= val.correct[:, -1].double().mean().item() - 0.02 - 1e-9
    assert kept["demand"]["original"] == str(runs / "plain")


def test_patience_from_the_command_line(runs, shell):
    code, out, _ = shell("calibrate", runs / "ic", "--max-cost", 1.1, "--rule", "patience")
    assert code == 0
    assert "Patience(patience=" in out


def test_probe(shell):
    code, out, _ = shell("probe", "resnet56", "--everywhere")
    assert code == 0
    for tap, got in [("layer1.3", "0.1536"), ("layer2.2", "0.4455"), ("layer3.5", "0.8874")]:
        assert re.search(rf"{re.escape(tap)}\s+0\.\d+\s+{got}", out)
    assert "251.5 MFLOPs" in out
    assert "a later layer still wants" in out


def test_probe_of_a_small_network_shows_what_there_is(shell, tmp_path, monkeypatch):
    (tmp_path / "few.py").write_text(FEW)
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = shell("probe", "few:small", "--image-size", 16)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.partition("Exits")[2].splitlines()[4:6]] == [["0", "1"], ["1", "5"]]
    code, out, err = shell("probe", "few:small", "--image-size", 16, "--shares", 0.1, "--shares", 0.2, "--shares", 0.3)
    assert code == 2
    assert "3 exits were asked for, but this network has 2 legal sites" in err
    assert "MFLOPs" in out  # the sites are there all the same


def test_a_network_that_a_function_returns_is_taken_for_trained_and_that_is_said(shell, tmp_path, monkeypatch):
    (tmp_path / "few.py").write_text(FEW)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--network", "few:small", "--epochs", 1, "--set", "shares=[0.5]", "--out", tmp_path / "out"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as on a terminal
        code, _, err = shell("fit", "--strategy", "ic_only", *options)
    assert code == 0
    assert "warning: ic_only leaves the backbone as it is: few:small is taken to return it trained" in err


def test_probe_lists_names(shell):
    assert shell("probe")[1].split() == ["mobilenet", "resnet110", "resnet20", "resnet56", "vgg16", "wrn32_4"]


def test_bench(runs, tmp_path, shell):
    run = Run.open(runs / "ic")
    run.archive(tmp_path / "kept")
    copy = Run.open(tmp_path / "kept")
    copy.record(["test"], progress=False)  # an archive's own is in half precision
    copy.calibrate(max_cost=0.5)
    options = ["--batch-size", 1, "--batch-size", 8, "--backend", "eager", "--precision", "fp32"]
    options += ["--num-samples", 24, "--rounds", 2, "--threads", 1, "--no-smaller"]
    code, out, err = shell("bench", tmp_path / "kept", *options)
    assert code == 0, err
    for word in ("of plain", "× one at a time", "of linear bound", "of the time without exits"):
        assert word in out
    kept = json.loads((tmp_path / "kept" / "results" / "bench.json").read_text())
    assert (kept["rounds"], kept["threads"], kept["measured_on"]["threads"], kept["split"]) == (2, 1, 1, "test")
    assert {"processor", "versions", "command", "data_md5"} <= set(kept["measured_on"])
    assert {(t["backend"], t["precision"], t["batch_size"]) for t in kept["timings"]} >= {
        ("eager", "fp32", size) for size in (1, 8)
    }
    by_name = {(row["precision"], row["batch"]): row for row in kept["bounds"] if row["back end"] == "eager"}
    assert by_name["fp32", 8]["unlike replay"] - by_name["fp32", 8]["of them ties"] == 0
    decisions = replay_of_some(copy, 24)
    assert {row["n"] for row in kept["engines"]} == {24, 16}
    found = next(row for row in kept["engines"] if (row["precision"], row["n"]) == ("fp32", 24))
    assert found["accuracy"] == pytest.approx(decisions.accuracy)
    assert found["cost"] == pytest.approx(decisions.cost)


def replay_of_some(run, number):
    """What the run's policy does on the samples that a benchmark of so many uses."""
    trace = run.trace("test")
    ids = run.load_data().split("test").sample(number).ids
    return replay(trace.select((trace.ids[:, None] == ids).any(1)), run.policy())


def bad_inputs(runs, tmp_path):
    """What a user gets wrong, and the words that must answer."""
    truncated = tmp_path / "trace.safetensors"
    truncated.write_bytes((runs / "ic" / "traces" / "test.safetensors").read_bytes()[:5000])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": Trace.load(runs / "ic" / "traces" / "val.safetensors").logits[0]}, foreign)
    out = tmp_path / "out"
    return [
        (["fit", "--network", "resnet65", "--out", out], "no network 'resnet65'. Did you mean 'resnet56'?"),
        (["fit", "--data", "cifar11", "--out", out], "no data set 'cifar11'"),
        (["fit", "--strategy", "jiont", "--out", out], "no strategy 'jiont'. Did you mean 'joint'?"),
        (["fit", "--recipe", "slow", "--out", out], "no recipe 'slow'"),
        (["fit", "--strategy", "ic_only", "--out", out], "Give one: --init RUN"),
        (["fit", "--set", "recipe.lrr=1", "--out", out], "unknown key 'recipe.lrr'"),
        (["fit", "--set", "seed", "--out", out], "--set takes key=value"),
        (["fit", "--set", "image_size=48", "--out", out], "image_size=48"),
        (["fit", "--out", runs / "ic"], "holds a run already. Pass --resume"),
        (["fit", "--seed", "9", "--out", runs / "ic", "--resume"], "another configuration"),
        (["fit", "--config", tmp_path / "gone.toml", "--out", out], "no file"),
        (["fit", "--init", tmp_path / "gone", "--strategy", "ic_only", "--out", out], "no file"),
        (["fit", "--init", runs / "plain", "--network", "vgg16", "--out", out], "225 names or shapes differ"),
        (["fit", "--data", "cifar10", "--data-dir", tmp_path, "--out", out], "no folder"),
        (["record", tmp_path], "no file"),
        (["analyze", truncated], "truncated"),
        (["analyze", foreign], "did not write"),
        (["analyze", runs / "ic" / "sdn.safetensors"], "is a sdn, not a trace"),
        (["analyze", tmp_path / "gone"], "no file"),
        (["calibrate", runs / "ic"], "one of max_cost, max_accuracy_drop, min_agreement"),
        (["calibrate", runs / "ic", "--max-cost", 0.01], "no confidence threshold has a cost of at most 0.01"),
        (["calibrate", runs / "ic", "--max-cost", 1, "--rule", "luck"], "no rule 'luck'"),
        (["calibrate", runs / "ic", "--max-cost", 1, "--reference", "luck"], "no reference 'luck'"),
        (["calibrate", runs / "ic", "--max-cost", 1, "--reference", "original"], "goes with max_accuracy_drop"),
        (["fit", "--device", "gpuu", "--out", out], "device 'gpuu' cannot be used here"),
        (["fit", "--set", "recipe.batch_size=5000", "--out", out], "more than the 1257 samples"),
        (["fit", "--seed", 10**20, "--out", out], "seed = "),
        (["fit", "--set", "image_size=64", "--out", out], "image_size=64"),
        (["replay", runs / "ic", "--split", "foo"], "no split 'foo'"),
        (["replay", runs / "plain"], "has no policy. Choose one"),
        (["bench", runs / "plain"], "has no policy. Choose one"),
        (["bench", tmp_path / "gone"], "no file"),
        (["bench", runs / "ic", "--backend", "onxx"], "no back end 'onxx'. Did you mean 'onnx'?"),
        (["bench", runs / "ic", "--num-samples", 0], "at least one sample"),
        (["bench", runs / "ic", "--num-samples", 8], "batches of 256 need as many samples"),
        (["probe", "resnet20", *(w for i in range(1, 60) for w in ("--shares", i / 60))], "legal sites"),
    ]  # fmt: skip


def test_bad_input_is_one_clear_line_and_exit_code_2(runs, tmp_path, shell, monkeypatch):
    monkeypatch.delenv("SHALLOWDEEP_DATA", raising=False)
    assert shell("calibrate", runs / "ic", "--max-cost", 1.1)[0] == 0
    for words, message in bad_inputs(runs, tmp_path):
        code, _, err = shell(*words)
        assert code == 2, (words, err)
        assert message in err, (words, err)
        assert len(err.strip().splitlines()) == 1, err
        assert not list(tmp_path.rglob("*.partial"))
        assert not (tmp_path / "out").exists(), words


def test_a_backdoor_is_for_the_page_alone(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shallowdeep.studies.side_by_side.run_cells", lambda *words, **options: 1 / 0)
    code, _, err = shell("study", "paper", "--backdoor", tmp_path / "backdoor.json")
    assert code == 2
    assert "is for the page. Write it: shallowdeep study paper --table" in err
    assert list(tmp_path.iterdir()) == []


def test_typed_options_are_checked(shell):
    code, _, err = shell("fit", "--epochs", "many", "--out", "x")
    assert code == 2
    assert "--epochs" in err
    assert "valid integer" in err


def test_a_full_disk_is_one_line(runs, shell, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    before = (runs / "ic" / "traces" / "test.safetensors").read_bytes()
    monkeypatch.setattr("shallowdeep.storage.save_file", full)
    code, _, err = shell("record", runs / "ic")
    assert code == 2
    assert "No space left on device" in err
    assert (runs / "ic" / "traces" / "test.safetensors").read_bytes() == before
    assert not list(runs.rglob("*.partial"))


def test_finished_run_resumes_at_once(runs, shell):
    before = (runs / "plain" / "sdn.safetensors").stat().st_mtime_ns
    options = ["--network", "resnet20", "--epochs", 1, "--set", "recipe.batch_size=64"]
    code, out, _ = shell("fit", "--strategy", "plain", *options, "--out", runs / "plain", "--resume")
    assert code == 0
    assert "Trained" in out
    assert (runs / "plain" / "sdn.safetensors").stat().st_mtime_ns == before


def test_resume_needs_no_other_option(runs, shell):
    code, out, _ = shell("fit", "--out", runs / "ic", "--resume")
    assert code == 0
    assert "Trained" in out


def test_two_trainings_do_not_share_a_folder(runs, tmp_path, shell):
    options = ["--network", "resnet20", "--epochs", 1, "--set", "recipe.batch_size=64", "--out", tmp_path / "out"]
    with trained_here(tmp_path / "out"):
        code, _, err = shell("fit", "--strategy", "plain", *options)
        assert code == 2
        assert f"another process trains in {tmp_path / 'out'}" in err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["fit.lock"]
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fit.lock").touch()  # of a process that was killed
    assert shell("fit", "--strategy", "plain", *options)[0] == 0
    assert not (tmp_path / "out" / "fit.lock").exists()


@pytest.mark.parametrize("command", ["record", "calibrate", "explore", "fit"])
def test_an_unfinished_training_says_how_to_go_on(runs, tmp_path, shell, command):
    folder = tmp_path / "un finished"
    shutil.copytree(runs / "plain", folder, ignore=shutil.ignore_patterns("sdn.safetensors", "traces"))
    words = {
        "calibrate": [folder, "--max-cost", 0.5],
        "fit": ["--init", folder, "--network", "resnet20", "--strategy", "ic_only", "--out", tmp_path / "out"],
    }
    code, _, err = shell(command, *words.get(command, [folder]))
    assert code == 2
    assert f"not trained to its end (1 epoch done). Go on: shallowdeep fit --out '{folder}' --resume" in err
    (folder / "checkpoint.pt").unlink()
    assert ("has no Trace" if command == "calibrate" else "holds no network") in shell(
        command, *words.get(command, [folder])
    )[2]


def test_an_archived_run_is_a_run(runs, tmp_path):
    run = Run.open(runs / "ic")
    run.archive(tmp_path / "kept")
    copy = Run.open(tmp_path / "kept")
    assert copy.config == run.config
    assert copy.trace("test").logits[0].sub(run.trace("test").logits[0]).abs().max() < 0.01  # half precision
    assert set(copy.analyze()) == {"overthinking", "confusion", "budgets"}
    size = sum(path.stat().st_size for path in (tmp_path / "kept").rglob("*"))
    assert size < 0.6 * sum(
        path.stat().st_size for path in runs.joinpath("ic").rglob("*") if path.name != "checkpoint.pt"
    )


def test_what_half_precision_does_not_hold_is_archived_as_it_is(runs, tmp_path):
    folder = tmp_path / "ic"
    shutil.copytree(runs / "ic", folder)
    trace = Trace.load(folder / "traces" / "test.safetensors")
    wide = replace(trace, logits=(*trace.logits[:-1], 1e6 * trace.logits[-1]))
    wide.save(folder / "traces" / "test.safetensors")
    Run.open(folder).archive(tmp_path / "kept")
    kept = Run.open(tmp_path / "kept")
    assert torch.equal(kept.trace("test").logits[-1], wide.logits[-1])
    assert torch.equal(kept.trace("val").logits[0], Run.open(folder).trace("val").logits[0].half().float())


def test_a_run_is_shared_with_a_card_of_what_it_knows(runs, tmp_path):
    run = Run.open(runs / "ic")
    run.save_pretrained(tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    accuracy = run.trace("test").correct.double().mean(0).tolist()
    assert all(f"{value:.4f}" in card for value in accuracy)
    assert "- data: digits" in card
    assert "- strategy: ic_only" in card
    assert ShallowDeepNetwork.from_pretrained(tmp_path / "shared").taps == run.load().taps


def test_a_network_without_errors_is_analysed_all_the_same(runs, tmp_path):
    run = Run.open(runs / "ic")
    run.archive(tmp_path / "kept")
    copy, test = Run.open(tmp_path / "kept"), run.trace("test")
    replace(test, labels=test.predictions[:, -1]).save(tmp_path / "kept" / "traces" / "test.safetensors")
    with pytest.warns(UserWarning, match="confusion is not measured: .*all right"):
        assert set(copy.analyze()) == {"overthinking", "budgets"}


def test_figures_alone_and_beside_the_page(runs, tmp_path, shell, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell("report", runs / "ic", "--figures", tmp_path / "one", "--format", "svg", "--no-images")
    assert (code, out.startswith(f"{tmp_path / 'one'}: ic-curve, ")) == (0, True)
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".svg"}
    assert not (tmp_path / "report.html").exists()
    both = ["--figures", tmp_path / "two", "--out", tmp_path / "page.html", "--no-images"]
    assert shell("report", runs / "ic", *both)[0] == 0
    assert {path.suffix for path in (tmp_path / "two").iterdir()} == {".svg", ".pdf"}
    assert (tmp_path / "page.html").exists()
    code, _, err = shell("report", runs / "ic", "--format", "svg")
    assert (code, err.strip()) == (2, "error: --format svg is for figures. Name their folder: --figures figures")
    assert not (tmp_path / "report.html").exists()


def test_python_m(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "shallowdeep", "replay", tmp_path], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: no file")


def test_a_start_that_fails_leaves_an_archived_run_as_it_was(runs, tmp_path, shell, monkeypatch):
    Run.open(runs / "ic").archive(tmp_path / "kept")
    (tmp_path / "kept" / "sdn.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir() if path.is_file()}

    def fails(*words, **options):
        raise OSError("no power")

    monkeypatch.setattr("shallowdeep.runs.run.fit", fails)
    assert shell("fit", "--resume", "--out", tmp_path / "kept")[0] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir() if path.is_file()} == before


def test_a_run_folder_of_a_stranger_runs_no_code_that_it_does_not_name(runs, tmp_path, shell):
    Run.open(runs / "ic").archive(tmp_path / "kept")
    tensors, info = load_tensors(tmp_path / "kept" / "sdn.safetensors", kind="sdn")
    network = {"name": "os:mkdir", "path": str(tmp_path / "made")}
    save_tensors(tmp_path / "kept" / "sdn.safetensors", tensors, kind="sdn", info={**info, "network": network})
    code, _, err = shell("record", tmp_path / "kept")
    assert (code, "built by code of its own" in err) == (2, True)
    assert not (tmp_path / "made").exists()
