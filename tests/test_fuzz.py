"""Damaged and foreign files of every kind that is read: a clear error or a usable value, and nothing else happens.

Each test takes a whole file and damages it: blindly (cut, flipped, overwritten, another kind of file), or with
knowledge of what it says (keys lost, numbers negative, huge or none, deep nesting, tensors of another type or shape).
"""

import copy
import io
import json
import pickle
import struct
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from shallowdeep.config import RunConfig, load_config
from shallowdeep.data.images import ImageSet
from shallowdeep.data.samples import Splits
from shallowdeep.errors import ConfigError, FileFormatError, ShallowDeepError
from shallowdeep.networks.attach import attach
from shallowdeep.networks.costs import Costs
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network
from shallowdeep.policies.replay import replay
from shallowdeep.policies.rules import Confidence, Patience, policy_from_dict
from shallowdeep.provenance import describe_start
from shallowdeep.runs.run import Run
from shallowdeep.storage import read_json
from shallowdeep.traces.trace import Trace, TraceInfo
from shallowdeep.training.checkpoint import Checkpoint
from shallowdeep.training.loop import fit
from shallowdeep.training.recipes import Recipe

# Values in the place of others. The words in capitals become JSON, or TOML, that Python's own writers would not write.
ODD = [
    None, True, 0, 1, -1, 3, 2**63, 10**30, 10**300, 0.5, -0.5, 1e300, "", "x", "a\nb", "\x00", "ü" * 300, [], {}, [[]],
    [0], [1, 2, 3], {"a": 1}, "NAN", "INFINITY", "HUGE", "LONG", "DEEP", "SURROGATE",
]  # fmt: skip
RAW = {
    '"NAN"': "NaN",
    '"INFINITY"': "-Infinity",
    '"HUGE"': "1e999",
    '"LONG"': "9" * 5000,
    '"DEEP"': "[" * 100_000 + "]" * 100_000,
    '"SURROGATE"': r'"\ud800"',
}


def as_text(values):
    text = json.dumps(values)
    for word, raw in RAW.items():
        text = text.replace(word, raw)
    return text


def places(values, path=()):
    """All places in nested dictionaries and lists."""
    found = [path]
    if isinstance(values, dict | list):
        for key in values if isinstance(values, dict) else range(len(values)):
            found += places(values[key], (*path, key))
    return found


