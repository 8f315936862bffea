"""Other libraries' loggers, while they say nothing that helps: stderr is for what has gone wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str, below: int) -> Iterator[None]:
    """Loggers keep to themselves what is less grave than a level; afterwards they are as before.

    >>> with quiet("somebody", below=logging.WARNING):
    ...     logging.getLogger("somebody").isEnabledFor(logging.INFO)
    False
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(below)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
