"""Which versions of which packages are installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Package to version, of those that are installed as such; a checkout on the path alone is not.

    >>> list(versions_of(["torch", "no-such-package"]))
    ['torch']
    """
    found = {package: version_of(package) for package in packages}
    return {package: number for package, number in found.items() if number is not None}


def version_of(package: str) -> str | None:
    """A package's version; ``None``: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
