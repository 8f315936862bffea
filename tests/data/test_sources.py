import hashlib
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from shallowdeep.data.files import parquet
from shallowdeep.data.samples import Augmentation
from shallowdeep.data.sources import data_sets, load_data
from shallowdeep.errors import ConfigError, DataError, UnknownName

NAMES = {"fine_label": ["oak", "cat", "dog", "elm"], "coarse_label": ["plant", "animal"]}
PARENTS = [0, 1, 1, 0]


def encode(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shard(path, first_row, count, *, spoil=None, size=4):
    """Rows like those of uoft-cs/cifar100; the row number is every pixel's red value."""
    rows = range(first_row, first_row + count)
    pixels = [np.dstack([np.full((size, size), v, np.uint8) for v in (row, 7, 9)]) for row in rows]
    for image in pixels:
        image[1, 2] = 200  # one bright pixel off the diagonal tells rows from columns
    images = [{"bytes": encode(image), "path": None} for image in pixels]
    if spoil is not None:
        images[spoil]["bytes"] = b"no image"
    fine = [row % 4 for row in rows]
    table = pa.table(
        {
            "img": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "fine_label": fine,
            "coarse_label": [PARENTS[label] for label in fine],
        }
    )
    features = {column: {"names": names, "_type": "ClassLabel"} for column, names in NAMES.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)


@pytest.fixture
def folder(tmp_path, cache):
    """40 training rows in two shards, 8 test rows in one, as CIFAR-100 would have them."""
    root = tmp_path / "data"
    write_shard(root / "cifar100" / "train-00000-of-00002.parquet", 0, 24)
    write_shard(root / "cifar100" / "train-00001-of-00002.parquet", 24, 16)
    write_shard(root / "cifar100" / "test-00000-of-00001.parquet", 100, 8)
    return root


@pytest.fixture
def decodings(monkeypatch):
    """Names of the shards that were opened, in order."""
    opened, really_open = [], parquet._open
    monkeypatch.setattr(
        parquet, "_open", lambda shard, columns: opened.append(shard.name) or really_open(shard, columns)
    )
    return opened


def test_reads_shards_in_order(folder):
    data = load_data("cifar100", data_dir=folder)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 8)
    for part, offset in ((data.train, 0), (data.val, 0), (data.test, 100)):
        assert part.images[:, 0, 0, 0].tolist() == (part.ids + offset).tolist()
        assert part.images[0, 1:, 3, 3].tolist() == [7, 9]
        assert part.images[0, :, 1, 2].tolist() == [200, 200, 200]
        assert part.labels.tolist() == ((part.ids + offset) % 4).tolist()
    assert sorted(data.train.ids.tolist() + data.val.ids.tolist()) == list(range(40))
    assert data.val.labels.tolist().count(0) == 1
    assert (data.train.split, data.val.split, data.test.split) == ("train", "val", "test")
    assert data.test.ids.tolist() == list(range(8))
    assert data.class_names == ("oak", "cat", "dog", "elm")
    assert data.augment == Augmentation(pad=4, flip=True)
    assert (data.train.mean, data.test.std) == ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


def test_coarse_labels_share_the_split_and_the_tree(folder):
    fine = load_data("cifar100", data_dir=folder)
    coarse = load_data("cifar100", data_dir=folder, labels="coarse")
    assert coarse.class_names == ("plant", "animal")
    assert coarse.val.ids.tolist() == fine.val.ids.tolist()
    assert coarse.train.tree == fine.test.tree
    assert fine.train.tree.parents == (0, 1, 1, 0)
    assert torch.equal(coarse.train.labels, fine.train.tree.coarsen(fine.train.labels))


def test_val_size_and_split_seed(folder):
    data = load_data("cifar100", data_dir=folder, val_size=12)
    assert data.val.labels.bincount().tolist() == [3, 3, 3, 3]
    assert load_data("cifar100", data_dir=folder, val_size=12).val.ids.tolist() == data.val.ids.tolist()
    assert load_data("cifar100", data_dir=folder, val_size=12, seed=1).val.ids.tolist() != data.val.ids.tolist()


def test_without_validation_the_network_learns_from_all(folder):
    data = load_data("cifar100", data_dir=folder, val_size=0)
    assert data.val is None
    assert data.train.ids.tolist() == list(range(40))
    assert data.test.md5() == load_data("cifar100", data_dir=folder).test.md5()
    with pytest.raises(DataError, match="cifar100 has no val split, only train, test"):
        data.split("val")


@pytest.mark.parametrize("val_size", [-1, 40])
def test_val_size_must_leave_something_to_learn_from(folder, val_size):
    with pytest.raises(ConfigError, match=rf"hold out {val_size} of 40 training images\. Take from 0 \(none\) to 39"):
        load_data("cifar100", data_dir=folder, val_size=val_size)


def test_the_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("SHALLOWDEEP_DATA", str(folder))
    assert len(load_data("cifar100").test) == 8
    monkeypatch.setenv("SHALLOWDEEP_DATA", "nowhere")
    assert len(load_data("cifar100", data_dir=folder).test) == 8  # the argument goes first


