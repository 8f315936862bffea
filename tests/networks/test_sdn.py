import copy
import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import shallowdeep.storage
from shallowdeep.errors import FileFormatError, NetworkError
from shallowdeep.networks.attach import attach
from shallowdeep.networks.costs import count_params
from shallowdeep.networks.exits import InternalClassifier, TokenClassifier
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network
from shallowdeep.storage import FORMAT, load_tensors, save_tensors

TAPS = ("stem", "blocks.0", "blocks.1")


@pytest.fixture
def sdn(tiny_net, images):
    torch.manual_seed(0)
    return attach(tiny_net(), images, taps=TAPS).eval()


def equal(some, others):
    return [torch.equal(a, b) for a, b in zip(some, others, strict=True)] == [True] * len(some)


def snapshot(net):
    return copy.deepcopy(net.state_dict())


# The backbone is a guest's host


def test_attach_leaves_the_backbone_as_it_was(tiny_net, images):
    net = tiny_net()
    names, alone = list(net.state_dict()), net(images)
    sdn = attach(net, images, taps=TAPS).eval()
    assert sdn.backbone is net
    assert list(net.state_dict()) == names
    assert [name for name in sdn.state_dict() if name.startswith("backbone.")] == [f"backbone.{n}" for n in names]
    logits = sdn(images)
    assert [tuple(each.shape) for each in logits] == [(6, 5)] * 4
    assert torch.equal(logits[-1], alone)
    assert torch.equal(sdn.run_backbone(images), alone)
    assert torch.equal(logits[1], sdn.exits[1](net.blocks[0](net.stem(images))))
    assert (sdn.num_exits, sdn.num_outputs, sdn.taps) == (4, 5, TAPS)


def test_a_frozen_backbone_stays_bit_identical(sdn, images):
    before, final = snapshot(sdn.backbone), sdn(images)[-1]
    assert sdn.freeze_backbone() is sdn
    optimizer = torch.optim.SGD(sdn.parameters(), lr=0.5, weight_decay=0.1)
    heads = snapshot(sdn.exits)
    for _ in range(3):
        sdn.train()
        assert sdn.exits[0].training
        assert not any(module.training for module in sdn.backbone.modules())
        F.cross_entropy(torch.cat(sdn(images)[:-1]), torch.arange(18) % 5).backward()
        optimizer.step()
    assert equal(list(sdn.backbone.state_dict().values()), list(before.values()))
    assert torch.equal(sdn.eval()(images)[-1], final)
    assert all(p.grad is None and not p.requires_grad for p in sdn.backbone.parameters())
    assert not any(torch.equal(heads[name], value) for name, value in sdn.exits.state_dict().items())


def test_unfreezing_lets_it_train_again(sdn, images):
    sdn.train().freeze_backbone()
    assert not sdn(images)[-1].requires_grad
    before = sdn.backbone.stem[1].num_batches_tracked.item()
    sdn.freeze_backbone(False)
    assert all(module.training for module in sdn.modules())
    torch.cat(sdn(images)).sum().backward()
    assert all(p.grad is not None for p in sdn.backbone.parameters())
    assert sdn.backbone.stem[1].num_batches_tracked == before + 1


def test_no_grad_outside_wins(sdn, images):
    with torch.no_grad():
        assert not any(logits.requires_grad for logits in sdn(images))
    assert all(logits.requires_grad for logits in sdn(images))


# Networks made from it


def storages(module):
    return {tensor.data_ptr() for tensor in module.state_dict().values()}


def test_plain_is_a_copy_of_the_backbone(sdn, images):
    plain, before = sdn.plain(), sdn(images)
    assert torch.equal(plain(images), before[-1])
    assert not storages(plain) & storages(sdn)
    for parameter in plain.parameters():
        parameter.data.zero_()
    assert equal(sdn(images), before)


@pytest.mark.parametrize(("exit", "params"), [(0, 116), (1, 420), (2, 724), (3, 1_053)])
def test_truncate_ends_at_an_exit(sdn, images, exit, params):
    before, state = sdn(images), snapshot(sdn)
    short = sdn.truncate(exit)
    assert torch.equal(short(images), before[exit])
    backbone = short if exit == 3 else short.backbone
    assert count_params(backbone) == params == sdn.costs.backbone_params[exit]
    assert not storages(short) & storages(sdn)
    for parameter in short.parameters():
        parameter.data.zero_()
    assert equal(list(sdn.state_dict().values()), list(state.values()))
    assert equal(sdn(images), before)


