"""Samples whose inputs are tensors held whole: features, token ids, several inputs at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.labelled import check_labelled, check_pass, labels_md5, own_parts, positions
from shallowdeep.data.labels import LabelTree
from shallowdeep.data.pytrees import map_tensors, row_counts, take_rows, tensors_in, to_channels_last
from shallowdeep.data.samples import Augmentation, Batch
from shallowdeep.data.stratify import stratified_split
from shallowdeep.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class TensorSet:
    """Samples of one split: tensors with samples as rows, on one device.

    Args:
        inputs: a tensor, or a tuple, list or mapping of tensors; a batch is some of their rows, and nothing is
            changed in it. A mapping holds a network's keyword inputs.
        labels: one per sample, in ``0 .. num_classes - 1``, or ``None``.
        ids: tell the samples of one source apart; ``None``: row numbers. Subsets keep them.
        class_names: one per label, or none.
        num_classes: how many labels there are; where not given, of ``class_names``, else the largest label and one.
        name: of the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.
        tree: the labels' two levels, where the data set has two.
        vocab_size: how many token ids there are, where the inputs are such; 0: they are not.

    Raises:
        DataError: the parts do not fit together.

    >>> data = TensorSet(torch.eye(4), torch.tensor([0, 1, 1, 0]))
    >>> [batch.ids.tolist() for batch in data.batches(3)]
    [[0, 1, 2], [3]]
    """

    inputs: Any
    labels: Int[Tensor, " n"] | None = None
    ids: Int[Tensor, " n"] = None  # type: ignore[assignment]
    class_names: tuple[str, ...] = ()
    num_classes: int = 0
    name: str = "tensors"
    split: str = "train"
    tree: LabelTree | None = None
    vocab_size: int = 0

    def __post_init__(self):
        counts = row_counts(self.inputs) | ({len(self.labels)} if self.labels is not None else set())
        if len(counts) != 1 or counts == {0} or not row_counts(self.inputs):
            raise DataError(
                f"inputs and labels have {sorted(counts)} rows. "
                "Give tensors with one row for each sample, and one sample at least."
            )
        count = counts.pop()
        # frozen for others: what was left out is filled in
        object.__setattr__(self, "ids", torch.arange(count, device=self.device) if self.ids is None else self.ids)
        object.__setattr__(self, "num_classes", self.num_classes or len(self.class_names) or self._largest() + 1)
        if len(self.ids) != count or len(self.class_names) not in (0, self.num_classes):
            raise DataError(
                f"there are {len(self.ids)} ids for {count} samples, and {len(self.class_names)} names for "
                f"{self.num_classes} classes. Give one id for each sample, and name every class or none."
            )
        check_labelled(
            self.labels,
            self.ids,
            class_names=self.class_names,
            num_classes=self.num_classes,
            split=self.split,
            tree=self.tree,
        )

    def _largest(self) -> int:
        return -1 if self.labels is None else int(self.labels.max())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """Where the tensors are, and the batches will be."""
        return next(tensors_in(self.inputs)).device

    @property
    def example_inputs(self) -> Any:
        """The inputs of the first four samples (fewer if there are fewer)."""
        return take_rows(self.inputs, slice(4))

    def to(self, device: str | torch.device) -> TensorSet:
        """The same samples on another device."""
        inputs, labels, ids = map_tensors(lambda tensor: tensor.to(device), (self.inputs, self.labels, self.ids))
        return replace(self, inputs=inputs, labels=labels, ids=ids)

    def subset(self, indices: Sequence[int] | Int[Tensor, " k"], split: str | None = None) -> TensorSet:
        """Some of the samples, in the order given; their ids travel along.

        Args:
            indices: positions in this set (not ids), none twice.
            split: what the subset is called; this set's split when not given.

        Raises:
            DataError: a position is outside the set or given twice.
        """
        chosen = positions(indices, len(self)).to(self.device)
        inputs, labels, ids = take_rows((self.inputs, self.labels, self.ids), chosen)
        return replace(self, inputs=inputs, labels=labels, ids=ids, split=split or self.split)

    def sample(self, n: int, seed: int = 0) -> TensorSet:
        """At most ``n`` samples with the classes in proportion, in their order.

        Args:
            n: how many; the set itself when it has no more.
            seed: the same seed picks the same samples.
        """
        if n >= len(self):
            return self
        labels = torch.zeros(len(self), dtype=torch.int64) if self.labels is None else self.labels
        return self.subset(stratified_split(labels, n, seed)[1])

    def num_batches(self, batch_size: int, drop_last: bool = False) -> int:
        """How many batches ``batches`` gives."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def batches(
        self,
        batch_size: int,
        *,
        augment: Augmentation | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """All samples once, on the set's device.

        The same seed gives the same batches on every device. PyTorch's global random state is neither read nor
        moved.

        Args:
            batch_size: samples per batch; the last batch may be smaller.
            augment: none: how tensors may change is not known.
            seed: of this pass, for the order; ``None`` keeps the set's order.
            drop_last: leave out a smaller last batch.
            channels_last: give floating-point inputs of four dimensions in that memory format.
            shard: ``(rank, number of processes)``: give only this process's share of each batch.

        Raises:
            ConfigError: the batch size is below 1, or there is an augmentation.
        """
        check_pass(batch_size, None, seed)
        if augment not in (None, Augmentation()):
            raise ConfigError(f"{augment} is for images; {self.name} are tensors. Leave it out of the splits.")
        parts = own_parts(len(self), batch_size, drop_last, shard)
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self.device)
            parts = (order[part] for part in parts)
        return (self._batch(rows, channels_last) for rows in parts)

    def _batch(self, rows: slice | Int[Tensor, " b"], channels_last: bool) -> Batch:
        inputs, labels, ids = take_rows((self.inputs, self.labels, self.ids), rows)
        inputs = to_channels_last(inputs) if channels_last else inputs
        return Batch(inputs, None if labels is None else labels.long(), ids.long())

    def md5(self) -> dict[str, str]:
        """Fingerprints of the inputs' bytes, one tensor after the other, and of the labels, if there are any.

        Returns:
            ``inputs`` and ``labels``: the labels as uint8 (as int64 with more than 256 classes).
        """
        digest = hashlib.md5(usedforsecurity=False)
        for tensor in tensors_in(self.inputs):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        labels = {} if self.labels is None else {"labels": labels_md5(self.labels, self.num_classes)}
        return {"inputs": digest.hexdigest(), **labels}
