"""Exported stages and self-exiting files: they decide as the replay of a Trace does."""

import copy
import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

import shallowdeep as sd
from shallowdeep.errors import ConfigError, NetworkError, UnknownName
from shallowdeep.inference import stages
from shallowdeep.inference.cascade import Cascade
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.onnx import export as onnx_export
from shallowdeep.inference.onnx import parity
from shallowdeep.inference.onnx.convert import as_typed
from shallowdeep.inference.onnx.export import export
from shallowdeep.inference.onnx.manifest import write_laziness
from shallowdeep.inference.runner import sessions
from shallowdeep.inference.runner.device import Device, device_of, one_node
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.manifest import FORMS, read_manifest
from shallowdeep.inference.runner.sessions import RunnerError, Settings
from shallowdeep.inference.runner.stages import OnnxStages
from shallowdeep.inference.runner.timing import Bench, Timing, bench, made_up

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ONE_THREAD = Settings(threads=1)
KINDS = {
    "some exits": lambda c: sd.Confidence(c, exits=(0, 2), answer="most_confident"),
    "patience": lambda c: sd.Patience(1),
    "confidence": lambda c: sd.Confidence(c),
}


@pytest.fixture(scope="module")
def parting(small, images):
    """The small network with centred logits, so that exits agree on some samples and not on others."""
    sdn = copy.deepcopy(small)
    with torch.no_grad():
        for head, logits in zip([*sdn.exits, sdn.backbone], sdn(images), strict=True):
            last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
            last.bias -= logits.mean(0)
    return sdn


@pytest.fixture(scope="module")
def seen(parting, images):
    return sd.record(parting, sd.TensorSet(images, torch.zeros(len(images), dtype=torch.int64), num_classes=5))


@pytest.fixture(scope="module", params=["some exits", "patience", pytest.param("confidence", marks=pytest.mark.slow)])
def exported(request, parting, images, seen, tmp_path_factory):
    """A policy whose samples part ways, and a folder with it."""
    sure = torch.stack([logits.softmax(-1).amax(-1) for logits in seen.logits[:-1]])
    policies = [KINDS[request.param](sure.quantile(share).item()) for share in (0.3, 0.4, 0.5, 0.6, 0.7)]
    policy = next(one for one in policies if len(sd.replay(seen, one).exits.unique()) >= 3)
    folder = tmp_path_factory.mktemp("exports") / "out"
    return policy, export(parting, policy, folder, example_inputs=images[:8], class_names=list("abcde"))


@pytest.fixture(scope="module")
def engine(exported, parting, images):
    """The policy's engine in ONNX Runtime."""
    return sd.Engine(parting, exported[0], backend="onnx", example_inputs=images, threads=1)


