"""Training in a process of its own that is killed, as power cuts and schedulers do it."""

import json
import random
import subprocess
import sys
import time

import pytest
import torch

from shallowdeep.storage import load_tensors

# Taps by name: the search for them would take seconds in every process. 437 images: three batches an epoch.
CONFIG = """
data = "digits"
val_size = 1000
validate_every = 3
network = "resnet20"
taps = ["layer1.0", "layer2.1"]
threads = 1
device = "cpu"
recipe = {name = "fast", epochs = 3}
"""
KILLS = 3


def spawn(*command):
    return subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def epochs_done(folder):
    path = folder / "history.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(folder):
        return spawn("-m", "shallowdeep", "fit", "--config", tmp_path / "config.toml", "--resume", "--out", folder)

    started = time.perf_counter()
    finish(start(whole))
    duration = time.perf_counter() - started

    seed = random.randrange(2**32)
    moments = random.Random(seed)
    print(f"\nseed {seed}: an uninterrupted run takes {duration:.1f} s")
    for _ in range(KILLS):
        # sooner, nothing but imports would be killed; later, a resumed run would be through
        process, moment = start(broken), moments.uniform(0.5, 0.8) * duration
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        print(f"  after {moment:.2f} s: exit {process.returncode}, {epochs_done(broken)} epochs done")
        if process.returncode == 0:
            break
        assert process.returncode == -9
    finish(start(broken))

    expected, found = (load_tensors(folder / "sdn.safetensors", kind="sdn")[0] for folder in (whole, broken))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    histories = [(folder / "history.jsonl").read_text().splitlines() for folder in (whole, broken)]
    kept = [[{**json.loads(line), "seconds": 0} for line in lines] for lines in histories]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3
    assert files(broken) == files(whole)


SCRIPT = """
import os, pathlib, signal, sys, torch
from torch import nn
from shallowdeep.data.sources import load_data
from shallowdeep.networks.attach import attach
from shallowdeep.training.loop import fit
from shallowdeep.training.recipes import Recipe
from shallowdeep.training.strategies import Phase

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(state, path):
    path.write_bytes(b"half")
    die()

def fit_and_save(folder, moment):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_data("digits", val_size=1000)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(10), nn.Flatten(), nn.Linear(36, 10))
    sdn = attach(net, digits.example_inputs, taps=["1"])

    def objective(logits, labels, progress):
        if progress > 0.4 and moment == "write":
            torch.save = write_half
        if progress > 0.4 and moment == "rename":
            pathlib.Path.replace = lambda path, target: die() if target.suffix == ".pt" else os.replace(path, target)
        return nn.functional.cross_entropy(logits[-1], labels)

    phases = (Phase(objective, "all", Recipe(epochs=3, lr=0.1)),)
    fit(sdn, digits, strategy=phases, folder=folder, resume=True, progress=False, device="cpu")
    sdn.save(pathlib.Path(folder) / "sdn.safetensors")

for folder, moment in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()  # importing PyTorch once is enough
    if child == 0:
        fit_and_save(folder, moment)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *sorted(os.listdir(folder)))
"""


@pytest.mark.slow
def test_killed_while_it_saves(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    moments = [(whole, "never"), (broken, "write"), (broken, "rename"), (broken, "never")]
    process = spawn("-W", "error", "-c", SCRIPT, *(word for moment in moments for word in moment))
    output, errors = process.communicate(timeout=300)
    lines = output.decode().split("\n")
    assert [line.split(" ")[0] for line in lines] == ["0", "-9", "-9", "0", ""], errors.decode()
    # one half-written file each time, swept away by the process after
    assert [line.count(".partial") for line in lines] == [0, 1, 1, 0, 0]
    assert (broken / "sdn.safetensors").read_bytes() == (whole / "sdn.safetensors").read_bytes()
    assert files(broken) == ["checkpoint.pt", "history.jsonl", "sdn.safetensors"]
