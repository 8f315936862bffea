"""What is to be beaten: each target's row, what it rests on, and the training that a gain took."""

import pytest

from shallowdeep.studies.paper.layout import groups_of
from shallowdeep.studies.paper.matrix import DATA
from shallowdeep.studies.paper.targets import TARGETS, show_targets, training_compute


def rows(results, *, gains):
    """A table of the section, the header left out, as lists of cells."""
    lines = show_targets(groups_of(results, DATA))
    tables = "\n".join(lines).split("\n\n")
    table = [text for text in tables if text.startswith("|")][gains]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_every_target_has_a_row_before_anything_is_run():
    found = rows([], gains=False)
    assert [row[2] for row in found] == ["≥ 75 at ≤ 50 %", "≥ 71 at ≤ 75 %", "≥ 78 at ≤ 75 %", "≥ 70 at ≤ 75 %"]
    assert {row[-1] for row in found + rows([], gains=True)} == {"not tested yet"}
    assert len(found) == len(TARGETS)
    assert rows([], gains=True)[0][2:6] == ["IC-only, joint, mixed", "–", "–", "+1.70 / +3.50 / +3.50"]


def test_an_accuracy_counts_within_its_budget(make_result):
    def joint(accuracy, seed=0, **more):
        return make_result("joint", seed=seed, within={0.5: accuracy, 0.75: (0.9, 0.74)}, **more)

    def of_vgg16(*results):
        return [row[3:] for row in rows(results, gains=False) if row[1] == "VGG-16"]

    untested = [["–"] * 5 + ["not tested yet"]]
    assert of_vgg16(make_result(), make_result(network="resnet56")) == untested
    assert of_vgg16(joint((0.75, 0.49))) == [["joint", "fast", "75.00", "49.00", "1", "beaten"]]
    assert of_vgg16(joint((0.749, 0.49))) == [["joint", "fast", "74.90", "49.00", "1", "not beaten"]]
    assert of_vgg16(joint(None)) == [["joint", "fast", "none", "–", "1", "not beaten"]]
    both = of_vgg16(joint((0.76, 0.49)), joint((0.73, 0.51), seed=1))  # the mean over seeds decides
    assert both == [["joint", "fast", "74.50 ± 2.12", "50.00 ± 1.41", "2", "not beaten"]]
    assert of_vgg16(joint((0.76, 0.49)), joint(None, seed=1))[0][-2:] == ["2", "not beaten"]
    assert of_vgg16(joint((0.8, 0.4), label_smoothing=0.1)) == untested
    assert of_vgg16(joint((0.8, 0.4), epochs=3)) == untested
    each = of_vgg16(joint((0.76, 0.49)), make_result("mixed", within={0.5: (0.7, 0.5)}), joint((0.7, 0.4), epochs=25))
    assert [(row[0], row[1], row[-1]) for row in each] == [
        ("joint", "fast", "beaten"),
        ("mixed", "fast", "not beaten"),
        ("joint", "fast, 25 epochs", "not beaten"),
    ]


def test_a_gain_is_of_the_same_seed_and_names_its_training(make_result):
    def run(strategy, accuracy, seed=0, **more):
        return make_result(strategy, seed=seed, within={None: (accuracy, 0.8)}, **more)

    def of_vgg16(*results, data="CIFAR-100"):
        return {row[2]: row[3:] for row in rows(results, gains=True) if row[:2] == [data, "VGG-16"]}

    plain = make_result(epochs=100)
    found = of_vgg16(
        plain,
        run("ic_only", 0.718, epochs=100),
        run("joint", 0.735, epochs=100),
        run("mixed", 0.74, epochs=100),
    )
    # forward: 1 GFLOP for each of 45,000 images; four recorded passes for the exits alone
    assert found["IC-only"] == ["fast, 100 epochs", "+1.80", "+1.70", "13.7", "1.01 / 1.08", "1", "beaten"]
    assert found["joint"] == ["fast, 100 epochs", "+3.50", "+3.50", "13.5", "1.00 / 1.00", "1", "not beaten"]
    assert found["mixed"] == [
        "fast, 100 epochs", "+4.00", "+3.50", "27", "2.00 / 1.00", "1", "beaten, with more compute",
    ]  # fmt: skip
    seeds = of_vgg16(
        make_result(accuracy=0.70), make_result(accuracy=0.72, seed=1), run("joint", 0.74), run("joint", 0.77, seed=1)
    )
    assert seeds["joint"][1] == "+4.50 ± 0.71"
    assert seeds["joint"][-2:] == ["2", "beaten"]
    assert seeds["IC-only, mixed"][-1] == "not tested yet"
    assert list(of_vgg16(run("joint", 0.9))) == ["IC-only, joint, mixed"]  # its plain network is missing
    assert list(of_vgg16(make_result(label_smoothing=0.1), run("joint", 0.9))) == ["IC-only, joint, mixed"]
    elsewhere = of_vgg16(make_result(data="cifar10"), run("joint", 0.9, data="cifar10"), data="CIFAR-10")
    assert elsewhere["joint"][2] == "–"
    assert elsewhere["joint"][-1] == "nothing published"


def test_compute_of_exits_alone_without_recording(make_result):
    plain = make_result(epochs=25)
    exits = make_result("ic_only", epochs=25, passes=0)
    assert training_compute(plain, plain) == 3 * 25 * 45_000 * 1e9
    assert training_compute(exits, plain) == pytest.approx((3 * 25 + 25) * 45_000 * 1e9)
