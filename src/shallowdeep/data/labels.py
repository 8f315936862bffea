"""Which coarse label each fine label belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from shallowdeep.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelTree:
    """Two levels of labels: every fine label has exactly one coarse one.

    Args:
        parents: the coarse label of each fine label, in the order of the fine labels.
        fine_names: one per fine label.
        coarse_names: one per coarse label.

    Raises:
        DataError: the lengths differ, or a parent is no coarse label.

    >>> tree = LabelTree((0, 1, 1), ("oak", "cat", "dog"), ("plant", "animal"))
    >>> tree.coarsen(torch.tensor([2, 0]))
    tensor([1, 0])
    """

    parents: tuple[int, ...]
    fine_names: tuple[str, ...]
    coarse_names: tuple[str, ...]

    def __post_init__(self):
        if len(self.parents) != len(self.fine_names):
            raise DataError(
                f"the label tree has {len(self.parents)} parents and {len(self.fine_names)} fine names. "
                "Give one parent for each fine label."
            )
        foreign = [parent for parent in self.parents if not 0 <= parent < len(self.coarse_names)]
        if foreign:
            raise DataError(
                f"{foreign[0]} is no coarse label: there are {len(self.coarse_names)} coarse names. "
                "Count coarse labels from 0, or name them all."
            )

    @classmethod
    def from_pairs(
        cls,
        fine: Int[Tensor, " n"],
        coarse: Int[Tensor, " n"],
        fine_names: Sequence[str],
        coarse_names: Sequence[str],
    ) -> LabelTree:
        """Read the tree off a data set that carries both labels.

        Args:
            fine: fine label of each sample.
            coarse: coarse label of the same samples.
            fine_names: one per fine label.
            coarse_names: one per coarse label.

        Raises:
            DataError: a fine label comes with two coarse ones, with none, or has no name.
        """
        parents: dict[int, int] = {}
        for child, parent in torch.stack([fine, coarse], dim=1).unique(dim=0).tolist():
            if child in parents:
                raise DataError(
                    f"fine label {child} comes with the coarse labels {parents[child]} and {parent}. "
                    "Give every fine label one coarse label."
                )
            parents[child] = parent
        if set(parents) != set(range(len(fine_names))):
            odd = min(set(parents) ^ set(range(len(fine_names))))
            raise DataError(
                f"fine label {odd} is {'not named' if odd in parents else 'on no sample'}. "
                f"Give samples of exactly the {len(fine_names)} named fine labels."
            )
        return cls(tuple(parents[child] for child in sorted(parents)), tuple(fine_names), tuple(coarse_names))

    @property
    def num_fine(self) -> int:
        """How many fine labels there are."""
        return len(self.fine_names)

    @property
    def num_coarse(self) -> int:
        """How many coarse labels there are."""
        return len(self.coarse_names)

    def coarsen(self, fine_labels: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The coarse label of each fine label.

        Args:
            fine_labels: any shape, each in ``0 .. num_fine - 1``.

        Returns:
            Of the same shape, int64, on the same device.
        """
        return torch.tensor(self.parents, device=fine_labels.device)[fine_labels.long()]

    def pool(self, probs: Float[Tensor, "n fine"]) -> Float[Tensor, "n coarse"]:
        """Probabilities of the coarse labels: the sum over each one's children.

        Args:
            probs: of the fine labels.

        Returns:
            As many rows, one column per coarse label; a row keeps its sum.

        Raises:
            DataError: there are not ``num_fine`` columns.

        >>> tree = LabelTree((0, 1, 1), ("oak", "cat", "dog"), ("plant", "animal"))
        >>> tree.pool(torch.tensor([[0.5, 0.25, 0.25]]))
        tensor([[0.5000, 0.5000]])
        """
        if probs.shape[1] != self.num_fine:
            raise DataError(
                f"the label tree has {self.num_fine} fine labels, the probabilities have {probs.shape[1]} "
                "columns. Give probabilities of the fine labels."
            )
        # a gather and a sum, not index_add: on a GPU that one adds in any order, so reruns would differ
        children = torch.tensor(self._children(), device=probs.device)
        return F.pad(probs, (0, 1))[:, children].sum(dim=2)

    def _children(self) -> list[list[int]]:
        """Children of each coarse label, filled up to one length with a column beyond the last."""
        families = [[f for f, p in enumerate(self.parents) if p == c] for c in range(self.num_coarse)]
        widest = max(map(len, families))
        return [family + [self.num_fine] * (widest - len(family)) for family in families]

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, for JSON."""
        return {
            "parents": list(self.parents),
            "fine_names": list(self.fine_names),
            "coarse_names": list(self.coarse_names),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> LabelTree:
        """Read back what ``to_dict`` wrote.

        Raises:
            DataError: a part is missing, or the parts disagree.
        """
        try:
            return cls(tuple(value["parents"]), tuple(value["fine_names"]), tuple(value["coarse_names"]))
        except KeyError as error:
            raise DataError(f"the label tree lacks {error}. Write it with LabelTree.to_dict.") from None
