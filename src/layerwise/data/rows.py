"""Finding data sets, and reading their images undecoded: parquet files, image folders, the Hugging Face hub."""

import importlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "fine_label", "labels", "class", "target", "y")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_NAMES = ("test", "validation", "valid", "val")  # the first that a data set has serves as its test split
SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val)(?![a-z])")


class Rows:
    """One split of undecoded images.

    Attributes:
        values: the label of each row, as it is stored: integers or strings.
        names: the class names that integer values index, or None where the values are all there is.
        files: what the rows are read from.
        image_column: name of the column that holds the images.
    """

    values: list
    names: tuple[str, ...] | None
    files: tuple[Path, ...]
    image_column: str = ""

    def __len__(self) -> int:
        return len(self.values)

    def read(self, row: int) -> bytes:
        """The encoded image of one row."""
        raise NotImplementedError

    def where(self, row: int) -> str:
        """The place of one row, for messages."""
        raise NotImplementedError


class TableRows(Rows):
    """Rows of an arrow table, in memory or mapped from disk.

    Args:
        table: anything with arrow's `column(name)`.
        schema: arrow schema with the features that Hugging Face `datasets` notes in its metadata, if any.
        title: what to call the data in messages.
        files: what the rows are read from.
        counts: rows per file, where `files` are what the user knows; default: `title` says where a row is.
    """

    def __init__(self, table: Any, schema: Any, title: str, files: Sequence[Path], counts: Sequence[int] = ()):
        self.image_column, label_column, self.names = find_columns(schema, title)
        self.title = title
        self.files = tuple(files)
        self.images = table.column(self.image_column)
        self.values = table.column(label_column).to_pylist()
        self.ends = list(accumulate(counts))

    def read(self, row: int) -> bytes:
        cell = self.images[row].as_py()
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"] or "").read_bytes()
        if cell is None:
            raise OSError("no image")
        return cell

    def where(self, row: int) -> str:
        if not self.ends:
            return f"row {row} of {self.title}"
        part = bisect_right(self.ends, row)
        return f"row {row - (self.ends[part - 1] if part else 0)} of {self.files[part]}"


class FileRows(Rows):
    """One image file per row; the class of a file is the folder that it lies in.

    Args:
        folder: folder with one folder per class.
    """

    def __init__(self, folder: Path):
        kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        found = {kind: sorted(p for p in kind.rglob("*") if p.suffix.lower() in SUFFIXES) for kind in kinds}
        if not any(found.values()):
            raise LayerwiseError(f"no images under {folder}; lay them out as {folder}/CLASS/NAME.png")
        for kind, files in found.items():
            if not files:
                raise LayerwiseError(f"class folder {kind} holds no images; fill it or remove it")
        if len(kinds) == 1:
            raise LayerwiseError(f"{folder} holds the one class {kinds[0].name!r}; give two or more class folders")
        self.files = tuple(file for files in found.values() for file in files)
        self.values = [label for label, files in enumerate(found.values()) for _ in files]
        self.names = tuple(kind.name for kind in kinds)

    def read(self, row: int) -> bytes:
        return self.files[row].read_bytes()

    def where(self, row: int) -> str:
        return str(self.files[row])


def need(module: str) -> Any:
    """Import a module of the `data` extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise LayerwiseError(f"{package} is not installed; run pip install 'layerwise[data]'") from error


def cache_folder() -> Path:
    """The folder of everything that layerwise may lose without harm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"


def find_local(name: str, root: str | Path | None) -> Path | None:
    """The folder of a data set under `root` or else $LAYERWISE_DATA; None where there is no such folder."""
    base = root if root is not None else os.environ.get("LAYERWISE_DATA")
    if not base:
        return None
    if not Path(base).is_dir():
        origin = "the data root" if root is not None else "LAYERWISE_DATA"
        raise LayerwiseError(f"{origin} names {base}, which is not a folder; point it to a folder of data sets")
    folder = Path(base) / name
    return folder if folder.is_dir() else None


def open_imagefolder(path: Path) -> dict[str, Rows]:
    """The splits of `path`/train and `path`/test, or `path` as the training split."""
    if not path.is_dir():
        raise LayerwiseError(f"{path} is not a folder; give imagefolder: a folder with one folder per class")
    if not (path / "train").is_dir():
        return {"train": FileRows(path)}
    return {split: FileRows(path / split) for split in ("train", *TEST_NAMES) if (path / split).is_dir()}


def open_parquet(path: Path, in_memory_limit: int) -> dict[str, Rows]:
    """The splits of one parquet file, or of the parquet files anywhere under a folder.

    A file belongs to the split that its name or its folder names; files that name none are the training split.
    """
    if not path.exists():
        raise LayerwiseError(f"{path} does not exist; give parquet: a parquet file or a folder of them")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise LayerwiseError(f"no *.parquet file under {path}; point to the folder that holds them")
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        words = SPLIT.findall(str(file.relative_to(path)).lower()) if path.is_dir() else ()
        splits.setdefault(words[-1] if words else None, []).append(file)
    if None in splits:
        if len(splits) > 1:
            raise LayerwiseError(f"cannot tell the split of {splits[None][0]}; put train or test into its name")
        splits = {"train": splits[None]}
    return {str(split): _read_parquet(files, in_memory_limit) for split, files in splits.items()}