@st.composite
def edited(draw, values, odd=tuple(ODD)):
    """Nested values of which one to three are lost, odd, doubled or called otherwise."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from(places(values)[1:] or [("nothing",)]))
        place = values
        for parent in parents:
            place = place[parent]
        action = draw(st.sampled_from(["odd", "odd", "odd", "lost", "doubled", "renamed"]))
        if action == "odd" or not isinstance(values, dict):
            place[key] = copy.deepcopy(draw(st.sampled_from(odd)))
        elif action == "doubled" and isinstance(place, list):
            place.append(copy.deepcopy(place[key]))
        elif action == "renamed" and isinstance(place, dict):
            place[draw(st.sampled_from(["other", "x.y", "a\nb"]))] = place.pop(key)
        else:
            del place[key]
    return values


@st.composite
def damaged(draw, whole, others=()):
    """The bytes of a file, cut, flipped, overwritten, lengthened; or those of another kind of file."""
    action = draw(st.sampled_from(["cut", "flip", "flip", "overwrite", "insert", "lengthen", "noise", "other"]))
    # the beginning and the end say what is where; between them lies mostly one number after another
    edge = st.one_of(st.integers(0, min(400, len(whole))), st.integers(max(0, len(whole) - 400), len(whole)))
    at = draw(st.one_of(edge, st.integers(0, len(whole))))
    noise = draw(st.binary(min_size=1, max_size=40))
    if action == "cut":
        return whole[:at]
    if action == "flip":
        flipped = bytearray(whole)
        for place in draw(st.lists(edge, min_size=1, max_size=4)):
            flipped[min(place, len(whole) - 1)] ^= draw(st.integers(1, 255))
        return bytes(flipped)
    if action == "overwrite":
        return whole[:at] + noise + whole[at + len(noise) :]
    if action == "insert":
        return whole[:at] + noise + whole[at:]
    if action == "lengthen":
        return whole + noise
    return draw(st.sampled_from(others)) if action == "other" and others else noise


class Unprinted(bytes):
    """Too many bytes to be shown where a test fails."""

    def __repr__(self):
        return f"{len(self)} bytes"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def clear_error_at_most(folder=None):
    """Inside may happen what a user is told in one line, and no file comes, goes or changes."""
    before = None if folder is None else contents(folder)
    try:
        yield
    except ShallowDeepError as error:
        message = str(error)
        assert 10 < len(message) < 1500, message
        assert len(message.splitlines()) == 1, message
    if folder is not None:
        assert contents(folder) == before


@contextmanager
def file_of(content, name):
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


# Files that are whole


def make_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))


def bytes_of(save, name="file"):
    with TemporaryDirectory() as folder:
        save(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def make_trace():
    logits = tuple(torch.randn(6, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    costs = Costs((10, 20, 40), (3, 3, 0), (5, 6, 7), (1, 1, 0), (0.3, 0.6, 1.0))
    info = TraceInfo("net", "digits", "val", {"classes": 3}, ("a", "b", "c"), versions={"torch": "2"})
    return Trace(logits, torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6), costs, info)


def make_optimizer(net, name="adamw"):
    options = {"lr": 0.1, "fused": True}
    return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name](
        net.parameters(), **options, **({"momentum": 0.9} if name == "sgd" else {})
    )


def step(net, optimizer):
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def make_checkpoint(name="adamw"):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    optimizer = make_optimizer(net, name)
    step(net, optimizer)
    with TemporaryDirectory() as folder:
        history = [{"phase": 0, "epoch": 1, "loss": 0.5}, {"phase": 0, "epoch": 2, "loss": 0.25}]
        Checkpoint(Path(folder), "this run").save(net, optimizer, 0, 2, history)
        return (Path(folder) / "checkpoint.pt").read_bytes()


torch.manual_seed(0)
SDN = bytes_of(attach(make_network(), torch.zeros(2, 3, 8, 8), taps=["1"]).save)
NAMED = bytes_of(attach(load_network("resnet20", num_classes=3), torch.zeros(2, 3, 32, 32), taps=["layer1.0"]).save)
TRACE = bytes_of(make_trace().save)
CHECKPOINT = make_checkpoint()
CONFIG = as_text(load_config(changes={"taps": '["a"]', "network_options": '{weights = "x"}'}).model_dump(mode="json"))
TOML = 'strategy = "plain"\nseed = 4\nshares = [0.2, 0.5]\n[recipe]\nname = "paper"\nepochs = 7\nmilestones = [0.5]\n'
FILES = {"sdn": SDN, "trace": TRACE, "checkpoint": CHECKPOINT, "config": CONFIG.encode(), "toml": TOML.encode()}


def others(kind):
    return [content for other, content in FILES.items() if other != kind] + [b"", b"\xff\xd8\xff\xe0", b"PAR1" * 9]


def parts_of(whole):
    """The tensors of a safetensors file and what this package says of them."""
    length = struct.unpack("<Q", whole[:8])[0]
    with file_of(whole, "a") as path:
        return load_file(path), json.loads(json.loads(whole[8 : 8 + length])["__metadata__"]["shallowdeep"])


def with_description(whole, description):
    tensors, _ = parts_of(whole)
    return bytes_of(lambda path: save_file(tensors, path, metadata={"shallowdeep": as_text(description)}))


def with_header(whole, header):
    length = struct.unpack("<Q", whole[:8])[0]
    text = as_text(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


def header_of(whole):
    return json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])


def odd_tensors(tensor):
    """Others in a tensor's place."""
    return [
        tensor.bool(), tensor.to(torch.complex64), tensor.to(torch.int8), tensor.to(torch.uint16), tensor.double(),
        tensor.to(torch.float8_e4m3fn), tensor.flatten()[:0], tensor[..., None], tensor.flatten(),
        tensor.flatten()[:1],
        torch.zeros(0), torch.zeros(()), torch.full_like(tensor, -5), torch.zeros(0, 10**9),
        tensor.float() * float("nan"), tensor.float() + 0.5, tensor.float() * 1e300,
    ]  # fmt: skip


@st.composite
def other_tensors(draw, tensors):
    """Named tensors of which one is another, is lost, has another name, or is there twice."""
    name = draw(st.sampled_from(sorted(tensors)))
    changed, action = dict(tensors), draw(st.sampled_from(["other", "other", "other", "lost", "renamed", "doubled"]))
    if action == "other":
        changed[name] = draw(st.sampled_from(odd_tensors(tensors[name]))).clone()
    elif action == "doubled":
        changed[f"{name}.more"] = changed[name].clone()
    else:
        tensor = changed.pop(name)
        if action == "renamed":
            changed[draw(st.sampled_from(["x", "logits.7", "ids", "labels"]))] = tensor
    return changed


