"""A run on the clock and out of the door: thresholds of each precision, `bench` of a run and of a folder, `export`."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from shallowdeep.config import load_config
from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.inference.engine import Engine
from shallowdeep.inference.runner import timing
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.sessions import Settings
from shallowdeep.inference.runner.timing import Timing
from shallowdeep.inference.timing.folder import bench_folder
from shallowdeep.inference.timing.speed import EXITS, PLAIN, SpeedReport
from shallowdeep.inference.timing.speed import Timing as Timed
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence
from shallowdeep.runs import run as run_steps
from shallowdeep.runs.run import CALIBRATION_SIZE, Run
from shallowdeep.storage import read_json, write_json

onnxruntime = pytest.importorskip("onnxruntime")
CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits with one internal exit and a policy."""
    config = {"strategy": "joint", "network": "resnet20", "shares": "[0.4]", "recipe.epochs": "1", "threads": "1"}
    config["recipe.batch_size"] = "32"
    run = Run.create(tmp_path_factory.mktemp("runs") / "run", load_config(None, config))
    run.fit(progress=False)
    run.record(["val", "test"], progress=False)
    write_json(run.folder / "policy.json", parting(run.trace("val")).to_dict())
    return run


def parting(trace):
    """A policy by which half of the samples leave at the first exit."""
    return Confidence(trace.logits[0].softmax(-1).amax(-1).quantile(0.5).item())


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it that a test may write to."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The run's folder for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("exports") / "out"
    return trained.export(folder, uint8=True).folder


@pytest.fixture
def out(exported, tmp_path):
    """A copy of it without what it was timed at."""
    shutil.copytree(exported, tmp_path / "out")
    manifest = read_json(tmp_path / "out" / "manifest.json")
    write_json(tmp_path / "out" / "manifest.json", {**manifest, "laziness": {}})
    return tmp_path / "out"


def laziness(folder):
    return read_json(folder / "manifest.json")["laziness"]


# ------------------------------------------------------------------------------------------- precisions


def test_another_precision_has_a_trace_and_thresholds_of_its_own(run, shell):
    before = (run.folder / "policy.json").read_text()
    code, said, err = shell("calibrate", run.folder, "--max-cost", 0.7, "--precision", "bf16")
    assert code == 0, err
    assert "Confidence(threshold=" in said
    trace, fp32 = run.trace("val", "bf16"), run.trace("val")
    assert (trace.info.precision, trace.info.strategy, trace.info.split) == ("bf16", "joint", "val")
    assert torch.equal(trace.ids, fp32.ids)
    assert 1e-4 < (trace.logits[-1] - fp32.logits[-1]).abs().max() < 0.5
    assert (run.folder / "policy.json").read_text() == before
    decisions = replay(trace, run.policy("bf16"))
    kept = read_json(run.folder / "results" / "calibration-bf16.json")
    assert kept["cost"] == pytest.approx(decisions.cost)
    assert kept["precision"] == "bf16"
    assert kept["demand"]["max_cost"] == 0.7
    recorded = run.trace("val", "bf16").info.versions
    run.record = None  # a Trace that is there is not recorded again
    run.calibrate(max_cost=0.75, precision="bf16")
    assert run.trace("val", "bf16").info.versions == recorded


def test_fp32_thresholds_never_serve_another_precision(run, shell, tmp_path):
    wanted = f"shallowdeep calibrate {run.folder} --precision int8"
    for words in (
        ["export", run.folder, "--out", tmp_path / "int8", "--precision", "int8"],
        ["bench", run.folder, "--precision", "int8", "--backend", "onnx"],
        ["replay", run.folder, "--precision", "int8"],
    ):
        code, _, err = shell(*words)
        assert code == 2
        assert "no policy for int8" in err
        assert wanted in err
    assert not (tmp_path / "int8").exists()
    for ask in (run.policy, lambda name: run.trace("val", name), lambda name: run.record(["val"], precision=name)):
        with pytest.raises(UnknownName, match="no precision 'fp8'"):
            ask("fp8")


def test_a_missing_trace_of_another_precision_names_the_command(run, shell):
    write_json(run.folder / "policy-bf16.json", run.policy().to_dict())
    code, _, err = shell("replay", run.folder, "--precision", "bf16")
    assert code == 2
    assert f"shallowdeep record {run.folder} --precision bf16" in err


