"""What an engine is compared to: the network without exits, bare and in one graph, each as it is fastest."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import shallowdeep as sd
from shallowdeep.inference import torch_stages
from shallowdeep.inference.cascade import Cascade
from shallowdeep.inference.runner.sessions import Settings
from shallowdeep.inference.runner.stages import OnnxStages
from shallowdeep.inference.timing import lanes
from shallowdeep.inference.timing.bare import bare_compiled, bare_onnx
from shallowdeep.inference.timing.bench import measure_speed
from shallowdeep.inference.timing.lanes import Workshop
from shallowdeep.inference.timing.speed import (
    ALL_EXITS,
    BARE,
    EXITS,
    IN_PARTS,
    NOBODY,
    PLAIN,
    STAGES,
    WHOLE_BATCH,
    SpeedReport,
    Timing,
)
from shallowdeep.inference.timing.whole import in_one_piece


def workshop(small, images, trace, policy, batch_sizes, **options):
    return Workshop(small, {"fp32": policy}, images[:4], trace, options, None, batch_sizes)


@pytest.fixture
def built(monkeypatch):
    """Builds lanes without the slow one, which has tests of its own."""
    monkeypatch.setattr(lanes, "OneAtATime", lambda *args: lambda inputs: None)

    def build(one, *backends):
        one.build(backends, ("fp32",), smaller=False, progress=False)
        assert one.left_out == []
        return {lane.variant: lane for lane in one.lanes if lane.backend == backends[0]}

    return build


def test_the_network_without_exits_runs_whole_batches_and_parts(monkeypatch, built, small, images, trace):
    found = built(workshop(small, images, trace, sd.Confidence(0.5), (8, 40)), "eager")
    run, rows = torch_stages.PlainStage.run, []

    def counted(self, stage, values):
        rows.append(len(values["inputs"]))
        return run(self, stage, values)

    monkeypatch.setattr(torch_stages.PlainStage, "run", counted)
    for variant, expected in ((WHOLE_BATCH, [40]), (IN_PARTS, [32, 8])):
        answers = found[variant].run(images)
        np.testing.assert_array_equal(answers.labels, trace.predictions[:, -1].numpy())
        assert rows == expected
        rows.clear()


def test_plain_is_the_faster_of_the_two_at_each_batch_size(built, small, images, trace):
    labels = trace.predictions[:, -1]
    report = measure_speed(
        small, sd.Confidence(0.5), images, labels, batch_sizes=(8, 40), backends=("eager",), rounds=2, smaller=False
    )
    at = {size: {t.variant: t.latencies_ms for t in report.timings if t.batch_size == size} for size in (8, 40)}
    assert IN_PARTS not in at[8]
    assert at[8][PLAIN] == at[8][WHOLE_BATCH]
    medians = {variant: np.median(at[40][variant]) for variant in (PLAIN, WHOLE_BATCH, IN_PARTS)}
    assert medians[PLAIN] == min(medians[WHOLE_BATCH], medians[IN_PARTS])
    assert {t.device for t in report.timings} == {"cpu"}


@pytest.mark.parametrize("backend", ["plain", "stages"])
def test_the_whole_network_in_one_piece_gives_all_logits(small, images, trace, backend):
    for exits in ([0, 1, 2, 3], [1, 3]):
        net = in_one_piece(small, exits)
        driver, values = sd.Engine(net, sd.Confidence(2.0, exits=()), backend=backend).ready(images)
        (found,) = driver.logits(values)
        expected = torch.cat([trace.logits[exit] for exit in exits], dim=1)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_all_exits_are_computed_in_one_graph_without_the_policy(built, small, images, trace):
    class Counting(sd.Confidence):
        steps = 0

        def step(self, state, logits, exit):
            Counting.steps += 1
            return super().step(state, logits, exit)

    found = built(workshop(small, images, trace, Counting(0.5), (8,)), "eager")
    Counting.steps = 0
    assert found[ALL_EXITS].run(images[:8]) is None
    assert Counting.steps == 0
    found[NOBODY].run(images[:8])
    assert Counting.steps == 4


def test_ratios_against_the_whole_network():
    taken = {EXITS: 1.0, PLAIN: 2.0, BARE: 4.0, STAGES: 5.0, ALL_EXITS: 10.0, NOBODY: 20.0}
    timings = tuple(Timing(8, "onnx", "fp32", name, (ms,), device="cpu") for name, ms in taken.items())
    report = SpeedReport(timings, (), {}, (1.0,), (1.0,), 1, 1, "cpu", {})
    (row,), (bounds,) = report.rows(), report.bound_rows()
    assert (row["of plain"].median, row["of bare"].median, row["device"]) == (0.5, 0.25, "cpu")
    assert (bounds["stages / all exits"].median, bounds["nobody / all exits"].median) == (0.5, 2.0)


def test_bare_onnx_runtime_takes_the_whole_batch_in_one_call(monkeypatch, small, images, trace):
    pytest.importorskip("onnxruntime")
    opened = []
    real = Settings.open

    def open_(self, model, name):
        session, calls = real(self, model, name), []
        opened.append((self, calls))
        return SimpleNamespace(run=lambda names, feeds: calls.append(feeds) or session.run(names, feeds))

    monkeypatch.setattr(Settings, "open", open_)
    found = bare_onnx(small, "fp32", images[:4], {"threads": 1}, None)(images)
    np.testing.assert_allclose(found, trace.logits[-1].numpy(), atol=1e-4)
    ((settings, calls),) = opened
    assert (settings.spinning, settings.threads) == (True, 1)  # ONNX Runtime's own default
    assert [feeds["inputs"].shape[0] for feeds in calls] == [40]


def test_the_bare_compiler_is_called_once_for_each_size(monkeypatch, small, images, trace):
    rows = []

    def compile(net, **options):
        assert options == {"dynamic": False}
        net.register_forward_pre_hook(lambda net, args: rows.append(len(args[0])))
        return net

    monkeypatch.setattr(torch, "compile", compile)
    run = bare_compiled(small, "fp32", images[:4], (1, 8))
    assert rows == [1, 8]
    torch.testing.assert_close(run(images), trace.logits[-1])
    assert rows == [1, 8, 40]


@pytest.mark.slow
def test_torch_compile_answers_like_the_network(small, images, trace):
    torch.testing.assert_close(bare_compiled(small, "fp32", images[:4], (8,))(images[:8]), trace.logits[-1][:8])


@pytest.mark.parametrize(
    ("provider", "device"),
    [("CPUExecutionProvider", "cpu"), ("CUDAExecutionProvider", "cuda"), ("OtherProvider", "OtherProvider")],
)
def test_a_lane_says_what_it_runs_on(small, images, trace, provider, device):
    one = workshop(small, images, trace, sd.Confidence(0.5), (8,), openvino={"device": "GPU"})
    stages = OnnxStages.__new__(OnnxStages)
    stages.exits = [0]
    stages.sessions = [SimpleNamespace(get_providers=lambda: [provider, "CPUExecutionProvider"])]
    cascade: Any = Cascade(stages, [1.0])
    assert one._place(cascade, "onnx") == device
    other, _ = sd.Engine(small, sd.Confidence(0.5), example_inputs=images[:2]).ready(images[:2])
    assert one._place(other, "openvino") == "gpu"
    assert one._place(other, "eager") == "cpu"
