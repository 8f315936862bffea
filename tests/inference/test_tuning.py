"""Tuning: the fastest is kept, the precision never changes, and what cannot run is named with its reason."""

import copy
import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from shallowdeep.errors import ConfigError, DataError, MissingExtra, NetworkError, UnknownName
from shallowdeep.inference import compiled, torch_stages
from shallowdeep.inference.engine import Engine
from shallowdeep.inference.latency import Latency
from shallowdeep.inference.tuning import task as tuning_task
from shallowdeep.inference.tuning import tune
from shallowdeep.inference.tuning.result import TunedWay, Tuning
from shallowdeep.inference.tuning.task import make_task, planned
from shallowdeep.networks.attach import attach
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence
from shallowdeep.traces.record import record

TORCH = ("eager", "stages")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHALLOWDEEP_CACHE", str(tmp_path))
    return tmp_path / "tuning"


@pytest.fixture(scope="module")
def sdn():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    found = attach(nn.Sequential(*layers), torch.zeros(2, 1, 8, 8), taps=["1", "3"]).eval()
    with torch.no_grad():
        found.exits[0].linear.weight.mul_(4)
    return found


@pytest.fixture(scope="module")
def parts():
    """What was exported: it takes a second each time."""
    return {}


@pytest.fixture(autouse=True)
def exported_once(sdn, parts, monkeypatch):
    original = torch_stages.cut

    def cut_once(network, example_inputs, *, exits):
        if network is not sdn:
            return original(network, example_inputs, exits=exits)
        if tuple(exits) not in parts:
            parts[tuple(exits)] = original(network, example_inputs, exits=exits)
        return parts[tuple(exits)]

    monkeypatch.setattr(torch_stages, "cut", cut_once)


@pytest.fixture
def images():
    return torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def make(sdn, images, **settings):
    return Engine(sdn, Confidence(0.84), **{"example_inputs": images, **settings})


@pytest.fixture
def takes(monkeypatch):
    """Sets what a lane takes, by a function of it; lanes run all the same."""
    ran, original = [], tune._Lane.run

    def scripted(milliseconds):
        def run(lane):
            original(lane)
            ran.append(lane)
            return float(milliseconds(lane))

        monkeypatch.setattr(tune._Lane, "run", run)
        return ran

    return scripted


@pytest.mark.parametrize(
    ("fastest", "by_table", "micro_batch"),
    [("eager", False, 32), ("eager", True, 40), ("stages", False, 40), ("stages", True, 32)],
)
def test_the_engine_goes_on_with_the_fastest(sdn, images, takes, fastest, by_table, micro_batch):
    wanted = (fastest, by_table, micro_batch)
    takes(lambda lane: 1 if (lane.backend, lane.driver.latency is not None, lane.driver.micro_batch) == wanted else 2)
    engine = make(sdn, images)
    before = engine(images)
    found = engine.tune(40, backends=TORCH, repeats=2)
    assert (found.chosen.backend, found.chosen.by_table, found.chosen.micro_batch) == wanted
    assert (engine.backend, engine.latency is not None, engine.micro_batch) == wanted
    assert found.chosen.ms == 1
    assert len(found.ways) == 8
    after = engine(images)
    assert len(set(before.exits)) > 1
    np.testing.assert_array_equal(before.exits, after.exits)
    np.testing.assert_allclose(before.scores, after.scores, atol=1e-6)


def test_medians_spread_and_ratios_are_those_of_what_was_timed(sdn, images, takes):
    number = iter(range(10**6))

    def milliseconds(lane):
        base = 10 if lane.has_exits else 20 if lane.backend == "plain" else 40
        return base + (100 if next(number) % 7 == 0 else 0)  # the odd slow one counts in no median

    takes(milliseconds)
    found = make(sdn, images).tune(8, backends=["stages"], repeats=9)
    assert [(way.ms, way.plain_ms, way.ratio) for way in found.ways] == [(10.0, 40.0, 0.25)] * 2
    assert found.plain_ms == 20.0
    assert found.chosen.spread_ms < 100
    assert "0.25" in str(found)
    assert "0.50" in str(found)
    assert "do not pay" not in str(found)


