"""Compiled stages: the decisions of a replay, one compilation for each stage and size, and plain errors."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from shallowdeep.errors import ConfigError, NetworkError
from shallowdeep.inference import compiled
from shallowdeep.inference.compiled import CompiledStages, _laid_out, _taken, sizes_up_to
from shallowdeep.inference.engine import Engine
from shallowdeep.inference.stages import cut
from shallowdeep.networks.attach import attach
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence, Patience
from shallowdeep.traces.record import record

SIZES = (2, 8)


class Convolutions(nn.Module):
    """Three convolutions with batch-norm, two of them with a site behind."""

    def __init__(self, width=4):
        super().__init__()
        widths = [1, width, width, width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in pairwise(widths)
            )
        )
        self.classify = nn.Linear(width, 3)

    def forward(self, x):
        return self.classify(self.layers(x).mean((2, 3)))


@pytest.fixture(scope="module")
def sdn():
    torch.manual_seed(0)
    found = attach(Convolutions(), torch.zeros(2, 1, 8, 8), taps=["layers.0", "layers.1"]).eval()
    with torch.no_grad():
        for module in found.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.Linear):
                module.weight.mul_(4)
    return found


@pytest.fixture(scope="module")
def parts():
    """What was exported: it takes a second each time."""
    return {}


@pytest.fixture(autouse=True)
def exported_once(sdn, parts, monkeypatch):
    original = compiled.cut

    def cut_once(network, example_inputs, *, exits):
        if network is not sdn:
            return original(network, example_inputs, exits=exits)
        if tuple(exits) not in parts:
            parts[tuple(exits)] = original(network, example_inputs, exits=exits)
        return parts[tuple(exits)]

    monkeypatch.setattr(compiled, "cut", cut_once)


@pytest.fixture(scope="module")
def images():
    return torch.randn(21, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def middle(sdn, images):
    """A threshold that about half of the samples reach at the first exit, far from each of them."""
    with torch.no_grad():
        found = sdn(images)[0].softmax(-1).amax(-1).sort().values
    return float(found[10] + found[11]) / 2


def check_equal(answers, decisions):
    np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
    np.testing.assert_array_equal(answers.labels, decisions.predictions.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["confidence", "patience"])
def test_decisions_are_those_of_a_replay(sdn, images, rule):
    threshold = middle(sdn, images)
    policy = Patience(1) if rule == "patience" else Confidence(threshold, answer="most_confident")
    engine = Engine(sdn, policy, backend="compiled", sizes=SIZES)
    answers = engine(images)
    assert len(set(answers.exits)) > 1
    check_equal(answers, replay(record(sdn, [images]), policy))
    check_equal(answers, replay(engine.record([images]), policy))
    alone = [engine(images[i : i + 1]) for i in range(4)]
    assert [int(one.exits[0]) for one in alone] == answers.exits[:4].tolist()


@pytest.mark.slow
def test_a_measured_engine_answers_alike_and_measures_its_own_sizes(sdn, images):
    policy = Confidence(middle(sdn, images))
    engine = Engine(sdn, policy, backend="compiled", sizes=SIZES)
    assert engine.measure(images, [1, 2, 5, 64], repeats=1).sizes == SIZES
    check_equal(engine(images), replay(record(sdn, [images]), policy))


@pytest.mark.slow
def test_bf16_is_that_of_its_own_trace_and_leaves_the_network_alone(sdn, images):
    before = {name: tensor.clone() for name, tensor in sdn.state_dict().items()}
    policy = Confidence(middle(sdn, images))
    engine = Engine(sdn, policy, backend="compiled", precision="bf16", sizes=(8,))
    trace, exact = engine.record([images]), record(sdn, [images])
    check_equal(engine(images), replay(trace, policy))
    assert trace.info.precision == "bf16"
    differences = [float((a - b).abs().max()) for a, b in zip(trace.logits, exact.logits, strict=True)]
    assert 0 < max(differences) < 0.1  # bfloat16 has eight bits: other than float32, and not far from it
    after = sdn.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


@pytest.mark.slow
def test_two_threads_compile_once_and_answer_alike(sdn, images, monkeypatch):
    made, original = [], compiled._compiled

    def counted(module, inputs, name):
        made.append((name, len(inputs[0])))
        return original(module, inputs, name)

    monkeypatch.setattr(compiled, "_compiled", counted)
    policy = Confidence(middle(sdn, images))
    engine = Engine(sdn, policy, backend="compiled", sizes=(8,), example_inputs=images)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine, [images] * 4))
    assert sorted(made) == [("exit 0", 8), ("exit 1", 8), ("exit 2", 8)]
    for answers in found:
        check_equal(answers, replay(record(sdn, [images]), policy))


@pytest.mark.slow
def test_more_sizes_than_the_compilers_own_limit_are_all_compiled(sdn, images, monkeypatch):
    made, original = [], compiled._compiled

    def counted(module, inputs, name):
        made.append(len(inputs[0]))
        return original(module, inputs, name)

    monkeypatch.setattr(compiled, "_compiled", counted)
    sizes = tuple(range(1, 11))  # Dynamo stops at eight
    engine = Engine(sdn, Confidence(1.5, exits=()), backend="compiled", sizes=sizes, example_inputs=images)
    plain = record(sdn, [images]).logits[-1].softmax(-1).numpy()
    for size in sizes:
        np.testing.assert_allclose(engine(images[:size]).scores, plain[:size], atol=1e-5)
    assert made == list(sizes)


@pytest.mark.slow
def test_weights_are_frozen_into_what_is_compiled(sdn, images):
    copied = copy.deepcopy(sdn)
    engine = Engine(copied, Confidence(1.5, exits=()), backend="compiled", sizes=(4,))
    before = engine(images[:4])
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(engine(images[:4]).scores, before.scores)
    assert not torch._inductor.config.freezing


def test_what_does_not_compile_is_one_error(sdn, images, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("C++ compile error\n" + 100 * "long\n")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    engine = Engine(sdn, Confidence(0.9), backend="compiled", sizes=SIZES)
    with pytest.raises(NetworkError, match=r"up to exit 0 does not compile for 2 rows: C\+\+ compile error\. Use"):
        engine(images[:1])


NO_COMPILER = """
import torch
from torch import nn
from shallowdeep import Confidence, Engine, attach
from shallowdeep.errors import ConfigError
x = torch.zeros(1, 1, 8, 8)
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
sdn = attach(net, x, taps=["0"])
try:
    Engine(sdn, Confidence(0.9), backend="compiled", example_inputs=x)
