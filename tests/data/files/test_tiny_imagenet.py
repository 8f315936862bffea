import csv
import io
import zipfile
from contextlib import suppress

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.samples import Augmentation
from shallowdeep.data.sources import load_data
from shallowdeep.errors import DataError

pytestmark = pytest.mark.usefixtures("cache")


def colour(label, row):
    return (40 * label + 20, row, 7)


WNIDS = ("n02", "n01", "n03")  # not sorted, as in the original


def tiny_files(encode):
    """Names and contents as in tiny-imagenet-200.zip; the green value is the file's number."""
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n01\tgoldfish"}
    for label, name in enumerate(sorted(WNIDS)):
        files[f"train/{name}/{name}_boxes.txt"] = b""
        for row in range(12):
            files[f"train/{name}/images/{name}_{row}.JPEG"] = encode(colour(label, row), 64, 64)
    lines = [(f"val_{row}.JPEG", sorted(WNIDS)[row % 3], "0", "0", "62", "62") for row in range(11)]
    text = io.StringIO()
    csv.writer(text, "excel-tab", lineterminator="\n").writerows(lines)
    files["val/val_annotations.txt"] = text.getvalue().encode()
    files |= {f"val/images/val_{row}.JPEG": encode(colour(row % 3, row), 64, 64) for row in range(11)}
    files["test/images/test_0.JPEG"] = b"without a label: left alone"
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_zip(root, files):
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as file:
        for name, content in files.items():
            file.writestr(name, content)


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("place", ["", "tinyimagenet"])
def test_tiny_imagenet_as_its_makers_pack_it(tmp_path, encode, write, place):
    write(tmp_path / "data" / place, tiny_files(encode))
    data = load_data("tinyimagenet", data_dir=tmp_path / "data", val_size=6)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 6, 11)
    assert data.class_names == ("n01", "n02", "n03")
    for part in (data.train, data.val):
        assert part.labels.tolist() == (part.ids // 12).tolist()
        assert part.images[:, 1, 0, 0].tolist() == (part.ids % 12).tolist()  # 10 comes after 9
        assert torch.equal(part.images[:, 0, 5, 5], (40 * part.labels + 20).to(torch.uint8))
    assert data.test.images[:, 1, 0, 0].tolist() == list(range(11))
    assert data.test.labels.tolist() == [row % 3 for row in range(11)]
    assert (data.train.mean, data.train.std) == ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
    assert data.augment == Augmentation(pad=8, flip=True)
    larger = load_data("tinyimagenet", data_dir=tmp_path / "data", val_size=6, preprocessing=Preprocessing(96))
    assert larger.example_inputs.shape == (4, 3, 96, 96)
    assert larger.val.ids.tolist() == data.val.ids.tolist()


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wnids.txt": b"n01\nn02\nn03\nn04"}, r"no training images of \['n04'\]"),
        ({"wnids.txt": b"n01\nn02"}, r"n03_0\.JPEG is of class 'n03', which wnids\.txt does not list"),
        ({"wnids.txt": b"\xff\xfe"}, r"wnids\.txt is no text"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn09"}, r"val_0\.JPEG is of class 'n09'"),
        ({"val/val_annotations.txt": b""}, r"val_0\.JPEG is of class ''"),
    ],
)
def test_tiny_imagenet_that_is_not_whole(tmp_path, encode, write, change, message):
    files = tiny_files(encode) | {f"tiny-imagenet-200/{name}": content for name, content in change.items()}
    write(tmp_path, files)
    with pytest.raises(DataError, match=message):
        load_data("tinyimagenet", data_dir=tmp_path)


def test_tiny_imagenet_without_a_list_or_cut_off(tmp_path, encode):
    files = tiny_files(encode)
    del files["tiny-imagenet-200/wnids.txt"]
    write_folder(tmp_path / "a", files)
    with pytest.raises(DataError, match=r"cannot read .*wnids\.txt \(No such file"):
        load_data("tinyimagenet", data_dir=tmp_path / "a")
    write_zip(tmp_path / "b", tiny_files(encode))
    packed = tmp_path / "b" / "tiny-imagenet-200.zip"
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"tiny-imagenet-200\.zip is truncated or no zip file"):
        load_data("tinyimagenet", data_dir=tmp_path / "b")


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_zip_file_gives_data_or_our_error(tmp_path, encode, cache, data):
    write_zip(tmp_path, tiny_files(encode))
    packed = tmp_path / "tiny-imagenet-200.zip"
    content = bytearray(packed.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # a part of them in the directory at the end
        last = len(content) - 1
        place = data.draw(st.one_of(st.integers(0, last), st.integers(last * 3 // 4, last)))
        content[place] = data.draw(st.integers(0, 255))
    packed.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    with suppress(DataError):  # and no other
        assert load_data("tinyimagenet", data_dir=tmp_path).num_classes == 3
    assert not list(cache.glob(".*partial"))


def test_tiny_imagenet_of_the_hub(tmp_path, encode, write_parquet, monkeypatch):
    import huggingface_hub

    images = [encode(colour(row % 3, row), 64, 64) for row in range(30)]
    for split in ("train", "valid"):
        path = tmp_path / "data" / f"{split}-00000-of-00001-1359597a978bc4fa.parquet"
        write_parquet(path, images, label=[0, 1, 2] * 10, names=("n01", "n02", "n03"))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.append(repo) or str(tmp_path)
    )
    data = load_data("tinyimagenet")
    assert asked == ["zh-plus/tiny-imagenet"]
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 30)
    assert data.test.split == "test"


@pytest.mark.slow
def test_tiny_imagenet_itself(cifar_dir):
    if not (cifar_dir / "tinyimagenet").is_dir():
        pytest.skip(f"no Tiny ImageNet under {cifar_dir}")
    with pytest.warns(UserWarning, match="a part of the data set"):
        data = load_data("tinyimagenet", data_dir=cifar_dir)
    assert (len(data.train), len(data.val), len(data.test)) == (13_500, 1_500, 2_000)
    assert (data.num_classes, data.class_names[0], data.example_inputs.shape) == (200, "n01443537", (4, 3, 64, 64))
    assert data.test.labels.bincount().tolist() == [10] * 200
    table = pq.read_table(cifar_dir / "tinyimagenet" / "val-00000-of-00002.parquet")
    for row in (0, 777, 1999):
        picture = Image.open(io.BytesIO(table["img"][row].as_py()["bytes"])).convert("RGB")
        assert np.array_equal(data.test.images[row].permute(1, 2, 0).numpy(), np.asarray(picture))
        assert data.test.labels[row] == table["label"][row].as_py()
    pixels = data.train.images[::5].float() / 255
    # the authors' constants are of all 100,000 images; the mean of these 2,700 differs by its standard error
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.train.mean), atol=0.01)
