"""What is answered: samples that leave at an exit, and all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DONE = -1  # the id of a row whose sample has its answer, or that only fills a batch up


@dataclass(frozen=True)
class Answers:
    """What was answered, one entry per sample.

    Attributes:
        ids: which samples these are, shape ``(n,)``: their numbers in the order in which they were given.
        labels: the answered class, shape ``(n,)``.
        scores: probabilities, shape ``(n, outputs)``.
        confidences: the largest of them, shape ``(n,)``.
        exits: where each sample left, shape ``(n,)``.
        costs: what that cost, as a share of the plain network, shape ``(n,)``.
    """

    ids: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    confidences: np.ndarray
    exits: np.ndarray
    costs: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def updated(self, later: Answers) -> Answers:
        """These answers, with later ones in the place of their samples' earlier ones; both in the order of ids."""
        places = np.searchsorted(self.ids, later.ids)
        merged = {name: getattr(self, name).copy() for name in ("labels", "scores", "confidences", "exits", "costs")}
        for name, values in merged.items():
            values[places] = getattr(later, name)
        return Answers(self.ids, **merged)

    def __str__(self) -> str:
        shares = {int(exit): float((self.exits == exit).mean()) for exit in np.unique(self.exits)}
        listed = ", ".join(f"exit {exit} {100 * share:.0f} %" for exit, share in shares.items())
        return f"{len(self)} answers at {100 * self.costs.mean():.1f} % of the cost ({listed})"


class Leaving(NamedTuple):
    """Samples that leave at one exit: their ids ``(n,)``, the scores they are answered with ``(n, outputs)``."""

    exit: int
    ids: np.ndarray
    scores: np.ndarray


def settle(
    ids: np.ndarray, stop: np.ndarray, scores: np.ndarray, exit: int, *, last: bool, plan: np.ndarray | None = None
) -> tuple[Leaving, np.ndarray]:
    """Who leaves at an exit.

    Args:
        ids: whose each row is, ``DONE`` where it is nobody's any more.
        stop: what the policy says of each row.
        scores: what each row would be answered.
        exit: index of the exit.
        last: everyone leaves here.
        plan: the exit of each sample by its id, in place of ``stop``.

    Returns:
        Those who leave, and the ids with theirs set to ``DONE``.
    """
    live = ids != DONE
    if plan is not None:
        stop = plan[ids] <= exit
    leaving = live if last else live & stop
    return Leaving(exit, ids[leaving], scores[leaving]), np.where(leaving, DONE, ids)


def live_rows(ids: np.ndarray) -> np.ndarray:
    """Indices of the rows that still want an answer."""
    return (ids != DONE).nonzero()[0]


def collect(leaving: Iterable[Leaving], exits: Sequence[int], costs: Sequence[float]) -> Answers:
    """All that leaves, as one ``Answers`` in the order of the samples.

    Args:
        leaving: at least one.
        exits: index of each exit where samples may leave.
        costs: of leaving there.
    """
    found = list(leaving)
    ids = np.concatenate([one.ids for one in found])
    order = np.argsort(ids, kind="stable")
    left = np.concatenate([np.full(len(one.ids), one.exit) for one in found])[order]
    scores = np.concatenate([one.scores for one in found])[order]
    paid = np.asarray(costs, dtype=np.float64)[np.searchsorted(np.asarray(exits), left)]
    return Answers(ids[order], scores.argmax(-1), scores, scores.max(-1), left, paid)