def test_unknown_names(cache):
    assert data_sets() == ["cifar10", "cifar100", "digits", "tinyimagenet", "trec"]
    with pytest.raises(UnknownName, match=r"no data set 'cifar11'\. Did you mean 'cifar10'"):
        load_data("cifar11")
    with pytest.raises(UnknownName, match="no label set of digits 'coarse'"):
        load_data("digits", labels="coarse")


def test_the_folder_must_hold_the_data_set(folder):
    with pytest.raises(DataError, match=r"no folder .*data/cifar10\. Let --data-dir .* name"):
        load_data("cifar10", data_dir=folder)


def test_a_missing_shard_is_named(folder):
    (folder / "cifar100" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"cifar100 lacks train-00000-of-00002\.parquet"):
        load_data("cifar100", data_dir=folder)
    (folder / "cifar100" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"no train-00000-of-0000N\.parquet under .*cifar100"):
        load_data("cifar100", data_dir=folder)


def test_a_truncated_shard_is_named(folder):
    shard = folder / "cifar100" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet is truncated or no Parquet file"):
        load_data("cifar100", data_dir=folder)


def test_damage_inside_a_shard_is_named(folder):
    shard = folder / "cifar100" / "train-00001-of-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[4:60] = bytes(56)  # the first page's header, behind the magic number
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet is truncated or no Parquet file"):
        load_data("cifar100", data_dir=folder)


def test_an_undecodable_image_is_named_by_file_and_row(folder, cache):
    write_shard(folder / "cifar100" / "train-00001-of-00002.parquet", 24, 16, spoil=5)
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet, row 5: cannot decode"):
        load_data("cifar100", data_dir=folder)
    assert not cache.exists()


def test_images_must_have_one_size(folder):
    write_shard(folder / "cifar100" / "train-00001-of-00002.parquet", 24, 16, size=5)
    with pytest.raises(DataError, match=r"image 24 of cifar100 train is \(5, 5\) pixels, the first \(4, 4\)"):
        load_data("cifar100", data_dir=folder)


def test_foreign_columns_are_named(folder):
    shutil.copytree(folder / "cifar100", folder / "cifar10")
    with pytest.raises(DataError, match=r"has no column label, only img, fine_label, coarse_label"):
        load_data("cifar10", data_dir=folder)


def test_missing_labels_and_names_are_errors(folder):
    shard = folder / "cifar100" / "test-00000-of-00001.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.replace_schema_metadata({}), shard)
    with pytest.raises(DataError, match="does not name the classes of fine_label"):
        load_data("cifar100", data_dir=folder)
    holes = pa.array([None] * 8, pa.int64())
    pq.write_table(table.set_column(1, "fine_label", holes), shard)
    with pytest.raises(DataError, match="8 rows without fine_label"):
        load_data("cifar100", data_dir=folder)


def test_decoded_images_are_kept(folder, cache, decodings):
    first = load_data("cifar100", data_dir=folder)
    assert len(decodings) == 3
    again = load_data("cifar100", data_dir=folder)
    assert len(decodings) == 3
    assert (again.train.md5(), again.test.md5()) == (first.train.md5(), first.test.md5())
    assert (again.class_names, again.train.tree) == (first.class_names, first.train.tree)
    content = (folder / "cifar100" / "test-00000-of-00001.parquet").read_bytes()
    assert (cache / f"cifar100-test-{hashlib.sha256(content).hexdigest()[:16]}.safetensors").is_file()


def damage(content):
    content[-1] ^= 1
    return content


@pytest.mark.parametrize("spoil", [damage, lambda content: content[:-10], lambda content: b""])
def test_a_damaged_cache_is_built_anew(folder, cache, decodings, spoil):
    sound = load_data("cifar100", data_dir=folder).test.md5()
    (file,) = cache.glob("cifar100-test-*")
    content = file.read_bytes()
    file.write_bytes(spoil(bytearray(content)))
    del decodings[:]
    assert load_data("cifar100", data_dir=folder).test.md5() == sound
    assert decodings == ["test-00000-of-00001.parquet"]
    assert file.read_bytes() == content


def test_changed_shards_are_decoded(folder, decodings):
    load_data("cifar100", data_dir=folder)
    write_shard(folder / "cifar100" / "test-00000-of-00001.parquet", 200, 8)
    assert load_data("cifar100", data_dir=folder).test.images[0, 0, 0, 0] == 200
    assert len(decodings) == 4


def test_a_cache_that_cannot_be_written_is_only_a_warning(folder, cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="Set SHALLOWDEEP_CACHE"):
        assert len(load_data("cifar100", data_dir=folder).test) == 8


def test_the_hub_is_the_last_resort(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo, **options):
        asked.append((repo, options))
        return str(folder)  # the shards lie in a folder of it, as on the hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("SHALLOWDEEP_DATA", str(folder / "nowhere"))  # a folder without the set is passed over
    assert len(load_data("cifar100").test) == 8
    assert asked == [("uoft-cs/cifar100", {"repo_type": "dataset", "allow_patterns": "*.parquet"})]


