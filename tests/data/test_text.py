import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shallowdeep.data.sources import load_data
from shallowdeep.data.text import tokenize, train_tokenizer
from shallowdeep.errors import ConfigError, DataError, UnknownName

pytestmark = pytest.mark.usefixtures("cache")
NAMES = {"coarse_label": ["HUM", "LOC"], "fine_label": ["HUM:ind", "HUM:gr", "LOC:city", "LOC:other"]}
ASKED = ["Who painted it ?", "Which team won ?", "What city is it in ?", "Where is the zoo ?"]


def write(path, rows):
    labels = [row % 4 for row in range(rows)]
    table = pa.table(
        {
            "text": [f"{ASKED[label]} {row}" for row, label in enumerate(labels)],
            "coarse_label": [label // 2 for label in labels],
            "fine_label": labels,
        }
    )
    features = {column: {"names": names, "_type": "ClassLabel"} for column, names in NAMES.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data" / "trec" / "train-00000-of-00001.parquet", 80)
    write(tmp_path / "data" / "trec" / "test-00000-of-00001.parquet", 12)
    return tmp_path / "data"


def test_trec(folder):
    data = load_data("trec", data_dir=folder)
    assert (len(data.train), len(data.val), len(data.test), data.augment) == (72, 8, 12, None)
    assert data.class_names == tuple(NAMES["fine_label"])
    assert data.train.tree.parents == (0, 0, 1, 1)
    assert sorted(data.train.ids.tolist() + data.val.ids.tolist()) == list(range(80))
    assert data.train.labels.tolist() == (data.train.ids % 4).tolist()
    inputs = data.test.inputs
    assert {key: (tuple(value.shape), value.dtype) for key, value in inputs.items()} == {
        "input_ids": ((12, 40), torch.int64),
        "attention_mask": ((12, 40), torch.int64),
    }
    assert (inputs["input_ids"][:, 0] == 1).all()
    assert torch.equal(inputs["attention_mask"], (inputs["input_ids"] != 0).long())
    assert int(inputs["input_ids"].max()) < data.train.vocab_size == data.test.vocab_size
    (batch,) = data.val.batches(100)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_without_validation_the_network_learns_from_all(folder):
    data = load_data("trec", data_dir=folder, val_size=0)
    assert (data.train.ids.tolist(), data.val, len(data.test)) == (list(range(80)), None, 12)


def test_coarse_labels_share_the_split_and_the_tokens(folder):
    fine, coarse = load_data("trec", data_dir=folder), load_data("trec", data_dir=folder, labels="coarse")
    assert coarse.class_names == ("HUM", "LOC")
    assert coarse.val.ids.tolist() == fine.val.ids.tolist()
    assert torch.equal(coarse.train.labels, fine.train.tree.coarsen(fine.train.labels))
    assert coarse.train.md5()["inputs"] == fine.train.md5()["inputs"]
    with pytest.raises(UnknownName, match="no label set of trec 'medium'"):
        load_data("trec", data_dir=folder, labels="medium")


def test_validation_texts_do_not_train_the_tokenizer(folder):
    data = load_data("trec", data_dir=folder, val_size=40)
    texts = pq.read_table(folder / "trec" / "train-00000-of-00001.parquet")["text"].to_pylist()
    tokenizer = train_tokenizer([texts[row] for row in data.train.ids.tolist()], 4000)
    expected = tokenize(tokenizer, [texts[row] for row in data.val.ids.tolist()], 40)
    assert torch.equal(data.val.inputs["input_ids"], expected["input_ids"])
    assert data.val.vocab_size == tokenizer.get_vocab_size()
    whole = train_tokenizer(texts, 4000)
    assert whole.get_vocab_size() != tokenizer.get_vocab_size()


def test_tokens_spell_the_text():
    tokenizer = train_tokenizer(ASKED * 5, 300)
    found = tokenize(tokenizer, ["Where is Zürich ?", "x" * 50], length=20)
    rows = [[id for id in row if id > 1] for row in found["input_ids"].tolist()]
    spelt = "".join(tokenizer.id_to_token(id) for id in rows[0])
    bytes_of = {character: number for number, character in _byte_names()}
    assert bytes(bytes_of[character] for character in spelt).decode() == " where is zürich ?"
    assert len(rows[1]) == 19  # cut off, [CLS] included
    assert found["attention_mask"].sum(1).tolist() == [len(rows[0]) + 1, 20]


def _byte_names():
    """GPT-2's printable character for every byte, as its paper's code makes them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [number for number in range(256) if number not in printable]
    return [(n, chr(n)) for n in printable] + [(n, chr(256 + place)) for place, n in enumerate(rest)]


TRAIN = """
import hashlib
from shallowdeep.data.text import train_tokenizer
words = [f"{a}{b}{a}" for a in "abcdefgh" for b in ("ing", "er", "tion", "able")]
texts = [" ".join(words[i : i + 9]) for i in range(len(words))]
found = hashlib.md5(repr(sorted(train_tokenizer(texts, 330).get_vocab().items())).encode()).hexdigest()
"""


def test_the_same_texts_train_the_same_tokenizer_in_every_process():
    # a trainer that walks a hash table passes within one process and fails between two
    run = subprocess.run([sys.executable, "-c", TRAIN + "print(found)"], capture_output=True, text=True, check=True)
    here: dict = {}
    exec(TRAIN, here)
    assert run.stdout.strip() == here["found"]


def test_a_vocabulary_holds_all_bytes():
    assert train_tokenizer(["a"], 258).get_vocab_size() == 258
    with pytest.raises(ConfigError, match=r"257 tokens are fewer than the bytes. Take 258"):
        train_tokenizer(["a"], 257)


def test_texts_that_are_missing(folder):
    path = folder / "trec" / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "text", pa.array([None] * 12, pa.string())), path)
    with pytest.raises(DataError, match="12 rows without text"):
        load_data("trec", data_dir=folder)
    pq.write_table(table.drop_columns(["text"]), path)
    with pytest.raises(DataError, match="has no column text"):
        load_data("trec", data_dir=folder)
    path.unlink()
    with pytest.raises(DataError, match=r"no test-00000-of-0000N.parquet"):
        load_data("trec", data_dir=folder)


@pytest.mark.slow
def test_trec_itself(cifar_dir):
    if not (cifar_dir / "trec").is_dir():
        pytest.skip(f"no TREC under {cifar_dir}")
    data = load_data("trec", data_dir=cifar_dir)
    assert (len(data.train), len(data.val), len(data.test)) == (4907, 545, 500)
    assert (data.num_classes, data.train.tree.num_coarse, data.train.vocab_size) == (50, 6, 4000)
    assert data.class_names[:2] == ("ABBR:abb", "ABBR:exp")
    cut = (data.train.inputs["attention_mask"][:, -1] == 1).sum().item()
    assert cut <= 15  # of 4,907 questions
    assert data.test.inputs["attention_mask"].sum(1).max() < 40