def safetensors_damage(whole, others):
    tensors, description = parts_of(whole)
    metadata = {"shallowdeep": json.dumps(description)}
    return st.one_of(
        damaged(whole, others),
        edited(description).map(lambda changed: with_description(whole, changed)),
        edited(header_of(whole)).map(lambda changed: with_header(whole, changed)),
        other_tensors(tensors).map(lambda changed: bytes_of(lambda path: save_file(changed, path, metadata=metadata))),
    )


# Networks


def make_data():
    """Two images of three classes."""
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    samples = ImageSet(images, torch.tensor([0, 2]), torch.arange(2), (0.5,) * 3, (0.5,) * 3, ("a", "b", "c"))
    return Splits(samples, None, replace(samples, split="test"))


def use(sdn, example):
    """A network that was loaded can be run, and be cut off at each exit."""
    with torch.no_grad():
        assert [tuple(logits.shape) for logits in sdn.eval()(example)] == [(2, 3)] * sdn.num_exits
        assert sdn.truncate(0)(example).shape == (2, 3)
    assert len(sdn.costs.relative()) == sdn.num_exits
    assert torch.isfinite(sdn.costs.relative()).all()


@settings(max_examples=100)
@given(safetensors_damage(SDN, others("sdn")))
def test_a_damaged_network(content):
    with file_of(content, "sdn.safetensors") as path, clear_error_at_most(path.parent):
        use(ShallowDeepNetwork.load(path, backbone=make_network()), torch.zeros(2, 3, 8, 8))


@settings(max_examples=30)
@given(edited(parts_of(NAMED)[1]["info"]).map(lambda info: {**parts_of(NAMED)[1], "info": info}))
def test_a_network_that_is_built_by_name_from_a_damaged_description(description):
    content = with_description(NAMED, description)
    with file_of(content, "sdn.safetensors") as path, clear_error_at_most(path.parent):
        use(ShallowDeepNetwork.load(path), torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("size", [-1, 0, 2**31, 10**12, 2**62, 2**63, 10**300, 10.5])
@pytest.mark.parametrize(
    "path",
    [
        ("network", "num_classes"), ("label_spaces", "classes"), ("heads", 0, "num_outputs"), ("heads", 0, "shape", 0),
        ("placements", 0, "site", "shape", 0), ("placements", 0, "site", "shape", 1),
    ],
)  # fmt: skip
def test_a_damaged_size_takes_no_memory(path, size, tmp_path):
    description = parts_of(NAMED)[1]
    place = description["info"]
    for key in path[:-1]:
        place = place[key]
    key = path[-1] if path[-1] != "classes" else next(iter(place))
    place[key] = size
    (tmp_path / "sdn.safetensors").write_bytes(with_description(NAMED, description))
    with pytest.raises(ShallowDeepError):
        ShallowDeepNetwork.load(tmp_path / "sdn.safetensors")


def test_sizes_that_are_damaged_together_take_no_memory(tmp_path):
    """All say the same, and only the weights know better."""
    description = parts_of(NAMED)[1]
    info = description["info"]
    info["heads"][0]["shape"] = info["placements"][0]["site"]["shape"] = [2**40, 4, 4]
    (tmp_path / "sdn.safetensors").write_bytes(with_description(NAMED, description))
    with pytest.raises(FileFormatError, match="do not fit the network"):
        ShallowDeepNetwork.load(tmp_path / "sdn.safetensors")


@pytest.mark.parametrize("part", [("site", "name"), ("unreached", 0), ("site", "row_inputs")])
def test_a_tap_that_the_network_does_not_have(part, tmp_path):
    description = parts_of(NAMED)[1]
    place = description["info"]["placements"][0]
    if part[0] == "unreached":
        place["unreached"][0] = "layer9"
    else:
        place["site"][part[1]] = "layer9" if part[1] == "name" else [["layer9", 0]]
    (tmp_path / "sdn.safetensors").write_bytes(with_description(NAMED, description))
    with pytest.raises(FileFormatError, match=r"does not fit the network: .*layer9"):
        ShallowDeepNetwork.load(tmp_path / "sdn.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        *({"format": odd} for odd in ("1", -1, 0, None, 1.5, True, [1], 2, 10**30)),
        *({"kind": odd} for odd in (["sdn"], {"sdn": 1}, None, 1, "x" * 5000, "a\nb")),
        *({"info": odd} for odd in ([], None, "sdn", 1, [["placements"]])),
    ],
)
def test_a_header_that_is_none(changes, tmp_path):
    content = with_description(SDN, parts_of(SDN)[1] | changes)
    (tmp_path / "sdn.safetensors").write_bytes(content)
    with pytest.raises(FileFormatError, match=f"^{tmp_path}/sdn.safetensors .{{5,250}}$"):
        ShallowDeepNetwork.load(tmp_path / "sdn.safetensors", backbone=make_network())


