from operator import attrgetter

import pytest

from shallowdeep.config import config_keys, load_config
from shallowdeep.errors import ConfigError


def test_defaults():
    config = load_config()
    assert (config.data, config.network, config.strategy, config.recipe.name) == ("digits", "resnet20", "joint", "fast")
    assert config.shares == (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)


def test_toml_then_options_then_text(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('strategy = "plain"\nseed = 4\nshares = [0.2, 0.5]\n[recipe]\nname = "paper"\nepochs = 7\n')
    config = load_config(file, {"seed": 5, "recipe.lr": "0.05"})
    assert (config.strategy, config.seed, config.shares) == ("plain", 5, (0.2, 0.5))
    assert (config.recipe.name, config.recipe.epochs, config.recipe.lr) == ("paper", 7, 0.05)


def test_recipe_takes_the_changes():
    recipe = load_config(changes={"recipe.name": "paper", "recipe.lr": 0.03}).recipe.build("backbone", "vgg16")
    assert (recipe.lr, recipe.epochs, recipe.weight_decay) == (0.03, 100, 5e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": "3"}, r"unknown key 'sead'\. Did you mean seed"),
        ({"recipe.lrr": "3"}, r"unknown key 'recipe\.lrr'\. Did you mean recipe\.lr"),
        ({"seed.x": "3"}, r"unknown key 'seed\.x'|seed = "),
        ({"recipe.lr": "fast"}, r"recipe\.lr = 'fast': .*number"),
        ({"recipe.epochs": "0"}, r"recipe\.epochs = 0: .*greater than 0"),
        ({"zzz": "1"}, r"unknown key 'zzz'\. Known: .*data, data_dir"),
        ({"data.name": "x"}, r"data = .*string"),
        ({"data_options.labls": "coarse"}, r"unknown key 'data_options\.labls'\. Did you mean data_options\.labels"),
        ({"data_options.seed": "x"}, r"data_options\.seed = 'x': .*integer"),
        ({"network_options.num_classes": "3"}, r"network_options = .*leave num_classes out"),
        ({"network_options.image_size": "64"}, r"network_options = .*set image_size"),
        ({"recipe.milestones": "[34, 59]"}, r"recipe\.milestones\.0 = 34: .*less than 1"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(changes=changes)


VALUES = {
    "backdoor.column": ("0", 0),
    "backdoor.rate": ("0.05", 0.05),
    "backdoor.row": ("1", 1),
    "backdoor.seed": ("3", 3),
    "backdoor.side": ("2", 2),
    "backdoor.target": ("dog", "dog"),
    "compile": ("true", True),
    "data": ("cifar10", "cifar10"),
    "data_dir": ("here", "here"),
    "data_options.image_column": ("pixels", "pixels"),
    "data_options.label_column": ("species", "species"),
    "data_options.labels": ("coarse", "coarse"),
    "data_options.seed": ("3", 3),
    "device": ("cpu", "cpu"),
    "devices": ("2", 2),
    "features.dtype": ("fp16", "fp16"),
    "features.folder": ("kept", "kept"),
    "features.passes": ("4", 4),
    "image_size": ("64", 64),
    "init": ("runs/plain", "runs/plain"),
    "network": ("vgg16", "vgg16"),
    "network_options": ("{pretrained = true}", {"pretrained": True}),
    "num_nodes": ("3", 3),
    "recipe.batch_size": ("32", 32),
    "recipe.channels_last": ("true", True),
    "recipe.clip_norm": ("2", 2.0),
    "recipe.epochs": ("3", 3),
    "recipe.label_smoothing": ("0.1", 0.1),
    "recipe.lr": ("1e-2", 0.01),
    "recipe.milestones": ("[0.5, 0.75]", (0.5, 0.75)),
    "recipe.momentum": ("0", 0.0),
    "recipe.name": ("paper", "paper"),
    "recipe.nesterov": ("false", False),
    "recipe.optimizer": ("adam", "adam"),
    "recipe.precision": ("bf16", "bf16"),
    "recipe.schedule": ("constant", "constant"),
    "recipe.warmup": ("0.1", 0.1),
    "recipe.weight_decay": ("0", 0.0),
    "seed": ("7", 7),
    "shares": ("[0.5]", (0.5,)),
    "strategy": ("plain", "plain"),
    "taps": ('["layer1.0"]', ("layer1.0",)),
    "threads": ("2", 2),
    "val_size": ("100", 100),
    "validate_every": ("0", 0),
}


@pytest.mark.parametrize("key", config_keys())
def test_every_key_can_be_set_by_text(key):
    text, value = VALUES[key]
    beside = {"backdoor.target": "dog"} if key == "backdoor.rate" else {}  # a rate without a target is refused
    config = load_config(changes={key: text} | beside)
    assert attrgetter(key)(config) == value


def test_options_that_earlier_versions_took_for_the_datas_are_the_runs():
    config = load_config(changes={"data_options.val_size": "3", "data_options.labels": "coarse"})
    assert (config.val_size, config.data_options.labels) == (3, "coarse")


def test_a_change_that_does_not_go_with_the_recipe():
    with pytest.raises(ConfigError, match=r"the recipe: .*nesterov needs a momentum above 0"):
        load_config(changes={"recipe.momentum": "0"}).recipe.build("backbone", "resnet20")


@pytest.mark.parametrize("text", [b"seed = ", b"\xff\xfe", b"= 3"])
def test_no_toml(tmp_path, text):
    file = tmp_path / "run.toml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"run\.toml as TOML"):
        load_config(file)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*gone\.toml"):
        load_config(tmp_path / "gone.toml")


def test_keys_are_listed_dotted():
    assert "recipe.epochs" in config_keys()
    assert "recipe" not in config_keys()


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"network": "resnet20"}, False),
        ({"network": "resnet20", "init": "runs/plain"}, True),
        ({"network": "resnet20", "network_options.weights": "w.safetensors"}, True),
        ({"network": "timm:resnet18"}, False),
        ({"network": "timm:resnet18", "network_options.pretrained": True}, True),
        ({"network": "hf:vit"}, False),
        ({"network": "hf:google/vit-base-patch16-224"}, True),
        ({"network": "hf:google/vit-base-patch16-224", "network_options.pretrained": False}, False),
        ({"network": "mine:net"}, True),
    ],
)
def test_which_backbones_come_trained(changes, trained):
    assert load_config(changes=changes).starts_trained == trained
