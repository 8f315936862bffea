"""A folder for others, read back without a connection."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import yaml

from shallowdeep.errors import ConfigError, FileFormatError, NetworkError, UnknownName
from shallowdeep.networks.attach import attach
from shallowdeep.networks.hub import find_weights, make_card
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import load_network

hub = pytest.importorskip("huggingface_hub")

INFO = {
    "data": "digits", "strategy": "ic_only", "accuracy": [0.5, 0.75, 0.9], "split": "test", "license": "mit",
    "datasets": ["owner/digits"], "notes": "Trained for a test.",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_connection(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sdn(x):
    torch.manual_seed(0)
    return attach(load_network("resnet20", num_classes=4), x, taps=["layer1.0", "layer2.1"]).eval()


def metadata(card):
    head = card.split("---\n")[1]
    return yaml.safe_load(head)


def test_a_folder_holds_two_files_and_loads_bit_identical(sdn, x, tmp_path):
    sdn.save_pretrained(tmp_path / "net", card_info=INFO)
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["README.md", "sdn.safetensors"]
    other = ShallowDeepNetwork.from_pretrained(tmp_path / "net").eval()
    assert list(other.state_dict()) == list(sdn.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), sdn.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other(x), sdn(x), strict=True))
    assert (other.costs, other.placements) == (sdn.costs, sdn.placements)


def test_another_process_loads_it_offline(sdn, x, tmp_path):
    sdn.save_pretrained(tmp_path)
    torch.save([logits.detach() for logits in sdn(x)], tmp_path / "logits")
    torch.save(x, tmp_path / "x")
    code = (
        "import sys, torch; from shallowdeep import ShallowDeepNetwork; torch.set_num_threads(1)\n"
        f"sdn = ShallowDeepNetwork.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"x, logits = (torch.load({str(tmp_path)!r} + name) for name in ('/x', '/logits'))\n"
        "print([torch.equal(a, b) for a, b in zip(sdn(x), logits, strict=True)], 'huggingface_hub' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[True, True, True] False"


def test_options_of_load_reach_it(tiny_net, images, tmp_path):
    sdn = attach(tiny_net(), images, taps=["stem"]).eval()
    sdn.save_pretrained(tmp_path)
    net = tiny_net(seed=1)
    other = ShallowDeepNetwork.from_pretrained(tmp_path, backbone=net).eval()
    assert other.backbone is net
    assert torch.equal(other(images)[0], sdn(images)[0])


def test_the_class_is_no_other_for_it(sdn, x):
    # A mixin of the hub would keep a configuration of its own on every network.
    assert [base.__name__ for base in ShallowDeepNetwork.__bases__] == ["Module"]
    for other in (copy.deepcopy(sdn), pickle.loads(pickle.dumps(sdn))):
        assert torch.equal(other(x)[0], sdn(x)[0])


# The card


def test_card_with_everything(sdn):
    card = make_card(sdn, INFO)
    found = metadata(card)
    assert found["library_name"] == "shallowdeep"
    assert found["license"] == "mit"
    assert found["datasets"] == ["owner/digits"]
    assert found["tags"] == ["early-exit", "shallow-deep-network", "adaptive-inference"]
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"type": "owner/digits", "name": "digits", "split": "test"}
    assert result["metrics"][0]["value"] == 0.9
    first, second, last = sdn.costs.relative().tolist()
    assert f"| 0 | layer1.0 | {first:.3f} | 0.5000 |" in card
    assert f"| 1 | layer2.1 | {second:.3f} | 0.7500 |" in card
    assert f"| 2 | the network's own output | {last:.3f} | 0.9000 |" in card
    for line in ("- network: `resnet20`", "- data: digits", "- strategy: ic_only", "- licence: mit"):
        assert line in card.splitlines()
    assert 'ShallowDeepNetwork.from_pretrained("{this repository}")' in card
    assert card.endswith("Trained for a test.\n")


@pytest.mark.parametrize(("data", "task"), [("digits", "image-classification"), ("trec", "text-classification")])
def test_a_card_names_the_task(sdn, data, task):
    found = metadata(make_card(sdn, INFO | {"data": data}))
    assert found["model-index"][0]["results"][0]["task"]["type"] == task


def test_card_with_nothing(sdn):
    card = make_card(sdn, {})
    found = metadata(card)
    assert "license" not in found
    assert "model-index" not in found
    assert "accuracy" not in card
    assert "- licence: not stated" in card.splitlines()
    assert "- strategy" not in card


def test_cards_of_other_networks(tiny_net, images):
    card = make_card(attach(tiny_net(), images, taps=["stem"]), {})
    assert 'from_pretrained("{this repository}", backbone=net)' in card
    assert "# TinyNet with early exits" in card


def test_a_card_names_the_network_it_stands_on(tiny_net, images):
    net = tiny_net()
    sdn = attach(net, images, taps=["stem"])
    net.shallowdeep_spec = load_network_spec("hf:owner/name")
    found = metadata(make_card(sdn, {}))
    assert found["base_model"] == "owner/name"
    assert found["tags"][-1] == "hf"
    net.shallowdeep_spec = load_network_spec("package.module:build")
    card = make_card(sdn, {})
    assert "base_model" not in metadata(card)
    assert "trust_code=True" in card


def load_network_spec(name):
    from shallowdeep.networks.zoo import NetworkSpec

    return NetworkSpec(name)


def test_what_a_card_cannot_say(sdn, tmp_path):
    with pytest.raises(UnknownName, match=r"no entry of a model card 'licence'. Did you mean 'license'\?"):
        sdn.save_pretrained(tmp_path / "net", card_info={"licence": "mit"})
    with pytest.raises(ConfigError, match="one accuracy per exit, got 2 for 3 exits"):
        sdn.save_pretrained(tmp_path / "net", card_info={"accuracy": [0.1, 0.2]})
    assert not (tmp_path / "net").exists()


# The hub


def test_a_folder_without_the_file(tmp_path):
    with pytest.raises(FileFormatError, match=r"no file sdn\.safetensors in .* that save_pretrained wrote"):
        ShallowDeepNetwork.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["owner/name", "no/such/thing", "nothing"])
def test_a_repository_that_cannot_be_fetched(name):
    with pytest.raises(NetworkError, match=f"cannot fetch sdn.safetensors of '{name}'") as caught:
        ShallowDeepNetwork.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_a_repository_is_fetched_by_its_file(sdn, x, tmp_path, monkeypatch):
    sdn.save(tmp_path / "cached")
    asked = {}

    def download(*args, **kwargs):
        asked.update(kwargs, args=args)
        return str(tmp_path / "cached")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    other = ShallowDeepNetwork.from_pretrained("owner/name", revision="v1", local_files_only=True).eval()
    assert torch.equal(other(x)[0], sdn(x)[0])
    assert asked == {
        "args": ("owner/name", "sdn.safetensors"), "revision": "v1", "token": None, "cache_dir": None,
        "local_files_only": True,
    }  # fmt: skip
    assert find_weights("owner/name") == tmp_path / "cached"


class FakeApi:
    """Stands in for the hub: keeps what was uploaded."""

    calls = []  # noqa: RUF012
    error = None

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repository, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", repository, private, exist_ok))
        return type("Url", (), {"repo_id": f"user/{repository}"})()

    def upload_folder(self, repo_id, folder_path, **options):
        files = sorted(os.listdir(folder_path))  # noqa: PTH208
        self.calls.append(("upload", repo_id, files, options))
        return "https://huggingface.co/user/net/commit/1"


def test_push(sdn, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    address = sdn.push_to_hub("net", card_info=INFO, private=True, token="secret", commit_message="first")
    assert address == "https://huggingface.co/user/net/commit/1"
    assert FakeApi.calls == [
        ("token", "secret"),
        ("create", "net", True, True),
        ("upload", "user/net", ["README.md", "sdn.safetensors"], {"commit_message": "first"}),
    ]


def test_a_push_that_fails(sdn, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "error", ConnectionError("no route to host"))
    with pytest.raises(NetworkError, match=r"cannot upload to 'net' \(no route to host\)\. Log in with"):
        sdn.push_to_hub("net")
