"""Finding data sets, and reading their images undecoded: parquet files, image folders, the Hugging Face hub."""

import importlib
import json
import math
import os
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from layerwise.errors import LayerwiseError
from layerwise.files import (
    check_regular,
    kind_of,
    list_files,
    list_folders,
    read_bytes,
    shown,
)

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "fine_label", "labels", "class", "target", "y")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga"),
)
TEST_NAMES = ("test", "eval", "validation", "valid", "val", "dev")  # the first that there is serves as the test split
SPLITS = {name: name for name in ("train", *TEST_NAMES)} | {
    **dict.fromkeys(("training", "trn", "trainval"), "train"),
    **dict.fromkeys(("testing", "tst", "holdout", "heldout"), "test"),
    **{"evaluation": "eval", "devel": "dev", "development": "dev"},
}  # what people call their splits
AFFIXES = ("set", "dataset", "data", "images", "image", "imgs", "img", "split", "folder", "dir")
NAMED_SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?:{'|'.join(AFFIXES)}|[ab])?")
SHARD = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]+")  # what differs between the parts of a table
MISSING = ("", "nan", "+nan", "-nan", "null", "<na>", "#na", "#n/a", "n/a", "nat")  # what programs write for no label
TEXT_TYPES = ("string", "large_string", "string_view")  # arrow's names for words
WITHHELD = -1  # the label that the Hugging Face hub gives to samples of a test split whose labels are kept back


class Rows:
    """One split of undecoded images.

    Attributes:
        values: the label of each row: whole numbers or words, or None where there is none.
        names: the class names that whole numbers index, or None where the values are all there is.
        files: what the rows are read from.
        image_column: name of the column that holds the images.
        notes: what was left out, a sentence each.
    """

    values: list
    names: tuple[str, ...] | None
    files: tuple[Path, ...]
    image_column: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def read(self, row: int) -> bytes:
        """The encoded image of one row."""
        raise NotImplementedError

    def where(self, row: int) -> str:
        """The place of one row, for messages."""
        raise NotImplementedError

    @property
    def withheld(self) -> bool:
        """Whether no row has a label, as in a test split whose labels are kept back."""
        return bool(self.values) and all(value is None or value == WITHHELD for value in self.values)


class Part(NamedTuple):
    """The rows of one file, or of one split of the hub."""

    title: str
    """What to call it in messages."""
    labels: list
    names: tuple[str, ...] | None
    folder: Path | None
    """What relative paths of images start from."""


class TableRows(Rows):
    """Rows of arrow tables, in memory or mapped from disk.

    Args:
        image_column: name of the column that holds the images.
        images: the images as arrow columns, which follow each other.
        parts: the labels, file by file.
        files: what the rows are read from.
        folders: where the images may lie that a cell names by their path.

    Raises:
        LayerwiseError: parts with differing class lists, or with numbers here and words there; a path that leads out of
            the folders.
    """

    def __init__(
        self,
        image_column: str,
        images: Sequence[Any],
        parts: Sequence[Part],
        files: Sequence[Path],
        folders: Sequence[Path],
    ):
        self.image_column, self.images, self.folders = image_column, images, folders
        self.parts = [part for part in parts if part.labels] or list(parts[:1])
        self.names = _same_classes(self.parts)
        self.values = [value for part in self.parts for value in part.labels]
        self.ends = list(accumulate(len(part.labels) for part in self.parts))
        self.image_ends = list(accumulate(len(column) for column in images))
        self.files = (*files, *self._named_files())

    def read(self, row: int) -> bytes:
        content = _content(self._cell(row))
        return content if isinstance(content, bytes) else read_bytes(self._path(row, content))

    def where(self, row: int) -> str:
        part, inner = _place(self.ends, row)
        return f"row {inner} of {self.parts[part].title}"

    def _cell(self, row: int) -> Any:
        column, inner = _place(self.image_ends, row)
        return self.images[column][inner].as_py()

    def _named_files(self) -> list[Path]:
        """The files that cells name in place of an image, each of them checked."""
        named = []
        for column, start in zip(self.images, [0, *self.image_ends], strict=False):
            named += [start + row for row in _rows_without_bytes(column)]
        paths = [(row, _content(self._cell(row))) for row in named]
        return sorted({self._path(row, path) for row, path in paths if path and isinstance(path, str)})

    def _path(self, row: int, path: str) -> Path:
        """The file that a cell names, if it lies in the folder of the data."""
        if not path:
            raise LayerwiseError(f"{self.where(row)} holds no image; fill it or take it out.")
        start = self.parts[_place(self.ends, row)[0]].folder
        file = Path(path) if start is None else start / path
        try:
            found = file.resolve()
        except (OSError, ValueError, RuntimeError):
            found = None
        if found is None or not any(found.is_relative_to(folder.resolve()) for folder in self.folders):
            raise LayerwiseError(
                f"{self.where(row)} names the file {shown(path)}, which is not in the folder of the data; put the "
                "image there, or into the cell."
            )
        check_regular(found, f"{self.where(row)} names it as its image")
        return found