@settings(max_examples=25)
@given(safetensors_damage(NAMED, others("sdn")).map(Unprinted))
def test_a_run_from_a_damaged_network(content):
    data, plain = make_data(), load_config(changes={"network": "resnet20", "strategy": "plain"})
    with file_of(content, "sdn.safetensors") as path, clear_error_at_most(path.parent):
        run = Run(path.parent / "run", plain.model_copy(update={"init": str(path)}))
        assert run.build(data).num_exits == 1


# Traces


@settings(max_examples=150)
@given(safetensors_damage(TRACE, others("trace")))
def test_a_damaged_trace(content):
    with file_of(content, "test.safetensors") as path, clear_error_at_most(path.parent):
        trace = Trace.load(path)
        assert trace.predictions.shape == (len(trace), trace.num_exits)
        assert torch.isfinite(trace.costs.relative()).all()
        decisions = replay(trace if trace.labels is not None else trace.as_agreement(), Confidence(0.5))
        assert 0 <= decisions.accuracy <= 1
        assert json.loads(json.dumps(trace.info.to_dict(), allow_nan=False)) is not None


@pytest.mark.parametrize("name", ["ids", "labels", "logits.1"])
@pytest.mark.parametrize("number", range(17))
def test_a_trace_of_odd_tensors(name, number, tmp_path):
    tensors, description = parts_of(TRACE)
    tensors[name] = odd_tensors(tensors[name])[number].clone()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"shallowdeep": json.dumps(description)})
    with clear_error_at_most(tmp_path):
        trace = Trace.load(path)
        assert trace.ids.dtype == trace.labels.dtype == torch.int64
        assert all(logits.dtype == torch.float32 and logits.shape == (6, 3) for logits in trace.logits)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("head_flops", [-1, 3, 0]), ("backbone_params", [5, 6, -7]), ("backbone_flops", ["a", "b", "c"]),
        ("head_params", [0.5, 3, 0]), ("nominal", ["x", 0.6, 1.0]), ("backbone_flops", [10, 20]), ("head_flops", 3),
    ],
)  # fmt: skip
def test_a_trace_with_costs_that_are_none(key, value, tmp_path):
    description = parts_of(TRACE)[1]
    description["info"]["costs"][key] = value
    (tmp_path / "a.safetensors").write_bytes(with_description(TRACE, description))
    with pytest.raises(FileFormatError, match=r"a.safetensors lacks a part of a Trace"):
        Trace.load(tmp_path / "a.safetensors")


# Checkpoints


def load_checkpoint(content, name="adamw"):
    """What resuming does with a file: refuse it and change nothing, or go on with a step."""
    torch.manual_seed(1)
    net = nn.Linear(4, 3)
    optimizer = make_optimizer(net, name)
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    with file_of(content, "checkpoint.pt") as path, clear_error_at_most(path.parent):
        checkpoint = Checkpoint(path.parent, "this run")
        try:
            done = checkpoint.load(net, optimizer, 0)
        except ShallowDeepError:
            assert str([net.state_dict(), optimizer.state_dict()]) == str(before)
            raise
        history = checkpoint.read_history()
        assert done == 1_000_000_000 or [record["phase"] for record in history].count(0) == done > 0
        json.dumps(history)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1]
        step(net, optimizer)
        return done


def test_a_whole_checkpoint_is_loaded():
    for name in ("sgd", "adamw"):
        assert load_checkpoint(make_checkpoint(name), name) == 2


@settings(max_examples=100)
@given(damaged(CHECKPOINT, others("checkpoint")))
def test_a_damaged_checkpoint(content):
    load_checkpoint(content)