def test_it_says_so_where_exits_do_not_pay(sdn, images, takes):
    takes(lambda lane: 3.0 if lane.has_exits else 2.0 if lane.backend == "plain" else 2.5)
    engine = make(sdn, images)
    found = engine.tune(4, backends=TORCH, repeats=1)
    assert str(found).splitlines()[-1] == (
        "exits do not pay here: eager takes 3.00 ms with them, 1.50 times the 2.00 ms of the fastest network without "
        "(plain). tune(allow_plain=True) lets the engine go on without them; the last exit then answers everything."
    )
    assert found.exits_ratio == 1.5
    assert found.chosen.leaves_early
    assert len(set(engine(images).exits)) > 1  # the policy's answers, as nobody allowed others


@pytest.mark.parametrize("fastest", ["plain", "stages"])
def test_it_goes_on_without_exits_where_that_is_faster_and_allowed(sdn, images, takes, fastest):
    milliseconds = {"plain": 2.5, "stages": 2.5, fastest: 2.0}
    ran = takes(lambda lane: 3.0 if lane.has_exits else milliseconds[lane.backend])
    engine = make(sdn, images)
    assert engine.exits == [0, 1, 2]
    found = engine.tune(4, backends=TORCH, repeats=1, allow_plain=True)
    assert (found.chosen.backend, found.chosen.leaves_early, found.chosen.ms) == (fastest, False, 2.0)
    assert (engine.backend, engine.exits, engine.latency) == (fastest, [2], None)
    expected = record(sdn, [images]).logits[-1].softmax(-1)
    np.testing.assert_allclose(engine(images).scores, expected.numpy(), atol=1e-6)
    assert set(engine(images).exits) == {2}
    assert str(found).splitlines()[2].split()[:4] == [fastest, "32", "no", "exits"]
    assert str(found).splitlines()[-1] == (
        "exits do not pay here: eager takes 3.00 ms with them, 1.50 times the 2.00 ms of the fastest network without "
        f"({fastest}). The engine goes on without them: the last exit answers everything."
    )
    ran.clear()
    again = make(sdn, images)
    assert again.tune(4, backends=TORCH, repeats=1, allow_plain=True) == replace(found, from_cache=True)
    assert (ran, again.backend) == ([], fastest)
    np.testing.assert_array_equal(again(images).scores, engine(images).scores)
    assert engine.tune(4, backends=TORCH, repeats=1).chosen.leaves_early  # the policy was not forgotten
    assert len(set(engine(images).exits)) > 1


def test_exits_stay_where_they_are_as_fast(sdn, images, takes):
    takes(lambda lane: 2.0)
    engine = make(sdn, images)
    found = engine.tune(4, backends=TORCH, repeats=1, allow_plain=True)
    assert found.chosen.leaves_early
    assert found.exits_ratio == 1.0
    assert "do not pay" not in str(found)
    assert len(set(engine(images).exits)) > 1


def test_lanes_are_timed_in_turns(sdn, images, takes):
    ran = takes(lambda lane: 1)
    make(sdn, images).tune(4, backends=TORCH, repeats=3)
    lanes = list(dict.fromkeys(map(id, ran)))
    assert len(lanes) == 6
    assert list(map(id, ran[6:])) == lanes * 2 + lanes  # behind the first run, which is not counted


