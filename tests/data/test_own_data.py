"""Data of one's own: folders of images, Parquet files, the hub."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.images import ImageSet
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.samples import Augmentation
from shallowdeep.data.sources import load_data
from shallowdeep.errors import ConfigError, DataError, ShallowDeepError, UnknownName

pytestmark = pytest.mark.usefixtures("cache")
CLASSES = ("ant", "bee", "cat")


def colour(label, row):
    return (40 * label + 20, row, 7)


@pytest.fixture
def fill(encode):
    """(folder, rows, classes, size) -> a folder of class folders."""

    def filled(folder, rows, classes=CLASSES, width=8, height=8):
        for label, name in enumerate(classes):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for row in range(rows):
                (folder / name / f"{row:03d}.png").write_bytes(encode(colour(label, row), width, height))
        return folder

    return filled


def shown(data):
    """Label and green value of each sample: class and row of its file."""
    return sorted(zip(data.labels.tolist(), data.images[:, 1, 0, 0].tolist(), strict=True))


def test_a_folder_of_classes_gives_three_splits(fill, tmp_path):
    data = load_data(f"folder:{fill(tmp_path / 'mine', 20)}")
    assert (len(data.train), len(data.val), len(data.test)) == (49, 5, 6)  # a tenth of 60, then of the rest
    assert (data.class_names, data.name) == (CLASSES, f"folder:{tmp_path / 'mine'}")
    assert data.test.labels.bincount().tolist() == [2, 2, 2]
    everything = sorted(shown(data.train) + shown(data.val) + shown(data.test))
    assert everything == [(label, row) for label in range(3) for row in range(20)]
    for part in (data.train, data.val, data.test):
        assert isinstance(part, ImageSet)
        assert torch.equal(part.images[:, 0, 0, 0], (40 * part.labels + 20).to(torch.uint8))
    assert data.augment == Augmentation(pad=1, flip=True)
    assert (data.train.mean, data.train.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_test_split_does_not_depend_on_the_seed(fill, tmp_path):
    folder = fill(tmp_path / "mine", 20)
    one, two = load_data(f"folder:{folder}"), load_data(f"folder:{folder}", seed=1, val_size=9)
    assert one.test.ids.tolist() == two.test.ids.tolist()
    assert (len(two.val), len(two.train)) == (9, 45)
    whole = load_data(f"folder:{folder}", val_size=0)
    assert (len(whole.train), whole.val) == (54, None)
    assert whole.test.ids.tolist() == one.test.ids.tolist()
    assert not set(shown(whole.train)) & set(shown(whole.test))


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_folders_that_are_splits(fill, tmp_path, val):
    for split, rows in (("train", 10), (val, 4), ("test", 3)):
        fill(tmp_path / "mine" / split, rows)
    data = load_data(f"folder:{tmp_path / 'mine'}")
    assert (len(data.train), len(data.val), len(data.test)) == (30, 12, 9)
    assert [part.split for part in (data.train, data.val, data.test)] == ["train", "val", "test"]
    assert data.val.ids.tolist() == list(range(12))
    for val_size in (3, 0):
        with pytest.raises(ConfigError, match=r"has 12 validation samples of its own. Leave val_size out"):
            load_data(f"folder:{tmp_path / 'mine'}", val_size=val_size)


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("seg_train", "seg_test"), ("seg_train/seg_train", "seg_test/seg_test")]
)
def test_folders_that_are_splits_however_named(fill, tmp_path, train, test):
    fill(tmp_path / "mine" / train, 10)
    fill(tmp_path / "mine" / test, 3)
    data = load_data(f"folder:{tmp_path / 'mine'}")
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 9)
    assert data.class_names == CLASSES


def test_a_folder_whose_whole_name_is_a_split_goes_first(fill, tmp_path):
    for folder, rows in (("train", 10), ("train_masks", 7), ("test", 3), ("test_small", 2), ("notes", 1)):
        fill(tmp_path / "mine" / folder, rows)
    data = load_data(f"folder:{tmp_path / 'mine'}")
    assert (len(data.train) + len(data.val), len(data.test)) == (30, 9)


def test_a_class_may_be_called_as_a_split_is(fill, tmp_path):
    data = load_data(f"folder:{fill(tmp_path / 'mine', 20, ('bus', 'car', 'train'))}")
    assert data.class_names == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("val", "test"), "has no folder to train on beside test, val"),
        (("train", "Training", "test"), "has several folders for train: Training, train"),
        (("bus", "car", "steam train"), "steam train are called like splits, bus, car like none"),
    ],
)
def test_folders_that_are_no_splits_together(fill, tmp_path, folders, message):
    for folder in folders:
        fill(tmp_path / "mine" / folder, 3)
    with pytest.raises(DataError, match=message):
        load_data(f"folder:{tmp_path / 'mine'}")


def test_splits_without_class_folders(fill, tmp_path):
    fill(tmp_path / "mine", 3, ("test1", "train"))
    with pytest.raises(DataError, match=r"test1 holds no folder of images for each class: .*/CLASS/NAME\.jpg"):
        load_data(f"folder:{tmp_path / 'mine'}")


def test_what_is_not_there_is_held_out_or_none(fill, tmp_path):
    fill(tmp_path / "mine" / "train", 10)
    fill(tmp_path / "mine" / "val", 4)
    data = load_data(f"folder:{tmp_path / 'mine'}")
    assert (len(data.train), len(data.val), data.test) == (30, 12, None)
    (tmp_path / "mine" / "val").rename(tmp_path / "mine" / "test")
    data = load_data(f"folder:{tmp_path / 'mine'}")
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 12)


def test_hidden_files_other_files_and_deeper_folders(fill, tmp_path, encode):
    folder = fill(tmp_path / "mine", 10)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(b"no image")
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "ant" / "._000.png").write_bytes(b"no image")
    (folder / "ant" / "more").mkdir()
    (folder / "ant" / "more" / "x.JPG").write_bytes(encode(colour(0, 99), format="JPEG"))
    (folder / "empty").mkdir()
    data = load_data(f"folder:{folder}")
    assert data.class_names == CLASSES
    assert len(data.train) + len(data.val) + len(data.test) == 31


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_data(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"no images in .*CLASS/NAME.jpg"):
        load_data(f"folder:{tmp_path}")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot look into .* \(Permission denied\)"):
        load_data(f"folder:{tmp_path}")


def test_a_class_that_only_the_test_split_has(fill, tmp_path):
    fill(tmp_path / "train", 10)
    fill(tmp_path / "test", 3, classes=("ant", "dog"))
    with pytest.raises(DataError, match="has the class 'dog', which the training split has not"):
        load_data(f"folder:{tmp_path}")


def test_classes_missing_in_another_split_keep_their_labels(fill, tmp_path):
    fill(tmp_path / "train", 10)
    fill(tmp_path / "test", 3, classes=("cat",))
    data = load_data(f"folder:{tmp_path}")
    assert (data.test.class_names, data.test.labels.tolist()) == (CLASSES, [2, 2, 2])


def test_images_of_several_sizes_are_decoded_as_they_are_needed(fill, tmp_path):
    folder = fill(tmp_path / "mine", 10)
    fill(folder, 2, classes=("ant",), width=30, height=20)  # two of them are larger now
    data = load_data(f"folder:{folder}")
    assert isinstance(data.train, EncodedImages)
    assert data.train.preprocessing == Preprocessing()
    assert data.augment == Augmentation(flip=True, min_area=0.08)
    assert data.example_inputs.shape == (4, 3, 224, 224)


def test_large_images_are_decoded_as_they_are_needed(fill, tmp_path):
    data = load_data(f"folder:{fill(tmp_path / 'mine', 4, width=97)}")
    assert isinstance(data.test, EncodedImages)


def test_a_preprocessing_is_followed(fill, tmp_path):
    folder, wanted = fill(tmp_path / "mine", 10), Preprocessing(16, (0.0,) * 3, (1 / 255,) * 3, 1.0)
    data = load_data(f"folder:{folder}", preprocessing=wanted)
    held = load_data(f"folder:{folder}")
    assert data.val.ids.tolist() == held.val.ids.tolist()
    (batch,) = data.val.batches(100)
    assert batch.inputs.shape[1:] == (3, 16, 16)
    assert batch.inputs[:, 1, 0, 0].round().tolist() == held.val.images[:, 1, 0, 0].tolist()


def test_a_later_image_of_another_size_is_named(fill, tmp_path):
    folder = fill(tmp_path / "mine", 60)  # the first 64 images decide
    fill(folder, 1, classes=("ant", "bee", "cat", "dog"), width=9)
    fill(folder, 1, classes=("ant", "bee", "cat"))
    with pytest.raises(DataError, match=r"image 180 of .* is \(8, 9\) pixels.*give a preprocessing"):
        load_data(f"folder:{folder}")


def test_a_bad_file_is_named_and_nothing_is_kept(fill, tmp_path, cache):
    folder = fill(tmp_path / "mine", 30)
    (folder / "cat" / "004.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cat/004\.png: cannot decode"):
        load_data(f"folder:{folder}")
    assert not cache.exists()


def test_decoded_folders_are_kept_until_a_file_changes(fill, tmp_path, encode, monkeypatch):
    from shallowdeep.data.files import parquet

    decoded, really = [], parquet.decode
    monkeypatch.setattr(parquet, "decode", lambda content, where: decoded.append(where) or really(content, where))
    folder = fill(tmp_path / "mine", 5)
    first = load_data(f"folder:{folder}")
    assert len(decoded) == 15
    assert load_data(f"folder:{folder}").train.md5() == first.train.md5()
    assert len(decoded) == 15
    (folder / "ant" / "000.png").write_bytes(encode((1, 2, 3), 8, 8) + b" ")
    load_data(f"folder:{folder}")
    assert len(decoded) == 30


def rows_of(encode, rows, first=0):
    return [encode(colour(row % 3, row + first)) for row in range(rows)]


@pytest.mark.parametrize(
    "files",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00002-abcdef.parquet", "data/train-00001-of-00002-abcdef.parquet", "data/test.parquet"),
        ("train.parquet", "train2.parquet", "test.parquet"),
        ("default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"),
        ("Train1.parquet", "Train2.parquet", "Test.parquet"),
        ("ants_train_0.parquet", "ants_train_1.parquet", "ants_testing.parquet"),
        ("ants-TRAIN/0.parquet", "ants-TRAIN/1.parquet", "ants-TEST/0.parquet"),
    ],
)
def test_parquet_files_however_named(tmp_path, encode, write_parquet, files):
    for file, first in zip(files, (0, 15, 100), strict=True):
        write_parquet(
            tmp_path / "mine" / file, rows_of(encode, 15, first), label=[row % 3 for row in range(15)], names=CLASSES
        )
    data = load_data(f"parquet:{tmp_path / 'mine'}")
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 15)
    assert data.class_names == CLASSES
    for part, first in ((data.train, 0), (data.val, 0), (data.test, 100)):
        assert part.images[:, 1, 0, 0].tolist() == (part.ids + first).tolist()
        assert part.labels.tolist() == (part.ids % 15 % 3).tolist()


def test_files_that_belong_to_no_split_are_named(tmp_path, encode, write_parquet):
    for file in ("train", "test", "extra"):
        write_parquet(tmp_path / "mine" / f"{file}.parquet", rows_of(encode, 15), label=[row % 3 for row in range(15)])
    with pytest.warns(UserWarning, match=r"extra\.parquet are called like none of train, val, test and are not read"):
        data = load_data(f"parquet:{tmp_path / 'mine'}")
    assert (len(data.train), len(data.val), len(data.test)) == (14, 1, 15)


def test_one_parquet_file(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "anything.parquet", rows_of(encode, 30), label=[row % 3 for row in range(30)])
    for place in (tmp_path, tmp_path / "anything.parquet"):
        data = load_data(f"parquet:{place}")
        assert (len(data.train), len(data.val), len(data.test)) == (25, 2, 3)
        assert data.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (["bee", "ant", "cat"], ("ant", "bee", "cat"), [1, 0, 2]),
        ([10, 9, 30], ("9", "10", "30"), [1, 0, 2]),
    ],
)
def test_labels_that_are_words_or_any_numbers(tmp_path, encode, write_parquet, values, names, labels):
    write_parquet(tmp_path / "train.parquet", rows_of(encode, 30), kind=values * 10)
    write_parquet(tmp_path / "test.parquet", rows_of(encode, 3), kind=values)
    data = load_data(f"parquet:{tmp_path}", label_column="kind")
    assert (data.class_names, data.test.labels.tolist()) == (names, labels)
    write_parquet(tmp_path / "test.parquet", rows_of(encode, 3), kind=[*values[:2], type(values[0])(77)])
    with pytest.raises(DataError, match=r"test\.parquet, column kind: '77' is none of the 3 classes"):
        load_data(f"parquet:{tmp_path}", label_column="kind")


def test_columns_are_found_or_named(tmp_path, encode, write_parquet):
    images, labels = rows_of(encode, 12), [0, 1, 2] * 4
    write_parquet(tmp_path / "train.parquet", images, image_column="img", labels=labels)
    assert len(load_data(f"parquet:{tmp_path}").class_names) == 3
    write_parquet(tmp_path / "train.parquet", images, image_column="picture", species=labels)
    with pytest.raises(DataError, match=r"has no label column \(label, labels, fine_label\), only picture, species"):
        load_data(f"parquet:{tmp_path}")
    with pytest.raises(DataError, match=r"has no image column \(img, image\)"):
        load_data(f"parquet:{tmp_path}", label_column="species")
    with pytest.raises(DataError, match="has no column kind, only picture, species"):
        load_data(f"parquet:{tmp_path}", label_column="kind")
    data = load_data(f"parquet:{tmp_path}", label_column="species", image_column="picture")
    assert len(data.train) == 10
    with pytest.raises(DataError, match="column species is int64, no encoded images"):
        load_data(f"parquet:{tmp_path}", label_column="species", image_column="species")


def test_fine_and_coarse_labels(tmp_path, encode, write_parquet):
    fine = [0, 1, 2, 3] * 6
    path = tmp_path / "train.parquet"
    write_parquet(path, rows_of(encode, 24), fine_label=fine, coarse_label=[label // 2 for label in fine])
    data = load_data(f"parquet:{tmp_path}", labels="coarse")
    assert data.num_classes == 2
    assert data.train.tree.parents == (0, 0, 1, 1)
    write_parquet(path, rows_of(encode, 24), label=fine)
    with pytest.raises(UnknownName, match=r"no label set of parquet:.* 'coarse'"):
        load_data(f"parquet:{tmp_path}", labels="coarse")


def test_floats_are_no_labels(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", rows_of(encode, 3), label=[0.5, 1.0, 2.0])
    with pytest.raises(DataError, match="column label is double, no labels"):
        load_data(f"parquet:{tmp_path}")


def test_test_labels_that_are_hidden(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", rows_of(encode, 30), label=[0, 1, 2] * 10, names=CLASSES)
    write_parquet(tmp_path / "test.parquet", rows_of(encode, 3), label=[-1] * 3, names=CLASSES)
    with pytest.warns(UserWarning, match="test is left out: its labels are all -1"):
        data = load_data(f"parquet:{tmp_path}")
    assert len(data.test) == 3  # held out of the training images: none of these


def test_splits_must_name_their_classes_alike(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train.parquet", rows_of(encode, 30), label=[0, 1, 2] * 10, names=CLASSES)
    write_parquet(tmp_path / "test.parquet", rows_of(encode, 3), label=[0, 1, 2], names=CLASSES[::-1])
    with pytest.raises(DataError, match=r"classes are called \('cat', 'bee', 'ant'\).*training split \('ant'"):
        load_data(f"parquet:{tmp_path}")


def test_missing_shards_are_a_warning(tmp_path, encode, write_parquet):
    write_parquet(tmp_path / "train-00000-of-00003.parquet", rows_of(encode, 30), label=[0, 1, 2] * 10)
    with pytest.warns(UserWarning, match="has 1 of 3 shards of train: a part of the data set"):
        load_data(f"parquet:{tmp_path}")


def test_several_data_sets_below_one_folder(tmp_path, encode, write_parquet):
    for name in ("one", "two"):
        write_parquet(tmp_path / name / "train.parquet", rows_of(encode, 3), label=[0, 1, 2])
    with pytest.raises(DataError, match=r"train lies in several folders: .*one, .*two. Name the one"):
        load_data(f"parquet:{tmp_path}")


def test_no_parquet_files(tmp_path, encode, write_parquet):
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_data(f"parquet:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="no Parquet files to train on under"):
        load_data(f"parquet:{tmp_path}")
    write_parquet(tmp_path / "test.parquet", rows_of(encode, 3), label=[0, 1, 2])
    with pytest.raises(DataError, match="no Parquet files to train on under"):
        load_data(f"parquet:{tmp_path}")


@pytest.mark.parametrize(("place", "pattern"), [("me/set", "*.parquet"), ("me/set/small", "small/*.parquet")])
def test_the_hub(tmp_path, encode, write_parquet, monkeypatch, place, pattern):
    import huggingface_hub

    write_parquet(tmp_path / "small" / "train-00000-of-00001.parquet", rows_of(encode, 30), label=[0, 1, 2] * 10)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or str(tmp_path)
    )
    assert len(load_data(f"hub:{place}").train) == 25
    assert asked == [("me/set", {"repo_type": "dataset", "allow_patterns": pattern})]
    with pytest.raises(ConfigError, match="hub:alone names no data set"):
        load_data("hub:alone")


def test_arguments_that_do_not_apply(tmp_path):
    for name in ("cifar10", "digits", "trec", f"folder:{tmp_path}"):
        with pytest.raises(ConfigError, match=r"has no columns to choose"):
            load_data(name, image_column="x")
    for name in ("digits", "trec"):
        with pytest.raises(ConfigError, match="no files of images to preprocess"):
            load_data(name, preprocessing=Preprocessing())
    with pytest.raises(ConfigError, match="'folder:' names no place"):
        load_data("folder:")
    with pytest.raises(UnknownName, match=r"no data set 'zip:x'.*folder:…, hub:…, parquet:…"):
        load_data("zip:x")


def test_cifar_with_a_preprocessing(tmp_path, encode, write_parquet):
    images, labels = rows_of(encode, 30), [0, 1, 2] * 10
    for split in ("train", "test"):
        write_parquet(
            tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet",
            images,
            image_column="img",
            label=labels,
            names=CLASSES,
        )
    data = load_data("cifar10", data_dir=tmp_path, preprocessing=Preprocessing(20))
    held = load_data("cifar10", data_dir=tmp_path)
    assert data.example_inputs.shape == (4, 3, 20, 20)
    assert data.val.ids.tolist() == held.val.ids.tolist()


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory, encode, write_parquet):
    path = tmp_path_factory.mktemp("sound") / "train.parquet"
    write_parquet(path, [encode(colour(row % 3, row)) for row in range(30)], label=[0, 1, 2] * 10, names=CLASSES)
    return path.read_bytes()


@given(st.data())
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_parquet_file_gives_data_or_our_error(sound_file, tmp_path, cache, data):
    content = bytearray(sound_file)
    end = len(content)
    for _ in range(data.draw(st.integers(1, 5))):
        # half of them in the footer, where the structure is
        place = data.draw(st.one_of(st.integers(0, end - 1), st.integers(end * 3 // 4, end - 1)))
        content[place] = data.draw(st.integers(0, 255))
    length = data.draw(st.one_of(st.just(end), st.integers(0, end)))
    (tmp_path / "train.parquet").write_bytes(content[:length])
    preprocessing = data.draw(st.sampled_from([None, Preprocessing(8)]))
    try:
        found = load_data(f"parquet:{tmp_path / 'train.parquet'}", preprocessing=preprocessing)
        assert len(list(found.test.batches(2))) > 0
    except ShallowDeepError:
        pass
    assert not list(cache.glob(".*partial"))


@given(st.binary(max_size=300), st.sampled_from([b"", b"PAR1"]))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_no_parquet_file(tmp_path, cache, garbage, frame):
    (tmp_path / "train.parquet").write_bytes(frame + garbage + frame)
    with pytest.raises(DataError, match=r"train\.parquet is truncated or no Parquet file"):
        load_data(f"parquet:{tmp_path}")
    assert not cache.exists()


@pytest.mark.parametrize(
    "metadata",
    [
        b"no json",
        b"[]",
        b'{"info": null}',
        b'{"info": {"features": {"label": {"names": 3}}}}',
        b'{"info": {"features": {"label": {"names": []}}}}',
    ],
)
def test_odd_metadata(tmp_path, encode, write_parquet, metadata):
    path = tmp_path / "train.parquet"
    write_parquet(path, rows_of(encode, 30), label=[0, 1, 2] * 10)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": metadata}), path)
    assert load_data(f"parquet:{tmp_path}").class_names == ("0", "1", "2")


def test_rows_without_an_image(tmp_path, encode, write_parquet):
    path = tmp_path / "train.parquet"
    write_parquet(path, [*rows_of(encode, 29), None], label=[0, 1, 2] * 10)
    with pytest.raises(DataError, match=r"train\.parquet, row 29: cannot decode"):
        load_data(f"parquet:{tmp_path}")
    table = pa.table({"image": pa.array([None] * 3, pa.struct([("path", pa.string())])), "label": [0, 1, 2]})
    pq.write_table(table, path)
    with pytest.raises(DataError, match=r"no encoded images. Name their column with image_column="):
        load_data(f"parquet:{tmp_path}")
