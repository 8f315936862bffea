"""Questions as token ids: a small text data set, and the tokenizer that is trained for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.assemble import Held
from shallowdeep.data.files.parquet import find_shards, read_texts
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.samples import Splits
from shallowdeep.data.stratify import stratified_split
from shallowdeep.data.tensors import TensorSet
from shallowdeep.errors import ConfigError, UnknownName, require

PAD, CLS = "[PAD]", "[CLS]"


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where a text data set comes from and how it is cut into tokens.

    Args:
        hub: dataset repository on the Hugging Face hub.
        columns: label set -> its column in the files; the first is the default.
        vocab_size: of the tokenizer that is trained on it.
        length: tokens of a sample, the first one included.
    """

    hub: str
    columns: Mapping[str, str] = field(default_factory=lambda: {"fine": "label"})
    vocab_size: int = 4000
    length: int = 40


TEXTS: dict[str, TextSource] = {
    # 40 tokens hold 99.8 % of the questions whole
    "trec": TextSource("CogComp/trec", {"fine": "fine_label", "coarse": "coarse_label"}),
}


def load_text(name: str, folder: Path, *, labels: str, held: Held) -> Splits:
    """A text data set: token ids and attention masks as keyword inputs.

    The tokenizer is trained on the training samples, after the validation samples were held out of them.

    Args:
        name: of the data set.
        folder: holds its Parquet shards.
        labels: which label set.
        held: how much is held out for validation.

    Raises:
        UnknownName: the data set has no such labels.
        ConfigError: too many samples are held out.
        DataError: the files are missing or damaged.
        MissingExtra: a library that reads them is not installed.
    """
    source = TEXTS[name]
    if labels not in source.columns:
        raise UnknownName(f"label set of {name}", labels, source.columns)
    texts, train, names = read_texts(find_shards(folder, "train"), "text", source.columns)
    test_texts, test, _ = read_texts(find_shards(folder, "test"), "text", source.columns)
    tree = LabelTree.from_pairs(train["fine"], train["coarse"], names["fine"], names["coarse"])
    kept, chosen = stratified_split(train["fine"], held.num_val(len(texts)), held.seed)
    tokenizer = train_tokenizer([texts[row] for row in kept.tolist()], source.vocab_size)

    def make(found: Sequence[str], known: Tensor, split: str) -> TensorSet:
        inputs, size = tokenize(tokenizer, found, source.length), tokenizer.get_vocab_size()
        return TensorSet(inputs, known, class_names=names[labels], name=name, split=split, tree=tree, vocab_size=size)

    whole = make(texts, train[labels], "train")
    val = whole.subset(chosen, "val") if len(chosen) else None
    return Splits(whole.subset(kept), val, make(test_texts, test[labels], "test"))


def train_tokenizer(texts: Sequence[str], vocab_size: int = 4000) -> Any:
    """A byte-level BPE tokenizer in lower case, the same for the same texts.

    Not WordPiece: the ``tokenizers`` library trains that one differently in every run.

    Args:
        texts: to learn the frequent pieces of words from.
        vocab_size: tokens, at most; 258 at least: every byte, ``[PAD]`` (id 0) and ``[CLS]`` (id 1).

    Returns:
        A ``tokenizers.Tokenizer``; its ``save`` keeps it as JSON.

    Raises:
        ConfigError: the vocabulary is too small for all bytes.
        MissingExtra: the library is not installed.
    """
    library = require("tokenizers", extra="text")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ConfigError(f"{vocab_size} tokens are fewer than the bytes. Take {len(alphabet) + 2} or more.")
    tokenizer = library.Tokenizer(library.models.BPE())
    steps = [library.normalizers.NFKC(), library.normalizers.Lowercase()]
    tokenizer.normalizer = library.normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, CLS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str], length: int = 40) -> dict[str, Int[Tensor, "n length"]]:
    """Token ids and attention mask: ``[CLS]``, the text's tokens, and ``[PAD]`` up to the length.

    Args:
        tokenizer: of ``train_tokenizer``, or another one of ``tokenizers`` that has these two tokens.
        texts: at least one.
        length: tokens of each; what is longer is cut off.

    Returns:
        ``input_ids`` and ``attention_mask`` (1 where there is a token), int64.
    """
    cls, pad = tokenizer.token_to_id(CLS), tokenizer.token_to_id(PAD)
    found = [[cls, *encoded.ids][:length] for encoded in tokenizer.encode_batch(list(texts))]
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids in found]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in found]),
    }