class FileRows(Rows):
    """One image file per row.

    Args:
        folder: what the files lie in; links do not lead out of it. None for files that the user named one by one.
        files: the files.
        values: the class of each, an index of `names`, or None; default None for all.
        names: the class names.
    """

    def __init__(
        self,
        folder: Path | None,
        files: Sequence[Path],
        values: Sequence[int | None] | None = None,
        names: tuple[str, ...] | None = None,
    ):
        self.folder, self.files, self.names = folder, tuple(files), names
        self.values = [None] * len(self.files) if values is None else list(values)

    def read(self, row: int) -> bytes:
        return read_bytes(self.files[row], "replace it or take it out", self.folder)

    def where(self, row: int) -> str:
        return shown(self.files[row])


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
    if kind_of(base) != "folder":
        origin = "the data root" if root is not None else "LAYERWISE_DATA"
        raise LayerwiseError(f"{origin} names {shown(base)}, which is not a folder; point it to a folder of data sets")
    folder = Path(base) / name
    return folder if kind_of(folder) == "folder" else None


def class_folders(folder: Path) -> FileRows:
    """The images below a folder with one folder per class.

    Raises:
        LayerwiseError: no images, or a class without one.
    """
    kinds = list_folders(folder)
    found = {kind: list_files(kind, SUFFIXES) for kind in kinds}
    if not any(found.values()):
        raise LayerwiseError(f"no images under {shown(folder)}; lay them out as {shown(folder)}/CLASS/NAME.png")
    for kind, files in found.items():
        if not files:
            raise LayerwiseError(f"class folder {shown(kind)} holds no images; fill it or remove it")
    values = [label for label, files in enumerate(found.values()) for _ in files]
    names = check_words([kind.name for kind in kinds], shown(folder))
    rows = FileRows(folder, [file for files in found.values() for file in files], values, names)
    others = len(list_files(folder)) - len(rows)
    if others > 0:
        rows.notes = (f"{others} files under {shown(folder)} are no images in a class folder and are left out",)
    return rows


def is_missing(word: str) -> bool:
    """Whether a label stands for one that is missing.

    >>> is_missing(" NaN "), is_missing("nanny")
    (True, False)
    """
    return word.strip().lower() in MISSING


