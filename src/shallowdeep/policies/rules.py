"""Exit policies: frozen values that look at one exit's logits at a time and say who may leave.

``start`` and ``step`` are tensor code alone, so that ``torch.export`` takes them into a graph; a threshold may
be given as a tensor there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shallowdeep.errors import ConfigError, UnknownName
from shallowdeep.networks.calls import first_line
from shallowdeep.storage import shown

State = tuple[Tensor, ...]
"""What a policy remembers of each sample: tensors with one row per sample, compacted as features are."""


class Verdict(NamedTuple):
    """What a policy says at one exit.

    Attributes:
        stop: who may leave here, shape ``(rows,)``.
        state: to be handed to the next exit's step.
        scores: what would be answered here, probabilities of shape ``(rows, outputs)``.
        label_space: the label set that answers; ``None``: the only one.
    """

    stop: Bool[Tensor, " rows"]
    state: State
    scores: Float[Tensor, "rows outputs"]
    label_space: str | None = None


@runtime_checkable
class ExitPolicy(Protocol):
    """When to stop, and with which scores to answer.

    At the last exit everyone leaves, whatever ``stop`` says, with that step's ``scores``.

    Attributes:
        kind: name in ``policy.json``.
        exits: the internal exits it looks at; ``None``: all. Those, and no others, are run and paid for.
    """

    kind: ClassVar[str]

    @property
    def exits(self) -> tuple[int, ...] | None:
        """The internal exits it looks at; ``None``: all."""
        ...

    def start(self, rows: int, num_outputs: int) -> State:
        """State before the first exit."""
        ...

    def step(self, state: State, logits: Float[Tensor, "rows outputs"], exit: int) -> Verdict:
        """Look at one exit's logits."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, with ``kind``."""
        ...


@dataclass(frozen=True)
class Confidence:
    """Leave at the first exit whose largest softmax probability reaches a threshold.

    Args:
        threshold: 0: everyone leaves at the first exit; above 1: nobody leaves early.
        exits: the internal exits to look at; ``None``: all.
        answer: of a sample that reaches the end unsure. ``"last"``: the last exit's. ``"most_confident"``:
            that of the most confident exit met, the paper's rule; the cost is full depth all the same.

    Deviation: the paper's fallback is ``answer="most_confident"``.
    Cite: Kaya, Hong & Dumitras, ICML 2019, section 5.1.
    """

    kind: ClassVar[str] = "confidence"
    threshold: float | Tensor
    exits: tuple[int, ...] | None = None
    answer: Literal["last", "most_confident"] = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, Tensor) and not 0 <= self.threshold <= 2:
            raise ConfigError(
                f"a confidence threshold lies between 0 and 1 (above, up to 2: never stop), got {self.threshold}."
            )
        if self.answer not in ("last", "most_confident"):
            raise ConfigError(f"answer is 'last' or 'most_confident', got {self.answer!r}.")
        _make_plain(self, "threshold", float)

    def start(self, rows: int, num_outputs: int) -> State:
        """Nothing, or the best confidence met and its scores."""
        return () if self.answer == "last" else (torch.zeros(rows), torch.zeros(rows, num_outputs))

    def step(self, state: State, logits: Float[Tensor, "rows outputs"], exit: int) -> Verdict:
        """Stop where the largest probability reaches the threshold."""
        scores = logits.softmax(-1)
        confidence = scores.amax(-1)
        stop = confidence >= self.threshold
        if self.answer == "last":
            return Verdict(stop, (), scores)
        best, best_scores = state
        better = confidence > best
        state = (torch.where(better, confidence, best), torch.where(better[:, None], scores, best_scores))
        return Verdict(stop, state, state[1])  # who stops here is surer than ever before: these are its scores

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, with ``kind``."""
        return _to_dict(self)


@dataclass(frozen=True)
class Patience:
    """Leave once some exits in a row have repeated the exit before them.

    Args:
        patience: how many exits in a row must agree with the one before; 0: everyone leaves at the first.
        exits: the internal exits to look at; ``None``: all.

    Cite: Zhou et al., "BERT Loses Patience", NeurIPS 2020.
    """

    kind: ClassVar[str] = "patience"
    patience: int | Tensor
    exits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.patience, Tensor) and not (self.patience >= 0 and float(self.patience).is_integer()):
            raise ConfigError(f"patience is a whole number of exits, 0 or more, got {self.patience}.")
        _make_plain(self, "patience", int)

    def start(self, rows: int, num_outputs: int) -> State:
        """The last label met (none yet) and how often it was repeated."""
        return torch.full((rows,), -1), torch.zeros(rows, dtype=torch.long)

    def step(self, state: State, logits: Float[Tensor, "rows outputs"], exit: int) -> Verdict:
        """Stop where the label has been repeated often enough."""
        before, repeats = state
        label = logits.argmax(-1)
        repeats = torch.where(label == before, repeats + 1, torch.zeros_like(repeats))
        return Verdict(repeats >= self.patience, (label, repeats), logits.softmax(-1))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values, with ``kind``."""
        return _to_dict(self)


RULES: dict[str, type] = {rule.kind: rule for rule in (Confidence, Patience)}


def policy_from_dict(values: Any) -> ExitPolicy:
    """Read back what a policy's ``to_dict`` gave.

    Raises:
        UnknownName: there is no policy of that kind.
        ConfigError: its settings are not usable.

    >>> policy_from_dict({"kind": "confidence", "threshold": 0.9, "exits": [0, 2]})
    Confidence(threshold=0.9, exits=(0, 2), answer='last')
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a policy is written as keys and values, got {shown(values)}.")
    settings = dict(values)
    kind, exits = settings.pop("kind", None), settings.get("exits")
    if not isinstance(kind, str) or kind not in RULES:
        raise UnknownName("policy", shown(kind)[1:-1] if isinstance(kind, str) else shown(kind), RULES)
    try:
        if exits is not None:
            if not isinstance(exits, list | tuple) or any(type(exit) is not int for exit in exits):
                raise TypeError(f"exits are whole numbers in a list, got {shown(exits)}")
            settings["exits"] = tuple(exits)
        for value in settings.values():
            if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
                raise TypeError(f"{shown(value)} is no number, or too large")
        return RULES[kind](**settings)
    except (TypeError, OverflowError) as error:
        raise ConfigError(f"the settings {shown(dict(values))} are no {kind} policy: {first_line(error)}.") from None


def exits_of(policy: ExitPolicy, num_exits: int) -> list[int]:
    """The exits a policy is run at: the internal ones it looks at, and the last.

    Raises:
        ConfigError: it looks at an exit that the network does not have.
    """
    last = num_exits - 1
    internal = list(range(last)) if policy.exits is None else list(policy.exits)
    if any(exit >= last for exit in internal):
        raise ConfigError(
            f"the policy looks at exits {internal}; this network's internal exits are {list(range(last))}."
        )
    return [*internal, last]


def _make_plain(policy: Any, name: str, kind: type[int] | type[float]) -> None:
    """Check a policy's exits, and keep its numbers as Python's own: numpy's are none to JSON."""
    exits, number = policy.exits, getattr(policy, name)
    if exits is not None:
        if list(exits) != sorted(set(exits)) or any(exit < 0 for exit in exits):
            raise ConfigError(f"exits are indices from shallow to deep, each once, got {exits}.")
        object.__setattr__(policy, "exits", tuple(map(int, exits)))
    if not isinstance(number, Tensor):
        object.__setattr__(policy, name, kind(number))


def _to_dict(policy: Any) -> dict[str, Any]:
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in vars(policy).items()}
    return {"kind": policy.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}