def test_int8_is_the_same_network_recorded_exported_and_benched(run, tmp_path, monkeypatch):
    """The same samples calibrate all three, and the policy of int8 stops them."""
    seen, val = {}, run.trace("val")

    class Recorder(Engine):
        def __init__(self, sdn, policy, **options):
            seen["record"] = (policy, options["calibration"])
            assert (options["backend"], options["precision"]) == ("onnx", "int8")

        def record(self, samples, **options):
            surer = tuple(2 * logits for logits in val.logits)
            return replace(val, logits=surer, info=replace(val.info, precision="int8"))

    def export(sdn, policy, folder, **options):
        seen["export"] = (policy, options["calibration"])
        raise ConfigError("exported")

    def measure(sdn, policies, *data, **options):
        seen["bench"] = (policies["int8"], options["calibration"])
        raise ConfigError("measured")

    monkeypatch.setattr(run_steps, "Engine", Recorder)
    monkeypatch.setattr(run_steps, "export", export)
    monkeypatch.setattr(run_steps, "measure_speed", measure)
    run.calibrate(max_cost=0.7, precision="int8")
    with pytest.raises(ConfigError, match="exported"):
        run.export(tmp_path / "int8", precision="int8")
    with pytest.raises(ConfigError, match="measured"):
        run.bench(precisions=("int8",), num_samples=8)
    chosen = run.policy("int8")
    assert chosen != run.policy()
    assert seen["record"][0] == run.policy()  # the best guess while there is none of int8
    assert seen["export"][0] == seen["bench"][0] == chosen
    images = [found[1] for found in seen.values()]
    assert len(images[0]) == min(CALIBRATION_SIZE, len(val))
    assert all(torch.equal(images[0], other) for other in images[1:])
    run.record(["val"], precision="int8")
    assert seen["record"][0] == chosen  # from now on the very network that is exported


@pytest.mark.slow
def test_int8_from_end_to_end(run, shell, tmp_path):
    assert shell("calibrate", run.folder, "--max-cost", 0.7, "--precision", "int8")[0] == 0
    assert run.trace("val", "int8").info.precision == "int8"
    write_json(run.folder / "policy-int8.json", parting(run.trace("val", "int8")).to_dict())
    code, _, err = shell("export", run.folder, "--out", tmp_path / "int8", "--precision", "int8")
    assert code == 0, err
    manifest = read_json(tmp_path / "int8" / "manifest.json")
    assert manifest["policy"] == run.policy("int8").to_dict()
    run.record(["test"], precision="int8", progress=False)
    decisions = run.replay(precision="int8")
    assert len(decisions.exits.unique()) == 2
    images = run.load_data().test.batches(360)
    answers = Runner(tmp_path / "int8", settings=Settings(threads=1))(next(iter(images)).inputs.numpy())
    np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
    np.testing.assert_array_equal(answers.labels, decisions.predictions.numpy())


def test_an_archive_keeps_every_precision(run, tmp_path):
    run.calibrate(max_cost=0.7, precision="bf16")
    run.archive(tmp_path / "kept")
    copy = Run.open(tmp_path / "kept")
    assert copy.policy("bf16") == run.policy("bf16")
    assert copy.trace("val", "bf16").info.precision == "bf16"
    assert copy.trace("test").info.precision == "fp32"


# ------------------------------------------------------------------------------------------- exported folders


def test_an_export_decides_as_replay(trained, exported):
    images = trained.load_data().test.images.numpy()
    answers, decisions = Runner(exported, settings=Settings(threads=1))(images), trained.replay()
    np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
    np.testing.assert_array_equal(answers.labels, decisions.predictions.numpy())
    assert len(np.unique(answers.exits)) == 2
    forms = {(one["form"], one["rows"]) for one in laziness(exported)[CPU]}
    assert forms == {("single", 1), ("batched", 1)}


def test_export_from_the_command_line(run, shell, tmp_path, monkeypatch):
    asked = {}

    def export(self, folder, **options):
        asked.update(folder=folder, **options)
        return "written"

    monkeypatch.setattr(Run, "export", export)
    code, said, _ = shell("export", run.folder, "--out", tmp_path / "out", "--precision", "int8", "--uint8")
    options = {"folder": tmp_path / "out", "precision": "int8", "uint8": True, "stages_only": False}
    assert (code, asked) == (0, options)
    shell("export", run.folder, "--out", tmp_path / "out", "--stages-only", "--opset", 20)
    assert asked == {**options, "precision": "fp32", "uint8": False, "stages_only": True, "opset": 20}
    assert "written" in said
    assert f"python {tmp_path / 'out' / 'run.py'}" in said


