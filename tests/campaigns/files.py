"""Files that are broken: checkpoints, weights, images, tables, parquet."""

import io
import json
import random
import shutil
import struct
import time
from pathlib import Path

from campaigns.sandbox import Tally, command, inside

PROMISE = (
    "A checkpoint, an image, a table or a parquet file that is broken in any way is one sentence and exit code 2, or "
    "is read as what it says; never a traceback, a crash or a hang."
)


def damaged(draw: random.Random, data: bytes) -> bytes:
    """A file with a fault of storage."""
    kind = draw.randrange(7)
    if not data or kind == 0:
        return b""
    at = draw.randrange(len(data))
    length = draw.randint(1, 64)
    return {
        1: lambda: data[:at],
        2: lambda: data[:at] + bytes(draw.randrange(256) for _ in range(length)) + data[at + length :],
        3: lambda: data[:at] + data[at + length :],
        4: lambda: data[:at] + bytes(length) + data[at:],
        5: lambda: bytes([*data[:at], data[at] ^ (1 << draw.randrange(8)), *data[at + 1 :]]),
        6: lambda: data + data[-length:],
    }[kind]()


def edited(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else, with a length that fits."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    kind = draw.randrange(7)
    if kind == 0:
        entry["shape"] = draw.choice([[], [1], [10**9], [-1, 2], entry["shape"][::-1], [*entry["shape"], 1], "x"])
    elif kind == 1:
        entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "I8", "BOOL", "X1", 3])
    elif kind == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            [[end, start], [start, end + 4], [-4, end], [start - 4, end], [2**62, 2**63]]
        )
    elif kind == 3:
        del header[name]
    elif kind == 4:
        header[draw.choice(["x", name + "x", ""])] = header.pop(name)
    elif kind == 5:
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    else:
        meta = header.get("__metadata__", {})
        if meta:
            key = draw.choice(list(meta))
            text = meta[key]
            at = draw.randrange(len(text)) if text else 0
            meta[key] = draw.choice([text[:at], text.replace("1", "-1", 1), "null", "[]", text + "x", "9" * 50])
        header["__metadata__"] = meta
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data[8 + length :]


def images(draw: random.Random) -> tuple[str, bytes]:
    """A small image in some format and mode."""
    from PIL import Image

    mode = draw.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F"])
    kind = {"I;16": ["png", "tiff"], "I": ["tiff"], "F": ["tiff"], "LA": ["png"], "RGBA": ["png", "webp"]}.get(
        mode, ["png", "gif", "bmp", "tiff"]
    )
    form, held = draw.choice(kind), io.BytesIO()
    Image.new(mode, (draw.choice([1, 8, 17]), draw.choice([1, 8, 30]))).save(held, form)
    return f"image.{form}", held.getvalue()


def tables(draw: random.Random) -> tuple[str, bytes]:
    """A small table as CSV or parquet."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    rows = draw.choice([3, 40])
    columns = {
        "a": [draw.uniform(-1, 1) for _ in range(rows)],
        "b": [draw.choice([0, 1, None]) if draw.random() < 0.1 else draw.randrange(9) for _ in range(rows)],
        "label": [draw.choice(["x", "y", "007"]) for _ in range(rows)],
    }
    table, held = pa.table(columns), io.BytesIO()
    if draw.random() < 0.5:
        pa.csv.write_csv(table, held)
        return "table.csv", held.getvalue()
    pa.parquet.write_table(table, held)
    return "table.parquet", held.getvalue()


def run(count: int, seed: int, folder: Path, deadline: float) -> Tally:
    """`count` files, of each kind in turn."""
    tally, draw = Tally("files", PROMISE), random.Random(seed)
    home = folder / "home"
    with inside(home):
        words = "train --steps 4 --save-every 2 --model.width 8 --threads 1 --out RUN --rule sll --accumulate 3"
        assert command(words.split(), folder / "job", 60).code == 0
        clean = folder / "clean"
        shutil.copytree(home, clean)
        weights = [path for path in Path("RUN").rglob("*.safetensors")]
        assert weights
        for number in range(count):
            if time.monotonic() > deadline:
                break
            kind = ("checkpoint", "edited", "edited", "image", "table")[number % 5]
            if kind in ("checkpoint", "edited"):
                files = weights if kind == "edited" else [p for p in Path("RUN").rglob("*") if p.is_file()]
                victims = [draw.choice(files)] if draw.random() < 0.5 else files
                for victim in victims:  # all of them, so that no older checkpoint can stand in
                    data = victim.read_bytes()
                    victim.write_bytes(edited(draw, data) if kind == "edited" else damaged(draw, data))
                words = draw.choice(
                    ["eval RUN", "train --resume RUN", "validate RUN", "export RUN w.safetensors --overwrite"]
                )
                if "resume" in words:
                    (home / "RUN" / "result.json").unlink(missing_ok=True)
                words = words.removesuffix(" --overwrite").split()
                what = f"{' '.join(words)}, {len(victims)} {kind}: {victims[0]}"
            else:
                name, data = images(draw) if kind == "image" else tables(draw)
                data = damaged(draw, data) if draw.random() < 0.8 else data
                target = home / (
                    name
                    if draw.random() < 0.8
                    else f"{draw.choice(['a', '.b'])}.{draw.choice(['png', 'csv', 'npy', 'parquet'])}"
                )
                target.write_bytes(data)
                words = ["predict", "RUN", target.name]
                if kind == "table" or draw.random() < 0.5:
                    words = ["train", "--data", f"{'parquet' if 'parquet' in name else 'csv'}:{target.name}"]
                    words += [
                        "--steps",
                        "1",
                        "--threads",
                        "1",
                        "--model.width",
                        "4",
                        "--batch-size",
                        "2",
                        "--out",
                        "made",
                    ]
                what = f"{' '.join(words)} ({len(data)} bytes)"
            attempt = command(words, folder / "job", 60)
            tally.add(
                f"files {number}, seed {seed}: {what}",
                [f"{fault} {attempt.err[-400:]!r}" for fault in attempt.faults()],
            )
            for path in home.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.copytree(clean, home, dirs_exist_ok=True)
    return tally
