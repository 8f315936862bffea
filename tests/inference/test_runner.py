"""The exported folder's runner: bad folders, bad input, its command line, and a machine without PyTorch."""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import shallowdeep as sd
from shallowdeep.inference.onnx.export import export
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.sessions import RunnerError, Settings
from shallowdeep.inference.runner.timing import Timing, bench, time_leaving

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

POLICY = sd.Confidence(0.6, exits=(0,))
ONE_THREAD = Settings(threads=1)


@pytest.fixture(scope="module")
def written(small, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runner") / "out"
    export(small, POLICY, folder, example_inputs=images[:8])
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(written, tmp_path / "out")


def rewritten(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def parts_of(folder):
    return json.loads((folder / "manifest.json").read_text())["stages"]


def test_a_missing_folder_or_manifest_is_named(tmp_path, folder):
    with pytest.raises(RunnerError, match=r"no file .*nowhere.*manifest\.json"):
        Runner(tmp_path / "nowhere")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RunnerError, match="as JSON"):
        Runner(folder)
    (folder / "manifest.json").write_text("[1]")
    with pytest.raises(RunnerError, match="no manifest of a shallowdeep export"):
        Runner(folder)


def test_a_later_format_is_refused(folder):
    with pytest.raises(RunnerError, match="has format 99; this runner reads up to 1"):
        Runner(rewritten(folder, format=99))


def test_a_missing_stage_file_is_named(folder):
    (folder / "stage_1.onnx").unlink()
    with pytest.raises(RunnerError, match=r"cannot read .*stage_1\.onnx \(No such file"):
        Runner(folder)


def test_a_stage_file_of_another_export_is_refused(folder):
    (folder / "stage_1.onnx").write_bytes((folder / "stage_0.onnx").read_bytes())
    with pytest.raises(RunnerError, match=r"stage_1\.onnx is not the file that manifest\.json speaks of"):
        Runner(folder)


def test_a_manifest_that_contradicts_itself_is_refused(folder):
    with pytest.raises(RunnerError, match=r"contradicts itself: exits \[0, 1\], stages that end at \[0, 3\]"):
        Runner(rewritten(folder, exits=[0, 1]))


def test_names_that_disagree_are_refused(folder):
    parts = parts_of(folder)
    parts[1]["inputs"] = ["pixels", "threshold"]
    with pytest.raises(RunnerError, match=r"has the inputs features, threshold; manifest\.json says pixels, threshold"):
        Runner(rewritten(folder, stages=parts))


def test_a_manifest_without_a_part_is_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["costs"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunnerError, match="does not say costs"):
        Runner(folder)


FIRST = {"file": "stage_0.onnx", "sha256": "0", "exit": 0, "inputs": ["inputs"], "outputs": ["stop"]}
INPUT = {"name": "inputs", "dtype": "float32", "shape": [3, 16, 16], "range": [-1, 1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ["stage_0.onnx", "stage_1.onnx"]}, "stages[0] = 'stage_0.onnx' is not a mapping with file, sha256"),
        ({"stages": [{key: FIRST[key] for key in FIRST if key != "file"}]}, "stages[0] does not say file"),
        ({"stages": [{**FIRST, "file": 3}]}, "stages[0].file = 3 is not the name of a file in the folder"),
        ({"stages": [{**FIRST, "file": "../stage_0.onnx"}]}, "'../stage_0.onnx' is not the name of a file in"),
        ({"stages": [{**FIRST, "inputs": "inputs"}]}, "stages[0].inputs = 'inputs' is not a list of at least 1"),
        ({"stages": []}, "stages = [] is not a list of at least 1"),
        ({"stages": None}, "stages = None is not a list"),
        ({"thresholds": None}, "thresholds = None is not a mapping from names"),
        ({"thresholds": {"threshold": None}}, "thresholds.threshold = None is not a finite number"),
        ({"costs": None}, "costs = None is not a list"),
        ({"costs": [0.1, None]}, "costs[1] = None is not a number above 0"),
        ({"costs": [0.1, float("nan")]}, "costs[1] = nan is not a number above 0"),
        ({"costs": [0.1, 10**400]}, "is not a number above 0"),
        ({"exits": ["0", "3"]}, "exits = ['0', '3'] is not a list of rising whole numbers"),
        ({"exits": [3, 0]}, "exits = [3, 0] is not a list of rising whole numbers"),
        ({"extremes": {"early": {"threshold": 0}}}, "extremes does not say late"),
        ({"inputs": {"inputs": INPUT}}, "is not a list of at least 1"),
        ({"inputs": [{**INPUT, "dtype": "float33"}]}, "inputs[0].dtype = 'float33' is not a type of numbers"),
        ({"inputs": [{**INPUT, "dtype": "(2,"}]}, "inputs[0].dtype = '(2,' is not a type of numbers"),
        ({"inputs": [{**INPUT, "shape": [3, "16", 16]}]}, "inputs[0].shape[1] = '16' is not a whole number above 0"),
        ({"inputs": [{**INPUT, "range": None}]}, "inputs[0].range = None is not two finite numbers"),
        ({"single": "single.onnx"}, "single = 'single.onnx' is not a mapping with file, sha256"),
        ({"format": "1"}, "has format '1'; this runner reads up to 1"),
        ({"format": True}, "has format True; this runner reads up to 1"),
    ],
)
def test_a_malformed_manifest_is_named(folder, changes, message):
    with pytest.raises(RunnerError, match=re.escape(message)) as raised:
        Runner(rewritten(folder, **changes))
    assert str(raised.value).endswith(("Export anew.", "Use the folder's own run.py."))


