"""Every network of the zoo against the numbers of the paper's own four, one line each in ``TABLE``."""

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.networks.attach import SHARES, attach, choose_sites, total_flops
from shallowdeep.networks.costs import count_params
from shallowdeep.networks.sites import probe
from shallowdeep.networks.zoo import load_network, networks, spec_of

COLUMNS = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny": (200, 64)}  # classes, pixels


@dataclass
class Row:
    """What is known of a network; tuples hold the columns in order.

    ``taps`` are the authors' positions (where they have none: ours), ``automatic`` what the shares must
    find where that is something else. ``mega_params`` and ``mega_macs`` in millions.
    """

    taps: tuple[str, ...]
    mega_params: tuple[float, ...]
    mega_macs: tuple[float, ...]
    added_params: tuple[int, ...]
    percent: tuple[tuple[float, ...], ...] = ()  # of the plain network's multiply-adds up to each exit
    exit_inputs: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by pixels
    automatic: tuple[str, ...] | None = None


# The last block of a stage and the stage are one place of one cost, and there the last name wins.
TABLE = {
    "vgg16": Row(
        taps=("layers.1", "layers.3", "layers.5", "layers.6", "layers.8", "layers.9"),
        mega_params=(15.254, 15.300, 21.223),
        mega_macs=(313.726, 313.772, 1259.282),
        added_params=(215_105, 2_151_005, 5_530_806),
        percent=(
            (12.60, 30.65, 48.72, 60.76, 78.84, 90.88, 100.07),
            (12.63, 30.74, 48.91, 61.08, 79.38, 91.48, 100.69),
            (12.57, 30.59, 48.64, 60.69, 78.81, 90.93, 100.44),
        ),
        exit_inputs={32: (1024, 2048, 4096, 4096, 8192, 2048), 64: (1024, 2048, 4096, 4096, 8192, 8192)},
    ),
    "resnet56": Row(
        taps=("layer1.3", "layer1.7", "layer2.2", "layer2.6", "layer3.1", "layer3.5"),
        mega_params=(0.856, 0.862, 0.868),
        mega_macs=(125.748, 125.754, 125.760),
        added_params=(35_906, 359_006, 718_006),
        percent=(
            (15.36, 30.38, 44.56, 59.57, 73.75, 88.77, 100.03),
            (15.38, 30.41, 44.63, 59.68, 73.93, 89.02, 100.29),
            (15.40, 30.45, 44.71, 59.80, 74.13, 89.30, 100.57),
        ),
        exit_inputs=dict.fromkeys((32, 64), (256, 256, 512, 512, 1024, 1024)),
    ),
    "wrn32_4": Row(
        taps=("layer1.2", "layer1", "layer2.1", "layer2.3", "layer3.0", "layer3.2"),
        mega_params=(7.404, 7.427, 7.453),
        mega_macs=(1185.336, 1185.359, 1185.384),
        added_params=(143_426, 1_434_206, 2_868_406),
        percent=(
            (16.85, 29.59, 45.69, 58.43, 74.53, 87.27, 100.01),
            (16.85, 29.60, 45.72, 58.47, 74.61, 87.38, 100.12),
            (16.86, 29.62, 45.75, 58.52, 74.69, 87.50, 100.24),
        ),
        exit_inputs=dict.fromkeys((32, 64), (1024, 1024, 2048, 2048, 4096, 4096)),
    ),
    "mobilenet": Row(
        taps=("blocks.2", "blocks.4", "blocks.6", "blocks.8", "blocks.11"),
        mega_params=(3.217, 3.309, 3.412),
        mega_macs=(46.354, 46.447, 185.582),
        added_params=(266_294, 2_662_904, 7_783_405),
        percent=(
            (21.64, 35.78, 49.77, 68.36, 91.42, 100.57),
            (21.99, 36.90, 52.44, 72.59, 96.40, 105.73),
            (21.80, 36.28, 50.96, 70.24, 94.96, 104.19),
        ),
        exit_inputs={32: (2048, 4096, 8192, 8192, 4096), 64: (2048, 4096, 8192, 8192, 16384)},
        automatic=("blocks.1", "blocks.3", "blocks.6", "blocks.7", "blocks.9", "blocks.11"),
    ),
    # By hand: the usual 269,722 and 1,727,962 parameters of shortcuts without weights, and the two
    # projections with batch-norm, 16·32 + 64 and 32·64 + 128; 0.131 M multiply-adds each.
    "resnet20": Row(
        taps=("layer1.0", "layer1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"),
        mega_params=(0.272, 0.278, 0.285),
        mega_macs=(40.813, 40.819, 40.825),
        added_params=(35_906, 359_006, 718_006),
    ),
    "resnet110": Row(
        taps=("layer1.7", "layer1.15", "layer2.5", "layer2.13", "layer3.4", "layer3.12"),
        mega_params=(1.731, 1.737, 1.743),
        mega_macs=(253.150, 253.156, 253.162),
        added_params=(35_906, 359_006, 718_006),
    ),
}

