"""Tiny ImageNet as its makers pack it: a zip file, or the folder that comes out of it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import torch

from shallowdeep.data.files.stores import FileStore, Part, Store, ZipStore, read_member
from shallowdeep.errors import DataError

FOLDER = "tiny-imagenet-200"


def read_tiny_imagenet(root: Path) -> dict[str, Part] | None:
    """Train and test (the makers' validation images, as papers use them); nothing where neither form is there.

    Labels are the places of the sorted WordNet ids, which name the classes, as in the hub's copies.

    Args:
        root: holds ``tiny-imagenet-200/`` or ``tiny-imagenet-200.zip``.

    Raises:
        DataError: a list or the images of a class are missing, or the zip file is damaged.
    """
    folder, packed = root / FOLDER, root / f"{FOLDER}.zip"
    if folder.is_dir():
        members = [path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file()]
        return _parts(folder, members, lambda name: _text(root / name), lambda names: _files(root, names))
    if packed.is_file():
        return _parts(packed, _members(packed), lambda name: read_member(packed, name), lambda n: _zipped(packed, n))
    return None


def _files(root: Path, names: Sequence[str]) -> Store:
    return FileStore(tuple(root / name for name in names))


def _zipped(path: Path, names: Sequence[str]) -> Store:
    return ZipStore(path, tuple(names))


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}). Unpack {FOLDER}.zip again.") from None


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as file:
            return file.namelist()
    except Exception as error:  # zipfile raises whatever damaged bytes lead it to
        raise DataError(f"{path} is truncated or no zip file ({error}). Download it again.") from None


def _parts(
    where: Path, members: Sequence[str], read: Callable[[str], bytes], store: Callable[[Sequence[str]], Store]
) -> dict[str, Part]:
    names = tuple(sorted(set(_lines(where, read, "wnids.txt"))))
    answers = dict(line.split("\t")[:2] for line in _lines(where, read, "val/val_annotations.txt") if "\t" in line)
    train = sorted((name for name in members if _is_image(name, "train")), key=_order)
    test = sorted((name for name in members if _is_image(name, "val")), key=_order)
    # of train/n01443537/images/n01443537_0.JPEG the third part from behind
    found = [PurePosixPath(name).parts[-3] for name in train]
    answered = [answers.get(PurePosixPath(name).name, "") for name in test]
    lacking = sorted(set(names) - set(found))
    if lacking or not names:
        raise DataError(f"{where}: no training images of {lacking[:3] or 'any class'}. Unpack or download it again.")
    return {
        "train": _part(where, store(train), found, names),
        "test": _part(where, store(test), answered, names),
    }


def _part(where: Path, store: Store, classes: Sequence[str], names: tuple[str, ...]) -> Part:
    number = {name: label for label, name in enumerate(names)}
    foreign = [row for row, name in enumerate(classes) if name not in number]
    if foreign:
        raise DataError(
            f"{store.where(foreign[0])} is of class '{classes[foreign[0]]}', which wnids.txt does not list. "
            "Unpack or download it again."
        )
    if not classes:
        raise DataError(f"{where}: no validation images. Unpack or download it again.")
    return Part(store, {"fine": torch.tensor([number[name] for name in classes])}, {"fine": names})


def _is_image(name: str, split: str) -> bool:
    path = PurePosixPath(name)
    return name.startswith(f"{FOLDER}/{split}/") and path.suffix == ".JPEG" and path.parent.name == "images"


def _order(name: str) -> tuple[str, int, str]:
    """By folder, then by the number in the file's name, of which 10 comes after 9."""
    path = PurePosixPath(name)
    number = path.stem.rpartition("_")[2]
    return str(path.parent), int(number) if number.isdecimal() else -1, path.name


def _lines(where: Path, read: Callable[[str], bytes], name: str) -> list[str]:
    try:
        return read(f"{FOLDER}/{name}").decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {name} is no text ({error}). Unpack or download it again.") from None
