"""Stages in int8: what is quantised, on what it is calibrated, and that every form decides by the int8 logits."""

import numpy as np
import pytest
import torch

import shallowdeep as sd
from shallowdeep.errors import ConfigError
from shallowdeep.inference.cascade import Cascade
from shallowdeep.inference.onnx import export as onnx_export
from shallowdeep.inference.onnx import quantize
from shallowdeep.inference.onnx.convert import convert
from shallowdeep.inference.onnx.export import export
from shallowdeep.inference.onnx.handover import in_eight_bits
from shallowdeep.inference.onnx.precisions import models_in
from shallowdeep.inference.onnx.quantize import MIN_ROWS, _reaching, body_nodes, quantize_stages
from shallowdeep.inference.runner.folder import Runner
from shallowdeep.inference.runner.manifest import FORMS
from shallowdeep.inference.runner.sessions import Settings
from shallowdeep.inference.runner.stages import OnnxStages

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def many():
    return torch.randn(160, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def policy(trace):
    sure = torch.stack([logits.softmax(-1).amax(-1) for logits in trace.logits[:-1]])
    found = [sd.Confidence(sure.quantile(share).item(), exits=(0, 1)) for share in (0.3, 0.4, 0.5, 0.6, 0.7)]
    return next(one for one in found if len(sd.replay(trace, one).exits.unique()) == 3)


@pytest.fixture(scope="module")
def floats(small, images, policy):
    return convert(small, policy, images[:8])


@pytest.fixture(scope="module")
def written(small, images, many, policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "out"
    return export(small, policy, folder, example_inputs=images[:8], precision="int8", calibration=many)


def kinds(model):
    return [node.op_type for node in model.graph.node]


def test_convolutions_are_quantised_and_the_policy_is_not(floats, many, policy):
    found = quantize_stages(floats.models, {"threshold": policy.threshold}, {"inputs": many.numpy()})
    for before, after in zip(floats.models, found, strict=True):
        assert "QuantizeLinear" not in kinds(before.model)
        nodes = after.model.graph.node
        makers = {name: node for node in nodes for name in node.output}
        dequantised = [
            {makers[name].op_type for name in node.input[:2] if name in makers}
            for node in nodes
            if node.op_type == "Conv"
        ]
        assert dequantised
        assert all(one == {"DequantizeLinear"} for one in dequantised)
        weights = [
            one for one in after.model.graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1
        ]
        assert len(weights) == len(dequantised) + 1  # and the Gemm's
        values = np.concatenate([onnx.numpy_helper.to_array(one).ravel() for one in weights])
        assert 32 < np.abs(values.astype(int)).max() <= 64  # 7 bits
        softmax = next(node for node in nodes if node.op_type == "Softmax")
        assert makers[softmax.input[0]].op_type != "DequantizeLinear"
        assert (after.inputs, after.outputs) == (before.inputs, before.outputs)


def test_a_residual_is_taken_and_a_bias_is_not():
    def node(kind, inputs, output):
        return onnx.helper.make_node(kind, inputs, [output], name=output)

    nodes = [
        node("Conv", ["x", "w"], "conv"),
        node("Add", ["conv", "bias"], "biased"),
        node("Add", ["conv", "biased"], "residual"),
        node("Relu", ["residual"], "features_out"),
        node("MatMul", ["features_out", "m"], "product"),
        node("Add", ["product", "bias"], "logits"),
        node("Softmax", ["logits"], "scores"),
        node("MatMul", ["scores", "m"], "policy"),
    ]
    kind = onnx.TensorProto.FLOAT
    names = {"in": ["x"], "out": ["features_out", "logits", "scores", "policy"]}
    inputs, outputs = ([onnx.helper.make_tensor_value_info(n, kind, None) for n in names[k]] for k in ("in", "out"))
    weights = [onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), name) for name in ("w", "m", "bias")]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, initializer=weights)
    assert body_nodes(graph) == ["conv", "residual", "features_out", "product"]