class Tokens(nn.Module):
    """Attention, whose last layer is never called, and a parameter of the network itself."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 8))
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.position
        x = x + self.first(x, x, x)[0]
        return self.fc(self.second(x, x, x)[0].mean(1))


def test_truncate_keeps_weights_of_modules_that_are_never_called():
    x = torch.randn(2, 5, 8)
    sdn = attach(nn.Sequential(nn.Identity(), Tokens()), x, taps=["1.second"]).eval()
    assert torch.equal(sdn.truncate(0)(x), sdn(x)[0])
    # position; in and out projections of both attentions
    assert count_params(sdn.truncate(0).backbone) == sdn.costs.backbone_params[0] == 40 + 2 * (4 * 64 + 4 * 8)


@pytest.mark.parametrize("exit", [-1, 4])
def test_truncate_refuses_an_exit_that_is_not_there(sdn, exit):
    with pytest.raises(NetworkError, match=f"no exit {exit}: this network has exits 0 to 3"):
        sdn.truncate(exit)


# Round trips


@pytest.mark.parametrize("trip", [copy.deepcopy, lambda sdn: pickle.loads(pickle.dumps(sdn))], ids=["copy", "pickle"])
def test_copies_give_equal_outputs(sdn, images, trip):
    before = sdn(images)
    other = trip(sdn)
    assert equal(other(images), before)
    assert not storages(other) & storages(sdn)
    assert (other.costs, other.placements, other.taps) == (sdn.costs, sdn.placements, TAPS)


def test_state_dict_round_trip(sdn, tiny_net, images):
    other = attach(tiny_net(seed=1), images, taps=TAPS).eval()
    assert not equal(other(images), sdn(images))
    other.load_state_dict(sdn.state_dict())
    assert equal(other(images), sdn(images))


def test_save_and_load_by_name(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    sdn = attach(load_network("resnet20", num_classes=4), x, taps=["layer1.0", "layer2.1"]).eval()
    sdn.save(tmp_path / "deep" / "net.safetensors")
    other = ShallowDeepNetwork.load(tmp_path / "deep" / "net.safetensors").eval()
    assert equal(other(x), sdn(x))
    assert (other.costs, other.placements, other.label_spaces) == (sdn.costs, sdn.placements, {"labels": 4})
    assert [type(head) for head in other.exits] == [InternalClassifier] * 2
    assert torch.equal(other.truncate(0)(x), sdn(x)[0])


def test_load_with_a_backbone(sdn, tiny_net, images, tmp_path):
    sdn.save(tmp_path / "net")
    net = tiny_net(seed=1)
    other = ShallowDeepNetwork.load(tmp_path / "net", backbone=net).eval()
    assert other.backbone is net
    assert equal(other(images), sdn(images))
    with pytest.raises(FileFormatError, match=r"not known by name\. Build it and pass it: load"):
        ShallowDeepNetwork.load(tmp_path / "net")


def test_heads_of_the_users_own(tiny_net, images, tmp_path):
    def head(site, num_outputs):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(site.shape[0], num_outputs))

    sdn = attach(tiny_net(), images, taps=TAPS, head=head).eval()
    sdn.save(tmp_path / "net")
    other = ShallowDeepNetwork.load(tmp_path / "net", backbone=tiny_net(seed=1), head=head).eval()
    assert equal(other(images), sdn(images))
    with pytest.raises(FileFormatError, match=r"heads of your own\. Pass what built them: load"):
        ShallowDeepNetwork.load(tmp_path / "net", backbone=tiny_net())


def test_token_heads_keep_their_pooling(tmp_path):
    x = torch.randn(2, 5, 8)
    sdn = attach(Tokens(), x, taps=["second"], head=lambda site, k: TokenClassifier(site.shape, k, "first")).eval()
    sdn.save(tmp_path / "net")
    other = ShallowDeepNetwork.load(tmp_path / "net", backbone=Tokens()).eval()
    assert other.exits[0].pool == "first"
    assert equal(other(x), sdn(x))


def test_final_head_and_label_spaces(tiny_net, images, tmp_path):
    spaces = {"fine": 5, "coarse": 2}
    sdn = attach(tiny_net(), images, taps=TAPS, label_spaces=spaces, final_head=nn.Linear(5, 7)).eval()
    assert [tuple(each.shape) for each in sdn(images)] == [(6, 7)] * 4
    assert torch.equal(sdn(images)[-1], sdn.final_head(sdn.backbone(images)))
    sdn.save(tmp_path / "net")
    other = ShallowDeepNetwork.load(tmp_path / "net", backbone=tiny_net(seed=1), final_head=nn.Linear(5, 7)).eval()
    assert equal(other(images), sdn(images))
    assert (list(other.label_spaces.items()), other.num_outputs) == ([("fine", 5), ("coarse", 2)], 7)
    with pytest.raises(FileFormatError, match=r"saved with a final head of its own\. Pass it: load"):
        ShallowDeepNetwork.load(tmp_path / "net", backbone=tiny_net())


def test_half_precision_on_disk(sdn, tiny_net, images, tmp_path):
    sdn.save(tmp_path / "half", dtype=torch.float16)
    sdn.save(tmp_path / "full")
    other = ShallowDeepNetwork.load(tmp_path / "half", backbone=tiny_net(seed=1)).eval()
    assert equal(list(other.parameters()), [p.half().float() for p in sdn.parameters()])
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    # the description is the same in both
    saved = (tmp_path / "full").stat().st_size - (tmp_path / "half").stat().st_size
    floats = sum(t.numel() for t in sdn.state_dict().values() if t.is_floating_point())
    assert abs(saved - 2 * floats) < 100  # offsets are written with fewer digits


def test_values_beyond_half_precision_are_kept(sdn, tiny_net, tmp_path):
    weight = next(sdn.parameters()).data
    weight[0], large = 1e5, weight.clone()
    large[0] = 1e5
    sdn.save(tmp_path / "half", dtype=torch.float16)
    other = ShallowDeepNetwork.load(tmp_path / "half", backbone=tiny_net(seed=1))
    first, second, *_ = other.parameters()
    assert torch.equal(first, large)
    assert torch.equal(second, second.half().float())


# Files that are not what they should be


def refusal(path, **options):
    with pytest.raises(FileFormatError) as caught:
        ShallowDeepNetwork.load(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("length", [0, 4, 8, 100, 0.5, -1])
def test_truncated_file(sdn, tiny_net, tmp_path, length):
    path = tmp_path / "net"
    sdn.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * length) if isinstance(length, float) else length])
    assert "truncated or no safetensors file" in refusal(path, backbone=tiny_net())


INFO = {"network": None, "placements": [], "heads": [], "costs": {}, "label_spaces": {}, "final_head": False}


def header(**changes):
    return json.dumps({"kind": "sdn", "format": FORMAT, "info": INFO} | changes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "a file that shallowdeep did not write, not a sdn"),
        ({"other": "x"}, "a file that shallowdeep did not write, not a sdn"),
        ({"shallowdeep": "{"}, "truncated or no safetensors file"),
        ({"shallowdeep": "[1]"}, "a file that shallowdeep did not write"),
        ({"shallowdeep": '{"kind": "sdn"}'}, "a file that shallowdeep did not write"),
        ({"shallowdeep": header(kind="trace")}, "is a trace, not a sdn"),
        ({"shallowdeep": header(format=FORMAT + 1)}, "this version reads up to 1. Upgrade shallowdeep"),
        ({"shallowdeep": header(info={})}, "describes no Shallow-Deep Network ('"),
        ({"shallowdeep": header()}, "describes no Shallow-Deep Network"),
        ({"shallowdeep": header(info=INFO | {"placements": [1]})}, "describes no Shallow-Deep Network"),
    ],
)
def test_foreign_file(tiny_net, tmp_path, metadata, message):
    path = tmp_path / "net"
    save_file({"x": torch.zeros(2)}, path, metadata=metadata)
    assert message in refusal(path, backbone=tiny_net())


def test_other_foreign_files(tiny_net, tmp_path):
    path = tmp_path / "net"
    assert refusal(path) == f"no file {path}. Name the path of one that is there."
    path.write_text('{"kind": "sdn"}' * 20)
    assert "truncated or no safetensors file" in refusal(path)
    torch.save({"a": torch.zeros(1)}, path)
    assert "truncated or no safetensors file" in refusal(path)
    save_tensors(path, {"logits": torch.zeros(2)}, kind="trace", info={})
    assert "is a trace, not a sdn" in refusal(path, backbone=tiny_net())


def test_weights_that_do_not_fit_leave_the_backbone_alone(sdn, tmp_path):
    path = tmp_path / "net"
    sdn.save(path)
    wider = copy.deepcopy(sdn.backbone)
    wider.fc = nn.Linear(4, 6)
    before = snapshot(wider)
    wider.stem[0].weight.data.add_(1)
    changed = snapshot(wider)
    assert "2 names or shapes differ, first 'backbone.fc.bias'" in refusal(path, backbone=wider)
    assert equal(list(wider.state_dict().values()), list(changed.values()))
    assert not equal(list(changed.values()), list(before.values()))
    assert "do not fit the network" in refusal(path, backbone=nn.Linear(3, 5))


def test_a_failing_save_leaves_the_file_that_was_there(sdn, tmp_path, monkeypatch):
    path = tmp_path / "net"
    sdn.save(path)
    before = path.read_bytes()

    def full_disk(tensors, to, metadata):
        Path(to).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shallowdeep.storage, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        sdn.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["net"]


def test_what_is_printed(sdn):
    # (tap + heads so far) / 62,228 multiply-adds; each head is 64·5
    shares = "{stem: 0.116, blocks.0: 0.418, blocks.1: 0.719, last: 1.015}"
    assert f"relative cost to each exit: {shares}" in repr(sdn)


def test_the_last_exit_alone_has_its_final_head():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    head = nn.Linear(3, 4)
    sdn = attach(net, torch.zeros(2, 6), taps=["0"], label_spaces={"fine": 4}, final_head=head).eval()
    x = torch.randn(3, 6)
    assert torch.equal(sdn.truncate(1)(x), sdn(x)[-1])
    assert sdn.costs.head_flops == (2 * 5 * 4, 2 * 3 * 4)
    # 60 + 30 FLOPs of the backbone; its own heads cost 40 and 24 more.
    assert sdn.costs.relative(exits=[]).tolist() == pytest.approx([60 / 90, 114 / 90])
    assert sdn.freeze_backbone().train().final_head.training is False
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_inputs_as_keywords(tiny_net, images):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, pixel_values, scale=1.0):
            return self.net(pixel_values * scale)

    sdn = attach(Named(), {"pixel_values": images}, taps=("net.blocks.0",)).eval()
    with torch.no_grad():
        by_keyword, by_mapping = sdn(pixel_values=images), sdn({"pixel_values": images})
    assert all(torch.equal(a, b) for a, b in zip(by_keyword, by_mapping, strict=True))


def test_data_parallel_is_refused_in_words(tiny_net, images):
    sdn = attach(tiny_net(), images, taps=("blocks.0",))
    with pytest.raises(NetworkError, match="Use DistributedDataParallel: torchrun"):
        sdn._replicate_for_data_parallel()  # what DataParallel calls for each device


def forge(path, network):
    """The same file, its network described in other words."""
    tensors, info = load_tensors(path, kind="sdn")
    save_tensors(path, tensors, kind="sdn", info={**info, "network": network})


def test_no_file_runs_code_that_is_not_trusted(tmp_path):
    sdn = attach(load_network("resnet20", num_classes=3), torch.zeros(1, 3, 32, 32), taps=("layer1.0",))
    sdn.save(path := tmp_path / "sdn.safetensors")
    forge(path, {"name": "os:mkdir", "path": str(tmp_path / "made")})
    for trust in (False, "my.module:net", "os"):
        with pytest.raises(NetworkError, match="built by code of its own, 'os:mkdir'"):
            ShallowDeepNetwork.load(path, trust_code=trust)
    forge(path, {"name": f"hf:{tmp_path}", "trust_remote_code": True})
    with pytest.raises(NetworkError, match="where its configuration is needed and nothing else"):
        ShallowDeepNetwork.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["sdn.safetensors"]


def test_a_network_that_was_changed_is_no_longer_known_by_name(tmp_path):
    net = load_network("resnet20", num_classes=3)
    net.layer1[0].relu = nn.GELU()
    net.fc = nn.Sequential(net.fc, nn.Identity())
    attach(net, torch.zeros(1, 3, 32, 32), taps=("layer1.0",)).save(tmp_path / "sdn.safetensors")
    with pytest.raises(FileFormatError, match="not known by name"):
        ShallowDeepNetwork.load(tmp_path / "sdn.safetensors")


def test_heads_come_back_in_the_backbones_number_type(tiny_net, images, tmp_path):
    sdn = attach(tiny_net().bfloat16(), images.bfloat16(), taps=("blocks.0",)).eval()
    sdn.save(tmp_path / "sdn.safetensors")
    loaded = ShallowDeepNetwork.load(tmp_path / "sdn.safetensors", backbone=tiny_net().bfloat16()).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(images.bfloat16()), sdn(images.bfloat16()), strict=True))


def test_one_way_of_giving_inputs_at_a_time(tiny_net, images):
    sdn = attach(tiny_net(), images, taps=("blocks.0",))
    with pytest.raises(NetworkError, match="one argument, or keywords: got both, with scale"):
        sdn(images, scale=2.0)
