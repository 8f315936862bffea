"""What is a tie: a decision that rounding alone may turn, and that no two run times need to agree on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from shallowdeep.inference.stages import with_thresholds
from shallowdeep.policies.rules import ExitPolicy

TIE = 1e-5  # how far run times may lie apart by rounding

Numbers = Mapping[str, float | int]
"""A policy's numbers by name (``stages.thresholds_of``)."""


def with_numbers(policy: ExitPolicy, numbers: Numbers) -> ExitPolicy:
    """The same policy with other numbers, such as the policy itself would not take among them."""
    return with_thresholds(policy, {name: torch.tensor(number) for name, number in numbers.items()})


def nudged(numbers: Numbers) -> Iterator[dict[str, float | int]]:
    """The numbers with one real one moved by ``TIE``, each in turn, down and up; a decision that turns is a tie.

    >>> [round(moved["threshold"], 5) for moved in nudged({"threshold": 0.9, "patience": 2})]
    [0.89999, 0.90001]
    """
    for name, number in numbers.items():
        for step in (-TIE, TIE) if isinstance(number, float) else ():
            yield {**numbers, name: number + step}
