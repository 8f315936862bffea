"""Two processes on a CPU, as torchrun starts them, against one process."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from shallowdeep.config import load_config
from shallowdeep.processes import make_fabric
from shallowdeep.runs.run import Run
from shallowdeep.storage import load_tensors

FIT = {
    "data": "digits",
    "recipe.epochs": 1,
    "recipe.batch_size": 64,
    "recipe.precision": "fp32",  # in bf16, where a processor has it, sums of another order differ by more
    "threads": 1,
    "device": "cpu",
    "taps": ["layer1.1", "layer2.1"],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trained ResNet-20 to put exits on."""
    run = Run.create(tmp_path_factory.mktemp("runs") / "plain", load_config(changes={**FIT, "strategy": "plain"}))
    run.fit(progress=False)
    return run


@pytest.fixture(scope="module")
def fitted(plain):
    """The same exits, trained by one process and by two."""
    folder = plain.folder.parent
    changes = {**FIT, "strategy": "ic_only", "init": str(plain.folder)}
    run = Run.create(folder / "one", load_config(changes=changes))
    run.fit(progress=False)
    torchrun("fit", "--out", folder / "two", *options(changes))
    return run, Run.open(folder / "two")


def options(changes):
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def torchrun(*arguments, ok=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [*command, "-m", "shallowdeep", *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert (found.returncode == 0) == ok, found.stderr[-3000:]
    return found


def test_fabric_makes_no_remarks(caplog):
    fabrics = logging.getLogger("lightning_fabric.utilities.rank_zero")
    level = fabrics.level
    with caplog.at_level(logging.INFO):
        make_fabric("cpu", precision="bf16-mixed")
    assert not caplog.records
    assert fabrics.level == level


@pytest.mark.slow
def test_ic_only_training_ends_where_one_process_ends(fitted):
    one, two = (load_tensors(run.weights, kind="sdn")[0] for run in fitted)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    moved = [n for n in one if n.startswith("exits.") and not torch.equal(one[n], two[n])]
    assert moved, "equal to the last bit: the second process did no work"


@pytest.mark.slow
def test_history_counts_all_processes(fitted):
    one, two = (run.folder / "history.jsonl" for run in fitted)
    first, second = (json.loads(path.read_text()) for path in (one, two))
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)
    assert second["train_accuracy"] == pytest.approx(first["train_accuracy"], abs=2e-3)
    assert second["val_accuracy"] == pytest.approx(first["val_accuracy"], abs=2 / 180)


@pytest.mark.slow
def test_record_loses_and_doubles_no_sample(fitted):
    two = fitted[1]
    alone = two.record(progress=False)
    torchrun("record", two.folder)
    for split, trace in alone.items():
        shared = two.trace(split)
        assert torch.equal(shared.ids, trace.ids)
        assert torch.equal(shared.labels, trace.labels)
        for ours, theirs in zip(shared.logits, trace.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_command_starts_both_processes(plain, fitted):
    folder = plain.folder.parent / "started"
    changes = {**FIT, "strategy": "ic_only", "init": str(plain.folder)}
    subprocess.run(
        [sys.executable, "-m", "shallowdeep", "fit", "--out", str(folder), "--devices", "2", *options(changes)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    ours, theirs = (load_tensors(run.weights, kind="sdn")[0] for run in (Run.open(folder), fitted[1]))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_and_leaves_nothing(plain):
    folder = plain.folder.parent / "odd"
    found = torchrun("fit", "--out", folder, *options({**FIT, "recipe.batch_size": 65, "strategy": "plain"}), ok=False)
    assert "a batch of 65 cannot be shared out evenly among 2 processes" in found.stderr
    assert not folder.exists()


PROCESS = """
import json, pathlib, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import shallowdeep as sd
from shallowdeep.processes import join, shard

torch.set_num_threads(1)
join("cpu")
rank = shard()[0]
torch.manual_seed(0)
x = torch.randn(129, 6)
y = (x[:, 0] > 0).long()
net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
net.register_parameter("unused", nn.Parameter(torch.zeros(3)))
sdn = sd.attach(net, x[:2], taps=["1"])
torch.manual_seed(rank)  # every process would shuffle in an order of its own
ids = torch.arange(129)
loader = DataLoader(TensorDataset(x, y, ids), batch_size=64, shuffle=True)  # 64, 64 and one
recipe = sd.Recipe(epochs=2, batch_size=64, lr=0.1)
splits = sd.Splits(train=sd.Stream(loader), val=sd.Stream(DataLoader(TensorDataset(x[:1], y[:1]), batch_size=1)))
history = sd.fit(sdn, splits, recipe=recipe, device="cpu", progress=False)
trace = sd.record(sdn, loader)
one = sd.record(sdn, [(x[:1], y[:1])])
found = {
    "every_id_once": sorted(trace.ids.tolist()) == ids.tolist(),
    "labels_kept": torch.equal(trace.labels, y),
    "recorded_of_one": len(one),
    "loss_is_positive": history[-1]["loss"] > 0,
    "exits": [len(history[-1]["train_accuracy"]), len(history[-1]["val_accuracy"])],
    "weights": sum(p.detach().double().sum().item() for p in sdn.parameters()),
}
pathlib.Path(f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_a_stream_in_two_processes_loses_nothing_and_waits_for_nobody(tmp_path):
    (tmp_path / "script.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run(
        [*command, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "the processes ended at different weights"
    del first["weights"]
    assert first == {
        "every_id_once": True, "labels_kept": True, "recorded_of_one": 1, "loss_is_positive": True, "exits": [2, 2],
    }  # fmt: skip