def assert_decides_like(answers, decisions):
    np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
    np.testing.assert_allclose(answers.scores, decisions.scores.numpy(), atol=1e-5)
    np.testing.assert_array_equal(answers.labels, decisions.predictions.numpy())
    np.testing.assert_allclose(answers.costs, decisions.costs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("micro_batch", [None, 7])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_decides_like_replay(exported, images, seen, form, micro_batch):
    policy, out = exported
    decisions = sd.replay(seen, policy)
    assert len(decisions.exits.unique()) >= 3
    answers = Runner(out.folder, form, micro_batch=micro_batch, settings=ONE_THREAD)(images.numpy())
    assert_decides_like(answers, decisions)


@pytest.mark.parametrize("form", FORMS)
def test_one_sample_is_answered_as_in_a_batch(exported, images, seen, form):
    policy, out = exported
    one = Runner(out.folder, form, settings=ONE_THREAD)
    found = [one(images[i : i + 1].numpy()).exits[0] for i in range(12)]
    assert found == sd.replay(seen, policy).exits[:12].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_other_thresholds_are_those_of_another_policy(exported, images, seen, form):
    policy, out = exported
    name, other = ("patience", 0) if isinstance(policy, sd.Patience) else ("threshold", 0.45)
    decisions = sd.replay(seen, type(policy)(**{**vars(policy), name: other}))
    assert decisions.exits.tolist() != sd.replay(seen, policy).exits.tolist()
    assert_decides_like(Runner(out.folder, form, thresholds={name: other})(images.numpy()), decisions)
    opened = Runner(out.folder, form)
    assert_decides_like(opened.with_thresholds({name: other})(images.numpy()), decisions)
    assert_decides_like(opened(images.numpy()), sd.replay(seen, policy))


def test_a_folder_streams_and_answers_at_any_time(exported, images, seen):
    policy, out = exported
    one, decisions = Runner(out.folder, settings=ONE_THREAD), sd.replay(seen, policy)
    for refill in (False, True):
        parts = list(one.stream([part.numpy() for part in images.split(16)], refill=refill))
        order = np.argsort(np.concatenate([part.ids for part in parts]))
        assert np.concatenate([part.exits for part in parts])[order].tolist() == decisions.exits.tolist()
    *_, last = one.anytime(images.numpy())
    assert_decides_like(last, decisions)
    for form in ("single", "batched"):
        parts = list(Runner(out.folder, form, micro_batch=8).stream([part.numpy() for part in images.split(16)]))
        assert sorted(np.concatenate([part.ids for part in parts]).tolist()) == list(range(len(images)))


def test_the_manifest_says_what_there_is(exported, parting, seen):
    policy, out = exported
    manifest = json.loads((out.folder / "manifest.json").read_text())
    assert manifest["policy"] == policy.to_dict()
    assert manifest["exits"] == [*(policy.exits or range(3)), 3]
    assert manifest["taps"] == ["stem", "first", "second"]
    costs = dict(zip(manifest["exits"], manifest["costs"], strict=True))
    decisions = sd.replay(seen, policy)
    assert [costs[exit] for exit in decisions.exits.tolist()] == pytest.approx(decisions.costs.tolist(), rel=1e-6)
    (one,) = manifest["inputs"]
    assert {key: one[key] for key in ("name", "dtype", "shape")} == {
        "name": "inputs",
        "dtype": "float32",
        "shape": [3, 16, 16],
    }
    assert manifest["class_names"] == list("abcde")
    assert manifest["parity"]["rows"] == 8
    assert len(manifest["parity"]["exits_used"]) >= 3
    assert 0 < manifest["parity"]["logits"] < 1e-5
    (lazy,) = manifest["laziness"].values()
    assert {entry["form"]: entry["ratio"] > 0 for entry in lazy} == {"single": True, "batched": True}
    assert list(manifest["laziness"]) == ["CPUExecutionProvider"]
    assert {path.name for path in out.folder.iterdir()} == set(out.files)
    assert "within" in str(out)
    assert "single.onnx: leaving at the first exit takes" in str(out)


def test_files_say_nothing_of_this_machine(exported):
    _, out = exported
    for path in out.folder.iterdir():
        assert b"site-packages" not in path.read_bytes(), path
        assert str(out.folder.parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(("form", "rows"), [("single", 1), ("batched", 40)])
def test_nothing_deeper_runs_when_nobody_goes_on(exported, images, tmp_path, form, rows):
    """What ran, by ONNX Runtime's own profile."""
    _, out = exported
    early, late = (stages_run(out, form, way, images[:rows], tmp_path / way) for way in ("early", "late"))
    assert early == {"stage_0"}
    assert late == {f"stage_{place}" for place in range(len(out.manifest["stages"]))}
    answers = Runner(out.folder, form, thresholds=out.manifest["extremes"]["early"])(images.numpy())
    assert set(answers.exits.tolist()) == {0}
    assert answers.scores.shape == (40, 5)


def stages_run(out, form, way, images, prefix):
    """The stages of a self-exiting file that some rows run through."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.intra_op_num_threads = 1
    options.profile_file_prefix = str(prefix)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps nodes' names
    session = onnxruntime.InferenceSession(out.folder / f"{form}.onnx", options, providers=["CPUExecutionProvider"])
    ((name, number),) = out.manifest["extremes"][way].items()
    kind = np.int64 if name == "patience" else np.float32
    session.run(None, {"inputs": images.numpy(), name: np.array(number, kind)})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event["name"] for event in events if event.get("cat") == "Node"]
    return {name.partition("/")[0] for name in ran if name.startswith("stage_")}


def test_features_may_stay_in_the_run_times_own_arrays(exported, images, seen, monkeypatch):
    """The way of a GPU, on a CPU: values bound by ONNX Runtime instead of numpy's."""
    policy, out = exported
    one = Runner(out.folder, micro_batch=16, settings=ONE_THREAD)
    stages = one.cascade.stages
    stages.device = Device("cpu", 0, ONE_THREAD)
    assert_decides_like(one(images.numpy()), sd.replay(seen, policy))
    values = stages.run(0, {"inputs": images.numpy()}).values
    assert not [name for name, value in values.items() if isinstance(value, np.ndarray)]
    held, rows = {name: value.numpy() for name, value in values.items()}, np.array([5, 0, 5, 31])
    with monkeypatch.context() as without:  # the way back to the host
        without.delattr(onnxruntime.OrtValue, "numpy")
        taken = stages.take(values, rows)
        joined = stages.join([taken, values, taken])
    for name, value in held.items():
        np.testing.assert_array_equal(taken[name].numpy(), value[rows])
        np.testing.assert_array_equal(joined[name].numpy(), np.concatenate([value[rows], value, value[rows]]))


def test_rows_of_every_kind_are_moved_on_the_device():
    device, rows = Device("cpu", 0, ONE_THREAD), np.array([2, 0, 2])
    for kind in ("float32", "float64", "float16", "uint8", "int8", "int32", "int64", "bool"):
        for shape in ((4,), (4, 3), (4, 2, 3, 3)):
            value = np.random.default_rng(0).integers(0, 2, shape).astype(kind)
            held = device.hold(value)
            for found, expected in (
                (device.take(held, rows), value[rows]),
                (device.join([held, held]), np.concatenate([value, value])),
            ):
                assert found.numpy().dtype == value.dtype
                np.testing.assert_array_equal(found.numpy(), expected)


def test_the_model_that_moves_rows_is_onnx():
    for kind, inputs in (("Gather", ["tensor(float)", "tensor(int64)"]), ("Concat", ["tensor(bool)"] * 200)):
        model = onnx.load_from_string(one_node(kind, inputs))
        (node,), graph = model.graph.node, model.graph
        assert (node.op_type, node.attribute[0].name, node.attribute[0].i) == (kind, "axis", 0)
        assert [*node.input, *node.output] == [value.name for value in (*graph.input, *graph.output)]
        wanted = {"float": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64, "bool": onnx.TensorProto.BOOL}
        found = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
        assert found == [wanted[one[7:-1]] for one in (*inputs, inputs[0])]


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    opened = []

    class Session:
        def __init__(self, model, options, providers):
            opened.append(providers)

        def get_providers(self):
            return ["CUDAExecutionProvider"]

    available = ["CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"]
    fake = types.SimpleNamespace(
        get_available_providers=lambda: available,
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=Session,
        __version__="1",
    )
    monkeypatch.setattr(sessions, "load_onnxruntime", lambda: fake)
    cuda = Settings(providers=("CUDAExecutionProvider", "CPUExecutionProvider"), device_id=2)
    cuda.open(b"", "a stage")
    assert opened == [[("CUDAExecutionProvider", {"device_id": 2, "use_tf32": 0}), "CPUExecutionProvider"]]
    assert (device_of(cuda).kind, device_of(cuda).index) == ("cuda", 2)
    own = Settings(providers=(("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 1}),), device_id=2)
    assert (own.numbered[0][1], device_of(own).index) == ({"device_id": 1, "use_tf32": 1}, 1)
    engine = device_of(dataclasses.replace(cuda, providers=("TensorrtExecutionProvider",)))
    monkeypatch.setattr(Device, "run", lambda self, session, names, feeds, staying: [session])
    monkeypatch.setattr(Device, "hold", lambda self, value: types.SimpleNamespace(data_type=lambda: "tensor(float)"))
    engine.take(np.zeros(3, np.float32), np.array([1]))
    assert opened[1:] == [[("CUDAExecutionProvider", {"device_id": 2, "use_tf32": 0})]]
    assert device_of(Settings()) is None
    with pytest.raises(RunnerError, match="numbered from 0 on, got device_id=-1"):
        Settings(device_id=-1).open(b"", "a stage")


@pytest.mark.parametrize("spinning", [False, True])
def test_threads_wait_actively_between_runs_where_that_is_asked_for(exported, spinning):
    session = Settings(threads=2, spinning=spinning).open(exported[1].folder / "single.onnx", "a file")
    entry = session.get_session_options().get_session_config_entry
    assert entry("session.force_spinning_stop") == ("0" if spinning else "1")


def test_an_engine_decides_like_the_folder(exported, engine, images, seen):
    policy, out = exported
    assert engine.micro_batch == 32
    answers, expected = engine(images), Runner(out.folder, settings=ONE_THREAD)(images.numpy())
    assert_decides_like(answers, sd.replay(seen, policy))
    np.testing.assert_array_equal(answers.scores, expected.scores)
    logits = Runner(out.folder, settings=ONE_THREAD).cascade.logits({"inputs": images.numpy()})
    for exit, one in zip(engine.exits, logits, strict=True):
        np.testing.assert_allclose(one, seen.logits[exit].numpy(), atol=1e-4)


def test_a_batch_run_at_once_takes_one_file_and_others_the_stages(exported, engine, images, seen, monkeypatch):
    policy, _ = exported
    ran = []
    run = OnnxStages.run
    monkeypatch.setattr(OnnxStages, "run", lambda self, stage, values: ran.append(stage) or run(self, stage, values))
    plan = np.resize(engine.exits, 32)
    for rows in (1, 32):
        assert_decides_like(engine(images[:rows]), sd.replay(seen.select(torch.arange(rows)), policy))
        driver, values = engine.ready(images[:rows])
        planned = driver.answer(values, plan=plan[:rows])
        assert planned.exits.tolist() == plan[:rows].tolist()
        assert not ran
        by_stages = Cascade.answer(driver, values, plan=plan[:rows])
        np.testing.assert_allclose(planned.scores, by_stages.scores, atol=1e-5)
        assert sorted(set(ran)) == list(range(len(set(plan[:rows]))))
        ran.clear()
    engine(images)
    assert ran


@pytest.mark.parametrize(
    ("limit", "options"), [("NESTING", {}), ("MOST_BYTES", {}), (None, {"exits": ()}), (None, {"one_file": False})]
)
def test_no_second_copy_is_held_where_it_cannot_help(small, images, monkeypatch, limit, options):
    options = dict(options)
    if limit:
        monkeypatch.setattr(f"shallowdeep.inference.onnx.onnxruntime.{limit}", 1)
    policy = sd.Confidence(0.5, exits=options.pop("exits", (0,)))
    engine = sd.Engine(small, policy, backend="onnx", example_inputs=images, threads=1, **options)
    driver, _ = engine.ready(images)
    assert driver.folded is None


@pytest.mark.parametrize("threads", [1, 3])
def test_openvino_runs_the_same_files(exported, images, seen, threads):
    pytest.importorskip("openvino")
    from shallowdeep.inference.onnx.openvino import OpenVinoStages

    policy, out = exported
    files = [(out.folder / part["file"]).read_bytes() for part in out.manifest["stages"]]
    stages = OpenVinoStages(files, out.manifest["exits"], out.manifest["thresholds"], threads=1)
    cascade = Cascade(stages, out.manifest["costs"], micro_batch=7)
    with ThreadPoolExecutor(threads) as pool:
        for answers in pool.map(lambda _: cascade.answer({"inputs": images.numpy()}), range(2 * threads)):
            assert_decides_like(answers, sd.replay(seen, policy))


TWO_ENGINES = """
import signal
import torch
from torch import nn
import shallowdeep as sd

net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
sdn, x = sd.attach(net, torch.zeros(1, 8), taps=["1"]).eval(), torch.randn(5, 8)
engines = [sd.Engine(sdn, sd.Confidence(0.5), backend="openvino", example_inputs=x) for _ in range(2)]
print([len(engine(x).exits) for engine in engines])
engines.pop(0)
engines.pop(0)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_signal_after_two_openvino_engines_does_not_kill_the_process():
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", TWO_ENGINES], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "[5, 5]\nstopped\n"), done.stderr


def test_another_provider_may_be_timed_later(exported, tmp_path):
    _, out = exported
    folder = shutil.copytree(out.folder, tmp_path / "out")
    latency = Latency((1,), ((1.0,),) * 3, ((0.1,),) * 3)
    early_ms = {"stages": 2.0, "single": 9.8, "batched": 3.0}
    own = tuple(Timing(form, 1, ms, 10.0, 0.2) for form, ms in early_ms.items())
    write_laziness(folder, Bench("TensorrtExecutionProvider", own, latency))
    again = tuple(dataclasses.replace(one, early_ms=5.0) for one in own)
    for timings in (own, again):
        write_laziness(folder, Bench("CUDAExecutionProvider", timings, latency))
    manifest = read_manifest(folder)
    laziness = manifest.pop("laziness")
    before = json.loads((out.folder / "manifest.json").read_text())
    assert manifest == {key: value for key, value in before.items() if key != "laziness"}
    assert laziness["CPUExecutionProvider"] == before["laziness"]["CPUExecutionProvider"]
    found = {
        name: [(one["form"], one["ratio"], one["leaves_early"]) for one in entries]
        for name, entries in laziness.items()
        if name != "CPUExecutionProvider"
    }
    assert found == {
        "TensorrtExecutionProvider": [("single", pytest.approx(0.98), False), ("batched", 0.3, True)],
        "CUDAExecutionProvider": [("single", 0.5, True), ("batched", 0.5, True)],
    }
    assert laziness["TensorrtExecutionProvider"][0]["note"] == "this provider does not leave early: use the stages"
    assert {path.name for path in folder.iterdir()} == set(out.files)  # nothing half-written is left
    Runner(folder, "single")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "laziness": []}))
    write_laziness(folder, Bench("CPUExecutionProvider", own, latency))  # a folder from before providers were named
    assert list(json.loads((folder / "manifest.json").read_text())["laziness"]) == ["CPUExecutionProvider"]


@pytest.mark.parametrize("threshold", [0.01, 0.5])
def test_a_tie_is_no_decision_to_compare(threshold):
    """Rows that lie within 1e-5 of a threshold, whatever its size, and such as do not."""
    away = np.array([-3e-5, -0.5e-5, 0.5e-5, 3e-5])
    sure = np.stack([threshold + away, np.full(4, 0.9)])
    logits = [np.log(np.stack([p, *[(1 - p) / 200] * 200], axis=1)).astype(np.float32) for p in sure]
    left, scores, firm = parity.decide(sd.Confidence(0.0, exits=(1,)), {"threshold": threshold}, logits, [1, 3])
    assert left.tolist() == [3, 3, 1, 1]
    assert firm.tolist() == [True, False, False, True]
    np.testing.assert_allclose(scores[:, 0], [0.9, 0.9, *sure[0, 2:]], atol=1e-6)


def test_threads_share_a_runner(exported, images, seen):
    policy, out = exported
    one = Runner(out.folder, settings=ONE_THREAD)
    with ThreadPoolExecutor(3) as pool:
        for answers in pool.map(lambda _: one(images.numpy()), range(6)):
            assert_decides_like(answers, sd.replay(seen, policy))


SHALLOW = sd.Confidence(0.5, exits=(0,))


@pytest.fixture(scope="module")
def pixels(small, tmp_path_factory):
    """A folder that takes uint8 images."""
    folder = tmp_path_factory.mktemp("pixels") / "out"
    examples = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scaled = (examples / 255 - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    preprocessing = {"mean": MEAN, "std": STD}
    return export(small, SHALLOW, folder, example_inputs=scaled, preprocessing=preprocessing, batched=False)


MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def test_normalisation_may_lie_in_the_graph(pixels, small):
    images = np.random.default_rng(1).integers(0, 256, (20, 3, 16, 16)).astype(np.uint8)
    data = sd.ImageSet(torch.from_numpy(images), torch.zeros(20).long(), torch.arange(20), MEAN, STD, tuple("abcde"))
    logits = sd.record(small, data).logits
    found = Runner(pixels.folder).cascade.logits({"inputs": images})
    for exit, one in zip((0, 3), found, strict=True):
        np.testing.assert_allclose(one, logits[exit].numpy(), atol=1e-4)
    assert pixels.manifest["inputs"][0]["dtype"] == "uint8"
    assert pixels.manifest["preprocessing"] == {"mean": list(MEAN), "std": list(STD)}
    with pytest.raises(RunnerError, match="uint8"):
        Runner(pixels.folder)(images.astype(np.float32))


def test_what_was_not_asked_for_is_not_there(pixels):
    assert not (pixels.folder / "batched.onnx").exists()
    assert pixels.manifest["batched"] is None
    with pytest.raises(RunnerError, match="without a batched file"):
        Runner(pixels.folder, "batched")


def test_the_network_is_left_as_it_was(small, images, tmp_path):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    small.train()
    try:
        export(small, SHALLOW, tmp_path / "out", example_inputs=images[:2], single=False, batched=False)
        assert small.training
    finally:
        small.eval()
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(weight.requires_grad for weight in small.parameters())


def test_a_folder_that_answers_otherwise_is_an_error(small, images, tmp_path, monkeypatch):
    def spoilt(*args, **options):
        found = onnx_export.__dict__["_convert_for_test"](*args, **options)
        weight = next(one for one in found.models[1].model.graph.initializer if len(one.dims) == 4)
        values = 1.01 * onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return found

    monkeypatch.setattr(onnx_export, "_convert_for_test", onnx_export.convert, raising=False)
    monkeypatch.setattr(onnx_export, "convert", spoilt)
    with pytest.raises(NetworkError, match="differ from PyTorch's"):
        export(small, SHALLOW, tmp_path / "out", example_inputs=images[:2])
    assert list(tmp_path.iterdir()) == []


def test_stages_that_are_no_longer_the_network_are_an_error(small, images, tmp_path, monkeypatch):
    def spoilt(graph):
        fold(graph)
        weight = next(weight for name, weight in graph.named_parameters() if name.startswith("conv"))
        weight.data = 1.01 * weight.data

    fold = stages.fold_batch_norms
    monkeypatch.setattr(stages, "fold_batch_norms", spoilt)
    with pytest.raises(NetworkError, match="the stages differ from the network that they were cut from: a logit by"):
        export(small, SHALLOW, tmp_path / "out", example_inputs=images[:2])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_leaves_elsewhere_is_an_error(small, images, tmp_path, monkeypatch):
    def spoilt(models, thresholds, *, batched):
        return onnx_export.__dict__["_fold_for_test"](
            [onnx_export.StageModel(3 - one.exit if batched else one.exit, one.model) for one in models],
            thresholds,
            batched=batched,
        )

    monkeypatch.setattr(onnx_export, "_fold_for_test", onnx_export.fold, raising=False)
    monkeypatch.setattr(onnx_export, "fold", spoilt)
    with pytest.raises(NetworkError, match=r"the exported batched lets row \d+ leave at exit"):
        export(small, SHALLOW, tmp_path / "out", example_inputs=images[:2])
    assert list(tmp_path.iterdir()) == []


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_a_stage_without_an_onnx_form_is_named(tmp_path):
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Bessel(), nn.Linear(6, 3))
    x = torch.randn(4, 6)
    sdn = sd.attach(net, x, taps=["1"])
    with pytest.raises(NetworkError, match=r"the stage up to the last exit has no ONNX form.*bessel"):
        export(sdn, sd.Confidence(0.5), tmp_path / "out", example_inputs=x)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(small, images, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("mine")
    some = {"example_inputs": images[:2]}
    with pytest.raises(ConfigError, match="is there already"):
        export(small, SHALLOW, full, **some)
    with pytest.raises(UnknownName, match="fp16"):
        export(small, SHALLOW, tmp_path / "out", precision="fp16", **some)
    with pytest.raises(ConfigError, match="2 class names do not fit 5 outputs"):
        export(small, SHALLOW, tmp_path / "out", class_names=["a", "b"], **some)
    with pytest.raises(ConfigError, match="do not fit 3 channels"):
        export(small, SHALLOW, tmp_path / "out", preprocessing={"mean": (0.5,), "std": (0.5,)}, **some)
    with pytest.raises(ConfigError, match="has not"):
        export(small, SHALLOW, tmp_path / "out", preprocessing={"mean": (0.5,)}, **some)
    with pytest.raises(ConfigError, match="looks at exits"):
        export(small, sd.Confidence(0.5, exits=(7,)), tmp_path / "out", **some)
    assert (full / "a").read_text() == "mine"


class Mean(nn.Module):
    def forward(self, x, mask):
        return x.where(mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


class Masked(nn.Module):
    """Takes the mean of what a mask says is there."""

    def __init__(self):
        super().__init__()
        self.first, self.mean, self.last = nn.Linear(6, 6), Mean(), nn.Linear(6, 3)

    def forward(self, x, mask):
        return self.last(self.mean(self.first(x), mask))


def test_a_mask_of_truth_values_goes_through_a_folder(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = {"x": torch.randn(8, 5, 6), "mask": torch.arange(5) < torch.arange(8)[:, None] % 5 + 1}
        sdn = sd.attach(Masked().eval(), inputs, taps=["first"])
    policy = sd.Confidence(sd.record(sdn, [inputs]).confidences[:, 0].median().item() + 1e-4)
    out = export(sdn, policy, tmp_path / "out", example_inputs=inputs)
    assert [(one["name"], one["dtype"], one["range"]) for one in out.manifest["inputs"][1:]] == [
        ("mask", "bool", [0, 1])
    ]
    decisions = sd.replay(sd.record(sdn, [inputs]), policy)
    assert len(decisions.exits.unique()) == 2
    values = {name: value.numpy() for name, value in inputs.items()}
    for form in FORMS:
        assert_decides_like(Runner(out.folder, form, settings=ONE_THREAD)(values), decisions)
    found = made_up(out.manifest, 50)["mask"]
    assert (found.dtype, found.shape) == (np.bool_, (50, 5))
    assert 0.4 < found.mean() < 0.6
    assert len(bench(out.folder, sizes=[2], repeats=1).timings) == 3


def test_an_opset_that_cannot_be_had_is_named_and_nothing_else_said(small, images, tmp_path, caplog, capfd):
    with pytest.raises(NetworkError, match=r"the stage up to exit 0.*opset 5"):
        export(small, SHALLOW, tmp_path / "out", example_inputs=images[:2], opset=5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("openvino", {"device": "NPU9"}, "OpenVINO has no device 'NPU9' here, only CPU"),
        ("onnx", {"providers": ["NoSuchProvider"]}, "no provider NoSuchProvider. This onnxruntime has"),
        ("onnx", {"speed": 3}, "does not know speed"),
        ("openvino", {"calibration": torch.zeros(2)}, "is for precision='int8'"),
    ],
)
def test_an_engine_says_which_option_is_wrong(small, images, backend, options, message):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[backend])
    engine = sd.Engine(small, SHALLOW, backend=backend, **options)
    with pytest.raises(ConfigError, match=message):
        engine.prepare(images)


def test_a_threshold_that_is_whole_by_chance_stays_a_real_number(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would not let it be whole
    assert as_typed(sd.Confidence(1)) == sd.Confidence(1.0)
    assert isinstance(as_typed(sd.Confidence(1)).threshold, float)
    assert isinstance(as_typed(sd.Patience(1)).patience, int)


def test_a_foreign_session_beside_an_engine_keeps_its_own_threads(exported):
    """Nothing global is changed: a session with threads of its own still opens."""
    _, out = exported
    OnnxStages([out.folder / part["file"] for part in out.manifest["stages"]], out.manifest["exits"])
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = True
    onnxruntime.InferenceSession(out.folder / "stage_0.onnx", options, providers=["CPUExecutionProvider"])


def of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
        return transformers.ViTForImageClassification(config)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit",
        "resnet",
        "mobilenet",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("vgg16", "resnet56", "wrn32_4")),
    ],
)
def test_networks_export(name, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = of_transformers(name) if name in ("vit", "resnet") else sd.load_network(name, num_classes=10)
        x = torch.randn(4, 3, 32, 32)
    sdn = sd.attach(net.eval(), x, shares=(0.5,))
    out = export(sdn, sd.Confidence(0.5), tmp_path / "out", example_inputs=x)  # which checks its answers
    assert len(out.parity.exits_used) == 2
    answers = [Runner(out.folder, form, settings=ONE_THREAD)(x.numpy()) for form in FORMS]
    for other in answers[1:]:
        np.testing.assert_array_equal(other.exits, answers[0].exits)
        np.testing.assert_allclose(other.scores, answers[0].scores, atol=1e-5)