def test_a_stage_is_calibrated_on_the_samples_that_reach_it(floats, small, many, policy):
    reaching = _reaching(floats.models, {"threshold": policy.threshold}, {"inputs": many.numpy()}, 1)
    counts = [sum(len(feeds["features" if place else "inputs"]) for feeds in one) for place, one in enumerate(reaching)]
    with torch.no_grad():
        logits = small(many)
    stays = [(one.softmax(-1).amax(-1) < policy.threshold).numpy() for one in logits]
    assert counts[0] == 160
    assert counts[1] == max(stays[0].sum(), MIN_ROWS)
    assert counts[2] == max((stays[0] & stays[1]).sum(), MIN_ROWS)
    assert counts[2] < counts[1] < counts[0]
    alone = _reaching(floats.models, {"threshold": 0.0}, {"inputs": many.numpy()}, 1)
    assert [sum(len(next(iter(feeds.values()))) for feeds in one) for one in alone] == [160, MIN_ROWS, MIN_ROWS]
    few = _reaching(floats.models, {"threshold": 0.0}, {"inputs": many[:9].numpy()}, 1)
    assert [sum(len(next(iter(feeds.values()))) for feeds in one) for one in few] == [9, 9, 9]


def test_every_form_decides_by_the_int8_logits(written, small, images, policy):
    data = sd.TensorSet(images, torch.zeros(len(images), dtype=torch.int64), num_classes=5)
    runner = Runner(written.folder, settings=Settings(threads=1))
    logits = runner.cascade.logits({"inputs": images.numpy()})
    trace = sd.Trace(
        tuple(torch.from_numpy(one) for one in logits),
        data.labels,
        data.ids,
        small.costs.select(runner.exits),
        sd.record(small, data).info,
    )
    decisions = sd.replay(trace, sd.Confidence(policy.threshold))
    assert len(decisions.exits.unique()) == 3
    for form in FORMS:
        answers = Runner(written.folder, form, settings=Settings(threads=1))(images.numpy())
        np.testing.assert_array_equal(answers.exits, np.asarray(runner.exits)[decisions.exits.numpy()])
        np.testing.assert_allclose(answers.scores, decisions.scores.numpy(), atol=1e-5)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_every_policy_runs_in_int8(small, images, many, policy, backend):
    """Each decides as its replay does on the back end's own Trace."""
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[backend])
    data = sd.TensorSet(images, torch.zeros(len(images), dtype=torch.int64), num_classes=5)
    kinds = [sd.Patience(1), sd.Confidence(policy.threshold, answer="most_confident")]
    for kind in kinds:
        engine = sd.Engine(
            small, kind, backend=backend, precision="int8", example_inputs=images, calibration=many, threads=1
        )
        decisions = sd.replay(engine.record(data), kind)
        answers = engine(images)
        np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
        np.testing.assert_allclose(answers.scores, decisions.scores.numpy(), atol=1e-5)


def test_an_export_says_how_far_int8_is_from_float(written):
    parity = written.manifest["parity"]
    assert 1e-4 < parity["logits"] < 0.3
    assert max(parity["scores"].values()) < 1e-4
    assert written.manifest["precision"] == "int8"
    assert written.manifest["bytes_of_fp32"] > 0
    assert b"QuantizeLinear" in (written.folder / "single.onnx").read_bytes()


