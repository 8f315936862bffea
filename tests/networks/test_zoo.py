"""Networks by name, ours and other libraries', without a connection."""

import importlib
import json
import urllib.error

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.errors import ConfigError, FileFormatError, MissingExtra, NetworkError, UnknownName
from shallowdeep.networks.attach import attach
from shallowdeep.networks.inputs import example_inputs_for, preprocessing_of
from shallowdeep.networks.sdn import ShallowDeepNetwork
from shallowdeep.networks.zoo import NetworkSpec, load_network, rebuild_network, spec_of

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")

TINY_VIT = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8,
}  # fmt: skip
TINY_BERT = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
}  # fmt: skip
TINY_GPT = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50}

# name -> options, taps, what its example looks like
NETWORKS = {
    "resnet20": ({"num_classes": 5}, ["layer1", "layer2"], (1, 3, 32, 32)),
    "timm:test_resnet": ({"num_classes": 5, "image_size": 64}, ["layer1", "layer3"], (1, 3, 64, 64)),
    "timm:test_vit": (
        {"num_classes": 5, "image_size": 32, "drop_rate": 0.1, "in_chans": 4}, ["blocks.0", "blocks.2"], (1, 4, 32, 32),
    ),
    "torchvision:shufflenet_v2_x0_5": ({"num_classes": 5, "image_size": 64}, ["stage2", "stage3"], (1, 3, 64, 64)),
    "torchvision:mnasnet0_5": ({"num_classes": 5, "image_size": 32}, ["layers.8", "layers.9"], (1, 3, 32, 32)),
    "torchvision:squeezenet1_1": ({}, ["features.4", "features.8"], (1, 3, 224, 224)),
    "hf:vit": ({"num_classes": 5, "image_size": 32, **TINY_VIT}, ["vit.layers.0", "vit.layers.1"], (1, 3, 32, 32)),
    "hf:bert": ({"num_classes": 5, **TINY_BERT}, ["bert.encoder.layer.0", "bert.encoder.layer.1"], (1, 16)),
    "hf:gpt2": ({"num_classes": 5, **TINY_GPT}, [], (1, 16)),
    "own_networks:build": ({"num_classes": 5, "image_size": 16, "width": 6}, ["0", "3"], (1, 3, 16, 16)),
}  # fmt: skip

OWN = """
from torch import nn

def build(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    )

def anything(**options):
    return build(options["num_classes"], options["image_size"])

def wrong():
    return [build(2)]

def breaks():
    raise KeyError("no such thing")

NOT_CALLABLE = 3
"""


