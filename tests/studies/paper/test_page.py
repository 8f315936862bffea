"""The page: what was run stands on it, what was not is a dash, and the same results give the same page."""

import json
import re
import shlex
from dataclasses import asdict

import pytest
from studies.conftest import STARTED
from studies.paper.test_claims import effect

from shallowdeep.errors import FileFormatError
from shallowdeep.storage import write_json
from shallowdeep.studies import side_by_side
from shallowdeep.studies.paper.layout import groups_of
from shallowdeep.studies.paper.matrix import DATA
from shallowdeep.studies.paper.page import page_of, write_page
from shallowdeep.studies.paper.reproduction import commands_of


def row_of(page: str, title: str, start: str) -> list[str]:
    """The cells of the first table row after a title that begins so."""
    lines = page[page.index(title) :].splitlines()
    line = next(line for line in lines if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def results(make_result):
    """VGG-16 under two seeds, ResNet-56 plain and jointly; the rest of CIFAR-100 is missing."""
    within = {0.25: None, 0.5: (0.68, 0.51), 0.75: (0.70, 0.74), None: (0.72, 0.9)}
    return [
        make_result(seed=0),
        make_result(seed=1, accuracy=0.72),
        make_result("ic_only", seed=0, within=within),
        make_result("joint", seed=0, within={**within, 0.25: (0.5, 0.24)}),
        make_result("joint", seed=1, accuracy=0.73, within={**within, 0.75: (0.71, 0.75), 0.25: (0.52, 0.26)}),
        make_result("mixed", seed=0, within=within),
        make_result(network="resnet56", accuracy=0.68),
        make_result("joint", network="resnet56", within=within),
    ]


def test_the_papers_layout(results):
    page = page_of(results)
    assert row_of(page, "## CIFAR-100", "VGG-16") == [
        "VGG-16",
        "fast",
        "2/1/2",
        "71.00 ± 1.41",
        "none · 51.00 ± 1.41 <sub>25.0</sub>",
        "68.00 <sub>51.0</sub> · 68.00 ± 0.00 <sub>51.0</sub>",
        "**70.00** <sub>74.0</sub> · 70.50 ± 0.71 <sub>74.5</sub>",  # the seed's own network decides what is bold
        "**72.00** <sub>90.0</sub> · **72.00 ± 0.00** <sub>90.0</sub>",
    ]
    assert row_of(page, "## CIFAR-100", "ResNet-56")[4:6] == ["– · none", "– · **68.00** <sub>51.0</sub>"]
    assert "| MobileNet |" not in page[page.index("## CIFAR-100") : page.index("## The claims")]
    assert "\nNot run yet: WideResNet-32-4, MobileNet.\n" in page
    assert row_of(page, "Mixed training", "VGG-16")[4:6] == ["none", "68.00 <sub>51.0</sub>"]
    assert "Not run yet: CIFAR-10, Tiny ImageNet." in page
    assert "Seeds 0, 1; 10,000 test images." in page


def test_every_section_has_its_figures(results):
    page = page_of(results)
    for words in (
        ("beside thresholds from test", "CIFAR-100 | fast | ResNet-56 | joint", "68.00 / 69.00"),
        ("## Exit by exit", "CIFAR-100 | fast | VGG-16 | *cost*", "101.0"),
        ("## Exit by exit", "CIFAR-100 | fast | VGG-16 | IC-only", "60.00 / 65.00"),
        ("## Overthinking", "CIFAR-100 | fast | VGG-16 | joint", "80.00 ± 0.00"),
        ("## Confusion", "CIFAR-100 | fast | ResNet-56 | joint", "0.700 / 0.800 / 0.800"),
        ("## Confusion", "CIFAR-100 | fast | ResNet-56 | joint", "−0.30 / +0.70"),
        ("## Published", "CIFAR-100 | VGG-16 | published", "74.4 (+3.50)"),
        ("## Published", "CIFAR-100 | VGG-16 | ours, fast", "72.00 ± 0.00 (+1.00) / 73.00 ± 0.00 (+2.00)"),
        ("## Published", "CIFAR-100 | VGG-16 | ours, fast", "2/1/2"),
        ("## How it was run", "CIFAR-100 | fast | VGG-16", "10.0 (30)"),
    ):
        assert words[2] in row_of(page, *words[:2]), words
    assert "Choosing on test would have added 1.00 points on average, 1.00 at most." in " ".join(page.split())
    assert "a processor, 1 thread; PyTorch 2.13.0, Python 3.11.7: 8 cells, 1.3 hours of training" in page
    assert "shallowdeep study paper --only 'cifar100/resnet56/joint-*'" not in page  # seed 1 of it was not run
    for claim in ("**Held.**", "**Not held.**", "**Not tested yet.**"):
        assert claim in page


def test_label_smoothing_shows_in_no_confusion(make_result):
    page = page_of([make_result(), make_result("joint", label_smoothing=0.1)])
    section = page[page.index("## Confusion") : page.index("## Published")]
    assert "| joint |" not in section
    assert "left out: cifar100/vgg16/joint-fast-seed0" in " ".join(section.split())


def test_incomplete_data_is_marked(make_result):
    page = page_of([make_result(data="tinyimagenet", n_train=13_500, n_val=1_500)])
    assert "**Not comparable with published figures:** fast (15,000 training images of 100,000)." in page
    assert "ours, fast" not in page
    assert "No run so far tests any." in page
    assert "- 15,000 training images of 100,000: tinyimagenet/vgg16/plain-fast-seed0" in page


def test_lengths_and_what_is_left_out_stand_by_the_claims(make_result):
    results = [make_result(), make_result(epochs=25), make_result(epochs=1), make_result(data="digits", epochs=1)]
    page = page_of(results)
    claims = " ".join(page[page.index("## The claims") : page.index("## Thresholds")].split())
    assert "networks trained for 25 epochs (fast, 1 run), 30 epochs (fast, 1 run);" in claims
    assert "- 1 epoch, fewer than 20: cifar100/vgg16/plain-fast-1epochs-seed0" in claims
    assert "- no data set of the paper; 1 epoch, fewer than 20: digits/vgg16/plain-fast-1epochs-seed0" in claims
    assert "**Not comparable with published figures:** fast, 1 epoch (1 epoch, fewer than 20)." in page
    assert "ours, fast, 25 epochs" in page
    assert "ours, fast, 1 epoch" not in page


def test_cross_fitted_thresholds_are_named(make_result):
    page = page_of([make_result(recipe="paper", n_train=50_000, n_val=0)])
    assert "thresholds come from cross-fitted halves of the test images" in " ".join(page.split())
    assert "cross-fitted" not in page_of([make_result()]).split("## Published")[0]


def test_lengths_stand_apart(make_result):
    page = page_of([make_result(), make_result(epochs=25, accuracy=0.6)])
    assert row_of(page, "## CIFAR-100", "VGG-16 | fast")[3] == "70.00"
    assert row_of(page, "## CIFAR-100", "VGG-16 | fast, 25 epochs")[3] == "60.00"


def test_the_papers_rule_for_unsure_images_stands_beside_ours(make_result):
    theirs = {0.5: None, None: (0.74, 0.8)}
    joint = make_result("joint", within={0.5: (0.68, 0.5), None: (0.72, 0.9)}, as_published=theirs)
    page = page_of([make_result(), joint, make_result("ic_only", within={None: (0.71, 0.9)})])
    assert row_of(page, "## Unsure images", "CIFAR-100 | fast | VGG-16 | joint")[5:] == [
        "68.00 / none",
        "60.00 / 60.00",
        "72.00 / 74.00",
    ]
    assert "| IC-only |" not in page[page.index("## Unsure images") : page.index("## Exit by exit")]
    assert row_of(page, "## Published", "CIFAR-100 | VGG-16 | ours, the paper's rule, fast")[5:] == [
        "–",
        "74.00 (+4.00) / 75.00 (+5.00)",
    ]
    gained = " ".join(page[page.index("Leaving early at the best threshold") :].split())
    assert "the most confident exit's answer, it is +4.00 points (1 run)." in gained


def test_a_budget_that_some_seeds_do_not_meet_says_so(make_result):
    def of(seed, row):
        return make_result("joint", seed=seed, within={0.5: row, 0.75: (0.7, 0.7), None: (0.7, 0.9)})

    page = page_of([make_result(), of(0, (0.6, 0.5)), of(1, None)])
    assert row_of(page, "## CIFAR-100", "VGG-16")[5] == "– · none in 1 of 2"
    assert (
        row_of(page, "beside thresholds", "CIFAR-100 | fast | VGG-16 | joint")[5] == "none in 1 of 2 / none in 1 of 2"
    )
    assert row_of(page, "## Figures to beat", "CIFAR-100 | VGG-16")[5] == "none in 1 of 2"


def test_precision_and_times_without_pauses(make_result):
    run = make_result().model_copy(update={"precisions": ("bf16",), "epoch_seconds": 12.0, "seconds": 5000.0})
    exits = make_result("ic_only").model_copy(update={"epoch_seconds": 1.0})
    page = page_of([run, exits])
    assert row_of(page, "## How it was run", "CIFAR-100 | fast | VGG-16")[3:6] == ["bf16", "6.0 (30)", "10.0 (10)"]
    assert "1 thread; PyTorch 2.13.0, Python 3.11.7, in bf16: 1 cell, 0.1 hours" in page


def written(results, folder):
    for result in results:
        write_json(folder / f"{result.name}.json", result.to_dict())
    return folder


def test_the_same_results_give_the_same_page(results, tmp_path):
    folder = written(results, tmp_path / "results")
    assert write_page(folder, tmp_path / "one.md") == len(results)
    write_page(folder, tmp_path / "two.md")
    assert (tmp_path / "one.md").read_bytes() == (tmp_path / "two.md").read_bytes()
    assert (tmp_path / "one.md").read_text() == page_of(results[::-1])


def test_prose_and_tables_are_well_formed(results):
    for line in page_of(results).splitlines():
        assert len(line) <= 120 or line.startswith(("|", "shallowdeep"))
    tables = re.findall(r"(?:^\|.*\n)+", page_of(results), re.MULTILINE)
    assert len(tables) >= 9
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def attacked(accuracy, with_policy, data="cifar10"):
    """What ``shallowdeep analyze`` writes of an attacked run."""
    return {**asdict(effect(accuracy, with_policy)), "config": config_of(data)}


def config_of(data):
    return {"data": data, "network": "vgg16", "strategy": "ic_only", "seed": 1, "backdoor": {"target": "dog"}}


def test_by_the_command_line_with_backdoors(results, shell, tmp_path):
    folder = written(results, tmp_path / "results")
    write_json(folder / "backdoor" / "seed0.json", attacked(0.12, 0.85))
    words = ("study", "paper", "--table", "--results", folder, "--out", tmp_path / "page.md")
    code, out, errors = shell(*words)
    assert code == 0, errors
    assert out == f"8 cells are in {tmp_path / 'page.md'}\n"
    page = " ".join((tmp_path / "page.md").read_text().split())
    assert "From 12.0 to 85.0 % on triggered samples" in page
    assert "n = 1 run of VGG-16, 9,000 triggered images" in page
    assert "by `--backdoor`" not in page
    # One from elsewhere counts as well, and the page says that its command alone would leave that out.
    write_json(tmp_path / "backdoor.json", attacked(0.22, 0.75))
    more = ("--backdoor", tmp_path / "backdoor.json", "--backdoor", folder / "backdoor" / "seed0.json")
    code, _, errors = shell(*words, *more)
    assert code == 0, errors
    page = " ".join((tmp_path / "page.md").read_text().split())
    assert "From 17.0 to 80.0 % on triggered samples" in page
    assert "1 attacked run was given by `--backdoor`" in page


def test_the_page_is_of_all_results(results, shell, tmp_path):
    folder = written(results, tmp_path / "results")
    code, _, errors = shell(
        "study", "paper", "--table", "--epochs", "20", "--results", folder, "--out", tmp_path / "page.md"
    )
    assert code == 2
    assert "--epochs is for cells to run or to list; --table writes all that lies under --results" in errors
    assert not (tmp_path / "page.md").exists()


def test_a_backdoor_among_the_cells_is_told_its_place(results, tmp_path):
    folder = written(results, tmp_path / "results")
    write_json(folder / "cifar10" / "backdoor.json", attacked(0.12, 0.85))
    with pytest.raises(FileFormatError, match=r"move it to .*results/backdoor\."):
        write_page(folder, tmp_path / "page.md")


def test_damaged_results_make_no_page(results, tmp_path):
    folder = written(results, tmp_path / "results")
    damaged = [folder / f"{result.name}.json" for result in results[:2]]
    damaged[0].write_text("{")
    damaged[1].write_text("{}")
    (tmp_path / "page.md").write_text("as it was")
    with pytest.raises(FileFormatError) as caught:
        write_page(folder, tmp_path / "page.md")
    assert all(str(path) in str(caught.value) for path in damaged)
    assert (tmp_path / "page.md").read_text() == "as it was"


def test_a_backdoor_that_is_none(results, tmp_path):
    folder = written(results, tmp_path / "results")
    for said in (
        {},
        {"config": config_of("cifar10")},
        {**asdict(effect(0.12, 0.85)), "config": 5},
        asdict(effect(0.12, 0.85)),
    ):
        (tmp_path / "backdoor.json").write_text(json.dumps(said))
        with pytest.raises(FileFormatError, match=r"backdoor.json is no result of a backdoor study \("):
            write_page(folder, tmp_path / "page.md", [tmp_path / "backdoor.json"])


def test_the_data_of_a_backdoor_is_read(results, tmp_path):
    folder = written(results, tmp_path / "results")
    write_json(tmp_path / "backdoor.json", {**asdict(effect(0.12, 0.85)), "config": config_of("digits")})
    write_page(folder, tmp_path / "page.md", [tmp_path / "backdoor.json"])
    assert "not CIFAR-10 but digits (1 run)" in " ".join((tmp_path / "page.md").read_text().split())


def asked_by(command, shell, monkeypatch):
    """The cells that a command line would run."""
    asked = []
    monkeypatch.setattr(side_by_side, "run_cells", lambda cells, place, **options: asked.extend(cells) or [])
    code, _, errors = shell(*shlex.split(command)[1:])
    assert code == 0, errors
    return {cell.name: cell for cell in asked}


def test_the_commands_run_the_cells_of_the_page_and_no_others(make_result, shell, monkeypatch):
    more = {"recipe": "paper", "epochs": 25, "n_train": 50_000, "n_val": 0, "threads": 4}
    unusual = [make_result(network=network, seed=seed) for network in ("vgg16", "resnet20") for seed in (0, 1)]
    results = [
        *unusual,
        make_result(threads=2, data="cifar10"),
        make_result("joint", data="cifar10", network="resnet56"),
        make_result("ic_only", data="cifar10", network="resnet56", passes=0),
        make_result("ic_only", data="cifar10", network="mobilenet"),
        *(make_result(strategy, data="digits", **more) for strategy in ("plain", "mixed")),
        make_result(data="tinyimagenet", seed=3),
        make_result("joint", data="tinyimagenet", seed=4),
    ]
    for group in groups_of(results, DATA):
        asked = {}
        assert len(commands_of(group)) == (3 if group.data == "cifar10" else 1)
        for command in commands_of(group):
            assert f"\n{command}\n" in page_of(results)
            cells = asked_by(command, shell, monkeypatch)
            assert not asked.keys() & cells.keys()
            asked |= cells
        assert asked.keys() == {result.name for result in group.results}
        for result in group.results:
            assert asked[result.name].config.threads == result.config.threads
            assert asked[result.name].config.features == result.config.features
            assert result.config.seed == asked[result.name].config.seed


def test_a_pattern_stands_where_it_selects_just_what_was_run(make_result):
    def commands(*kinds):
        [group] = groups_of([make_result(s, data="cifar10", network=n, seed=i) for s, n, i in kinds], DATA)
        return commands_of(group)

    strategies = ("plain", "ic_only", "joint", "mixed")
    networks = ("vgg16", "resnet56", "wrn32_4", "mobilenet")
    one = [(strategy, "vgg16", 0) for strategy in strategies]
    every = [(strategy, network, 0) for strategy in strategies for network in networks]
    begin = "shallowdeep study paper --only"
    assert commands(*every) == [f"{begin} 'cifar10/*'"]
    assert commands(*one) == [f"{begin} 'cifar10/vgg16/*'"]
    assert commands(*one[:2]) == [f"{begin} 'cifar10/vgg16/ic_only-*' --only 'cifar10/vgg16/plain-*'"]
    assert commands(("plain", "vgg16", 0), ("plain", "vgg16", 1)) == [f"{begin} 'cifar10/vgg16/plain-*' --seeds 0,1"]
    exits = [make_result(), make_result("ic_only", passes=0)]
    assert [commands_of(group) for group in groups_of(exits, DATA)] == [  # the plain network comes first
        [f"{begin} 'cifar100/vgg16/plain-*'", f"{begin} 'cifar100/vgg16/ic_only-*' --passes 0"]
    ]
    assert commands(("plain", "vgg16", 0), ("joint", "vgg16", 1)) == [
        f"{begin} cifar10/vgg16/joint-fast-seed1 --only cifar10/vgg16/plain-fast-seed0 --seeds 0,1"
    ]


def test_where_starts_differ_is_said(make_result):
    device = STARTED.model_copy(update={"accelerator": "a device", "compiled": True})
    page = page_of(
        [
            make_result(),
            make_result("joint", starts=(device, STARTED)),
            make_result("ic_only", starts=(STARTED, STARTED)),
        ]
    )
    said = " ".join(page[page.index("## How it was run") :].split())
    assert "- a processor, 1 thread; PyTorch 2.13.0, Python 3.11.7: 2 cells, 0.3 hours of training " in said
    assert (
        "- a device, compiled; PyTorch 2.13.0, Python 3.11.7, then a processor, 1 thread; PyTorch 2.13.0, "
        "Python 3.11.7: 1 cell, 0.2 hours of training (cifar100/vgg16/joint-fast-seed0)"
    ) in said
