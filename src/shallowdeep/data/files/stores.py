"""Where encoded images lie: files of a folder, members of a zip file, a column of Parquet files."""

from __future__ import annotations

import bisect
import itertools
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from shallowdeep.data.files.cache import cache_folder, change_key, content_key, word_key
from shallowdeep.errors import DataError, ShallowDeepError, require
from shallowdeep.storage import replacing


@runtime_checkable
class Store(Protocol):
    """Encoded images by their row; it travels to worker processes, so it holds names and no open file."""

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """What an error calls the image."""
        ...

    def read(self, row: int) -> bytes | None:
        """The bytes of one image; rows in any order."""
        ...

    def contents(self) -> Iterator[bytes | None]:
        """The bytes of all images, in order."""
        ...

    def prepare(self) -> None:
        """Do once, in the main process, what makes ``read`` quick."""
        ...

    def key(self) -> str:
        """Another one where the images are others."""
        ...


class Part(NamedTuple):
    """One split, not decoded; ``labels`` and ``names`` hold one entry for each label set."""

    store: Store
    labels: dict[str, Int[Tensor, " n"]]
    names: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class FileStore:
    """Image files.

    Args:
        paths: one per image.
    """

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, row: int) -> str:
        """The file's path."""
        return str(self.paths[row])

    def read(self, row: int) -> bytes:
        """The file's bytes.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return self.paths[row].read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.paths[row]} ({error.strerror}). Copy or download it again.") from None

    def contents(self) -> Iterator[bytes]:
        """The bytes of all files."""
        return map(self.read, range(len(self)))

    def prepare(self) -> None:
        """Nothing to do."""

    def key(self) -> str:
        """Changes with a file's name, size or time."""
        return change_key(self.paths)


@dataclass(frozen=True)
class ZipStore:
    """Members of a zip file.

    Args:
        path: of the zip file.
        members: one name per image.
    """

    path: Path
    members: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def where(self, row: int) -> str:
        """The file's path and the member's name."""
        return f"{self.path}, {self.members[row]}"

    def read(self, row: int) -> bytes:
        """The member's bytes.

        Raises:
            DataError: it cannot be read.
        """
        return read_member(self.path, self.members[row])

    def contents(self) -> Iterator[bytes]:
        """The bytes of all members."""
        return map(self.read, range(len(self)))

    def prepare(self) -> None:
        """Nothing to do."""

    def key(self) -> str:
        """Changes with the zip file's name, size or time, and with the members."""
        return change_key([self.path], *self.members)


def read_member(path: Path, member: str) -> bytes:
    """One member of a zip file, which stays open for the next.

    Raises:
        DataError: the file is no zip file or damaged, or has no such member.
    """
    try:
        stat = path.stat()
        return _open_zip(path, os.getpid(), stat.st_mtime_ns).read(member)
    except Exception as error:  # zipfile raises whatever damaged bytes lead it to
        raise DataError(f"cannot read {member} in {path} ({error}). Copy or download the file again.") from None


