import hashlib
import itertools
import pickle
import zipfile

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from shallowdeep.data.encoded import EncodedImages
from shallowdeep.data.files.stores import FileStore, ParquetStore, ZipStore
from shallowdeep.data.images import ImageSet
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.preprocess import Preprocessing
from shallowdeep.data.samples import Augmentation, IndexedSamples
from shallowdeep.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
BYTES = Preprocessing(8, (0.0,) * 3, (1 / 255,) * 3, 1.0)  # batches then hold the bytes themselves
AUGMENT = Augmentation(pad=1, flip=True, min_area=0.4)


@pytest.fixture
def store(tmp_path, noise):
    """Twenty image files of different sizes."""
    paths = [tmp_path / f"{row}.png" for row in range(20)]
    for row, path in enumerate(paths):
        path.write_bytes(noise(row, 9 + row % 5, 8 + row % 3))
    return FileStore(tuple(paths))


def make_set(store, **changes):
    parts = {
        "store": store,
        "labels": torch.arange(20) % 2,
        "ids": torch.arange(20),
        "preprocessing": BYTES,
        "class_names": ("a", "b"),
        "num_workers": 0,
    }
    return EncodedImages(**(parts | changes))


def gather(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def by_hand(path):
    return torch.from_numpy(BYTES.apply(Image.open(path).convert("RGB")).copy())


def test_batches_are_decoded_preprocessed_and_in_order(store):
    data = make_set(store)
    assert isinstance(data, IndexedSamples)
    batches = list(data.batches(8))
    assert [len(batch.ids) for batch in batches] == [8, 8, 4]
    inputs, labels, ids = gather(batches)
    assert (ids.tolist(), labels.tolist()) == (list(range(20)), [0, 1] * 10)
    assert (inputs.dtype, labels.dtype, ids.dtype) == (torch.float32, torch.int64, torch.int64)
    expected = torch.stack([by_hand(path) for path in store.paths])
    assert torch.equal(inputs.round().to(torch.uint8), expected)
    assert torch.equal(data.example_inputs, inputs[:4])
    assert data.subset([3]).example_inputs.shape == (1, 3, 8, 8)


def test_batches_are_normalised(store):
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    (batch,) = make_set(store, preprocessing=Preprocessing(8, mean, std, 1.0)).batches(20)
    raw = torch.stack([by_hand(path) for path in store.paths]).double() / 255
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    # float32, with one product and one difference
    torch.testing.assert_close(batch.inputs, expected.float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_same_seed_gives_the_same_pixels_for_any_workers_and_batch_size(store, workers):
    one = gather(make_set(store).batches(20, augment=AUGMENT, seed=5))
    assert one[2].tolist() != list(range(20))
    other = gather(make_set(store, num_workers=workers).batches(3, augment=AUGMENT, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    later = gather(make_set(store).batches(20, augment=AUGMENT, seed=6))
    assert not torch.equal(one[0][one[2].argsort()], later[0][later[2].argsort()])


def test_an_image_is_changed_as_its_preprocessing_says_and_no_two_alike(store):
    same = FileStore((store.paths[0],) * 20)
    inputs, _, ids = gather(make_set(same).batches(20, augment=AUGMENT, seed=2**64 - 1))
    image = Image.open(store.paths[0]).convert("RGB")
    for pixels, row in zip(inputs.round().to(torch.uint8), ids.tolist(), strict=True):
        random = np.random.default_rng((2**64 - 1, row))
        assert np.array_equal(pixels.numpy(), BYTES.apply_randomly(image, AUGMENT, random))
    assert len({pixels.numpy().tobytes() for pixels in inputs}) == 20


def test_without_augmentation_a_seed_shuffles_alone(store):
    for augment in (None, Augmentation()):
        inputs, _, ids = gather(make_set(store).batches(7, augment=augment, seed=1))
        expected = torch.stack([by_hand(store.paths[row]) for row in ids])
        assert torch.equal(inputs.round().to(torch.uint8), expected)


@pytest.mark.parametrize("number", [2, 3])
def test_shards_hold_each_sample_once_and_decode_no_other(store, number, monkeypatch):
    data = make_set(store)
    whole = gather(data.batches(5, augment=AUGMENT, seed=1))
    read, really = [], FileStore.read
    monkeypatch.setattr(FileStore, "read", lambda self, row: read.append(row) or really(self, row))
    shares = [list(data.batches(5, augment=AUGMENT, seed=1, shard=(rank, number))) for rank in range(number)]
    assert sorted(read) == list(range(20))
    together = gather(itertools.chain(*shares))
    first, second = whole[2].argsort(), together[2].argsort()
    assert all(torch.equal(a[first], b[second]) for a, b in zip(whole, together, strict=True))


@pytest.mark.parametrize(("drop_last", "count"), [(False, 3), (True, 2)])
def test_drop_last(store, drop_last, count):
    data = make_set(store)
    assert data.num_batches(8, drop_last) == count == len(list(data.batches(8, drop_last=drop_last)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_does_not_move(store, workers):
    before = torch.get_rng_state()
    list(make_set(store, num_workers=workers).batches(8, augment=AUGMENT, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_channels_last_changes_the_layout_alone(store):
    plain, turned = (next(make_set(store).batches(4, channels_last=last)).inputs for last in (False, True))
    assert turned.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, turned)


def test_subset_and_sample_keep_ids(store):
    part = make_set(store).subset([4, 1], split="val")
    assert (part.ids.tolist(), part.labels.tolist(), part.split, len(part)) == ([4, 1], [0, 1], "val", 2)
    (batch,) = part.batches(2)
    assert torch.equal(batch.inputs[1].round().to(torch.uint8), by_hand(store.paths[1]))
    data = make_set(store, labels=torch.tensor([0] * 16 + [1] * 4))
    assert data.sample(5, seed=4).labels.tolist() == [0, 0, 0, 0, 1]
    assert data.sample(20) is data
    with pytest.raises(DataError, match="no sample 20"):
        data.subset([20])


def test_to_moves_batches(store):
    data = make_set(store)
    (batch,) = data.to("meta").batches(20)
    assert (batch.inputs.device.type, batch.labels.device.type, batch.ids.device.type) == ("meta",) * 3
    assert data.device == torch.device("cpu")


def test_md5_is_of_the_files(store):
    part = make_set(store).subset([2, 0])
    content = store.paths[2].read_bytes() + store.paths[0].read_bytes()
    assert part.md5() == {
        "images": hashlib.md5(content).hexdigest(),
        "labels": hashlib.md5(bytes([0, 0])).hexdigest(),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_once_and_without_a_traceback(store, workers):
    store.paths[13].write_bytes(store.paths[13].read_bytes()[:60])
    with pytest.raises(DataError, match=rf"^{store.paths[13]}: cannot decode the image") as caught:
        list(make_set(store, num_workers=workers).batches(4))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_gone_is_named(store, workers):
    data = make_set(store, num_workers=workers)
    store.paths[7].unlink()
    with pytest.raises(DataError, match=r"cannot read .*7\.png \(No such file"):
        list(data.batches(4))


class Deadly(FileStore):
    """Ends whichever process reads row 9."""

    def read(self, row):
        if row == 9:
            import os

            os._exit(3)
        return super().read(row)


def test_a_worker_that_dies_is_an_error_with_advice(store):
    data = make_set(Deadly(store.paths), num_workers=2)
    with pytest.raises(DataError, match=r"a process that decodes images died .*num_workers=0"):
        list(data.batches(4))


def test_wrong_calls_fail_before_the_first_batch(store):
    data = make_set(store)
    with pytest.raises(ConfigError, match="without a seed"):
        data.batches(4, augment=AUGMENT)
    with pytest.raises(ConfigError, match="batch of 0"):
        data.batches(0)
    decoded = ImageSet(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(2).long(),
        torch.arange(2),
        (0.0,) * 3,
        (1.0,) * 3,
        ("a",),
    )
    with pytest.raises(ConfigError, match=r"images is held decoded, and .*min_area=0\.4.*Take min_area=1\.0"):
        decoded.batches(1, augment=AUGMENT, seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(19).long()}, "19 labels and 20 ids"),
        ({"labels": torch.zeros(0).long(), "ids": torch.zeros(0).long()}, "one image at least"),
        ({"labels": torch.full((20,), 2)}, "label 2 has no class name"),
        ({"ids": torch.arange(1, 21)}, "no row 20: the store has 20"),
        ({"ids": torch.arange(-1, 19)}, "no row -1"),
        ({"ids": torch.zeros(20).long()}, "id 0 is there twice"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"tree": LabelTree((0, 0), ("x", "y"), ("z",))}, "neither the label tree's 2 fine"),
    ],
)
def test_parts_must_fit(store, changes, message, monkeypatch):
    # as users run it: the suite's run-time check of annotations would speak first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(DataError, match=message):
        make_set(store, **changes)


@pytest.fixture
def parquet_store(tmp_path, cache, noise, write_parquet):
    """The same twenty images in two shards, and their bytes."""
    images = [noise(row, 9 + row % 5, 8 + row % 3) for row in range(20)]
    shards = [tmp_path / f"train-{number}.parquet" for number in range(2)]
    write_parquet(shards[0], images[:11], label=[0] * 11)
    write_parquet(shards[1], images[11:], label=[0] * 9, plain=True)
    return ParquetStore(tuple(shards), (11, 9), "image"), images


def test_a_parquet_column_gives_any_row(parquet_store, tmp_path, cache):
    store, images = parquet_store
    assert list(store.contents()) == images
    assert not cache.exists()
    store.prepare()
    assert [store.read(row) for row in (19, 0, 10, 11, 3)] == [images[row] for row in (19, 0, 10, 11, 3)]
    assert store.where(10) == f"{tmp_path / 'train-0.parquet'}, row 10"
    assert store.where(11) == f"{tmp_path / 'train-1.parquet'}, row 0"
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]
    assert [pickle.loads(pickle.dumps(store)).read(row) for row in (5, 12)] == [images[5], images[12]]


def test_parquet_files_and_image_files_give_the_same_batches(parquet_store, store):
    parquet, _ = parquet_store
    for workers in (0, 2):
        one = gather(make_set(parquet, num_workers=workers).batches(6, augment=AUGMENT, seed=1))
        other = gather(make_set(store).batches(6, augment=AUGMENT, seed=1))
        assert torch.equal(one[0], other[0])
    assert make_set(parquet).md5() == make_set(store).md5()


def test_what_was_packed_is_used_again_and_mended(parquet_store, cache):
    store, images = parquet_store
    store.prepare()
    (packed,) = cache.iterdir()
    written = packed.stat().st_mtime_ns
    again = ParquetStore(store.shards, store.counts, store.column)
    again.prepare()
    assert packed.stat().st_mtime_ns == written
    packed.unlink()
    packed.write_bytes(b"ARROW1 cut off")
    from shallowdeep.data.files import stores

    stores._mapped.cache_clear()  # as in another process
    again.prepare()
    assert again.read(14) == images[14]


def test_a_cache_that_cannot_be_written_is_an_error(parquet_store, cache):
    store, _ = parquet_store
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write .* Set SHALLOWDEEP_CACHE"):
        make_set(store)


def test_damaged_shards_leave_nothing_behind(parquet_store, cache):
    store, _ = parquet_store
    store.shards[1].write_bytes(store.shards[1].read_bytes()[:-50])
    with pytest.raises(DataError, match=r"train-1\.parquet is truncated"):
        store.prepare()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("counts", "message"),
    [((11, 8), "8 rows, and 9 of image"), ((11, 10), "10 rows, and 9 of image"), ((12, 8), "12 rows, and 11 of image")],
)
def test_a_column_has_as_many_rows_as_its_file(parquet_store, cache, counts, message):
    store, _ = parquet_store
    damaged = ParquetStore(store.shards, counts, store.column)
    with pytest.raises(DataError, match=rf"train-\d\.parquet has {message}"):
        list(damaged.contents())
    with pytest.raises(DataError, match="Copy or download it again"):
        damaged.prepare()
    assert list(cache.iterdir()) == []


def test_a_zip_file_gives_any_member(tmp_path, store):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in store.paths:
            file.write(image, f"deep/{image.name}")
    zipped = ZipStore(path, tuple(f"deep/{image.name}" for image in store.paths))
    assert list(zipped.contents()) == list(store.contents())
    assert zipped.where(3) == f"{path}, deep/3.png"
    one, other = (gather(make_set(s, num_workers=2).batches(6, seed=1)) for s in (zipped, store))
    assert torch.equal(one[0], other[0])
    with pytest.raises(DataError, match=r"cannot read missing\.png in .*all\.zip"):
        ZipStore(path, ("missing.png",)).read(0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot read deep/3\.png"):
        zipped.read(3)


def test_keys_change_with_the_content(parquet_store, store, tmp_path):
    parquet, _ = parquet_store
    before = (parquet.key(), store.key())
    assert ParquetStore(parquet.shards, parquet.counts, "other").key() != before[0]
    assert FileStore(store.paths[1:]).key() != before[1]
    content = bytearray(parquet.shards[0].read_bytes())
    content[-9] ^= 1
    parquet.shards[0].write_bytes(content)
    store.paths[0].write_bytes(b"another length")
    assert (parquet.key() != before[0], store.key() != before[1]) == (True, True)