except ConfigError as error:
    print(error)
"""


def test_without_a_c_plus_plus_compiler_it_says_so():
    found = subprocess.run(
        [sys.executable, "-c", NO_COMPILER],
        env={**os.environ, "CXX": "/no/such/compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith("backend='compiled' needs a C++ compiler (No working C++ compiler")
    assert "/no/such/compiler" in found.stdout
    assert "CXX" in found.stdout


@pytest.mark.parametrize("sizes", [(), (8, 2), (0, 4), (2, 2), (1.5,), 8, (True, 2)])
def test_sizes_that_are_none(sdn, sizes):
    with pytest.raises(ConfigError, match="sizes are whole numbers of rows, rising"):
        Engine(sdn, Confidence(0.9), backend="compiled", sizes=sizes, example_inputs=torch.zeros(1, 1, 8, 8))


def test_unknown_options_are_refused(sdn):
    with pytest.raises(ConfigError, match="does not know size: its options are sizes, progress"):
        Engine(sdn, Confidence(0.9), backend="compiled", size=8, example_inputs=torch.zeros(1, 1, 8, 8))


def test_sizes_go_up_to_the_micro_batch(sdn, images):
    def prepared(**settings):
        return Engine(sdn, Confidence(0.9), backend="compiled", example_inputs=images, **settings)

    assert prepared().micro_batch == 32
    assert prepared(sizes=(1, 8)).micro_batch == 8
    assert prepared(micro_batch=4, sizes=(1, 8)).micro_batch == 4
    engine = prepared(micro_batch=48)
    assert engine.micro_batch == 48
    assert engine._driver.stages.sizes == [1, 2, 4, 8, 16, 24, 32, 48]
    assert sizes_up_to(1) == [1]


def test_channels_stay_last_when_rows_are_taken(sdn, images):
    stages = CompiledStages(cut(sdn, images), Confidence(0.9), 3, sizes=SIZES)
    maps = torch.randn(5, 4, 8, 8)
    values = {"features": _laid_out(maps), "state_0": torch.arange(5)}
    found = stages.take(values, np.array([3, 1, 1]))
    assert torch.equal(found["features"], maps[[3, 1, 1]])
    assert found["features"].is_contiguous(memory_format=torch.channels_last)
    assert found["state_0"].tolist() == [3, 1, 1]
    assert torch.equal(_taken(torch.eye(3), torch.tensor([2])), torch.eye(3)[2:])