def split_of(name: str, anywhere: bool = False) -> str | None:
    """The split that a name gives: "train" or one of `TEST_NAMES`; None where it gives none, or several.

    Args:
        name: of a folder, a file or a split, in small or capital letters.
        anywhere: whether the word may stand anywhere in the name; if not, only words such as "set" may follow it.

    >>> split_of("Training"), split_of("seg_test"), split_of("val_set"), split_of("train_station")
    ('train', 'test', 'val', None)
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    if not anywhere:
        while len(words) > 1 and (words[-1] in AFFIXES or len(words[-1]) == 1):
            words.pop()
        words = words[-1:]
    words += [] if words else re.findall(r"[a-z]+", name.lower())[-1:]
    found = {SPLITS[match[1]] for word in words if (match := NAMED_SPLIT.fullmatch(word))}
    return found.pop() if len(found) == 1 else None


def open_imagefolder(path: Path) -> dict[str, Rows]:
    """The splits of `path`/train, `path`/test, ..., or `path` as the training split.

    A folder is a split by its name (`split_of`). Where no folder is the training split, all are classes.

    Raises:
        LayerwiseError: no folder, no images, two folders of one split, or folders that look like splits of which none
            is the training split.
    """
    if kind_of(path) != "folder":
        raise LayerwiseError(f"{shown(path)} is not a folder; give imagefolder: a folder with one folder per class")
    folders = list_folders(path)
    splits = _split_folders(path, folders)
    if "train" not in splits:
        _check_classes(path, folders)
        return {"train": class_folders(path)}
    used = set(splits.values())
    found: dict[str, Rows] = {"train": class_folders(_inner(splits.pop("train"), "train"))}
    for split in (split for split in TEST_NAMES if split in splits):
        folder = _inner(splits[split], split)
        images = list_files(folder, SUFFIXES)
        unlabelled = images and not list_folders(folder)
        found[split] = FileRows(folder, images) if unlabelled else class_folders(folder)
    others = [folder.name for folder in folders if folder not in used]
    if others:
        found["train"].notes += (f"folders of {shown(path)} that are no split are left out: {few(others)}",)
    return found


def _split_folders(path: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """The folder of each split; one whose name is the mere word comes before one with other words in its name."""
    candidates: dict[str, list[Path]] = {}
    for folder in folders:
        split, plain = split_of(folder.name), folder.name.lower()
        # Classes may be called "bullet_train" or "training"; a training split holds folders.
        if split is not None and (split != "train" or plain == "train" or list_folders(folder)):
            candidates.setdefault(split, []).append(folder)
    splits = {}
    for split, found in candidates.items():
        plain = [folder for folder in found if folder.name.lower() in SPLITS]
        if len(plain or found) > 1 and "train" in candidates:
            names = " and ".join(folder.name for folder in (plain or found)[:2])
            raise LayerwiseError(f"{shown(path)} has two folders of the split {split!r}, {names}; join them")
        splits[split] = (plain or found)[0]
    return splits


def _inner(folder: Path, split: str) -> Path:
    """A split's folder, or the one of the same split that is all there is in it, as in seg_train/seg_train."""
    inner = list_folders(folder)
    return inner[0] if len(inner) == 1 and split_of(inner[0].name) == split else folder


def _check_classes(path: Path, folders: Sequence[Path]) -> None:
    """Refuse folders that are no classes: all have names of splits, or all hold the same folders."""
    names = [folder.name for folder in folders]
    splits = {split_of(name) for name in names}
    if folders and None not in splits and (len(splits) > 1 or any(name.lower() in SPLITS for name in names)):
        if "train" in splits:
            raise LayerwiseError(
                f"the folders of {shown(path)} have names of splits ({few(names)}), and the one to train on holds no "
                "folder per class; sort its images into one folder per class"
            )
        raise LayerwiseError(f"{shown(path)} has no folder train, only {', '.join(names)}; add it")
    inside = [{folder.name.lower() for folder in list_folders(folder)} for folder in folders]
    shared = sorted(set.intersection(*inside)) if len(inside) > 1 else []
    if len(shared) > 1:
        raise LayerwiseError(
            f"the folders of {shown(path)} ({few(names)}) all hold the same folders ({few(shared)}), so they look like "
            "splits and not like classes; call one of them train and the others test and val"
        )


