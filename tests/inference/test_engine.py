"""Engines against the replay of a Trace: the same decisions, whatever runs the network."""

import copy
import itertools
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import shallowdeep as sd
from shallowdeep.errors import ConfigError, DataError, NetworkError, UnknownName
from shallowdeep.inference import torch_stages
from shallowdeep.inference.backends import BACKENDS as BACKENDS_BY_NAME
from shallowdeep.inference.backends import Order
from shallowdeep.inference.onnx import onnxruntime as onnx_back_end
from shallowdeep.inference.onnx.onnxruntime import build_onnx, provider_for
from shallowdeep.inference.onnx.openvino import device_for
from shallowdeep.inference.runner.sessions import RunnerError
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.policies.rules import Verdict

BACKENDS = ["eager", "stages"]


@pytest.fixture(scope="module", autouse=True)
def cutting_once():
    """Engines share no stage's weights, so that one export of a network serves all policies here."""
    original, kept = torch_stages.cut, {}

    def cut(sdn, example_inputs, *, exits):
        key = (sdn, tuple(exits))
        if key not in kept:
            kept[key] = original(sdn, example_inputs, exits=exits)
        return kept[key]

    torch_stages.cut = cut
    yield
    torch_stages.cut = original


@pytest.fixture(scope="module")
def engine_for(small, images):
    """Engines by back end and policy, each exported once."""
    made = {}

    def make(backend, policy, **options):
        key = (backend, repr(policy), repr(options))
        if key not in made:
            made[key] = sd.Engine(small, policy, backend=backend, example_inputs=images, **options)
        return made[key]

    return make


def assert_decides_like(answers, decisions):
    np.testing.assert_array_equal(answers.exits, decisions.exits.numpy())
    np.testing.assert_allclose(answers.scores, decisions.scores.numpy(), atol=1e-5)
    np.testing.assert_array_equal(answers.labels, decisions.predictions.numpy())
    np.testing.assert_allclose(answers.confidences, decisions.scores.numpy().max(1), atol=1e-5)
    np.testing.assert_allclose(answers.costs, decisions.costs.numpy())


def test_samples_part_ways(request, trace, policy):
    """What the other tests here rest on."""
    used = sum(share > 0 for share in sd.replay(trace, policy).exit_shares)
    expected = {"confidence": 4, "most confident": 4, "some exits": 3, "patience": 2}
    assert used == expected.get(request.node.callspec.params["policy"], 1)