ODD_IN_A_CHECKPOINT = [
    *(value for value in ODD if f'"{value}"' not in RAW),
    float("nan"), float("inf"), 10**5000, torch.zeros(()), torch.zeros(0), torch.zeros(3, 4).double(), torch.ones(4, 3),
    torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.complex64), torch.eye(4)[:3].to_sparse(),
    torch.zeros(3, 4, device="meta"), {0: {}}, {0: {"step": 1}}, {"a": torch.zeros(3)}, "[]", "[1]", "{",
    '[{"phase": 0}]',    "[" * 20_000, '[{"phase": 0}, {"phase": 0, "loss": NaN}]',
]  # fmt: skip


@settings(max_examples=100)
@given(edited(torch.load(io.BytesIO(CHECKPOINT), weights_only=True), ODD_IN_A_CHECKPOINT))
def test_a_checkpoint_that_says_odd_things(state):
    content = io.BytesIO()
    torch.save(state, content)
    load_checkpoint(content.getvalue())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("odd", [{0: {}}, {7: {}}, {0: {"step": 1}}, {"0": {}}, [], None])
def test_a_checkpoint_with_an_optimiser_of_something_else(name, odd):
    state = torch.load(io.BytesIO(make_checkpoint(name)), weights_only=True)
    state["optimizer"]["state"] = odd
    content = io.BytesIO()
    torch.save(state, content)
    assert load_checkpoint(content.getvalue(), name) is None


def test_settings_in_a_checkpoint_cannot_change_the_recipe():
    state = torch.load(io.BytesIO(CHECKPOINT), weights_only=True)
    state["optimizer"]["param_groups"] = [{"lr": 9.0, "params": "none", "betas": None}]
    content = io.BytesIO()
    torch.save(state, content)
    assert load_checkpoint(content.getvalue()) == 2


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def traps(victim):
    """The trap in every form in which PyTorch and Python write one."""
    values = [Trap(victim), {"identity": "this run", "sdn": Trap(victim)}]
    for value in values:
        yield pickle.dumps(value)
        for zipped in (True, False):
            content = io.BytesIO()
            torch.save(value, content, _use_new_zipfile_serialization=zipped)
            yield content.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # PyTorch sees that it is none of its files
def test_nothing_is_unpickled(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    for content in traps(victim):
        for name in ("checkpoint.pt", "sdn.safetensors", "config.json", "policy.json"):
            (folder / name).write_bytes(content)
        readers = [
            lambda: Checkpoint(folder, "this run").load(nn.Linear(4, 3), make_optimizer(nn.Linear(4, 3)), 0),
            lambda: ShallowDeepNetwork.load(folder / "sdn.safetensors"),
            lambda: Trace.load(folder / "sdn.safetensors"),
            lambda: Run.open(folder),
            lambda: Run(folder, load_config()).policy(),
            lambda: load_config(folder / "config.json"),
            lambda: load_network("resnet20", num_classes=3, weights=str(folder / "checkpoint.pt")),
        ]
        for read in readers:
            with pytest.raises(ShallowDeepError):
                read()
        assert not victim.exists()
    torch.load(folder / "checkpoint.pt", weights_only=False)
    assert victim.exists()  # the trap is one


@pytest.mark.parametrize("content", [CHECKPOINT[: len(CHECKPOINT) // 2], TRACE, CHECKPOINT, b""])
def test_a_run_is_not_resumed_from_a_damaged_checkpoint(content, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    data = make_data()
    sdn = attach(load_network("resnet20", num_classes=3), data.example_inputs, taps=["layer1.0"])
    before, recipe = contents(tmp_path), Recipe(epochs=1, batch_size=2, lr=0.1)
    with pytest.raises(FileFormatError, match=r"checkpoint\.pt"):
        fit(sdn, data, recipe=recipe, folder=tmp_path, resume=True, progress=False, device="cpu")
    assert contents(tmp_path) == before


# Configurations


def use_config(config):
    assert RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) is not None
    assert all(abs(share) < float("inf") for share in config.shares)
    with clear_error_at_most():
        config.recipe.build("all", config.network)


@settings(max_examples=60)
@given(
    st.one_of(damaged(CONFIG.encode(), others("config")), edited(json.loads(CONFIG)).map(lambda v: as_text(v).encode()))
)
def test_a_damaged_run(content):
    with file_of(content, "config.json") as path, clear_error_at_most(path.parent):
        use_config(Run.open(path.parent).config)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'{"earlier": 3}', b'{"earlier": [}', b"", TRACE])
def test_a_damaged_environment(content, tmp_path):
    (tmp_path / "environment.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"environment\.json"):
        describe_start(tmp_path, {})


TOML_VALUES = [
    "", "nan", "-inf", "1e999", "1e-999", "0x" + "f" * 6000, "9" * 5000, "[" * 20_000, "[" * 300 + "]" * 300, "-1",
    "0.5", "0", "true", "ü", "[]", "[1, [2]]", "{a = 1}", '"x"', '"' + "x" * 5000 + '"', '"\\u0000"', "'''a\nb'''",
    "1979-05-27", "1 # one", "1\nstrategy = 'plain'",
]  # fmt: skip
KEYS = [
    "seed", "recipe", "recipe.lr", "recipe.epochs", "recipe.milestones", "shares", "taps", "network", "data_options",
    "network_options",
    "data_options.x", "network_options.x", "threads", "init", "recipe.lr.x", "", ".", "a\nb", "recipe.", "x" * 3000,
]  # fmt: skip


@settings(max_examples=60)
@given(
    st.one_of(
        damaged(TOML.encode(), others("toml")),
        st.text(max_size=60).map(str.encode),
        st.tuples(st.sampled_from(KEYS), st.sampled_from(TOML_VALUES)).map(lambda pair: " = ".join(pair).encode()),
    )
)
def test_a_damaged_file_of_options(content):
    with file_of(content, "run.toml") as path, clear_error_at_most(path.parent):
        use_config(load_config(path))


TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(TOML_VALUES))


@settings(max_examples=60)
@given(st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=9)), TEXTS, min_size=1, max_size=3))
def test_odd_options(changes):
    with clear_error_at_most():
        use_config(load_config(changes=changes))


