"""Residual sums stay fused into convolutions in stages that begin beside a shortcut."""

import numpy as np
import pytest
import torch
from torch import nn

import shallowdeep as sd
from shallowdeep.inference.onnx.convert import convert
from shallowdeep.inference.onnx.layout import BLOCKED, kept_blocked
from shallowdeep.inference.runner.stages import OnnxStages

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

WIDTH = 16  # channels: whole blocks, of 8 or of 16


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x))


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def attached(block):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem, head = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH, 5)
        net = nn.Sequential(stem, block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        return sd.attach(net, IMAGES, taps=["0"]).eval()


@pytest.fixture(scope="module")
def residual():
    """Two stages, the second beginning beside a shortcut."""
    return convert(attached(Shortcut), sd.Confidence(0.5), IMAGES).models


def optimised(model, path):
    """What ONNX Runtime makes of a stage: how many nodes of each kind."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_shortcut_from_the_features_is_added_within_the_convolutions(residual, tmp_path):
    before, after = residual[1], kept_blocked(residual[1])
    plain, blocked = optimised(before, tmp_path / "before.onnx"), optimised(after, tmp_path / "after.onnx")
    if "ReorderInput" not in plain:
        pytest.skip("this processor's ONNX Runtime has no blocked layout")
    assert plain.count("Add") == 2  # one for each block
    assert blocked.count("Add") == 0
    assert blocked.count("ReorderInput") == 1


def test_the_answers_stay(residual):
    found = []
    for models in (residual, [kept_blocked(model) for model in residual]):
        stages = OnnxStages([model.model.SerializeToString() for model in models], [0, 1], {"threshold": 0.5})
        values = stages.run(0, {"inputs": IMAGES.numpy()}).values
        found.append(stages.run(1, values).logits)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


class Pooled(Straight):
    def forward(self, x):
        return super().forward(nn.functional.max_pool2d(x, 2))


@pytest.mark.parametrize("block", [Straight, Pooled])
def test_a_stage_is_not_changed_where_convolutions_or_poolings_alone_read_the_features(block):
    straight = convert(attached(block), sd.Confidence(0.5), IMAGES).models
    assert [kept_blocked(model) for model in straight] == straight


def test_the_given_model_stays_as_it_was(residual):
    before = residual[1].model.SerializeToString()
    assert kept_blocked(residual[1]).model.graph.node[0].name == BLOCKED
    assert residual[1].model.SerializeToString() == before


def test_an_exported_folder_has_it(tmp_path):
    sd.export(attached(Shortcut), sd.Confidence(0.5), tmp_path / "out", example_inputs=IMAGES)
    _, second = sorted((tmp_path / "out").glob("stage*.onnx"))
    assert [node.name for node in onnx.load(second).graph.node if node.op_type == "MaxPool"] == [BLOCKED]