@lru_cache(maxsize=2)
def _open_zip(path: Path, process: int, changed: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # one for each process: a forked one would move its parent's place in the file


@dataclass(frozen=True)
class ParquetStore:
    """An image column of Parquet files: bytes, or the Hugging Face hub's struct of bytes and path.

    Args:
        shards: the files, in order.
        counts: rows of each.
        column: its name.
    """

    shards: tuple[Path, ...]
    counts: tuple[int, ...]
    column: str

    def __len__(self) -> int:
        return sum(self.counts)

    def where(self, row: int) -> str:
        """The file's path and the row in it."""
        starts = [0, *itertools.accumulate(self.counts)]
        shard = bisect.bisect_right(starts, row) - 1
        return f"{self.shards[shard]}, row {row - starts[shard]}"

    def contents(self) -> Iterator[bytes | None]:
        """The bytes of all images, a thousand rows in memory at a time.

        Raises:
            DataError: a file is damaged, or the column holds no images.
        """
        for batch in self._batches():
            yield from batch.to_pylist()

    def _batches(self) -> Iterator[Any]:
        parquet = require("pyarrow.parquet", extra="data")
        for shard, count in zip(self.shards, self.counts, strict=True):
            with reading(shard), parquet.ParquetFile(shard) as file:
                left = count
                for batch in file.iter_batches(1000, columns=[self.column]):
                    left -= batch.num_rows
                    check_rows(shard, self.column, count - left, count, ended=left < 0)
                    yield _bytes_of(batch.column(0), shard, self.column)
                check_rows(shard, self.column, count - left, count)

    def prepare(self) -> None:
        """Write the images uncompressed and once into the cache, where any row can be mapped.

        Pages of a Parquet file are compressed together: a row in the middle costs hundreds.

        Raises:
            DataError: a shard is damaged, or the cache cannot be written.
        """
        arrow = require("pyarrow", extra="data")
        if self._is_packed():
            return
        try:
            with replacing(self._packed) as partial:
                schema = arrow.schema([("bytes", arrow.large_binary())])
                with arrow.OSFile(str(partial), "wb") as sink, arrow.ipc.new_file(sink, schema) as file:
                    for images in self._batches():
                        file.write_batch(arrow.record_batch([images.cast(arrow.large_binary())], schema=schema))
        except OSError as error:
            raise DataError(
                f"cannot write {self._packed} ({error.strerror}). Set SHALLOWDEEP_CACHE to a folder that can be "
                "written and has room for the images."
            ) from None

    def read(self, row: int) -> bytes | None:
        """The bytes of one image, out of what ``prepare`` wrote.

        Raises:
            DataError: that is gone or damaged.
        """
        with reading(self._packed):
            starts, batches = _mapped(self._packed, os.getpid())
            batch = bisect.bisect_right(starts, row) - 1
            return batches[batch].column(0)[row - starts[batch]].as_py()

    def _is_packed(self) -> bool:
        try:
            with reading(self._packed):
                return _mapped(self._packed, os.getpid())[0][-1] == len(self)
        except DataError:
            return False

    @cached_property
    def _packed(self) -> Path:
        return cache_folder() / f"packed-{change_key(self.shards, self.column)}.arrow"

    def key(self) -> str:
        """Changes with any byte of the files, and with the column."""
        return word_key(content_key(self.shards), self.column)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of Parquet's and Arrow's readers into ours.

    Raises:
        DataError: there was one.
    """
    try:
        yield
    except ShallowDeepError:
        raise
    except Exception as error:  # mostly Arrow's; for some damage OSError, ValueError, OverflowError, ...
        raise DataError(f"{path} is truncated or no Parquet file ({error}). Copy or download it again.") from None


def check_rows(shard: Path, column: str, found: int, count: int, *, ended: bool = True) -> None:
    """A column of a damaged file can be shorter or longer than the file says.

    Raises:
        DataError: it is.
    """
    if ended and found != count:
        raise DataError(f"{shard} has {count} rows, and {found} of {column}. Copy or download it again.")


def _bytes_of(images: Any, shard: Path, column: str) -> Any:
    """The binary column behind an image column."""
    types = require("pyarrow", extra="data").types
    if types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = images.field("bytes")
    if not (types.is_binary(images.type) or types.is_large_binary(images.type)):
        raise DataError(
            f"{shard}: column {column} is {images.type}, no encoded images. Name their column with image_column=."
        )
    return images


@lru_cache(maxsize=8)
def _mapped(path: Path, process: int) -> tuple[list[int], list[Any]]:
    """First rows of the batches, with the number of all rows behind them, and the batches, not in memory."""
    arrow = require("pyarrow", extra="data")
    file = arrow.ipc.open_file(arrow.memory_map(str(path)))
    batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    return [0, *itertools.accumulate(batch.num_rows for batch in batches)], batches
