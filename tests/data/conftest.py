"""Small image files and Parquet files for the tests of this room."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and no data folder in the environment."""
    monkeypatch.setenv("SHALLOWDEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SHALLOWDEEP_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def encode():
    """(colour, width, height, format) -> the bytes of an image file of one colour."""

    def encoded(colour, width=8, height=8, format="PNG"):
        file = io.BytesIO()
        Image.new("RGB", (width, height), colour).save(file, format)
        return file.getvalue()

    return encoded


@pytest.fixture(scope="session")
def write_parquet():
    """(path, images, labels, …) -> a Parquet file of images and labels, as the datasets library writes it."""

    def write(path, images, *, image_column="image", names=None, plain=False, **labels):
        structs = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = images if plain else pa.array([{"bytes": image, "path": None} for image in images], structs)
        table = pa.table({image_column: column, **labels})
        features = {column: {"names": names, "_type": "ClassLabel"} for column in labels}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=7)

    return write


@pytest.fixture(scope="session")
def noise():
    """(seed, width, height) -> the bytes of an image file in which no two windows are alike."""

    def encoded(seed, width=12, height=10):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return encoded