@pytest.mark.parametrize("shares", [list, np.array])
def test_random_inputs_leave_where_the_shares_say(sdn, images, takes, shares, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # to which an array is no sequence
    ran = takes(lambda lane: 1)
    make(sdn, images).tune(10, exit_shares=shares([0.5, 0.0, 0.5]), backends=["eager"], repeats=1)
    left = [lane.driver.answer(lane.rows, plan=lane.plan).exits for lane in ran if lane.has_exits]
    assert len(left) > 0
    assert all(np.bincount(exits, minlength=3).tolist() == [5, 0, 5] for exits in left)


def test_inputs_leave_where_the_policy_says(sdn, images, takes):
    ran = takes(lambda lane: 1)
    engine = make(sdn, images)
    engine.tune(20, inputs=images, backends=TORCH, repeats=1)
    expected = replay(record(sdn, [images[torch.arange(20) % 12]]), engine.policy)
    assert len(set(expected.exits.tolist())) > 1
    for lane in ran:
        if lane.has_exits:
            np.testing.assert_array_equal(lane.driver.answer(lane.rows, plan=lane.plan).exits, expected.exits.numpy())


def test_a_micro_batch_that_was_asked_for_is_kept(sdn, images):
    engine = make(sdn, images, micro_batch=3)
    found = engine.tune(8, backends=TORCH, repeats=1)
    assert {way.micro_batch for way in found.ways} == {3}
    assert engine.micro_batch == 3


def test_shares_become_whole_samples():
    plan = planned([0.25, 0.5, 0.25], [0, 2, 5], 8)
    assert np.unique(plan, return_counts=True)[1].tolist() == [2, 4, 2]
    assert set(plan) == {0, 2, 5}
    assert plan.tolist() != sorted(plan)
    assert planned([0.1, 0.9], [0, 1], 1).tolist() == [1]
    assert sorted(planned([0.1] * 10, range(10), 10)) == list(range(10))  # whose sum is less than 1


@pytest.mark.parametrize("shares", [[], [0.5, 0.5], [0.5, 0.6, 0.2], [1.5, -0.5, 0.0]])
def test_shares_that_do_not_fit_are_refused(sdn, images, shares):
    with pytest.raises(ConfigError, match=r"one share for each of the exits \[0, 1, 2\], together 1"):
        make(sdn, images).tune(4, exit_shares=shares)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch_size": 0}, ConfigError, "at least 1, got 0"),
        ({"repeats": 0}, ConfigError, "at least 1"),
        ({"backends": ["egaer"]}, UnknownName, "Did you mean 'eager'"),
        ({"backends": ["plain"]}, UnknownName, "no back end with exits 'plain'"),
        ({"backends": []}, ConfigError, "names none"),
        ({"inputs": torch.zeros(2, 3, 8, 8)}, DataError, "must be of shape"),
        ({"inputs": torch.full((2, 1, 8, 8), torch.nan)}, DataError, "not finite"),
    ],
)
def test_arguments_that_are_not_usable(sdn, images, arguments, error, words):
    with pytest.raises(error, match=words):
        make(sdn, images).tune(**arguments)


def test_without_any_inputs_there_is_nothing_to_time(sdn):
    with pytest.raises(ConfigError, match="nothing says what inputs look like"):
        Engine(sdn, Confidence(0.9)).tune()


REASONS = [ImportError("no such module"), MissingExtra("not installed"), NetworkError("not cut"), ConfigError("no way")]


@pytest.mark.parametrize("error", REASONS, ids=lambda error: type(error).__name__)
def test_what_cannot_run_is_left_out_with_its_reason(sdn, images, monkeypatch, error):
    def build(order):
        raise error

    monkeypatch.setattr(torch_stages, "build_stages", build)
    engine = make(sdn, images)
    found = engine.tune(4, backends=TORCH, repeats=1)
    assert found.left_out == {"stages": str(error)}
    assert f"stages: left out, {error}" in str(found)
    assert engine.backend == "eager"
    with pytest.raises(ConfigError, match=f"no back end can run here: stages: {error}"):
        engine.tune(4, backends=["stages"], repeats=1)
    assert engine.backend == "eager"


