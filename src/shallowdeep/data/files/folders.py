"""A folder of class folders of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shallowdeep.data.files.decode import SUFFIXES
from shallowdeep.data.files.stores import FileStore, Part
from shallowdeep.errors import DataError


def read_folder(folder: Path, words: Mapping[str, Sequence[str]]) -> dict[str, Part]:
    """The splits of a folder: of ``folder/train`` and so on, or one training split of ``folder`` itself.

    A class is a folder with images in it, at any depth; its name is the folder's, its label the place among the
    sorted names. Hidden files and what is no image by its suffix are passed over.

    Args:
        folder: holds class folders, or folders of them that are called as splits are.
        words: split -> what its folder may be called.

    Raises:
        DataError: there are no images, or a split has a class that the training split has not.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}. Name one that holds a folder of images for each class.")
    found = {split: [folder / word for word in names if (folder / word).is_dir()] for split, names in words.items()}
    if not found["train"]:
        return {"train": _read_classes(folder, None)}
    train = _read_classes(found["train"][0], None)
    names = train.names["fine"]
    return {"train": train} | {
        split: _read_classes(there[0], names) for split, there in found.items() if there and split != "train"
    }


def _read_classes(folder: Path, names: tuple[str, ...] | None) -> Part:
    try:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot look into {folder} ({error.strerror}). Check who may read it.") from None
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
