"""Small images as tensors, as files and in tables; shared by the tests of the data."""

import io
import json

import pytest

from layerwise.data import load
from layerwise.errors import LayerwiseError
from support.pixels import noise

PIL = pytest.importorskip("PIL.Image", reason="the data extra is not installed")
pa = pytest.importorskip("pyarrow", reason="the data extra is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")


def png(image):
    """A (C, H, W) uint8 image as a PNG file."""
    channels, height, width = image.shape
    pixels = bytes(image.permute(1, 2, 0).flatten().tolist())
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    buffer = io.BytesIO()
    PIL.frombytes(mode, (width, height), pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, *, classes=None, image="image", label="label"):
    """A parquet file of encoded images, with Hugging Face's feature metadata if `classes` are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data if isinstance(data, bytes) else png(data), "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(cells, kind), label: pa.array(labels)})
    if classes is not None:
        features = {image: {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def write_split_parquet(folder, **options):
    """20 training and 10 test images of two classes; returns the pixels."""
    train, test = noise(20), noise(10, seed=1)
    write_parquet(folder / "train-0.parquet", train, [i % 2 for i in range(20)], **options)
    write_parquet(folder / "test-0.parquet", test, [i % 2 for i in range(10)], **options)
    return train, test


def write_folder(path, images, suffix=".png"):
    path.mkdir(parents=True)
    for index, image in enumerate(images):
        (path / f"{index:03}{suffix}").write_bytes(png(image))


def refused(match, name, **options):
    with pytest.raises(LayerwiseError, match=match) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
