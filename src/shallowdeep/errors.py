"""What can go wrong, as one tree.

ShallowDeepError
├── ConfigError        an option, a file of options or an argument is not usable
│   └── UnknownName    a name that is in no table (offers the nearest ones)
├── DataError          images or labels are missing, truncated or of the wrong shape
├── NetworkError       a network cannot be built, called or converted
│   └── IllegalTap     an exit was asked for where none can sit
├── FileFormatError    a checkpoint or Trace is truncated, foreign, or of another version
├── TraceError         a Trace is inconsistent, or lacks what an analysis needs
├── CalibrationError   no policy meets the demand, or the split must not choose a policy
├── TrainingDiverged   the loss is no longer a number
└── MissingExtra       an optional dependency is not installed (names the command that installs it)

Every message says what was wrong, the value, and what to do about it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class ShallowDeepError(Exception):
    """Base of all errors meant for the user; the command line prints them in one line and leaves with 2.

    Usage::

        try:
            sdn = shallowdeep.attach(net, example_inputs)
        except shallowdeep.ShallowDeepError as error:
            print(error)
    """


class ConfigError(ShallowDeepError, ValueError):
    """An option, a file of options or an argument is not usable."""


class UnknownName(ConfigError):
    """A name is in no table.

    Args:
        kind: what was looked for, e.g. ``"network"``.
        name: the name that was not found.
        known: all names of the table.

    >>> print(UnknownName("network", "resnet65", ["resnet56", "vgg16"]))
    no network 'resnet65'. Did you mean 'resnet56'? Known: resnet56, vgg16
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        super().__init__(f"no {kind} '{name}'.{hint} Known: {', '.join(names)}")


class DataError(ShallowDeepError, ValueError):
    """Images or labels are missing, truncated or of the wrong shape."""


class NetworkError(ShallowDeepError, ValueError):
    """A network cannot be built, called or converted."""


class IllegalTap(NetworkError):
    """An exit was asked for where none can sit."""


class FileFormatError(ShallowDeepError, ValueError):
    """A checkpoint or Trace is truncated, foreign, or of another version."""


class TraceError(ShallowDeepError, ValueError):
    """A Trace is inconsistent, or lacks what an analysis needs."""


class CalibrationError(ShallowDeepError, ValueError):
    """No policy meets the demand, or the split must not choose a policy."""


class TrainingDiverged(ShallowDeepError, ArithmeticError):
    """The loss is no longer a number; the last good checkpoint is kept."""


class MissingExtra(ShallowDeepError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: its import name, e.g. ``"pyarrow.parquet"``.
        extra: the extra of this package that brings it, e.g. ``"data"``.

    Raises:
        MissingExtra: it is not installed, or does not import beside the installed PyTorch (a
            ``RuntimeError`` there, not an ``ImportError``).
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f"this needs '{package}', which does not import here ({error}). "
            f'Install it with: pip install "shallowdeep[{extra}]"'
        ) from error