FAILURES = [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), RuntimeError("[ONNXRuntimeError] : 6")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [0, 4])
def test_a_run_time_that_fails_ends_no_tuning(sdn, images, monkeypatch, error, after):
    """While it is prepared, and while it is timed: of stages four lanes and their first run come before."""
    ran, original = [], tune._Lane.run

    def run(lane):
        ran.extend([lane.backend] if lane.backend == "stages" else [])
        if len(ran) > 2 * after:
            raise error
        return original(lane)

    engine = make(sdn, images)
    monkeypatch.setattr(tune._Lane, "run", lambda lane: run(lane) if lane.backend == "stages" else original(lane))
    found = engine.tune(4, backends=TORCH, repeats=5)
    assert found.left_out == {"stages": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    assert {way.backend for way in found.ways} == {"eager"}
    assert engine.backend == "eager"
    ran.clear()
    with pytest.raises(ConfigError, match=f"no back end can run here: stages: {type(error).__name__}"):
        engine.tune(4, backends=["stages"], repeats=5)


def test_a_plain_network_that_fails_is_left_out_as_well(sdn, images, monkeypatch):
    def build(order):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_stages, "build_plain", build)
    found = make(sdn, images).tune(4, backends=TORCH, repeats=1)
    assert found.left_out == {"plain": "OutOfMemoryError: CUDA out of memory"}
    assert found.plain_ms is None
    assert {way.backend: way.plain_ms is None for way in found.ways} == {"eager": True, "stages": False}


def test_whoever_interrupts_is_obeyed(sdn, images, monkeypatch):
    def build(order):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_stages, "build_stages", build)
    with pytest.raises(KeyboardInterrupt):
        make(sdn, images).tune(4, backends=TORCH, repeats=1)


