"""A folder of class folders of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shallowdeep.data.files.decode import SUFFIXES
from shallowdeep.data.files.names import split_called
from shallowdeep.data.files.stores import FileStore, Part
from shallowdeep.errors import DataError


def read_folder(folder: Path, words: Mapping[str, Sequence[str]]) -> dict[str, Part]:
    """The splits of a folder: of ``folder/train`` and so on, or one training split of ``folder`` itself.

    A class is a folder with images in it, at any depth; its name is the folder's, its label the place among the
    sorted names. Hidden files and what is no image by its suffix are passed over.

    Args:
        folder: holds class folders, or folders of them that are called as splits are (``split_called``). A folder of
            images alone is a class, whatever it is called.
        words: split -> what its folder may be called.

    Raises:
        DataError: there are no images, or a split has a class that the training split has not; folders are called as
            splits are, and none is for training, several are for one split, none holds classes, or others beside them
            are called otherwise and no folder's whole name says that it is for training.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}. Name one that holds a folder of images for each class.")
    found = _splits_in(folder, words)
    if not found:
        return {"train": _read_classes(folder, None)}
    train = _read_classes(found["train"], None)
    names = train.names["fine"]
    return {"train": train} | {split: _read_classes(there, names) for split, there in found.items() if split != "train"}


def _splits_in(folder: Path, words: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Split -> its folder; nothing where the folders are classes."""
    inside = _folders(folder)
    called = {path: split for path in inside if (split := split_called(path.name, words))}
    if not any(_folders(path) for path in called):
        if called and len(called) == len(inside):
            raise DataError(f"{inside[0]} holds no folder of images for each class: {inside[0]}/CLASS/NAME.jpg.")
        return {}
    places = {split: _called_most(split, called, words[split]) for split in words}
    strange = [path.name for path in inside if path not in called]
    if strange and not any(path.name.lower() in words["train"] for path in places["train"]):
        raise DataError(
            f"{folder}: {', '.join(path.name for path in called)} are called like splits, {', '.join(strange)} like "
            "none, so these may be classes. Rename or move the ones or the others."
        )
    for split, there in places.items():
        if len(there) > 1:
            names = ", ".join(path.name for path in there)
            raise DataError(f"{folder} has several folders for {split}: {names}. Rename or move all but one.")
    if not places["train"]:
        raise DataError(f"{folder} has no folder to train on beside {', '.join(path.name for path in called)}.")
    return {split: _unpacked(there[0], split, words) for split, there in places.items() if there}


def _called_most(split: str, called: Mapping[Path, str], words: Sequence[str]) -> list[Path]:
    """Folders of a split: those whose whole name is one of its words, else all that are called so."""
    found = [path for path, other in called.items() if other == split]
    return [path for path in found if path.name.lower() in words] or found


def _unpacked(folder: Path, split: str, words: Mapping[str, Sequence[str]]) -> Path:
    """The folder, or the only one in it where that is called alike: archives are often packed so."""
    inside = _folders(folder)
    return inside[0] if len(inside) == 1 and split_called(inside[0].name, words) == split else folder


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot look into {folder} ({error.strerror}). Check who may read it.") from None


def _read_classes(folder: Path, names: tuple[str, ...] | None) -> Part:
    classes = [path.name for path in _folders(folder)]
    files = {name: _images(folder / name) for name in classes}
    classes = [name for name in classes if files[name]]
    if not classes:
        raise DataError(f"no images in {folder}. Put them into one folder for each class: {folder}/CLASS/NAME.jpg.")
    names = names or tuple(classes)
    foreign = sorted(set(classes) - set(names))
    if foreign:
        raise DataError(f"{folder} has the class '{foreign[0]}', which the training split has not. Rename or move it.")
    labels = torch.cat([torch.full((len(files[name]),), names.index(name)) for name in classes])
    return Part(FileStore(tuple(path for name in classes for path in files[name])), {"fine": labels}, {"fine": names})


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
