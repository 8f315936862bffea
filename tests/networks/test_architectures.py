"""The benchmark of other libraries' networks, on small ones."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from shallowdeep.errors import IllegalTap

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")

TINY = {"num_hidden_layers": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # ptflops is installed for the benchmark alone
    monkeypatch.setattr(module, "count_with_ptflops", lambda net, inputs: 4 * 1_000)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "architectures.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "architectures.md")
    return module


CASES = {
    "timm:test_convnext": ({"image_size": 64}, "3×64×64"),
    "timm:test_vit": ({"image_size": 64}, "3×64×64"),
    "torchvision:mobilenet_v3_small": ({"image_size": 64}, "3×64×64"),
    "hf:vit": ({**TINY, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8}, "3×32×32"),
    "hf:bert": ({**TINY, "vocab_size": 60, "num_hidden_layers": 3}, "16 tokens, masked"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_check_passes(name, benchmark):
    options, shape = CASES[name]
    row = benchmark.examine(name, options)
    assert row["input"] == shape
    assert row["plain_is_identical"]
    assert row["exits_moved"]
    assert row["backbone_kept"]
    assert row["load_is_identical"]
    assert row["backbone_moved"] > 0.9
    assert len(row["got"]) == len(row["asked"]) == len(row["taps"]) >= 2
    assert row["got"] == sorted(row["got"])
    assert row["legal_sites"] + sum(row["why_not"].values()) == row["sites"]
    assert row["cost_at_the_end"] > 1


def test_texts_are_padded_and_differ(benchmark):
    net = benchmark.load_network("hf:bert", num_classes=3, **TINY, vocab_size=60)
    batch = benchmark.example_batch(net)
    assert batch["attention_mask"].sum(1).tolist() == [16, 12, 9, 6]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == net.config.pad_token_id).all()
    assert len(batch["input_ids"].unique(dim=0)) == 4


def test_a_network_without_places_says_why(benchmark):
    with pytest.raises(IllegalTap, match="0 legal sites"):
        benchmark.examine("hf:gpt2", {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50})


def test_checks_that_fail(benchmark, monkeypatch):
    sdn = benchmark.attach(
        benchmark.load_network("timm:test_vit", num_classes=10, image_size=32),
        torch.zeros(1, 3, 32, 32),
        taps=["blocks.1"],
    )
    x = torch.randn(4, 3, 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda self: None)
        assert benchmark.train_exits(sdn, x) == (False, True)
        assert benchmark.train_all(sdn, x) == 0.0
    with monkeypatch.context() as patch:
        patch.setattr(type(sdn), "freeze_backbone", lambda self, frozen=True: self)
        patch.setattr(benchmark, "step", lambda sdn, logits: [p.data.add_(1) for p in sdn.parameters()])
        assert benchmark.train_exits(sdn, x) == (True, False)
    assert benchmark.load_is_identical(sdn, x)
    monkeypatch.setattr(
        benchmark.ShallowDeepNetwork, "load", lambda path: benchmark.copy.deepcopy(sdn).apply(zero_biases)
    )
    assert not benchmark.load_is_identical(sdn, x)


def zero_biases(module):
    if isinstance(module, torch.nn.Linear):
        module.bias.data.add_(1)


# The page


ROW = {
    "name": "timm:a", "options": {}, "input": "3×8×8", "params": 5, "flops": 2_000, "flops_of_ptflops": 1_000,
    "sites": 9, "legal_sites": 4, "why_not": {}, "asked": [0.3], "got": [0.314], "taps": ["a"],
    "cost_at_the_end": 1.25, "plain_is_identical": True, "exits_moved": True, "backbone_kept": False,
    "backbone_moved": 0.5, "load_is_identical": True, "seconds": 3,
}  # fmt: skip
FAILED = {"name": "timm:b", "failed": "not done after 5 s"}


def test_rows_are_kept_and_written(benchmark, monkeypatch):
    asked = []

    def spawn(name, args):
        asked.append(name)
        return {**ROW, "name": name}

    monkeypatch.setattr(benchmark, "spawn", spawn)
    monkeypatch.setattr(benchmark, "settings", lambda args: {})
    monkeypatch.setattr(benchmark, "ARCHITECTURES", {"timm:a": {}, "timm:b": {}, "timm:c": {}})
    benchmark.PAGE.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    benchmark.RESULTS.write_text(json.dumps({"rows": [FAILED, ROW]}))
    monkeypatch.setattr("sys.argv", ["architectures.py"])
    benchmark.main()
    assert asked == ["timm:c"]
    monkeypatch.setattr("sys.argv", ["architectures.py", "--retry"])
    benchmark.main()
    assert asked == ["timm:c", "timm:b"]
    assert [row["name"] for row in json.loads(benchmark.RESULTS.read_text())["rows"]] == ["timm:a", "timm:b", "timm:c"]
    page = benchmark.PAGE.read_text().splitlines()
    assert (page[0], page[-1]) == ("before", "after")
    assert "old" not in page
    assert "| `timm:a` | 3×8×8 | 0.00 | 2.0000 | 4 of 9 | 31 | 1.250 | ✗ | 50% | ✓ | ✓ |" in page


def test_a_failed_row_has_as_many_cells(benchmark):
    head, rule, row, failed = benchmark.as_table([ROW, FAILED]).splitlines()
    assert head.count("|") == row.count("|") == failed.count("|") == rule.count("|")
    assert failed.startswith("| `timm:b` | not done after 5 s |")


def test_a_network_that_takes_too_long_is_a_row(benchmark):
    args = argparse.Namespace(threads=1, limit=0.01)
    assert benchmark.spawn("timm:resnet50", args)["failed"] == "not done after 0 s"