@pytest.mark.slow
def test_bench_of_a_folder_writes_the_ratio_into_its_manifest(out):
    """In a process of its own: its sessions share one pool of threads."""
    words = ["bench", out, "--provider", CPU, "--batch-size", "1", "--batch-size", "4", "--rounds", "2"]
    found = subprocess.run(
        [sys.executable, "-m", "shallowdeep", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert CPU in found.stdout
    kept = laziness(out)[CPU]
    assert {(one["form"], one["rows"]) for one in kept} == {("single", 1), ("batched", 1), ("batched", 4)}
    for one in kept:
        assert one["ratio"] == pytest.approx(one["early_ms"] / one["late_ms"])
    assert len(Runner(out, settings=Settings(threads=1))(np.zeros((2, 3, 32, 32), np.uint8))) == 2  # still valid


@pytest.mark.parametrize("has_pool", [True, False])
def test_a_provider_that_does_not_leave_early_is_told(out, shell, monkeypatch, has_pool):
    settings = []

    def time_leaving(one, rows, repeats):
        settings.append(one.settings)
        return Timing(one.form, rows, 1.9, 2.0, 0.4)

    monkeypatch.setattr(timing, "time_leaving", time_leaving)
    monkeypatch.setattr(Settings, "open", without_pool(Settings.open))
    if not has_pool:  # as in an older onnxruntime
        monkeypatch.delattr(onnxruntime, "set_global_thread_pool_sizes")
    write_json(out / "manifest.json", {**read_json(out / "manifest.json"), "laziness": {"Other": []}})
    code, said, err = shell("bench", out, "--batch-size", 2, "--rounds", 1)
    assert code == 0, err
    assert said.count("this provider does not leave early: use the stages") == 2  # single and batched
    assert {one.shared_pool for one in settings} == {has_pool}
    kept = laziness(out)
    assert kept["Other"] == []
    assert {(one["form"], one["ratio"], one["leaves_early"]) for one in kept[CPU]} == {
        ("single", 0.95, False), ("batched", 0.95, False),
    }  # fmt: skip


def without_pool(open_):
    """Sessions with threads of their own: a shared pool would be this whole process's."""
    return lambda settings, model, name: open_(replace(settings, shared_pool=False, threads=1), model, name)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--backend", "onnx"], "--backend"),
        (["--precision", "int8"], "--precision"),
        (["--num-samples", "5"], "--num-samples"),
        (["--no-smaller"], "--smaller"),
        (["--device", "cpu"], "--device"),
        (["--shared-pool"], "--shared-pool"),
    ],
)
def test_options_of_a_run_are_refused_for_a_folder(out, shell, words, option):
    code, _, err = shell("bench", out, *words)
    assert code == 2
    assert f"{option} is for a run folder; an exported one takes" in err
    assert laziness(out) == {}


def test_a_folder_that_cannot_be_timed(out):
    with pytest.raises(ConfigError, match="no provider NoProvider"):
        bench_folder(out, providers=["NoProvider"])
    with pytest.raises(ConfigError, match="rounds of at least 1"):
        bench_folder(out, rounds=0)
    with pytest.raises(ConfigError, match="no file"):
        bench_folder(out / "gone")
    assert laziness(out) == {}


# ------------------------------------------------------------------------------------------- bench of a run


def report_on(device, *precisions):
    timings = [
        Timed(8, "eager", precision, variant, (1.0, 2.0), accuracy=0.5, cost=0.5, device=device)
        for precision in precisions
        for variant in (EXITS, PLAIN)
    ]
    return SpeedReport(tuple(timings), (), {}, (0.5, 0.6), (0.4, 1.0), 2, 1, device, {})


def test_benchmarks_of_other_devices_and_precisions_are_kept_apart(run, monkeypatch):
    pytest.importorskip("matplotlib")
    for device, precisions in (("cpu", ["fp32"]), ("cuda:0", ["fp32"]), ("cpu", ["fp32", "bf16"])):
        monkeypatch.setattr(run_steps, "measure_speed", lambda *a, d=device, p=precisions, **options: report_on(d, *p))
        run.bench(num_samples=8)
    names = {path.name for path in (run.folder / "results").glob("bench*")}
    assert names == {f"bench{end}.{kind}" for end in ("", "-cuda", "-fp32-bf16") for kind in ("json", "png")}
    assert read_json(run.folder / "results" / "bench-cuda.json")["timings"][0]["device"] == "cuda:0"


def test_a_shared_pool_is_asked_for_and_refused_where_it_cannot_be(run, shell, monkeypatch):
    seen = []

    def measure(*data, **options):
        seen.append(options["options"])
        return report_on("cpu", "fp32")

    monkeypatch.setattr(run_steps, "measure_speed", measure)
    assert shell("bench", run.folder, "--num-samples", 8, "--shared-pool")[0] == 0
    assert shell("bench", run.folder, "--num-samples", 8)[0] == 0
    assert seen == [{"onnx": {"shared_pool": True}}, None]
    write_json(run.folder / "policy-int8.json", run.policy().to_dict())
    with pytest.raises(ConfigError, match="int8 is quantised by sessions with threads of their own"):
        run.bench(precisions=("int8",), shared_pool=True)
    monkeypatch.delattr(onnxruntime, "set_global_thread_pool_sizes")
    with pytest.raises(ConfigError, match="no pool of threads to be shared"):
        run.bench(shared_pool=True)
