"""A stranger's network and a stranger's images, from the command line to a policy."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from shallowdeep.cli import app
from shallowdeep.config import load_config
from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.sources import load_data
from shallowdeep.errors import ConfigError, DataError
from shallowdeep.networks.attach import attach
from shallowdeep.networks.zoo import load_network
from shallowdeep.policies.calibrate import calibrate
from shallowdeep.policies.replay import replay
from shallowdeep.report.gallery import images_of
from shallowdeep.runs.run import Run
from shallowdeep.storage import load_tensors, read_json, write_json
from shallowdeep.traces.record import record
from shallowdeep.training.loop import fit
from shallowdeep.training.recipes import Recipe

NETWORK = '''
from torch import nn

def small(num_classes, width=4):
    """Three convolutions, for images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )
'''
ON_DIGITS = [
    "--epochs", "1", "--data", "digits", "--network", "strangers:small", "--device", "cpu", "--threads", "1",
    "--set", "shares=[0.8]",
]  # fmt: skip
LIGHT = {"bright": 200, "dark": 60, "medium": 130}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of class folders with pictures of different sizes, told apart by their brightness."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, light in LIGHT.items():
        (folder / name).mkdir()
        for number in range(40):
            height, width = random.integers(20, 60, 2)
            pixels = random.normal(light, 20, (height, width, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """A module of networks that Python finds."""
    (tmp_path / "strangers.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("strangers", None)


def command(*words):
    found = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_a_network_of_ones_own_on_a_folder_of_pictures(pictures, strangers, tmp_path):
    options = [
        "--data", f"folder:{pictures}", "--network", "strangers:small", "--device", "cpu", "--threads", "1",
        "--set", "network_options.width=6", "--set", "recipe.batch_size=16", "--set", "recipe.lr=0.02",
        "--set", "shares=[0.8]",
    ]  # fmt: skip
    plain, distilled = tmp_path / "plain", tmp_path / "distil"
    command("fit", "--strategy", "plain", "--epochs", "4", "--out", plain, *options)
    command("fit", "--strategy", "distil", "--init", plain, "--epochs", "4", "--out", distilled, *options)
    command("record", distilled)
    told = command("calibrate", distilled, "--min-agreement", "0.9")
    assert "agreement with the last exit" in told
    assert "accuracy" in command("replay", distilled)
    run = Run.open(distilled)
    assert isinstance(run.load_data().train, EncodedImages)
    assert run.trace("test").info.class_names == tuple(LIGHT)
    ours, theirs = (load_tensors(folder / "sdn.safetensors", kind="sdn")[0] for folder in (distilled, plain))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert read_json(distilled / "policy.json")["kind"] == "confidence"


def test_a_timm_network_with_weights_of_its_own_gets_its_own_preprocessing(pictures, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "weights.safetensors")
    command(
        "fit", "--strategy", "distil", "--epochs", "1", "--out", tmp_path / "run", "--device", "cpu", "--threads", "1",
        "--data", f"folder:{pictures}", "--network", "timm:test_resnet",
        "--set", f"network_options.weights={tmp_path / 'weights.safetensors'}",
        "--set", "recipe.batch_size=16", "--set", "shares=[0.5]",
    )  # fmt: skip
    run = Run.open(tmp_path / "run")
    wanted = timm.create_model("test_resnet").pretrained_cfg
    (tmp_path / "weights.safetensors").unlink()  # what was trained is whole without it
    sdn = run.load()
    data = run.load_data(sdn.backbone)
    assert data.train.example_inputs.shape[1:] == wanted["input_size"]
    assert data.train.preprocessing.mean == wanted["mean"]
    command("record", tmp_path / "run")
    assert len(run.trace("test")) == len(data.test)


def test_exits_see_images_as_the_network_they_are_put_on_did(pictures, strangers, tmp_path):
    prepared = "{image_size = 24, mean = [0.1, 0.2, 0.3], std = [0.4, 0.5, 0.6], crop_share = 1.0}"
    options = [
        "--epochs", "1", "--data", f"folder:{pictures}", "--network", "strangers:small", "--device", "cpu",
        "--threads", "1", "--set", f"network_options.preprocessing={prepared}", "--set", "recipe.batch_size=16",
        "--set", "shares=[0.8]",
    ]  # fmt: skip
    plain, exits, joint = (tmp_path / name for name in ("plain", "exits", "joint"))
    command("fit", "--strategy", "plain", "--out", plain, *options)
    command("fit", "--strategy", "ic_only", "--init", plain, "--out", exits, *options)
    command("fit", "--strategy", "joint", "--init", exits / "sdn.safetensors", "--out", joint, *options)
    for folder in (plain, exits):
        command("record", folder)
    assert torch.equal(Run.open(plain).trace("test").logits[-1], Run.open(exits).trace("test").logits[-1])
    earlier = tmp_path / "earlier"
    shutil.copytree(exits, earlier)  # as earlier versions left it, which showed their exits images as ImageNet's are
    write_json(earlier / "environment.json", {})
    assert (Run.open(earlier).origins, Run.open(earlier).prepares) == ((), False)
    shutil.rmtree(plain)  # what it was is kept where it is built on
    shutil.rmtree(exits)
    run = Run.open(joint)
    assert [origin.strategy for origin in run.origins] == ["ic_only", "plain"]
    assert run.load_data(run.load().backbone).train.preprocessing.mean == (0.1, 0.2, 0.3)


def test_a_network_that_wants_its_images_otherwise_does_not_take_the_weights(pictures, strangers, tmp_path):
    changes = {"data": f"folder:{pictures}", "network": "strangers:small", "shares": "[0.8]", "strategy": "plain"}
    plain = Run(tmp_path / "plain", load_config(changes=changes))
    plain.build(plain.load_data()).save(plain.weights)
    write_json(plain.folder / "config.json", plain.config.model_dump(mode="json"))
    changes |= {"strategy": "ic_only", "init": str(plain.folder)}
    other = Run(
        tmp_path / "exits", load_config(changes=changes | {"network_options.preprocessing": "{image_size = 9}"})
    )
    with pytest.raises(
        ConfigError, match=r"learned from images prepared by None, this network wants .*'image_size': 9"
    ):
        other.build(other.load_data())
    Run(tmp_path / "exits", load_config(changes=changes)).build(plain.load_data())


def test_no_picture_is_shown_that_the_network_saw_otherwise(strangers, tmp_path):
    for name, light in LIGHT.items():
        (tmp_path / "small" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (16, 16), (light, light, number)).save(tmp_path / "small" / name / f"{number}.png")
    changes = {"data": f"folder:{tmp_path / 'small'}", "network": "strangers:small", "shares": "[0.8]", "device": "cpu"}
    prepared = {"network_options.preprocessing": "{image_size = 24, crop_share = 1.0}"}
    for name, options in (("plain", {}), ("prepared", prepared)):
        run = Run(tmp_path / name, load_config(changes=changes | options))
        run.build(run.load_data(run.build_network(run.load_data()))).save(run.weights)
        trace = run.record(["test"], progress=False)["test"]
        if options:
            with pytest.raises(DataError, match="holds no decoded images"):
                images_of(run, trace)
        else:
            assert len(images_of(run, trace)) == len(trace)


def test_weights_of_no_run_say_nothing_of_images(pictures, strangers, tmp_path):
    config = load_config(changes={"data": f"folder:{pictures}", "network": "strangers:small", "init": str(tmp_path)})
    run = Run(tmp_path / "run", config)
    assert run.origins == ()
    net = load_network("strangers:small", num_classes=3, preprocessing=Preprocessing(image_size=24))
    assert run.load_data(net).train.preprocessing == Preprocessing()


def test_a_validation_split_that_the_backbone_has_learned_from_is_refused(strangers, tmp_path):
    plain, exits = tmp_path / "plain", tmp_path / "exits"
    command("fit", "--strategy", "plain", "--out", plain, *ON_DIGITS, "--set", "val_size=0")
    refused = [*ON_DIGITS, "--strategy", "ic_only", "--init", plain, "--out", exits]
    message = r"learned from 180 of the 180 validation samples.* Take its own split: val_size=0, data_options\.seed=0"
    with pytest.raises(ConfigError, match=message):
        command("fit", *refused)
    assert not exits.exists()
    command("fit", *refused, "--set", "val_size=0")


def test_exits_alone_teach_a_backbone_nothing(strangers, tmp_path):
    options = [*ON_DIGITS, "--strategy", "distil"]
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.warns(UserWarning, match="is taken to return it trained"):
        command("fit", "--out", first, *options, "--set", "val_size=0")
    command("fit", "--init", first, "--out", second, *options)
    assert len(Run.open(second).load_data().val) == 180


def test_the_same_split_in_other_words_is_taken(strangers, tmp_path):
    plain, exits = tmp_path / "plain", tmp_path / "exits"
    command("fit", "--strategy", "plain", "--out", plain, *ON_DIGITS)
    command("fit", "--strategy", "ic_only", "--init", plain, "--out", exits, *ON_DIGITS, "--set", "val_size=180")
    assert Run.open(exits).weights.exists()


@pytest.mark.parametrize("strategy", ["ic_only", "distil"])
def test_a_fresh_last_layer_is_not_frozen(pictures, strangers, tmp_path, strategy):
    torch.manual_seed(0)
    save_file(load_network("strangers:small", num_classes=5).state_dict(), tmp_path / "five.safetensors")
    config = load_config(
        changes={
            "data": f"folder:{pictures}",
            "network": "strangers:small",
            "network_options.weights": str(tmp_path / "five.safetensors"),
            "shares": "[0.8]",
            "strategy": strategy,
        }
    )
    run = Run(tmp_path / "run", config)
    data = run.load_data()
    with pytest.raises(ConfigError, match=r"last layer of strangers:small is fresh: .* other classes than the 3 of"):
        run.build(data)
    Run(tmp_path / "run", config.model_copy(update={"strategy": "joint"})).build(data)


@pytest.mark.slow
def test_questions_are_trained_recorded_calibrated_and_replayed(cifar_dir):
    pytest.importorskip("transformers")
    if not (cifar_dir / "trec").is_dir():
        pytest.skip(f"no questions under {cifar_dir}")
    data = load_data("trec", data_dir=cifar_dir, labels="coarse")
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    net = load_network("hf:bert", num_classes=6, vocab_size=data.train.vocab_size, **shape)
    sdn = attach(net, data.example_inputs, shares=(0.34, 0.67))
    assert [tap.rpartition(".")[0] for tap in sdn.taps] == ["bert.encoder.layer"] * 2
    recipe = Recipe(epochs=3, batch_size=64, optimizer="adamw", lr=2e-3, schedule="one_cycle", weight_decay=0.01)
    fit(sdn, data, recipe=recipe, device="cpu", progress=False)
    val, test = (record(sdn, split) for split in (data.val, data.test))
    assert (test.correct.double().mean(0) > 0.6).all()  # the most frequent of six classes is 0.28 of them
    decisions = replay(test, calibrate(val, max_accuracy_drop=0.01))
    assert decisions.cost < 0.8
    assert decisions.accuracy > test.correct[:, -1].double().mean() - 0.03