def test_without_a_c_plus_plus_compiler_compiled_is_left_out(sdn, images, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler("g++")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    found = make(sdn, images).tune(4, backends=["eager", "compiled"], repeats=1)
    assert found.left_out["compiled"].startswith("backend='compiled' needs a C++ compiler (Compiler: g++ is not found")


def test_the_precision_stays(sdn, images):
    engine = make(sdn, images, precision="bf16")
    found = engine.tune(4, backends=["eager", "onnx"], repeats=1)
    assert found.precision == engine.precision == "bf16"
    assert found.left_out == {"onnx": "it runs in fp32, int8"}
    assert engine.backend == "eager"


@pytest.fixture
def onnx_there():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_int8_is_tuned_on_what_the_engine_was_calibrated_with(sdn, images, cache, onnx_there, monkeypatch):
    from shallowdeep.inference.onnx import precisions

    given, models, original = [], {}, precisions.models_for

    def models_for(order, calibration, *more):  # of all back ends the same ones, which take a while to be made
        given.append(calibration)
        if order.policy not in models:
            models[order.policy] = original(order, calibration, *more)
        return models[order.policy]

    for module in ("onnxruntime", "openvino"):
        monkeypatch.setattr(f"shallowdeep.inference.onnx.{module}.models_for", models_for)
    engine = Engine(sdn, Confidence(0.84), backend="onnx", precision="int8", calibration=images)
    found = engine.tune(4, inputs=images, repeats=1)
    assert (found.precision, found.plain_ms) == ("int8", None)
    have = importlib.util.find_spec("openvino") is not None
    assert {way.backend for way in found.ways} == ({"onnx", "openvino"} if have else {"onnx"})
    assert found.left_out["eager"] == found.left_out["plain"] == "it runs in fp32, bf16"
    assert all(calibration is images for calibration in given)
    assert len(given) == (4 if have else 2)  # each with exits and without
    assert all(way.plain_ms > 0 for way in found.ways)
    assert "plain: left out, it runs in fp32, bf16" in str(found)
    assert json.loads(next(cache.iterdir()).read_text())["plain_ms"] is None
    own = engine.record([images])
    np.testing.assert_array_equal(engine(images).exits, replay(own, engine.policy).exits.numpy())


def test_what_int8_is_calibrated_on_is_part_of_the_case(sdn, images):
    """However large, and wherever two sets of inputs differ."""
    many = torch.zeros(40, 1, 30, 30)
    other = many.clone()
    other[20, 0, 15, 15] = 1  # which the tensor's own text leaves out
    assert str(many) == str(other)

    def key(calibration, **options):
        order = replace(make(sdn, images)._order, calibration=calibration)
        return make_task(order, 4, backends={"onnx": options}).key()

    assert len({key(many), key(other), key(None)}) == 3
    assert key(many) == key(many.clone()) == key({"inputs": many})  # by name or not, they are the same inputs
    assert key(None, table=many) != key(None, table=other)  # no option is shortened either
    assert key(None, table=many.numpy()) != key(None, table=other.numpy())


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_calibration_is_for_int8_alone(sdn, images, backend):
    engine = Engine(sdn, Confidence(0.84), backend=backend, calibration=images)
    for use in (engine.prepare, engine, lambda inputs: engine.tune(4, inputs=inputs)):
        with pytest.raises(ConfigError, match="calibration= is for precision='int8', not for 'fp32'"):
            use(images)


def test_int8_without_calibration_is_not_tuned(sdn, images):
    engine = Engine(sdn, Confidence(0.84), backend="onnx", precision="int8")
    with pytest.raises(ConfigError, match=r"^int8 is calibrated on real inputs\. Pass calibration="):
        engine.tune(4, inputs=images)


def test_a_run_time_without_the_networks_device_is_left_out(sdn, images, onnx_there, monkeypatch):
    from shallowdeep.inference.onnx import onnxruntime

    monkeypatch.setattr(onnxruntime, "PROVIDERS", {"cpu": "CUDAExecutionProvider"})  # as if there were a GPU
    engine = make(sdn, images)
    found = engine.tune(4, backends=["eager", "onnx"], repeats=1)
    assert engine.backend == "eager"
    assert found.left_out["onnx"].startswith(
        "backend='onnx' on cpu needs CUDAExecutionProvider, which comes with onnxruntime-gpu; this onnxruntime has"
    )
    assert found.left_out["onnx"].endswith('or compute on the CPU: sdn.to("cpu").')


def test_a_choice_is_found_again(sdn, images, cache, takes):
    ran = takes(lambda lane: 1 if lane.backend == "stages" and lane.driver.latency else 2)
    first = make(sdn, images).tune(4, backends=TORCH, repeats=1)
    assert len(list(cache.iterdir())) == 1
    ran.clear()
    engine = make(sdn, images)
    again = engine.tune(4, backends=TORCH, repeats=1)
    assert ran == []
    assert again == replace(first, from_cache=True)
    assert "from the cache" in str(again)
    assert engine.backend == "stages"
    assert isinstance(engine.latency, Latency)
    np.testing.assert_array_equal(engine(images).exits, make(sdn, images)(images).exits)
    assert not engine.tune(4, backends=TORCH, repeats=1, anew=True).from_cache
    assert ran


def test_another_case_is_another_choice(sdn, images, cache):
    def tuned(engine, *arguments, **settings):
        return engine.tune(*arguments, backends=["eager"], repeats=1, **settings).from_cache

    assert [tuned(make(sdn, images), 4) for _ in range(2)] == [False, True]
    assert not tuned(make(sdn, images), 5)
    assert not tuned(make(sdn, images), 4, exit_shares=[1.0, 0.0, 0.0])
    assert not tuned(make(sdn, images), 4, inputs=images)
    assert not tuned(make(sdn, images), 4, inputs=images + 1)
    assert not tuned(make(sdn, images, precision="bf16"), 4)
    assert not tuned(make(sdn, images, micro_batch=2), 4)
    assert not tuned(Engine(sdn, Confidence(0.6), example_inputs=images), 4)
    other = copy.deepcopy(sdn)
    with torch.no_grad():
        other.exits[0].linear.bias.add_(1)
    assert not tuned(make(other, images), 4)
    assert len(list(cache.iterdir())) == 9


def test_the_number_of_threads_and_the_versions_are_part_of_the_case(sdn, images, monkeypatch):
    order = make(sdn, images)._order
    task = make_task(order, 4, backends=["eager"])
    keys = {task.key(), task.key()}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(task.key())
    monkeypatch.setattr(tuning_task, "version_of", lambda package: "0.0")
    assert len(keys | {task.key()}) == 3


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"batch_size": "four"}', "no ways"])
def test_a_damaged_file_is_ignored_and_written_anew(sdn, images, cache, damage):
    first = make(sdn, images).tune(4, backends=["eager"], repeats=1)
    (path,) = cache.iterdir()
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "ways": []}) if damage == "no ways" else damage)
    again = make(sdn, images).tune(4, backends=["eager"], repeats=1)
    assert not again.from_cache
    assert again.chosen.backend == first.chosen.backend
    assert json.loads(path.read_text()).keys() == whole.keys()
    assert make(sdn, images).tune(4, backends=["eager"], repeats=1).from_cache


