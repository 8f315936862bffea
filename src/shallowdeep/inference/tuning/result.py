"""What tuning found: every way to answer a batch, fastest first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from shallowdeep.inference.latency import Latency


@dataclass(frozen=True)
class TunedWay:
    """One way to answer a batch, and how long it took.

    Attributes:
        backend: the run time.
        micro_batch: rows run at a time.
        by_table: finished rows are dropped where that pays by the measured table; else always.
        ms: of one batch, the median.
        spread_ms: between the quartiles.
        plain_ms: of the same network without exits in the same run time, at the best of the micro-batches;
            ``None``: that was not timed.
        leaves_early: it has exits; else nobody leaves before the end, as ``allow_plain`` lets it be.
    """

    backend: str
    micro_batch: int
    by_table: bool
    ms: float
    spread_ms: float
    plain_ms: float | None
    leaves_early: bool = True

    @property
    def ratio(self) -> float | None:
        """Its time by that of the same run time without exits; above 1 the exits cost more than they save."""
        return None if self.plain_ms is None else self.ms / self.plain_ms


@dataclass(frozen=True)
class Tuning:
    """What ``Engine.tune`` found.

    Attributes:
        batch_size: rows of a batch.
        precision: of all that was timed.
        device: it ran on.
        threads: PyTorch's.
        ways: fastest first; the first one is what the engine uses.
        plain_ms: of the backbone alone, run by its own code; ``None``: it cannot, not in this precision.
        left_out: back ends that cannot run here, and why.
        latency: the table the engine goes by; ``None``: it drops finished rows always.
        from_cache: it was found in the cache, not timed now.
    """

    batch_size: int
    precision: str
    device: str
    threads: int
    ways: tuple[TunedWay, ...]
    plain_ms: float | None
    left_out: dict[str, str] = field(default_factory=dict)
    latency: Latency | None = None
    from_cache: bool = False

    @property
    def chosen(self) -> TunedWay:
        """The fastest."""
        return self.ways[0]

    @property
    def fastest_with_exits(self) -> TunedWay:
        """The fastest of those that let samples leave early."""
        return next(way for way in self.ways if way.leaves_early)

    @property
    def fastest_plain(self) -> tuple[str, float] | None:
        """Where the network without exits is the fastest, and its ms; ``None``: it was timed nowhere."""
        timed = [("plain", self.plain_ms), *((way.backend, way.plain_ms) for way in self.ways)]
        return min(((name, ms) for name, ms in timed if ms is not None), key=lambda pair: pair[1], default=None)

    @property
    def exits_ratio(self) -> float | None:
        """The fastest time with exits by the fastest without, in whichever run times; above 1 exits cost time here."""
        plain = self.fastest_plain
        return None if plain is None else self.fastest_with_exits.ms / plain[1]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        kept = ", from the cache" if self.from_cache else ""
        lines = [
            f"batches of {self.batch_size} in {self.precision} on {self.device}, {self.threads} threads{kept}",
            f"{'back end':10} {'micro-batch':>11} {'drops rows':>14} {'ms':>9} {'spread':>7} "
            f"{'by its plain':>12} {'by eager plain':>14}",
        ]
        for way in self.ways:
            drops = "no exits" if not way.leaves_early else "where it pays" if way.by_table else "always"
            own = "-" if way.ratio is None else f"{way.ratio:.2f}"
            eager = "-" if self.plain_ms is None else f"{way.ms / self.plain_ms:.2f}"
            lines.append(
                f"{way.backend:10} {way.micro_batch:11} {drops:>14} {way.ms:9.2f} {way.spread_ms:7.2f} "
                f"{own:>12} {eager:>14}"
            )
        if self.plain_ms is not None and all(way.leaves_early for way in self.ways):
            lines.append(f"{'plain':10} {'':26} {self.plain_ms:9.2f}")
        lines += [f"{name}: left out, {why}" for name, why in self.left_out.items()]
        return "\n".join([*lines, *self._verdict()])

    def _verdict(self) -> list[str]:
        """A line where exits cost time: how much, and what can be done, or was."""
        if self.fastest_plain is None or (self.exits_ratio or 0) <= 1:
            return []
        (name, ms), way = self.fastest_plain, self.fastest_with_exits
        what = (
            "tune(allow_plain=True) lets the engine go on without them; the last exit then answers everything."
            if self.chosen.leaves_early
            else "The engine goes on without them: the last exit answers everything."
        )
        return [
            f"exits do not pay here: {way.backend} takes {way.ms:.2f} ms with them, {self.exits_ratio:.2f} times the "
            f"{ms:.2f} ms of the fastest network without ({name}). {what}"
        ]
