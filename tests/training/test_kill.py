"""Training and recording in a process of its own that is killed, as power cuts and schedulers do it."""

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

def write_half(state, file):
    file.write(b"half")
    file.flush()
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


RECORD = """
import os, pathlib, random, signal, sys, time, torch
from dataclasses import replace
import safetensors.torch, sklearn.datasets
import shallowdeep.storage
from shallowdeep.config import load_config
from shallowdeep.runs.run import Run
from shallowdeep.storage import write_json

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def is_due():
    global whole_before
    whole_before -= 1
    return whole_before < 0

def write_half(tensors, path, metadata):
    if not is_due():
        return safetensors.torch.save_file(tensors, path, metadata=metadata)
    content = safetensors.torch.save(tensors, metadata)
    path.write_bytes(content[:chance.randrange(1, len(content))])
    die()

def load_little(self, net=None):
    whole = load_data(self, net)
    return replace(whole, train=whole.train.sample(60), val=whole.val.sample(40), test=whole.test.sample(40))

def make(folder):
    run = Run.create(folder, load_config(changes={"taps": ["layer1.0"], "threads": 1, "device": "cpu"}))
    run.build(run.load_data()).save(run.weights)
    write_json(folder / "config.json", run.config.model_dump(mode="json"))

def record(folder, moment):
    torch.set_num_threads(1)
    if not folder.exists():
        make(folder)
    if moment == "write":
        shallowdeep.storage.save_file = write_half
    if moment == "rename":
        pathlib.Path.replace = lambda path, target: die() if is_due() else os.replace(path, target)
    os.write(writer, b"!")
    Run.open(folder).record(progress=False)

load_data, chance, whole = Run.load_data, random.Random(int(sys.argv[1])), {}
Run.load_data = load_little
for folder, moment in zip(sys.argv[2::2], sys.argv[3::2]):
    reader, writer = os.pipe()
    whole_before = chance.randrange(3)
    child = os.fork()  # importing PyTorch once is enough
    if child == 0:
        record(pathlib.Path(folder), moment)
        os._exit(0)
    os.read(reader, 1)
    started = time.perf_counter()
    if moment == "random":
        time.sleep(chance.uniform(0.2, 1) * duration)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    duration = time.perf_counter() - started if moment == "never" else duration
    present = sorted(path.name for path in pathlib.Path(folder).glob("traces/*"))
    for path in pathlib.Path(folder).glob("traces/*.safetensors"):
        assert path.read_bytes() == whole.setdefault(path.name, path.read_bytes())  # that of the first attempt
    print(status, folder, moment, *present)
"""


@pytest.mark.slow
def test_killed_while_it_records(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kinds = ["write", "random", "rename", "random", "write", "random", "random", "never"]
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    moments = [(whole, "never"), *((broken, moment) for moment in kinds)]
    process = spawn("-W", "error", "-c", RECORD, seed, *(word for moment in moments for word in moment))
    output, errors = process.communicate(timeout=300)
    print(output.decode())
    lines = [line.split(" ") for line in output.decode().splitlines()]
    killed = [line[0] for line in lines if line[2] in ("write", "rename")]
    assert (lines[0][0], lines[-1][0], *killed) == ("0", "0", "-9", "-9", "-9"), errors.decode()
    # what a killed process left half-written is swept away by the process after
    assert all(line.count(".partial") <= 1 for line in (" ".join(words) for words in lines))
    traces = [f"{split}.safetensors" for split in ("test", "train", "val")]
    for name in ("whole", "broken"):
        assert files(tmp_path / name / "traces") == traces
        assert files(tmp_path / name) == ["config.json", "sdn.safetensors", "traces"]
    for name in ["sdn.safetensors", *(f"traces/{trace}" for trace in traces)]:
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