@pytest.mark.parametrize("micro_batch", [None, 7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_decides_like_replay(engine_for, images, trace, policy, backend, micro_batch):
    engine = engine_for(backend, policy, micro_batch=micro_batch)
    assert_decides_like(engine(images), sd.replay(trace, policy))


@pytest.mark.parametrize("backend", ["eager", "stages", "plain"])
def test_a_cpu_runs_32_rows_at_a_time_unless_asked_otherwise(small, images, backend):
    def rows(**given: int) -> int | None:
        engine = sd.Engine(small, sd.Confidence(0.6), backend=backend, example_inputs=images, **given)
        engine(images)
        return engine.micro_batch

    assert rows() == 32
    assert rows(micro_batch=80) == 80


def test_elsewhere_all_rows_run_together(small, images):
    elsewhere = copy.deepcopy(small).to("meta")
    assert Order(elsewhere, sd.Confidence(0.6), "fp32", images).rows is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sample_is_answered_as_in_a_batch(engine_for, images, trace, backend):
    policy = sd.Confidence(0.6)
    engine, decisions = engine_for(backend, policy), sd.replay(trace, policy)
    assert [engine(images[i : i + 1]).exits[0] for i in range(12)] == decisions.exits[:12].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_answers_what_a_call_answers(engine_for, images, trace, policy, backend):
    engine = engine_for(backend, policy)
    parts = list(engine.stream(images.split(16)))
    merged = {
        int(i): (int(e), int(label))
        for part in parts
        for i, e, label in zip(part.ids, part.exits, part.labels, strict=True)
    }
    decisions = sd.replay(trace, policy)
    assert merged == dict(enumerate(zip(decisions.exits.tolist(), decisions.predictions.tolist(), strict=True)))
    assert sum(map(len, parts)) == len(images)


def test_a_refilled_stream_answers_the_same(small, images, trace, policy):
    engine = sd.Engine(small, policy, backend="stages", micro_batch=16)
    parts = list(engine.stream(images.split(5), refill=True))
    order = np.argsort(np.concatenate([part.ids for part in parts]))
    exits = np.concatenate([part.exits for part in parts])[order]
    assert exits.tolist() == sd.replay(trace, policy).exits.tolist()


def test_an_eager_stream_cannot_refill(small, images):
    with pytest.raises(ConfigError, match="refill takes stages"):
        list(sd.Engine(small, sd.Confidence(0.6)).stream([images], refill=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_anytime_gives_the_best_so_far_and_ends_at_the_answers(engine_for, images, trace, policy, backend):
    engine = engine_for(backend, policy)
    found = list(engine.anytime(images))
    assert_decides_like(found[-1], sd.replay(trace, policy))
    assert all(len(answers) == len(images) for answers in found)
    assert len(found) == len(set(found[-1].exits.tolist()) | {e for e in engine.exits if e <= found[-1].exits.max()})
    for before, after in itertools.pairwise(found):
        gone = before.exits != after.exits.max()
        left = np.isin(np.arange(len(images)), np.flatnonzero(after.exits == before.exits))
        np.testing.assert_array_equal(after.scores[left & gone], before.scores[left & gone])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_latency_table_changes_no_answer(engine_for, images, trace, policy, backend):
    engine = engine_for(backend, policy)
    latency = engine.measure(images[:3], [1, 8], repeats=1)
    assert engine.latency == latency
    assert len(latency.run_ms) == len(engine.exits)
    assert_decides_like(engine(images), sd.replay(trace, policy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_rows_are_not_computed(engine_for, images, backend):
    """The last block sees only the samples that get there."""
    engine = engine_for(backend, sd.Confidence(0.0), micro_batch=len(images))
    with SeeingRows() as seen:
        engine(images)
    assert seen.rows == [len(images)]  # the stem's, and no block's


class SeeingRows(torch.utils._python_dispatch.TorchDispatchMode):
    """Writes down the rows of every convolution."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default):
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_plain_answers_with_the_last_exit(small, images, trace):
    answers = sd.Engine(small, sd.Confidence(0.0), backend="plain", micro_batch=16)(images)
    np.testing.assert_allclose(answers.scores, trace.logits[-1].softmax(-1).numpy(), atol=1e-6)
    assert set(answers.exits.tolist()) == {3}
    assert set(answers.costs.tolist()) == {1.0}  # no exit is run


# What it leaves behind


@pytest.mark.parametrize("backend", [*BACKENDS, "plain"])
def test_the_network_stays_as_it_was(small, images, backend, engine_for):
    small.train()
    small.exits.eval()
    modes = [module.training for module in small.modules()]
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    engine = engine_for(backend, sd.Confidence(0.6))
    engine(images)
    assert next(iter(engine.stream([images]))) is not None
    engine.record([images])
    assert [module.training for module in small.modules()] == modes
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    small.eval()


def test_hooks_are_gone_after_an_error(small, images):
    broken = ShallowDeepNetwork(
        nn.Sequential(*[Twice(), Failing()]),
        [Head()],
        small.placements[:1],
        small.costs.select([0, 3]),
        label_spaces={"": 5},
    )
    broken.placements = (
        small.placements[0].__class__(None, 0.5, small.placements[0].site.__class__("0", (3,), 1, True, "")),
    )
    engine = sd.Engine(broken, sd.Confidence(1.0))
    with pytest.raises(ValueError, match="on purpose"):
        engine(torch.zeros(2, 3))
    assert not any(module._forward_hooks for module in broken.modules())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return 2 * x * self.weight


class Failing(nn.Module):
    def forward(self, x):
        raise ValueError("on purpose")


class Head(nn.Module):
    def forward(self, x):
        return x.new_zeros(len(x), 5)


# Threads


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_get_the_answers_of_one(engine_for, images, trace, backend):
    policy = sd.Confidence(0.6)
    engine, decisions = engine_for(backend, policy), sd.replay(trace, policy)
    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(engine, [images] * 8):
            assert_decides_like(answers, decisions)


def test_an_abandoned_stream_ends_its_thread(small, images):
    read = []

    def batches():
        for number in range(1000):
            read.append(number)
            yield images

    slow = copy.deepcopy(small)
    slow.backbone.second.register_forward_pre_hook(lambda *_: time.sleep(0.5))  # behind the first that leave
    before = set(threading.enumerate())
    stream = sd.Engine(slow, sd.Confidence(0.6)).stream(batches())
    next(stream)
    begun = set(threading.enumerate()) - before
    assert len(begun) == 1
    stream.close()
    count = len(read)
    assert count < 1000
    assert not begun & set(threading.enumerate())  # close waits for its end
    time.sleep(0.05)
    assert len(read) == count


def test_a_stream_that_nothing_comes_from_can_be_left(small, images):
    frames = queue.SimpleQueue()
    frames.put(images)
    stream = sd.Engine(small, sd.Confidence(0.6)).stream(iter(frames.get, None))
    next(stream)
    stream.close()  # the source would block for ever


def test_while_a_stream_waits_others_may_run_the_network(small, images, trace):
    engine = sd.Engine(small, sd.Confidence(0.6))
    stream = engine.stream([images[:20], images[20:]])
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        assert_decides_like(pool.submit(engine, images).result(timeout=60), sd.replay(trace, engine.policy))
    assert sum(len(part) for part in stream) > 0


def test_an_error_while_streaming_reaches_whoever_reads(small, images):
    def batches():
        yield images
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="the camera is gone"):
        list(sd.Engine(small, sd.Confidence(0.6)).stream(batches()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_autocast_changes_no_answer(small, images, trace, backend):
    policy = sd.Confidence(0.55)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = sd.Engine(copy.deepcopy(small), policy, backend=backend)(images)
    assert_decides_like(answers, sd.replay(trace, policy))


@pytest.mark.parametrize("backend", ["stages"])
def test_an_exported_engine_keeps_its_weights(small, images, backend):
    changed = copy.deepcopy(small)
    engine = sd.Engine(changed, sd.Confidence(0.6), backend=backend, example_inputs=images)
    before = engine(images)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(2)
    np.testing.assert_array_equal(engine(images).scores, before.scores)


def test_a_thread_inside_taps_and_an_engine_do_not_wait_for_each_other(small, images):
    """One lock for the network and its backbone."""
    engine = sd.Engine(small, sd.Confidence(0.6), example_inputs=images)
    inside, go_on = threading.Event(), threading.Event()

    def train():
        with small.tapped():
            inside.set()
            go_on.wait(30)
            return len(engine(images))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(train)
        inside.wait(30)
        second = pool.submit(engine, images)
        time.sleep(0.2)
        go_on.set()
        assert (first.result(timeout=60), len(second.result(timeout=60))) == (len(images), len(images))


def test_a_tapped_module_that_does_not_run_is_an_error(small, images):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.skip = nn.Linear(6, 6), nn.Linear(6, 3), False

        def forward(self, x):
            return self.last(x if self.skip else self.first(x))

    net = Skipping()
    engine = sd.Engine(sd.attach(net, torch.randn(2, 6), taps=["first"]), sd.Confidence(0.9))
    assert len(engine(torch.randn(3, 6))) == 3
    net.skip = True
    with pytest.raises(NetworkError, match="1 of the 1 tapped modules did not run"):
        engine(torch.randn(3, 6))


# What it refuses


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:0], "holds no sample"),
        (lambda x: x[:, :2], r"must be of shape \(n, 3, 16, 16\) and torch.float32, got \(40, 2, 16, 16\)"),
        (lambda x: x.double(), "got .* and torch.float64"),
        (lambda x: x[0], r"got \(3, 16, 16\)"),
        (
            lambda x: torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 7, torch.nan, x),
            "not finite, first in row 7",
        ),
        (lambda x: {"pixels": x}, "the network takes inputs; got pixels"),
        (lambda x: [x, "a cat"], "takes tensors only; input_1 is none"),
        (lambda x: x.numpy(), r"got an array of numpy: pass torch\.from_numpy\(inputs\)"),
    ],
)
def test_bad_inputs_are_refused(engine_for, images, backend, change, message):
    engine = engine_for(backend, sd.Confidence(0.6))
    with pytest.raises(sd.ShallowDeepError, match=message):
        engine(change(images))
    assert len(engine(images)) == len(images)


def test_the_first_call_is_checked_too(small, images):
    with pytest.raises(DataError, match="holds no sample"):
        sd.Engine(small, sd.Confidence(0.6))(images[:0])
    with pytest.raises(sd.ShallowDeepError, match="does not take"):
        sd.Engine(small, sd.Confidence(0.6))(images[:, :2])
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    sdn = sd.attach(net, images, taps=["1"])
    with pytest.raises(sd.ShallowDeepError, match="does not take"):  # its exit: the rest takes images of any size
        sd.Engine(sdn, sd.Confidence(0.6))(images[..., :8, :8])


def test_an_empty_stream_gives_nothing(small):
    assert list(sd.Engine(small, sd.Confidence(0.6)).stream([])) == []


def test_options_are_checked_when_the_engine_is_made(small):
    with pytest.raises(UnknownName, match="Did you mean 'eager'"):
        sd.Engine(small, sd.Confidence(0.6), backend="eeger")
    with pytest.raises(UnknownName, match="no precision 'fp16'"):
        sd.Engine(small, sd.Confidence(0.6), precision="fp16")
    with pytest.raises(ConfigError, match="runs in fp32, bf16, not in 'int8'"):
        sd.Engine(small, sd.Confidence(0.6), precision="int8")
    with pytest.raises(ConfigError, match="micro_batch=0"):
        sd.Engine(small, sd.Confidence(0.6), micro_batch=0)
    with pytest.raises(ConfigError, match=r"these are torch.bfloat16 as well"):
        sd.Engine(copy.deepcopy(small).bfloat16(), sd.Confidence(0.6))
    with pytest.raises(ConfigError, match=r"exits \[0, 9\]"):
        sd.Engine(small, sd.Confidence(0.6, exits=(0, 9)))
    with pytest.raises(ConfigError, match="does not know spin: it has no options"):
        sd.Engine(small, sd.Confidence(0.6), spin=True)(torch.zeros(1, 3, 16, 16))


# Many samples


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_thousand_samples_are_answered_in_their_order(backend):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        many = torch.randn(10_000, 4)
        sdn = sd.attach(net, many[:2], taps=["1", "3"]).eval()
    sure = torch.stack([logits.softmax(-1).amax(-1) for logits in sd.record(sdn, [many]).logits[:-1]])
    policy = sd.Confidence(sure.median().item())
    decisions = sd.replay(sd.record(sdn, [many]), policy)
    assert all(share > 0.1 for share in decisions.exit_shares)
    engine = sd.Engine(sdn, policy, backend=backend, micro_batch=1024)
    answers = engine(many)
    assert answers.ids.tolist() == list(range(10_000))
    firm = ((sure - policy.threshold).abs() > 1e-6).all(0).numpy()  # beside rounding
    assert firm.sum() > 9_900
    np.testing.assert_array_equal(answers.exits[firm], decisions.exits.numpy()[firm])
    np.testing.assert_allclose(answers.scores[firm], decisions.scores.numpy()[firm], atol=1e-5)
    parts = list(engine.stream(many.split(3000)))
    ids, exits = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "exits"))
    assert sorted(ids.tolist()) == list(range(10_000))
    np.testing.assert_array_equal(exits[np.argsort(ids)][firm], decisions.exits.numpy()[firm])


# Where it computes


ORT_CPU, ORT_GPU = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("device", "available", "provider"),
    [
        ("cpu", [ORT_CPU], ORT_CPU),
        ("cpu", ["TensorrtExecutionProvider", ORT_GPU, ORT_CPU], ORT_CPU),
        ("cuda", [ORT_GPU, ORT_CPU], (ORT_GPU, {"device_id": 0})),
        ("cuda:3", [ORT_CPU, ORT_GPU], (ORT_GPU, {"device_id": 3})),
    ],
)
def test_onnx_runtime_computes_where_the_network_is(device, available, provider):
    assert provider_for(torch.device(device), available) == provider


def test_onnx_runtime_without_the_networks_device_says_what_is_missing():
    with pytest.raises(
        ConfigError,
        match=r"on cuda:1 needs CUDAExecutionProvider, which comes with onnxruntime-gpu; this onnxruntime has "
        r'CPUExecutionProvider\. Install onnxruntime-gpu .* or compute on the CPU: sdn\.to\("cpu"\)',
    ):
        provider_for(torch.device("cuda:1"), [ORT_CPU])
    with pytest.raises(ConfigError, match=r"on mps needs a provider named by providers=; .*CoreML.*\. Name one, or"):
        provider_for(torch.device("mps"), ["CoreMLExecutionProvider", ORT_CPU])


def test_openvino_computes_where_the_network_is():
    assert device_for(torch.device("cpu"), ["CPU", "GPU"]) == "CPU"
    with pytest.raises(ConfigError, match=r'not compute on cuda:0; OpenVINO has CPU, GPU here\. .*sdn\.to\("cpu"\)'):
        device_for(torch.device("cuda:0"), ["CPU", "GPU"])


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_no_back_end_goes_to_another_device_by_itself(small, images, backend):
    """PyTorch's device without contents stands for a GPU."""
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[backend])
    order = Order(copy.deepcopy(small).to("meta"), sd.Confidence(0.6), "fp32", images)
    with pytest.raises(ConfigError, match=r"on meta.* or compute on the CPU"):
        BACKENDS_BY_NAME[backend].build(order)


@pytest.mark.parametrize(
    ("providers", "asked"),
    [
        (None, (ORT_GPU, {"device_id": 2, "use_tf32": 0})),
        ([ORT_GPU], (ORT_GPU, {"device_id": 2, "use_tf32": 0})),
        ([(ORT_GPU, {"device_id": 1})], (ORT_GPU, {"device_id": 1, "use_tf32": 0})),
        ([ORT_CPU], ORT_CPU),
    ],
)
def test_a_provider_that_was_asked_for_is_taken(small, images, monkeypatch, providers, asked):
    runtime = pytest.importorskip("onnxruntime")
    given = []

    def stages(files, exits, thresholds, settings):
        given.append(settings.numbered)
        raise RunnerError("no GPU here")

    monkeypatch.setattr(runtime, "get_available_providers", lambda: [ORT_GPU, ORT_CPU])
    monkeypatch.setattr(onnx_back_end, "OnnxStages", stages)
    monkeypatch.setattr(onnx_back_end, "models_for", lambda order, *_: ([], order.policy))
    monkeypatch.setattr(Order, "device", torch.device("cuda:2"))
    options = {} if providers is None else {"providers": providers}
    with pytest.raises(ConfigError, match="no GPU here"):
        build_onnx(Order(small, sd.Confidence(0.6), "fp32", images, options=options))
    assert given == [[asked]]


# Recording by the engine itself


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_decides_like_the_replay_of_its_own_trace(engine_for, images, backend, precision):
    policy = sd.Confidence(0.6)
    engine = engine_for(backend, policy, precision=precision)
    own = engine.record([images], split="val")
    assert (own.info.precision, own.info.split, own.num_exits) == (precision, "val", 4)
    assert_decides_like(engine(images), sd.replay(own, policy))


def test_bf16_is_bf16(small, images, trace):
    own = sd.Engine(small, sd.Confidence(0.6), precision="bf16").record([images])
    error = (own.logits[0] - trace.logits[0]).abs().max() / trace.logits[0].abs().max()
    assert 1e-4 < error < 5e-2
    assert next(small.parameters()).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recorded_engine_keeps_labels_ids_and_every_exits_number(engine_for, small, images, trace, backend):
    labels = torch.arange(len(images)) % 5
    policy = sd.Confidence(0.6, exits=(1,))
    engine = engine_for(backend, policy)
    own = engine.record(sd.TensorSet(images, labels, num_classes=5), batch_size=16)
    assert torch.equal(own.labels, labels)
    assert own.costs == small.costs
    for found, expected in zip(own.logits, trace.logits, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert_decides_like(engine(images), sd.replay(own, policy))
    assert sd.calibrate(own, min_agreement=0.5, exits=(0, 2)).exits == (0, 2)


def test_an_engine_that_nobody_leaves_records_the_last_exit(small, images, trace):
    own = sd.Engine(small, sd.Confidence(0.6), backend="plain").record([images])
    torch.testing.assert_close(own.logits[0], trace.logits[3])
    assert own.costs == small.costs.select([3])


class Own:
    """A policy of a user's own, no dataclass: whoever is sure twice in a row leaves."""

    kind = "own"

    def __init__(self, exits=None):
        self.exits = exits

    def start(self, rows, num_outputs):
        return (torch.zeros(rows, dtype=torch.bool),)

    def step(self, state, logits, exit):
        sure = logits.softmax(-1).amax(-1) > 0.5
        return Verdict(sure & state[0], (sure,), logits.softmax(-1))

    def to_dict(self):
        return {"kind": self.kind}


@pytest.mark.parametrize("exits", [None, (0, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_of_ones_own_is_recorded_and_replayed(small, images, backend, exits):
    engine = sd.Engine(small, Own(exits), backend=backend)
    own = engine.record([images])
    decisions = sd.replay(own, engine.policy)
    assert own.num_exits == 4
    assert len(decisions.exits.unique()) > 1
    assert_decides_like(engine(images), decisions)


@pytest.mark.parametrize(("given", "message"), [({"repeats": 0}, "repeats=0"), ({"sizes": [4, 0]}, r"sizes=\[4, 0\]")])
def test_what_is_measured_is_at_least_one(small, images, given, message):
    with pytest.raises(ConfigError, match=f"at least 1, got .*{message}"):
        sd.Engine(small, sd.Confidence(0.6)).measure(images, **given)


# Networks that take several inputs


@pytest.mark.slow
def test_a_text_network_drops_the_rows_of_its_mask(text_network):
    sdn, inputs = text_network
    recorded = sd.record(sdn, [inputs])
    policy = sd.Confidence(recorded.logits[0].softmax(-1).amax(-1).quantile(0.6).item())
    decisions = sd.replay(recorded, policy)
    assert all(share > 0 for share in decisions.exit_shares)  # rows are dropped twice
    for backend in BACKENDS:
        assert_decides_like(sd.Engine(sdn, policy, backend=backend)(inputs), decisions)
        with pytest.raises(DataError, match="inputs differ in rows"):
            sd.Engine(sdn, policy, backend=backend)({**inputs, "attention_mask": inputs["attention_mask"][:3]})


@pytest.fixture(scope="module")
def text_network():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=4
    )
    net = transformers.BertForSequenceClassification(config).eval()
    tokens = torch.randint(1, 50, (12, 9), generator=torch.Generator().manual_seed(2))
    lengths = torch.arange(12) % 6 + 4
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(9) < lengths[:, None]).long()}
    sdn = sd.attach(net, inputs, taps=["bert.encoder.layer.0", "bert.encoder.layer.1"])
    for head in sdn.exits:
        with torch.no_grad():
            list(head.modules())[-1].weight.mul_(4)  # confidences that lie apart
    return sdn, inputs