def open_hub(repository: str, advice: str = "") -> dict[str, Rows]:
    """The splits of a data set on the Hugging Face hub, downloaded once and mapped from its cache."""
    datasets = need("datasets")
    with _quiet():
        unreachable = _unreachable(repository)
        try:
            with _offline() if unreachable else nullcontext():
                found = datasets.load_dataset(repository)
        except Exception as error:  # anything may come out of the network stack and of a foreign loader
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            reason = reason.replace("OfflineModeIsEnabled", unreachable)
            raise LayerwiseError(
                f"cannot get {repository} from the Hugging Face hub ({type(error).__name__}: {reason}); "
                f"check the name and the network{advice}"
            ) from error
    return {
        split: TableRows(
            rows.data,
            rows.features.arrow_schema,
            f"{repository} ({split})",
            [Path(part["filename"]) for part in rows.cache_files],
        )
        for split, rows in found.items()
    }


def _unreachable(repository: str) -> str:
    """Why the hub cannot be reached, or "": `datasets` itself tries again for half a minute before it says so."""
    hub = need("huggingface_hub")
    try:
        hub.HfApi().dataset_info(repository, timeout=5)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
        return ""  # there was an answer, or `datasets` will say what is wrong with the name
    except Exception as error:  # of the network library, which differs between versions of the hub's client
        return str(error).strip().partition("\n")[0].rstrip(".")
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look into its cache only."""
    places = [need("datasets").config, need("huggingface_hub.constants")]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def find_columns(schema: Any, title: str) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the image column and of the label column, and the class names where the schema has them."""
    types = need("pyarrow").types
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    features = {name: feature for name, feature in features.items() if isinstance(feature, dict)}

    def kind(name: str) -> str | None:
        return features.get(name, {}).get("_type")

    def is_image(field: Any) -> bool:
        held = types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        return kind(field.name) == "Image" or held

    def is_label(field: Any) -> bool:
        text = types.is_string(field.type) or types.is_large_string(field.type)
        return kind(field.name) == "ClassLabel" or types.is_integer(field.type) or text

    image = pick("image", [field.name for field in schema if is_image(field)], IMAGE_NAMES, schema.names, title)
    labels = [field.name for field in schema if is_label(field)]
    noted_labels = [name for name in labels if kind(name) == "ClassLabel"]
    label = pick("label", noted_labels or labels, LABEL_NAMES, schema.names, title)
    names = features[label].get("names") if kind(label) == "ClassLabel" else None
    return image, label, tuple(names) if names else None


def pick(what: str, candidates: list[str], usual: Sequence[str], columns: Sequence[str], title: str) -> str:
    """The column to use: the first of the usual names among the candidates, or the only candidate."""
    for name in usual:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several {what} columns ({', '.join(candidates)})" if candidates else f"no {what} column"
    raise LayerwiseError(
        f"{title} has {problem} among its columns {', '.join(columns)}; name the one to use {usual[0]!r}"
    )


def _read_parquet(files: list[Path], in_memory_limit: int) -> TableRows:
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    tables, counts = [], []
    mapped = sum(file.stat().st_size for file in files) > in_memory_limit
    columns: list[str] = []
    schema = None
    for file in files:
        try:
            opened = parquet.ParquetFile(file)
            if schema is None:
                schema = opened.schema_arrow
                columns = list(find_columns(schema, str(file))[:2])
            for column in columns:
                if column not in opened.schema_arrow.names:
                    raise LayerwiseError(f"{file} has no column {column!r}, as {files[0]} has; take one of them out")
            counts.append(opened.metadata.num_rows)
            if not mapped:
                tables.append(opened.read(columns=columns))
        except (OSError, pyarrow.ArrowException) as error:
            raise LayerwiseError(f"{file} is not a readable parquet file; fetch it again") from error
    if not sum(counts):
        raise LayerwiseError(f"{files[0]} holds no rows; give a parquet file with samples")
    table = _map_parquet(files, columns) if mapped else pyarrow.concat_tables(tables, promote_options="permissive")
    return TableRows(table, schema, str(files[0]), files, counts)


def _map_parquet(files: list[Path], columns: list[str]) -> Any:
    """The files as one arrow table on disk: parquet itself cannot be read row by row."""
    datasets = need("datasets")
    cache = cache_folder() / "arrow"
    with _quiet():
        try:
            return datasets.Dataset.from_parquet(
                [str(file) for file in files], cache_dir=str(cache), columns=columns
            ).data
        except Exception as error:  # a foreign loader: a full disk comes as one of several types
            raise LayerwiseError(
                f"cannot lay {files[0]} out for streaming under {cache} ({type(error).__name__}); "
                "set XDG_CACHE_HOME to a folder with room"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` and `huggingface_hub` from writing to the terminal."""
    datasets = need("datasets")
    loggers = [need("datasets.utils.logging"), need("huggingface_hub.utils.logging")]
    levels = [logger.get_verbosity() for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.set_verbosity(50)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