def test_a_choice_that_cannot_be_built_any_more_is_timed_anew(sdn, images, monkeypatch, takes):
    takes(lambda lane: 1 if lane.backend == "stages" else 2)
    assert make(sdn, images).tune(4, backends=TORCH, repeats=1).chosen.backend == "stages"

    def build(order):
        raise NetworkError("not any more")

    monkeypatch.setattr(torch_stages, "build_stages", build)
    again = make(sdn, images).tune(4, backends=TORCH, repeats=1)
    assert (again.chosen.backend, again.from_cache) == ("eager", False)


def test_a_cache_that_cannot_be_written_warns(sdn, images, cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in the folder's place")
    with pytest.warns(UserWarning, match="it will be timed anew. Set SHALLOWDEEP_CACHE"):
        assert make(sdn, images).tune(4, backends=["eager"], repeats=1).chosen.backend == "eager"


def test_what_was_found_is_written_as_json(sdn, images):
    found = make(sdn, images).tune(4, backends=["eager"], repeats=1)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["ways"][0]["backend"] == "eager"
    assert values["plain_ms"] == found.plain_ms > 0


def test_the_table():
    ways = (TunedWay("stages", 32, True, 2.0, 0.1, 4.0), TunedWay("eager", 32, False, 3.0, 0.2, None))
    text = str(Tuning(32, "fp32", "cpu", 2, ways, 5.0, {"onnx": "not installed"}))
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["stages", "32", "where", "it", "pays", "2.00", "0.10", "0.50", "0.40"],
        ["eager", "32", "always", "3.00", "0.20", "-", "0.60"],
        ["plain", "5.00"],
        ["onnx:", "left", "out,", "not", "installed"],
    ]


def test_the_table_without_a_plain_network():
    ways = (TunedWay("onnx", 32, True, 2.0, 0.1, 1.0), TunedWay("onnx", 32, False, 3.0, 0.2, 1.0))
    lines = str(Tuning(32, "int8", "cpu", 2, ways, None)).splitlines()
    assert lines[2].split() == ["onnx", "32", "where", "it", "pays", "2.00", "0.10", "2.00", "-"]
    assert len(lines) == 5
    assert "2.00 times the 1.00 ms of the fastest network without (onnx)" in lines[-1]
    alone = Tuning(32, "fp32", "cpu", 2, (TunedWay("eager", 32, False, 3.0, 0.2, None),), None)
    assert alone.exits_ratio is None
    assert "do not pay" not in str(alone)


@pytest.mark.long
def test_compiled_stages_are_tuned_at_the_sizes_they_are_built_for(sdn, images, takes):
    takes(lambda lane: 1 if lane.backend == "compiled" and lane.has_exits and lane.driver.latency else 2)
    engine = make(sdn, images)
    before = engine(images)
    found = engine.tune(8, backends={"eager": {}, "compiled": {"sizes": (2, 8)}}, repeats=1)
    assert found.left_out == {}
    assert engine.backend == "compiled"
    assert engine.latency.sizes == (2, 8)
    np.testing.assert_array_equal(engine(images).exits, before.exits)


@pytest.mark.slow
def test_what_fails_only_when_it_compiles_is_left_out(sdn, images, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no Python.h")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    assert compiled.sizes_up_to(4) == [1, 2, 4]
    found = make(sdn, images).tune(4, backends=["eager", "compiled"], repeats=1)
    assert "no Python.h" in found.left_out["compiled"]