def test_no_folder_and_no_hub(cache, monkeypatch):
    import huggingface_hub

    def unreachable(repo, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DataError, match=r"uoft-cs/cifar10 \(ConnectionError.*SHALLOWDEEP_DATA or --data-dir"):
        load_data("cifar10")


def test_digits(cache):
    data = load_data("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1257, 180, 360)
    assert data.example_inputs.shape == (4, 3, 32, 32)
    assert data.augment == Augmentation(pad=4, flip=False)
    assert data.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert data.test.labels.bincount().tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert torch.equal(data.test.images[:, 0], data.test.images[:, 2])
    assert not cache.exists()


def test_digits_constants_and_enlargement(cache):
    import sklearn.datasets

    data = load_data("digits")
    pixels = torch.cat([part.images[:, 0] for part in (data.train, data.val, data.test)]).double() / 255
    assert (round(pixels.mean().item(), 3), round(pixels.std().item(), 3)) == (0.305, 0.324)
    assert (data.train.mean, data.train.std) == ((0.305,) * 3, (0.324,) * 3)
    raw = torch.from_numpy(sklearn.datasets.load_digits().images) / 16
    assert torch.cat([data.train.ids, data.val.ids]).unique().numel() == 1437
    assert abs(pixels.sum() / 16 - raw.sum()) / raw.sum() < 0.01  # 16 pixels for each; edges weigh more


def test_the_test_digits_do_not_depend_on_the_seed(cache):
    one, two = load_data("digits"), load_data("digits", seed=1, val_size=100)
    assert one.test.md5() == two.test.md5()
    assert len(two.val) == 100


def test_all_digits_but_the_test_ones(cache):
    data = load_data("digits", val_size=0)
    assert (len(data.train), data.val, len(data.test)) == (1437, None, 360)
    assert data.test.md5() == load_data("digits").test.md5()


@pytest.fixture(scope="session")
def cifar(cifar_dir, tmp_path_factory):
    """Both complete data sets, decoded once."""
    folder = tmp_path_factory.mktemp("cifar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHALLOWDEEP_CACHE", str(folder))
        yield {
            ("cifar10", "fine"): load_data("cifar10", data_dir=cifar_dir),
            ("cifar100", "fine"): load_data("cifar100", data_dir=cifar_dir),
            ("cifar100", "coarse"): load_data("cifar100", data_dir=cifar_dir, labels="coarse"),
        }
    shutil.rmtree(folder)  # 360 MB


MD5 = {  # of the decoded arrays: train images, train labels, test images, test labels
    ("cifar10", "fine"): (
        "17e2cb5a4119d89a4a13e02b91701bff",
        "69c5f3349be54915edfca558b72ad888",
        "6d2714505047e13831cd876923568712",
        "251f18ce75337ae9ca5d0dbd7ea62cf4",
    ),
    ("cifar100", "fine"): (
        "111db26282d380128f3126515677de38",
        "00c0899b82d482aefa46cdb301dbaf9c",
        "f56c971f508f38ef6f45ff5a2db65ea6",
        "1ddeb59844e0066662ddddaec17677b9",
    ),
    ("cifar100", "coarse"): (
        "111db26282d380128f3126515677de38",
        "db84efb5a75327fed86c68680a90fea7",
        "f56c971f508f38ef6f45ff5a2db65ea6",
        "dfe9d1a6b3536285cb4c35cfe1568353",
    ),
}


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.parametrize("key", MD5)
def test_cifar_is_complete_and_in_order(cifar, key):
    data = cifar[key]
    ids = torch.cat([data.train.ids, data.val.ids])
    order = ids.argsort()
    assert torch.equal(ids[order], torch.arange(50_000))
    images = torch.cat([data.train.images, data.val.images])[order].permute(0, 2, 3, 1).contiguous()
    labels = torch.cat([data.train.labels, data.val.labels])[order].to(torch.uint8)
    train = (hashlib.md5(images.numpy()).hexdigest(), hashlib.md5(labels.numpy()).hexdigest())
    assert (*train, *data.test.md5().values()) == MD5[key]


@pytest.mark.slow
@pytest.mark.cifar
def test_cifar_splits(cifar):
    ten, fine, coarse = cifar.values()
    assert ten.val.labels.bincount().tolist() == [500] * 10
    assert fine.val.labels.bincount().tolist() == [50] * 100
    assert fine.train.labels.bincount().tolist() == [450] * 100
    assert torch.equal(fine.val.ids, coarse.val.ids)
    assert (ten.num_classes, fine.num_classes, coarse.num_classes) == (10, 100, 20)
    assert ten.class_names[3] == "cat"
    assert ten.train.tree is None
    assert coarse.class_names[fine.train.tree.parents[0]] == "fruit_and_vegetables"  # of apples
    assert ten.train.mean == (0.485, 0.456, 0.406)
    assert ten.train.std == (0.229, 0.224, 0.225)
