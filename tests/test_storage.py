import pytest
import torch

from shallowdeep.errors import FileFormatError
from shallowdeep.storage import load_tensors, read_json, replacing, save_tensors, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_renames_a_whole_file(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("one")
        assert not path.exists()
        assert partial.parent == path.parent  # a rename cannot cross disks
    assert path.read_text() == "one"
    write_text(path, "zwei: ×")
    assert path.read_text(encoding="utf-8") == "zwei: ×"
    assert names(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "ü": "×"})
    assert read_json(tmp_path / "a.json") == {"b": [1, 2.5, None], "ü": "×"}
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith('"ü": "×"\n}\n')


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": torch.zeros(1)})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_no_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"cannot read .*a\.json as JSON"):
        read_json(tmp_path / "a.json")


def test_missing_files(tmp_path):
    for read in (read_json, lambda path: load_tensors(path, kind="trace")):
        with pytest.raises(FileFormatError, match=r"no file .*nothing"):
            read(tmp_path / "nothing")


def test_a_folder_is_no_file(tmp_path):
    for read in (read_json, lambda path: load_tensors(path, kind="trace")):
        with pytest.raises(FileFormatError, match=str(tmp_path)):
            read(tmp_path)


def test_tensors_round_trip(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "whole": base,
        "view": base[1:, ::2],
        "turned": base.T,
        "image": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "flags": torch.tensor([True, False]),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    save_tensors(tmp_path / "a", tensors, kind="trace", info={"split": "val", "n": 3})
    found, info = load_tensors(tmp_path / "a", kind="trace")
    assert info == {"split": "val", "n": 3}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    assert found["view"].tolist() == [[4.0, 6.0], [8.0, 10.0]]


def test_another_kind_is_refused(tmp_path):
    save_tensors(tmp_path / "a", {}, kind="sdn", info={})
    with pytest.raises(FileFormatError, match=r"a is a sdn, not a trace\."):
        load_tensors(tmp_path / "a", kind="trace")