def test_a_manifest_nested_too_deeply_is_refused(folder):
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(RunnerError, match="as JSON"):
        Runner(folder)


def test_an_opset_that_onnxruntime_does_not_know_is_named(folder):
    path = folder / "stage_0.onnx"
    model = onnx.load(path)
    model.opset_import[0].version = 999
    path.write_bytes(model.SerializeToString())
    parts = parts_of(folder)
    parts[0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RunnerError, match=r"onnxruntime .* does not open stage_0\.onnx.*999"):
        Runner(rewritten(folder, stages=parts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "whole"}, "no form 'whole'. Use one of: stages, single, batched"),
        ({"micro_batch": 0}, "got micro_batch=0"),
        ({"settings": Settings(providers=("NoSuchProvider",))}, "no provider NoSuchProvider. This onnxruntime has: "),
        ({"settings": Settings(providers=())}, "no provider is named"),
        ({"thresholds": {"speed": 1.0}}, "no number named 'speed'. It has: threshold"),
        ({"thresholds": {"threshold": float("nan")}}, "threshold is a finite number, got nan"),
    ],
)
def test_bad_options_are_named(written, options, message):
    with pytest.raises(RunnerError, match=re.escape(message)):
        Runner(written, **options)


def nan_in(images, row):
    images = images.copy()
    images[row, 0, 3, 3] = np.nan
    return images


@pytest.mark.parametrize("form", ["stages", "single", "batched"])
def test_bad_batches_are_named(written, images, form):
    one, good = Runner(written, form, settings=ONE_THREAD), images.numpy()
    for bad, message in [
        (good[:, :2], r"of shape \(n, 3, 16, 16\) and float32, got \(40, 2, 16, 16\)"),
        (good[0], r"got \(3, 16, 16\)"),
        (np.float32(1), r"got \(\)"),
        (good.astype(np.float64), "got .* and float64"),
        (good[:0], "holds no sample"),
        (nan_in(good, 5), r"not finite, first in row 5 \(1 in all\)"),
        ({"pixels": good}, "takes inputs; got pixels"),
    ]:
        with pytest.raises(RunnerError, match=message):
            one(bad)
    assert len(one(good[:1])) == 1


def test_one_file_gives_nothing_out_between_its_exits(written, images):
    one = Runner(written, "batched")
    with pytest.raises(RunnerError, match="takes form='stages'"):
        list(one.anytime(images.numpy()))
    with pytest.raises(RunnerError, match="refill takes form='stages'"):
        list(one.stream([images.numpy()], refill=True))


def test_timing_compares_the_first_exit_to_the_last(written):
    timing = time_leaving(Runner(written, "single", settings=ONE_THREAD), 1, repeats=3)
    assert (timing.form, timing.rows) == ("single", 1)
    assert timing.early_ms > 0
    manifest = Runner(written).manifest
    assert timing.share == pytest.approx(manifest["costs"][0] / manifest["costs"][-1])