def test_an_option_sets_itself_alone():
    with pytest.raises(ConfigError, match=r"seed = .*valid integer"):
        load_config(changes={"seed": "1\nstrategy = 'plain'"})


@pytest.mark.parametrize("value", ["nan", "inf", "0x" + "f" * 500, "0x" + "f" * 6000, "[nan]", "1979-05-27"])
def test_options_can_be_kept(value):
    with pytest.raises(ConfigError, match="cannot be kept as JSON"):
        load_config(changes={"network_options.x": value})


def test_words_that_no_file_can_hold():
    with pytest.raises(ConfigError, match="cannot be kept as JSON"):
        load_config(
            changes={"network_options.x": "\udcff"}
        )  # how Python hands over a byte of the shell that is no text


@pytest.mark.parametrize("value", ["inf", "nan", "1e999"])
@pytest.mark.parametrize("key", ["recipe.lr", "recipe.weight_decay", "recipe.clip_norm", "shares", "recipe.milestones"])
def test_numbers_of_a_configuration_are_finite(key, value):
    text = value if key.startswith("recipe.") and key != "recipe.milestones" else f"[{value}]"
    with pytest.raises(ConfigError, match=f"{key}.* = .*finite"):
        load_config(changes={key: text})


# Policies


POLICIES = [policy.to_dict() for policy in (Confidence(0.9, (0, 1), "most_confident"), Confidence(0.5), Patience(2))]


@settings(max_examples=80)
@given(
    st.one_of(
        st.sampled_from(POLICIES).flatmap(edited).map(lambda values: as_text(values).encode()),
        damaged(json.dumps(POLICIES[0]).encode(), others("config")),
    )
)
def test_a_damaged_policy(content):
    with file_of(content, "policy.json") as path, clear_error_at_most(path.parent):
        policy = Run(path.parent, load_config()).policy()
        assert policy_from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
        assert 0 <= replay(make_trace(), policy).accuracy <= 1


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "confidence", "threshold": 0.5, "exits": [0.5]},
        {"kind": "confidence", "threshold": 0.5, "exits": "01"},
        {"kind": "confidence", "threshold": 0.5, "exits": [True]},
        {"kind": "confidence", "threshold": True},
        {"kind": "patience", "patience": 10**400},
        {"kind": "patience", "patience": 10**30},
        {"kind": ["confidence"], "threshold": 0.5},
        {"kind": "confidence", "threshold": float("nan")},
    ],
)
def test_settings_that_are_none(values):
    with pytest.raises(ConfigError):
        policy_from_dict(values)


# JSON


@pytest.mark.parametrize("word", RAW.values())
def test_json_that_python_would_read(word, tmp_path):
    (tmp_path / "a.json").write_text(f'{{"a": {word}}}')
    if "ud800" in word:
        assert read_json(tmp_path / "a.json") == {"a": "\ud800"}
        return
    with pytest.raises(FileFormatError, match=r"cannot read .*a\.json as JSON: "):
        read_json(tmp_path / "a.json")