def open_parquet(path: Path, in_memory_limit: int) -> dict[str, Rows]:
    """The splits of one parquet file, or of the parquet files anywhere under a folder.

    A file belongs to the split that its name or its folder names. One file that names none is the training split, and
    so are the numbered parts of one table.

    Raises:
        LayerwiseError: no file, one that cannot be read, or files of which one cannot tell the splits.
    """
    kind = kind_of(path)
    if kind is None:
        raise LayerwiseError(f"{shown(path)} does not exist; give parquet: a parquet file or a folder of them")
    files = list_files(path, (".parquet",)) if kind == "folder" else [path]
    if not files:
        raise LayerwiseError(f"no *.parquet file under {shown(path)}; point to the folder that holds them")
    folder = path if kind == "folder" else path.parent
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        parts = file.relative_to(path).with_suffix("").parts if kind == "folder" else ()
        named = (split_of(part, anywhere=True) for part in reversed(parts))
        splits.setdefault(next(filter(None, named), None), []).append(file)
    if None in splits:
        if len(splits) > 1:
            raise LayerwiseError(f"cannot tell the split of {shown(splits[None][0])}; put train or test into its name")
        stems = {SHARD.sub("", str(file.relative_to(folder)).lower()): str(file.relative_to(folder)) for file in files}
        if len(stems) > 1:
            raise LayerwiseError(
                f"cannot tell the splits of {shown(path)}: its files ({few(list(stems.values()))}) name none and are "
                "not the numbered parts of one table; put train, test or val into each name"
            )
        splits = {"train": splits[None]}
    columns: Columns | None = None
    found: dict[str, Rows] = {}
    for split in sorted(splits, key=lambda split: split != "train"):  # what a test split lacks, the first one shows
        found[str(split)], columns = _read_parquet(splits[split], folder, in_memory_limit, columns)
    return {str(split): found[str(split)] for split in splits}


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
    caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(need("huggingface_hub.constants").HF_HUB_CACHE)]
    splits = {}
    for split, rows in found.items():
        title = f"{repository} ({split})"
        columns = find_columns(rows.features.arrow_schema, title)
        labels = _labels_of(rows.data.column(columns.label), columns, title) if columns.label else [None] * len(rows)
        part = Part(title, labels, columns.names, None)
        files = [Path(cached["filename"]) for cached in rows.cache_files]
        splits[split] = TableRows(columns.image, [rows.data.column(columns.image)], [part], files, caches)
    known = [split_of(split) for split in splits]
    return {
        (of if of is not None and of not in splits and known.count(of) == 1 else split): rows
        for (split, rows), of in zip(splits.items(), known, strict=True)
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


class Columns(NamedTuple):
    """Where a table of images has what."""

    image: str
    label: str | None
    """None where the labels of a test split are kept back."""
    names: tuple[str, ...] | None
    """The class names that whole numbers index, where the file notes them."""


def find_columns(schema: Any, title: str, known: Columns | None = None) -> Columns:
    """The columns of images and of labels, and the class names where the schema has them.

    Args:
        schema: arrow schema, with the features that Hugging Face `datasets` notes in its metadata, if any.
        title: what to call the table in messages.
        known: the columns of the training split, which a further split has too, apart from the labels.
    """
    types = need("pyarrow").types
    features = _features(schema, title)

    def kind(name: str) -> str | None:
        return features.get(name, {}).get("_type")

    def is_image(field: Any) -> bool:
        struct = types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        return kind(field.name) == "Image" or struct or _is_binary(field.type)

    def is_label(field: Any) -> bool:
        held = field.type.value_type if types.is_dictionary(field.type) else field.type
        number = types.is_integer(held) or types.is_boolean(held) or types.is_decimal(held)
        whole = types.is_floating(held) and field.name in LABEL_NAMES
        return kind(field.name) == "ClassLabel" or number or whole or str(held) in TEXT_TYPES

    if known is not None and known.image in schema.names:
        image = known.image
    else:
        images = [field.name for field in schema if is_image(field)]
        noted = [name for name in images if kind(name) == "Image"]
        image = _pick_column("image", noted or images, IMAGE_NAMES, schema, title, "encoded images")
    if known is not None and known.label is not None and known.label not in schema.names:
        return Columns(image, None, None)
    labels = [field.name for field in schema if is_label(field) and field.name != image]
    if known is not None and known.label in labels:
        label = str(known.label)
    else:
        noted = [name for name in labels if kind(name) == "ClassLabel"]
        label = _pick_column("label", noted or labels, LABEL_NAMES, schema, title, "whole numbers or words")
    names = features[label].get("names") if kind(label) == "ClassLabel" else None
    if names is None:
        return Columns(image, label, None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LayerwiseError(f"{title} notes no list of words as the classes of {label!r}; write it again.")
    return Columns(image, label, check_words(names, title) or None)


def check_words(names: Sequence[str], title: str) -> tuple[str, ...]:
    """The names of classes, as they are.

    Raises:
        LayerwiseError: a name twice, or two that are the same text in two Unicode spellings.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name)
        other = seen.get(key)
        seen[key] = name
        if other == name:
            raise LayerwiseError(f"{title} lists the class {name!r} twice; give each class a name of its own.")
        if other is not None:
            raise LayerwiseError(
                f"{title} spells the class {name!r} in two ways, as {other!a} and {name!a}; use one of them."
            )
    return tuple(names)


def few(names: Sequence[str] | None) -> str:
    """The first ten of some names."""
    if names is None:
        return "no names"
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def pick(what: str, candidates: Sequence[str], usual: Sequence[str], columns: Sequence[str], title: str) -> str:
    """The column to use: the first of the usual names among the candidates, or the only candidate."""
    for name in usual:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several {what} columns ({few(candidates)})" if candidates else f"no {what} column"
    raise LayerwiseError(f"{title} has {problem} among its columns {few(columns)}; name the one to use {usual[0]!r}")


def _pick_column(what: str, candidates: list[str], usual: Sequence[str], schema: Any, title: str, wanted: str) -> str:
    """`pick`, but a column of the right name that holds the wrong things is reported as what it is."""
    named = [name for name in usual if name in schema.names]
    if named and named[0] not in candidates and not any(name in candidates for name in usual):
        held = schema.field(named[0]).type
        raise LayerwiseError(f"column {named[0]!r} of {title} holds {held}, not {wanted}; store them as such.")
    return pick(what, candidates, usual, schema.names, title)


def _features(schema: Any, title: str) -> dict[str, dict]:
    """What Hugging Face `datasets` has noted about the columns."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, AttributeError, RecursionError) as reason:
        raise LayerwiseError(f"{title} holds damaged notes about its columns; write it again.") from reason


def _read_parquet(
    files: list[Path], folder: Path, in_memory_limit: int, known: Columns | None
) -> tuple[TableRows, Columns]:
    parquet = need("pyarrow.parquet")
    advice = "give parquet: a parquet file or a folder of them"
    mapped = sum(check_regular(file, advice).st_size for file in files) > in_memory_limit
    images, parts = [], []
    first: Columns | None = None
    for file in files:
        title = shown(file)
        try:
            opened = parquet.ParquetFile(file)
            schema = opened.schema_arrow
            if first is None:
                columns = first = find_columns(schema, title, known)
            else:
                for column in first[:2]:
                    if column is not None and column not in schema.names:
                        raise LayerwiseError(
                            f"{title} has no column {column!r}, as {shown(files[0])} has; take one of them out"
                        )
                columns = find_columns(schema, title, first)
            count = opened.metadata.num_rows
            labels: list = [None] * count
            if columns.label is not None:
                labels = _labels_of(opened.read(columns=[columns.label]).column(0), columns, title)
            if not mapped:
                images.append(opened.read(columns=[columns.image]).column(0))
        except LayerwiseError:
            raise
        except Exception as error:  # arrow raises many kinds about damaged bytes, and numbers in them may be huge
            raise LayerwiseError(f"{title} is not a readable parquet file; fetch it again") from error
        parts.append(Part(title, labels, columns.names, file.parent))
    if first is None or not any(part.labels for part in parts):
        raise LayerwiseError(f"{shown(files[0])} holds no rows; give a parquet file with samples")
    if mapped:
        images = [_map_parquet(files, [first.image]).column(first.image)]
    return TableRows(first.image, images, parts, files, [folder]), first


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
                f"cannot lay {shown(files[0])} out for streaming under {cache} ({type(error).__name__}); "
                "set XDG_CACHE_HOME to a folder with room"
            ) from error


def _labels_of(column: Any, columns: Columns, title: str) -> list:
    """The labels of a column as whole numbers or words; None where a cell is empty."""
    found = []
    for row, value in enumerate(column.to_pylist()):
        if isinstance(value, bool):
            value = int(value) if columns.names else str(value)
        elif isinstance(value, (float, Decimal)):
            if math.isnan(value):
                value = None
            elif not math.isfinite(value) or value != int(value):
                raise LayerwiseError(
                    f"row {row} of {title} has the label {value} in column {columns.label!r}, which is no class; "
                    "give whole numbers or words."
                )
            else:
                value = int(value)
        elif isinstance(value, str) and value not in (columns.names or ()) and is_missing(value):
            value = None
        if columns.names and isinstance(value, str):
            if value not in columns.names:
                raise LayerwiseError(
                    f"row {row} of {title} has the label {value!r}, which is none of the classes that the file notes "
                    f"({few(columns.names)}); correct one of them."
                )
            value = columns.names.index(value)
        found.append(value)
    return found


def _same_classes(parts: Sequence[Part]) -> tuple[str, ...] | None:
    """The class list that all parts share; numbers in one part and words in another share nothing."""
    first = parts[0]
    for part in parts[1:]:
        if part.names != first.names:
            raise LayerwiseError(
                f"the class lists of {first.title} ({few(first.names)}) and of {part.title} ({few(part.names)}) "
                "differ; give all files of a split the same list."
            )
    words = [next((isinstance(value, str) for value in part.labels if value is not None), None) for part in parts]
    for part, kind in zip(parts, words, strict=True):
        other = next((index for index, found in enumerate(words) if None not in (kind, found) and found != kind), None)
        if other is not None:
            held = ("whole numbers", "words") if not kind else ("words", "whole numbers")
            raise LayerwiseError(
                f"the labels of {part.title} are {held[0]} and those of {parts[other].title} are {held[1]}; "
                "write them alike."
            )
    return first.names


def _rows_without_bytes(column: Any) -> list[int]:
    """The rows of an image column whose cell holds no bytes."""
    pyarrow, compute = need("pyarrow"), need("pyarrow.compute")
    rows, start = [], 0
    for chunk in column.chunks:
        cells = chunk
        if pyarrow.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
            cells = compute.struct_field(chunk, "bytes")
        if not _is_binary(cells.type):
            rows += range(start, start + len(chunk))
        elif cells.null_count:
            rows += [start + row for row in compute.indices_nonzero(compute.is_null(cells)).to_pylist()]
        start += len(chunk)
    return rows


def _is_binary(kind: Any) -> bool:
    return str(kind).startswith(("binary", "large_binary", "fixed_size_binary"))


def _content(cell: Any) -> bytes | str:
    """The encoded image of a cell, or the path of the file that holds it."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    return cell if isinstance(cell, (bytes, str)) else ""


def _place(ends: Sequence[int], row: int) -> tuple[int, int]:
    """The part that a row lies in, and its number there."""
    part = bisect_right(ends, row)
    return part, row - (ends[part - 1] if part else 0)


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