@pytest.fixture(autouse=True)
def own_networks(tmp_path, monkeypatch):
    """A module of the user's, and no connection."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(importlib.sys.modules, "own_networks", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def example_logits(net, inputs):
    with torch.no_grad():
        output = net.eval()(**inputs) if isinstance(inputs, dict) else net.eval()(inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def same_weights(some, others):
    some, others = some.state_dict(), others.state_dict()
    assert list(some) == list(others)
    return all(torch.equal(some[name], others[name]) for name in some)


# Every source: built, described, saved and built again


@pytest.mark.parametrize("name", NETWORKS)
def test_a_named_network_answers_its_example(name):
    options, _, shape = NETWORKS[name]
    net = load_network(name, **options)
    inputs = example_inputs_for(net)
    assert tuple((inputs["input_ids"] if isinstance(inputs, dict) else inputs).shape) == shape
    assert example_logits(net, inputs).shape == (1, options.get("num_classes", 1000))
    spec = spec_of(net)
    assert spec.name == name
    assert json.loads(json.dumps(spec.options)) == spec.options


@pytest.mark.parametrize("name", NETWORKS)
def test_save_and_load_by_name(name, tmp_path):
    options, taps, _ = NETWORKS[name]
    torch.manual_seed(0)
    net = load_network(name, **options)
    inputs = example_inputs_for(net)
    inputs = inputs if isinstance(inputs, dict) else torch.randn(2, *inputs.shape[1:])
    sdn = attach(net, inputs, taps=taps[:1] if name.startswith("own") else taps).eval()
    sdn.save(tmp_path / "net.safetensors")
    other = ShallowDeepNetwork.load(tmp_path / "net.safetensors", trust_code=name.startswith("own")).eval()
    assert same_weights(other, sdn)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(other(inputs), sdn(inputs), strict=True))
    assert (other.costs, other.placements) == (sdn.costs, sdn.placements)
    assert spec_of(other.backbone) == spec_of(net)
    assert preprocessing_of(other.backbone) == preprocessing_of(net)


def test_what_is_no_plain_value_is_not_described(tmp_path):
    net = load_network("timm:test_resnet", num_classes=3, image_size=32, act_layer=nn.SiLU)
    assert spec_of(net) is None
    assert preprocessing_of(net).image_size == 32
    attach(net, example_inputs_for(net), taps=["layer1"]).save(tmp_path / "net")
    with pytest.raises(FileFormatError, match="not known by name"):
        ShallowDeepNetwork.load(tmp_path / "net")


def test_a_file_runs_no_code_unasked(tmp_path):
    net = load_network("own_networks:build", num_classes=5, image_size=16)
    attach(net, example_inputs_for(net), taps=["0"]).save(tmp_path / "net")
    del importlib.sys.modules["own_networks"]
    with pytest.raises(NetworkError, match=r"built by code of its own, 'own_networks:build'.*trust_code=True"):
        ShallowDeepNetwork.load(tmp_path / "net")
    assert "own_networks" not in importlib.sys.modules
    assert ShallowDeepNetwork.load(tmp_path / "net", trust_code=True).num_outputs == 5


def test_building_again_fetches_nothing(monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("fetched")

    torchvision = importlib.import_module("torchvision")
    monkeypatch.setattr(torchvision.models.SqueezeNet1_1_Weights.DEFAULT.__class__, "get_state_dict", fetch)
    for name in ("timm:test_resnet", "torchvision:squeezenet1_1"):
        options = {"num_classes": 3, "pretrained": True, "weights": "DEFAULT", "checkpoint_path": "/nowhere"}
        assert spec_of(rebuild_network(NetworkSpec(name, options))).options["num_classes"] == 3


# Weights


SOURCES_OF_WEIGHTS = {
    "resnet20": {},
    "timm:test_resnet": {"image_size": 32},
    "torchvision:shufflenet_v2_x0_5": {},
    "own_networks:build": {},
}
HEADS = {"resnet20": "fc", "timm:test_resnet": "fc", "torchvision:shufflenet_v2_x0_5": "fc", "own_networks:build": "4"}


@pytest.mark.parametrize("form", ["safetensors", "torch", "wrapped", "parallel"])
@pytest.mark.parametrize("name", SOURCES_OF_WEIGHTS)
def test_weights_from_a_file(name, form, tmp_path):
    trained = load_network(name, num_classes=4, **SOURCES_OF_WEIGHTS[name])
    path, state = tmp_path / f"net.{'safetensors' if form == 'safetensors' else 'pth'}", trained.state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        forms = {
            "torch": state,
            "wrapped": {"epoch": 3, "state_dict": state},
            "parallel": {f"module.{key}": value for key, value in state.items()},
        }
        torch.save(forms[form], path)
    net = load_network(name, num_classes=4, weights=str(path), **SOURCES_OF_WEIGHTS[name])
    assert same_weights(net, trained)
    assert "weights" not in spec_of(net).options


@pytest.mark.parametrize("name", SOURCES_OF_WEIGHTS)
def test_another_number_of_classes_gets_a_fresh_head(name, tmp_path):
    trained = load_network(name, num_classes=4, **SOURCES_OF_WEIGHTS[name])
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    net = load_network(name, num_classes=7, weights=str(tmp_path / "net.safetensors"), **SOURCES_OF_WEIGHTS[name])
    old, new = trained.state_dict(), net.state_dict()
    differ = {key for key in new if old[key].shape != new[key].shape or not torch.equal(old[key], new[key])}
    assert differ == {f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"}
    assert len(new[f"{HEADS[name]}.bias"]) == 7


def test_only_heads_may_have_another_size(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(load_network("own_networks:build", num_classes=4, width=6).state_dict(), path)
    with pytest.raises(NetworkError, match=r"do not fit the network: 3 names or shapes differ, first '0.bias'"):
        load_network("own_networks:build", num_classes=4, width=5, weights=str(path))
    save_file(load_network("torchvision:shufflenet_v2_x0_5", num_classes=4).state_dict(), path)
    with pytest.raises(NetworkError, match=r"2 names or shapes differ, first 'fc.bias'"):
        load_network("torchvision:shufflenet_v2_x0_5", weights=str(path))


def test_weights_of_another_network(tmp_path):
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(NetworkError, match=r"net.safetensors do not fit the network: \d+ names or shapes differ"):
        load_network("torchvision:resnet18", num_classes=4, weights=str(tmp_path / "net.safetensors"))
    with pytest.raises(NetworkError, match="cannot build timm:test_resnet"):
        load_network("timm:test_resnet", num_classes=4, weights=str(tmp_path / "net.safetensors"))


class Unsafe:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"weight": Unsafe()}, tmp_path / "net.pth")
    for name in ("resnet20", "timm:test_resnet", "torchvision:resnet18"):
        with pytest.raises(FileFormatError, match="no file of weights alone"):
            load_network(name, num_classes=4, weights=str(tmp_path / "net.pth"))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no file of weights alone"), (b"PK nonsense", "no file of weights alone"), (None, "no file of weights ")],
)
def test_a_file_that_holds_no_weights(tmp_path, content, message):
    path = tmp_path / "net.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message):
        load_network("resnet20", num_classes=4, weights=str(path))


def test_a_file_of_something_else(tmp_path):
    torch.save({"loss": [1.0]}, tmp_path / "net.pth")
    with pytest.raises(FileFormatError, match="holds no state dict"):
        load_network("resnet20", num_classes=4, weights=str(tmp_path / "net.pth"))


def test_published_weights_of_torchvision(monkeypatch):
    torchvision = importlib.import_module("torchvision")
    trained = torchvision.models.get_model("googlenet", weights=None, init_weights=False)
    entry = torchvision.models.GoogLeNet_Weights.DEFAULT
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, **options: trained.state_dict())
    net = load_network("torchvision:googlenet", pretrained=True, num_classes=6)
    assert torch.equal(net.conv1.conv.weight, trained.conv1.conv.weight)
    assert (net.fc.out_features, net.aux1, net.transform_input) == (6, None, True)
    again = rebuild_network(spec_of(net))
    assert (again.aux1, again.transform_input, preprocessing_of(again)) == (None, True, preprocessing_of(net))
    whole = load_network("torchvision:googlenet", weights="IMAGENET1K_V1")
    assert torch.equal(whole.fc.weight, trained.fc.weight)


def refuse_connection(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:resnet18", {"pretrained": True}),
        ("timm:resnet18", {"weights": "tv_in1k"}),
        ("torchvision:resnet18", {"pretrained": True}),
        ("torchvision:resnet18", {"weights": "IMAGENET1K_V1"}),
        ("hf:google/vit-base-patch16-224", {}),
    ],
)
def test_a_fetch_that_fails(name, options, monkeypatch):
    torchvision = importlib.import_module("torchvision")
    entry = type(torchvision.models.ResNet18_Weights.DEFAULT)
    monkeypatch.setattr(entry, "get_state_dict", refuse_connection)
    with pytest.raises(NetworkError, match=rf"cannot fetch what {name} needs .* pass the local path") as caught:
        load_network(name, num_classes=5, **options)
    assert "\n" not in str(caught.value)


def test_a_local_folder_of_timm(tmp_path):
    timm = importlib.import_module("timm")
    trained = timm.create_model("test_resnet", num_classes=6, drop_rate=0.25)
    timm.models.save_for_hf(trained, tmp_path / "net", model_args={"drop_rate": 0.25}, safe_serialization=True)
    net = load_network(f"timm:local-dir:{tmp_path / 'net'}", pretrained=True)
    assert same_weights(net, trained)
    assert spec_of(net).name == "timm:test_resnet"
    again = rebuild_network(spec_of(net))
    assert (again.fc.out_features, again.drop_rate) == (6, 0.25)


# Hugging Face


@pytest.fixture
def folder(tmp_path):
    """A trained network of images with three classes, as transformers writes it, its image processor with it."""
    net = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=3, image_size=32, **TINY_VIT))
    net.save_pretrained(tmp_path / "vit")
    processor = {
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3], "size": {"height": 32, "width": 32}, "resample": 3,
    }  # fmt: skip
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "vit", net


def test_a_local_folder(folder):
    path, trained = folder
    for name, options in ((f"hf:{path}", {}), ("hf:vit", {"weights": str(path)})):
        net = load_network(name, **options)
        assert same_weights(net, trained)
        assert preprocessing_of(net) == Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), 1.0, "bicubic", squash=True)
        # the folder may be gone when the network is loaded again
        assert spec_of(net).name == "hf:vit"
        assert str(path) not in json.dumps(spec_of(net).options)


def test_a_local_folder_with_other_classes_or_without_its_weights(folder):
    path, trained = folder
    net = load_network(f"hf:{path}", num_classes=6)
    assert torch.equal(net.vit.layers[2].mlp.fc1.weight, trained.vit.layers[2].mlp.fc1.weight)
    assert (net.classifier.out_features, spec_of(net).options["num_classes"]) == (6, 6)
    fresh = load_network(f"hf:{path}", pretrained=False)
    assert fresh.classifier.out_features == 3
    assert not torch.equal(fresh.vit.layers[2].mlp.fc1.weight, trained.vit.layers[2].mlp.fc1.weight)


def test_weights_of_another_shape_than_the_options(folder):
    with pytest.raises(NetworkError, match=r"do not fit the network|cannot build hf:"):
        load_network(f"hf:{folder[0]}", num_classes=6, hidden_size=32)


def test_half_precision_is_chosen_not_found(folder):
    path, net = folder
    net.half().save_pretrained(path)
    assert next(load_network(f"hf:{path}").parameters()).dtype == torch.float32
    net = load_network(f"hf:{path}", dtype="float16")
    assert next(net.parameters()).dtype == next(rebuild_network(spec_of(net)).parameters()).dtype == torch.float16


def test_a_configuration_that_names_code_runs_none(folder):
    spec = spec_of(load_network(f"hf:{folder[0]}"))
    config = {**spec.options["config"], "auto_map": {"AutoModelForImageClassification": "evil--evil.Net"}}
    net = rebuild_network(NetworkSpec("hf:owner/name", {**spec.options, "config": config}))
    assert type(net) is transformers.ViTForImageClassification
    assert not hasattr(net.config, "auto_map")


def test_decoders_get_a_padding_token():
    net = load_network("hf:gpt2", num_classes=5, eos_token_id=49, **TINY_GPT)
    assert net.config.pad_token_id == 49
    tokens = example_inputs_for(net)["input_ids"][0].tolist()
    assert 49 not in tokens
    assert len(set(tokens)) == 16


def test_a_type_with_two_classifiers_takes_the_plain_one():
    net = load_network("hf:deit", num_classes=4, image_size=32, **TINY_VIT)
    assert type(net) is transformers.DeiTForImageClassification
    assert type(rebuild_network(spec_of(net))) is transformers.DeiTForImageClassification


def test_task_of_a_type_that_does_both():
    sizes = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1}
    net = load_network("hf:perceiver", task="text", num_classes=4, **sizes)
    assert type(net) is transformers.PerceiverForSequenceClassification
    assert type(rebuild_network(spec_of(net))) is transformers.PerceiverForSequenceClassification


# What networks take


def test_preprocessing_is_the_librarys():
    timm = preprocessing_of(load_network("timm:test_resnet"))
    assert timm == Preprocessing(160, (0.5,) * 3, (0.5,) * 3, 0.95, "bilinear")
    resnet = preprocessing_of(load_network("torchvision:resnet50"))
    assert (resnet.image_size, resnet.crop_share, resnet.interpolation) == (224, 224 / 232, "bilinear")
    assert preprocessing_of(load_network("timm:test_resnet", image_size=96)).image_size == 96
    assert preprocessing_of(load_network("hf:vit", image_size=32, **TINY_VIT)) is None
    given = Preprocessing(16, crop_share=0.5)
    net = load_network("own_networks:build", num_classes=3, preprocessing=given)
    assert preprocessing_of(net) == preprocessing_of(rebuild_network(spec_of(net), trust_code=True)) == given


@pytest.mark.parametrize("options", [{"image_size": 32}, {"img_size": 32}])
def test_image_size_of_a_fixed_network(options):
    net = load_network("timm:test_vit", num_classes=3, **options)
    assert net.patch_embed.num_patches == 4
    assert example_inputs_for(net).shape == example_inputs_for(rebuild_network(spec_of(net))).shape == (1, 3, 32, 32)


def test_image_size_of_torchvision():
    net = load_network("torchvision:vit_b_16", num_classes=3, image_size=32)
    assert net.image_size == 32
    assert example_inputs_for(net).shape == (1, 3, 32, 32)


def test_networks_of_others_have_examples_too():
    timm = importlib.import_module("timm")
    assert example_inputs_for(timm.create_model("test_vit", in_chans=1)).shape == (1, 3, 160, 160)
    net = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=(16, 24), **TINY_VIT))
    assert example_inputs_for(net).shape == (1, 3, 16, 24)
    with pytest.raises(NetworkError, match="cannot tell what inputs this Linear takes"):
        example_inputs_for(nn.Linear(2, 2))


def test_a_function_gets_what_its_signature_takes():
    net = load_network("own_networks:anything", num_classes=3, image_size=16)
    assert net[0].out_channels == 16
    assert spec_of(net) == NetworkSpec("own_networks:anything", {"num_classes": 3, "image_size": 16})


# What cannot be built


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("timm:resnet1B", {}, UnknownName, "no timm network 'resnet1B'. Did you mean 'resnet18'?"),
        ("timm:resnet18", {"weights": "tv_in2k"}, UnknownName, "'resnet18.tv_in2k'. Did you mean 'resnet18.tv_in1k'?"),
        ("torchvision:resnet19", {}, UnknownName, "no torchvision network 'resnet19'. Did you mean 'resnet18'?"),
        ("torchvision:resnet18", {"weights": "IMAGENET1K_V3"}, UnknownName, "Did you mean 'IMAGENET1K_V1'?"),
        ("hf:vitt", {}, UnknownName, "hub repository (owner/name) 'vitt'. Did you mean 'vit'?"),
        ("hf:vit", {"task": "sound"}, UnknownName, "no task of a Hugging Face network 'sound'. Known: image, text"),
        ("own_networks:bild", {}, UnknownName, "no function in own_networks 'bild'. Did you mean 'build'?"),
        ("own_networks:NOT_CALLABLE", {}, UnknownName, "no function in own_networks 'NOT_CALLABLE'"),
        ("no_such_module:f", {}, NetworkError, "cannot import 'no_such_module'"),
        ("own_networks:wrong", {}, NetworkError, "own_networks:wrong returned a list, not an nn.Module"),
        ("own_networks:breaks", {}, NetworkError, "cannot build own_networks:breaks: 'no such thing'"),
        ("own_networks:build", {"pretrained": True}, ConfigError, "nothing is published for own_networks:build"),
        ("timm:resnet18", {"nonsense": 3}, NetworkError, "unexpected keyword argument 'nonsense'. Check the options"),
        ("torchvision:resnet18", {"nonsense": 3}, NetworkError, "unexpected keyword argument 'nonsense'"),
        ("hf:vit", {"pretrained": True}, ConfigError, "a model type has no weights, got hf:vit"),
        ("hf:vit", {"weights": "/nowhere"}, NetworkError, "no folder /nowhere with weights for hf:vit"),
        ("hf:bert", {"image_size": 32, **TINY_BERT}, ConfigError, "reads text, got image_size=32"),
        ("hf:whisper", {}, NetworkError, "no image or text classifier of type 'whisper'"),
        ("resnet20", {"drop": 0.1}, ConfigError, "resnet20 has no option 'drop'"),
        ("resnet20", {"pretrained": True}, ConfigError, "no weights are published for resnet20"),
        ("timm:resnet18", {"num_classes": 1}, ConfigError, "at least 2 classes, got num_classes=1"),
    ],
)  # fmt: skip
def test_what_cannot_be_built(name, options, error, message):
    with pytest.raises(error) as caught:
        load_network(name, **{"num_classes": 5, **options})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_our_own_need_a_number_of_classes():
    with pytest.raises(ConfigError, match="resnet20 needs a number of classes"):
        load_network("resnet20")


@pytest.mark.parametrize("error", [ImportError("none"), RuntimeError("operator torchvision::nms does not exist")])
@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "hf:vit"])
def test_a_library_that_does_not_import(name, error, monkeypatch):
    def refuse(module):
        raise error

    monkeypatch.setattr("shallowdeep.errors.importlib.import_module", refuse)
    with pytest.raises(MissingExtra, match=r'pip install "shallowdeep\[zoo\]"'):
        load_network(name, num_classes=5)


def test_a_model_whose_code_does_not_import(monkeypatch):
    def refuse(*args, **kwargs):
        raise ModuleNotFoundError("Could not import module 'ViTForImageClassification'")

    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_config", refuse)
    with pytest.raises(MissingExtra, match="hf:vit needs a library that does not import here"):
        load_network("hf:vit", **TINY_VIT)