def test_the_benchmark_times_all_forms_and_stages(written):
    found = bench(written, sizes=[1, 4], repeats=2, settings=ONE_THREAD)
    assert [(one.form, one.rows) for one in found.timings] == [
        ("stages", 1),
        ("stages", 4),
        ("single", 1),
        ("batched", 1),
        ("batched", 4),
    ]
    assert found.latency.sizes == (1, 4)
    assert len(found.latency.run_ms) == 2
    assert str(found).startswith("CPUExecutionProvider, milliseconds")
    assert "stage 1" in str(found)


def test_a_provider_that_runs_both_branches_is_found_out():
    lazy, eager = Timing("single", 1, 2.0, 10.0, 0.2), Timing("single", 1, 9.8, 10.0, 0.2)
    assert lazy.leaves_early
    assert lazy.ratio == pytest.approx(0.2)
    assert "use the stages" not in str(lazy)
    assert not eager.leaves_early
    assert str(eager).endswith("this provider does not leave early: use the stages")


ALONE = """
import sys

ALLOWED = {"numpy", "onnxruntime", "__main__", *sys.stdlib_module_names}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
for name in list(sys.modules):  # what came in while Python started
    if name.partition(".")[0] not in ALLOWED:
        del sys.modules[name]
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder, *arguments, program="run.py"):
    """The folder's own run.py, in a process in which there are numpy, onnxruntime and Python's own modules alone."""
    command = [sys.executable, "-c", ALONE, str(folder / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, timeout=300)


@pytest.mark.parametrize("name", ["torch", "shallowdeep", "onnx", "safetensors", "pydantic"])
def test_nothing_else_can_be_imported_where_the_command_line_is_tried(tmp_path, name):
    assert importlib.util.find_spec(name) is not None
    (tmp_path / "imports.py").write_text(f"import {name}\n")
    done = run(tmp_path, program="imports.py")
    assert done.stderr.endswith(f"ImportError: {name} is not here\n")


def test_the_command_line_answers_without_pytorch(folder, images, trace):
    np.save(folder / "images.npy", images.numpy())
    done = run(folder, folder / "images.npy", "--out", folder / "answers.npz", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("40 answers at ")
    answers, decisions = np.load(folder / "answers.npz"), sd.replay(trace, POLICY)
    assert len(np.unique(answers["exits"])) == 2
    np.testing.assert_array_equal(answers["exits"], decisions.exits.numpy())
    np.testing.assert_array_equal(answers["labels"], decisions.predictions.numpy())
    np.testing.assert_allclose(answers["scores"], decisions.scores.numpy(), atol=1e-5)


def test_the_command_line_sets_thresholds_and_forms(folder, images):
    np.save(folder / "images.npy", images.numpy())
    for form in ("stages", "single", "batched"):
        done = run(folder, folder / "images.npy", "--set", "threshold=0", "--form", form)
        assert done.stdout.endswith("(exit 0 100 %)\n"), done.stderr


def test_the_command_line_times_itself(folder):
    done = run(folder, "--bench", "--batch", 1, 2, "--repeats", 2, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^single +1 +[\d.]+ +[\d.]+ +[\d.]+", done.stdout, re.MULTILINE)
    assert re.search(r"^stages +2 +[\d.]+ +[\d.]+ +[\d.]+", done.stdout, re.MULTILINE)


def test_the_command_line_says_what_is_wrong(folder):
    np.save(folder / "flat.npy", np.zeros((2, 3), np.float32))
    (folder / "text.npy").write_text("no numbers")
    for arguments, message in [
        ([folder / "nowhere.npy"], "no file"),
        ([folder / "text.npy"], "no .npy or .npz file"),
        ([folder / "flat.npy"], "must be of shape (n, 3, 16, 16)"),
        ([], "name a file of images"),
        ([folder / "flat.npy", "--set", "threshold"], "NAME=NUMBER"),
        ([folder / "flat.npy", "--provider", "NoSuchProvider"], "no provider NoSuchProvider"),
        (
            [folder / "flat.npy", "--folder", rewritten(shutil.copytree(folder, folder / "spoilt"), stages=["a"])],
            "stages[0] = 'a' is not a mapping with file",
        ),
    ]:
        done = run(folder, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("run.py: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