CASES = [(name, column) for name in TABLE for column in COLUMNS]


def build(name, column):
    num_classes, pixels = COLUMNS[column]
    return load_network(name, num_classes=num_classes, image_size=pixels), torch.zeros(1, 3, pixels, pixels)


@cache
def converted(name, column):
    net, example = build(name, column)
    return attach(net, example, taps=TABLE[name].taps)


def test_no_network_is_missing_from_the_table():
    assert sorted(TABLE) == networks()


@pytest.mark.parametrize(("name", "column"), CASES)
def test_parameters_and_multiply_adds(name, column):
    net, example = build(name, column)
    i = list(COLUMNS).index(column)
    assert round(count_params(net) / 1e6, 3) == TABLE[name].mega_params[i]
    assert round(total_flops(net, example) / 2e6, 3) == TABLE[name].mega_macs[i]


PAPER = [(name, column) for name, column in CASES if TABLE[name].percent]


@pytest.mark.parametrize(("name", "column"), PAPER)
def test_what_the_exits_add(name, column):
    sdn, i = converted(name, column), list(COLUMNS).index(column)
    assert [head.linear.in_features for head in sdn.exits] == list(TABLE[name].exit_inputs[COLUMNS[column][1]])
    assert count_params(sdn) - count_params(sdn.backbone) == TABLE[name].added_params[i]
    assert sum(sdn.costs.head_params) == TABLE[name].added_params[i]
    # The facts have two decimals of a percent.
    assert (100 * sdn.costs.relative()).tolist() == pytest.approx(TABLE[name].percent[i], abs=0.01)


@pytest.mark.parametrize("name", ["resnet20", pytest.param("resnet110", marks=pytest.mark.slow)])
def test_what_the_exits_add_to_the_other_networks(name):
    sdn = converted(name, "cifar10")
    assert sum(sdn.costs.head_params) == TABLE[name].added_params[0]


SLOW = {("vgg16", "tiny"), ("resnet110", "cifar10")}  # many sites, or large maps
# The other two differ from the paper's in depth alone: 32 pixels are enough there.
PLACED = [*((name, "cifar10") for name in TABLE), *(case for case in PAPER if case[1] == "tiny")]


@pytest.mark.parametrize(
    ("name", "column"), [pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW)) for case in PLACED]
)
def test_shares_find_the_authors_positions(name, column):
    net, example = build(name, column)
    sites = choose_sites(probe(net, example), SHARES, total_flops(net, example))
    assert tuple(site.name for site in sites) == (TABLE[name].automatic or TABLE[name].taps)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", TABLE)
def test_logits_of_a_batch(name, column):
    net, example = build(name, column)
    with torch.no_grad():
        logits = net.eval()(example.expand(2, -1, -1, -1))
    assert logits.shape == (2, COLUMNS[column][0])
    assert logits.isfinite().all()


def test_a_named_network_knows_how_to_be_built_again():
    spec = spec_of(load_network("resnet20", num_classes=7, image_size=64))
    assert (spec.name, spec.options) == ("resnet20", {"num_classes": 7, "image_size": 64})
    assert spec_of(torch.nn.Linear(2, 2)) is None


def test_unknown_name():
    with pytest.raises(UnknownName, match=r"no network 'resnet65'\. Did you mean 'resnet56'\?"):
        load_network("resnet65", num_classes=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 10, "image_size": 224}, r"vgg16 is made for images of \(32, 64\) pixels, got image_size=224"),
        ({"num_classes": 1}, "at least 2 classes, got num_classes=1"),
    ],
)
def test_unusable_options(options, message):
    with pytest.raises(ConfigError, match=message):
        load_network("vgg16", **options)