def largest_weight(folder):
    """The largest weight of convolutions and matrix products in a folder's stages, as a whole number."""
    models = [onnx.load(path) for path in sorted(folder.glob("stage_*.onnx"))]
    weights = [one for model in models for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    return max(np.abs(onnx.numpy_helper.to_array(one).astype(int)).max() for one in weights if len(one.dims) > 1)


def test_weights_have_as_many_bits_as_asked_for(written, floats, small, images, many, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "convert", lambda *args, **options: floats)  # as it was done before
    options = {"example_inputs": images[:8], "precision": "int8", "calibration": many, "weight_bits": 8}
    out = export(small, policy, tmp_path / "out", single=False, batched=False, **options)
    assert 64 < largest_weight(out.folder) <= 128
    assert 32 < largest_weight(written.folder) <= 64
    assert (out.manifest["weight_bits"], written.manifest["weight_bits"]) == (8, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8", "calibration": torch.zeros(2, 3, 16, 16), "weight_bits": 4}, "got weight_bits=4"),
        ({"weight_bits": 8}, "weight_bits= is for precision='int8', not for 'fp32'"),
    ],
)
def test_other_numbers_of_bits_are_refused(small, images, policy, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export(small, policy, tmp_path / "out", example_inputs=images[:2], **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_an_int8_engine_decides_like_its_own_trace(small, images, many, policy, backend):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[backend])
    engine = sd.Engine(small, policy, backend=backend, precision="int8", calibration=many, threads=1)
    data = sd.TensorSet(images, torch.zeros(len(images), dtype=torch.int64), num_classes=5)
    trace = engine.record(data)
    assert trace.info.precision == "int8"
    decisions = sd.replay(trace, policy)
    answers = engine(images)
    np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
    np.testing.assert_allclose(answers.scores, decisions.scores.numpy(), atol=1e-5)


def test_int8_without_real_inputs_is_refused(small, images, policy, tmp_path):
    with pytest.raises(ConfigError, match="Pass calibration="):
        export(small, policy, tmp_path / "out", example_inputs=images[:2], precision="int8")
    with pytest.raises(ConfigError, match="Pass calibration="):
        sd.Engine(small, policy, backend="onnx", precision="int8", example_inputs=images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (255 * x.sigmoid()).byte(), r"and torch.float32, got \(160, 3, 16, 16\) and torch.uint8"),
        (lambda x: x[:, :2], r"inputs must be of shape \(n, 3, 16, 16\) and .*, got \(160, 2, 16, 16\)"),
        (lambda x: x[0], r"got \(3, 16, 16\)"),
        (lambda x: x[:0], "inputs holds no sample"),
        (lambda x: torch.cat([x[:7], x[:1] / 0]), r"not finite, first in row 7 \(1 rows in all\)"),
        (lambda x: {"pixels": x}, "the network takes inputs; got pixels"),
    ],
)
def test_inputs_to_calibrate_on_are_the_networks(floats, many, policy, change, message):
    with pytest.raises(ConfigError, match=f"calibration= does not fit: .*{message}"):
        models_in("int8", floats, policy, change(many))


def logits_of(models, threshold, images):
    """What stages give at each exit, nobody leaving."""
    files = [model.model.SerializeToString() for model in models]
    stages = OnnxStages(files, [model.exit for model in models], {"threshold": threshold}, Settings(threads=1))
    return Cascade(stages, [0.1] * len(models)).logits({"inputs": images.numpy()})


def types_given(model):
    """Type and shape of each value that a stage gives to later ones."""
    tensors = {value.name: value.type.tensor_type for value in model.model.graph.output}
    return {
        name: (kind.elem_type, [dim.dim_value for dim in kind.shape.dim][1:])
        for name, kind in tensors.items()
        if name.endswith("_out")
    }


@pytest.mark.parametrize("case", ["all quantised", "a stage in float32", "a scale of its own"])
def test_stages_hand_over_eight_bits_and_nothing_else_changes(floats, many, images, policy, case, monkeypatch):
    arguments = ({"threshold": policy.threshold}, {"inputs": many.numpy()})
    if case == "a scale of its own":
        monkeypatch.setattr(quantize, "scales_given", lambda model: {})
    before = quantize_stages(floats.models, *arguments)
    if case == "a stage in float32":
        before[1] = floats.models[1]
    after = in_eight_bits(before)
    for one, other in zip(*(logits_of(models, policy.threshold, images) for models in (before, after)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [(one.inputs, one.outputs) for one in after] == [(one.inputs, one.outputs) for one in before]
    assert types_given(before[0]) == {"features_out": (onnx.TensorProto.FLOAT, [8, 16, 16])}
    assert types_given(after[0]) == {"features_out": (onnx.TensorProto.UINT8, [16, 16, 8])}
    second = types_given(after[1])["features_out"][0]
    assert second == (onnx.TensorProto.FLOAT if case == "a stage in float32" else onnx.TensorProto.UINT8)
    quantised = [node.input[0] for node in after[1].model.graph.node if node.op_type == "QuantizeLinear"]
    assert ("features/float" in quantised) == (case == "a scale of its own")
    assert "features" not in quantised
