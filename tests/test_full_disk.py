"""Disks that are full: one clear line and exit code 2, nothing half-written, and all goes on once there is space.

A limit on the size of files makes a real write fail in the middle, on any Unix and without privileges; where this
process may mount one, a real file system that is too small does it too.
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from shallowdeep.config import load_config
from shallowdeep.runs.run import Run

resource = pytest.importorskip("resource")  # of Unix alone

# One batch an epoch; nothing but what is asked for below is larger than some kilobytes.
CONFIG = """
data = "digits"
val_size = 1300
validate_every = 0
network = "resnet20"
taps = ["layer1.0", "layer2.1"]
threads = 1
device = "cpu"
recipe = {name = "fast", epochs = 3}
"""

# Reads what to do line by line: [words of the command line, checkpoints before the disk is full, bytes that fit].
SCRIPT = """
import contextlib, io, json, os, resource, sys
from dataclasses import replace
from pathlib import Path
import lightning_fabric, sklearn.datasets
import shallowdeep.cli
from shallowdeep.data import sources
from shallowdeep.runs.run import Run

def fill_after(num_checkpoints, num_bytes):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    rename, seen = Path.replace, []

    def counting(path, target):
        rename(path, target)
        seen.extend([1] if target.name == "checkpoint.pt" else [])
        if len(seen) == num_checkpoints:
            fill()

    if num_bytes is not None:
        Path.replace = counting
        if num_checkpoints == 0:
            fill()

def run(words, num_checkpoints, num_bytes):
    load = Run.load_data

    def load_little(self, net=None):
        whole = load(self, net)
        return replace(whole, val=whole.val.sample(30), test=whole.test.sample(30))

    Run.load_data = load_little
    fill_after(num_checkpoints, num_bytes)
    sys.argv = ["shallowdeep", *words]
    if words[0] == "archive":
        shallowdeep.cli.app = lambda prog_name: Run.open(words[1]).archive(words[2])
    shallowdeep.cli.main()

for line in sys.stdin:
    reader, writer = os.pipe()
    child = os.fork()  # importing PyTorch once is enough
    if child == 0:
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            run(*json.loads(line))
        except SystemExit as left:
            os._exit(left.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        errors = file.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), errors]), flush=True)
"""


@pytest.fixture(scope="module")
def shell():
    """Run a command line in a fork of one process, on a disk that has room for so many bytes of each file."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(*words, num_checkpoints=0, num_bytes=None):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([[str(word) for word in words], num_checkpoints, num_bytes]) + "\n")
        process.stdin.flush()
        code, errors = json.loads(process.stdout.readline())
        return code, [line for line in errors.split("\n") if line and "%" not in line]  # no progress bar

    yield run
    process.communicate()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(shell, config, tmp_path_factory):
    """A run that nothing disturbed, recorded."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert shell("fit", "--config", config, "--out", folder) == (0, [])
    assert shell("record", folder) == (0, [])
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of so many kilobytes, and how to enlarge it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size_kb, *options):
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size_kb}k"]), "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            done = False
        if not done:
            pytest.skip("this process may not mount a file system")
        return folder

    yield mount
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def history(folder):
    return [{**json.loads(line), "seconds": 0} for line in (folder / "history.jsonl").read_text().splitlines()]


def assert_told(found, *words):
    code, errors = found
    assert code == 2, errors
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert all(word in errors[0] for word in words), errors


def assert_same_run(folder, whole):
    assert (folder / "sdn.safetensors").read_bytes() == (whole / "sdn.safetensors").read_bytes()
    assert history(folder) == history(whole)


TRAINED = ["checkpoint.pt", "config.json", "environment.json", "history.jsonl", "sdn.safetensors"]


@pytest.mark.parametrize(("num_bytes", "name"), [(100, "config.json"), (10**5, "checkpoint.pt")])
def test_nothing_is_left_of_a_run_that_could_not_keep_an_epoch(num_bytes, name, shell, config, tmp_path):
    found = shell("fit", "--config", config, "--out", tmp_path / "run", num_bytes=num_bytes)
    assert_told(found, "File too large", name)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(shell, config, whole, tmp_path):
    folder = tmp_path / "run"
    found = shell("fit", "--config", config, "--out", folder, num_checkpoints=1, num_bytes=10**5)
    assert_told(found, "File too large", "checkpoint.pt")
    assert files(folder) == TRAINED[:-1]
    # room for both epochs that are left, and then none for the network
    found = shell("fit", "--out", folder, "--resume", num_checkpoints=2, num_bytes=10**5)
    assert_told(found, "File too large", "sdn.safetensors")
    assert files(folder) == TRAINED[:-1]
    assert len(history(folder)) == 3
    assert shell("fit", "--out", folder, "--resume") == (0, [])
    assert files(folder) == TRAINED
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_small_file_system_keeps_the_last_checkpoint(shell, config, whole, small_disk):
    size_kb = (whole / "checkpoint.pt").stat().st_size // 1024
    disk = small_disk(int(1.5 * size_kb))  # for one checkpoint, not for two
    folder = disk / "run"
    assert_told(shell("fit", "--config", config, "--out", folder), "No space left on device", "checkpoint.pt")
    assert files(folder) == TRAINED[:-1]
    assert len(history(folder)) >= 1
    small_disk(10 * size_kb, "remount")
    assert shell("fit", "--out", folder, "--resume") == (0, [])
    assert files(folder) == TRAINED
    assert_same_run(folder, whole)
    # and then none for the Traces
    os.posix_fallocate((file := os.open(disk / "ballast", os.O_CREAT | os.O_RDWR)), 0, _free(disk) - 4096)
    os.close(file)
    assert_told(shell("record", folder), "No space left on device", ".safetensors")
    assert files(folder) == TRAINED
    (disk / "ballast").unlink()
    assert shell("record", folder) == (0, [])
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in files(whole) if "traces" in name)


def _free(disk):
    found = os.statvfs(disk)
    return found.f_bavail * found.f_bsize


def test_record_leaves_whole_traces(shell, whole, tmp_path):
    traces = {path.name: path.read_bytes() for path in (whole / "traces").iterdir()}
    assert set(traces) == {"train.safetensors", "val.safetensors", "test.safetensors"}
    size = len(traces["train.safetensors"]) - 1
    assert max(len(content) for name, content in traces.items() if "train" not in name) < size
    assert_told(shell("record", whole, num_bytes=size), "File too large", "train.safetensors")
    assert {path.name: path.read_bytes() for path in (whole / "traces").iterdir()} == traces


def test_an_archive_is_whole_or_not_there(shell, whole, tmp_path):
    assert_told(shell("archive", whole, tmp_path / "kept", num_bytes=10**5), "File too large", "sdn.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert shell("archive", whole, tmp_path / "kept") == (0, [])
    assert Run.open(tmp_path / "kept").config == load_config(changes=json.loads((whole / "config.json").read_text()))
    assert files(tmp_path) == sorted(f"kept/{name}" for name in files(whole) if name != "checkpoint.pt")
