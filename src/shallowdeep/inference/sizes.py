"""Sizes of batches: those that a driver is built for, and those at which it is timed."""

from __future__ import annotations

from collections.abc import Sequence

from shallowdeep.inference.backends import Driver


def built_for(driver: Driver) -> Sequence[int] | None:
    """The sizes of batches that a driver's stages are compiled for, rising; ``None``: any will do."""
    return getattr(getattr(driver, "stages", None), "sizes", None)


def rows_at_a_time(driver: Driver, rows: int) -> int:
    """How many of some rows a driver runs at a time."""
    sizes = built_for(driver)
    return min(limit for limit in (rows, driver.micro_batch, sizes[-1] if sizes else None) if limit)


def powers_up_to(most: int) -> list[int]:
    """Powers of two up to a number, and that.

    >>> powers_up_to(6)
    [1, 2, 4, 6]
    """
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
