"""Parquet files: finds their splits, and reads their rows, in memory or mapped from disk."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerwise.core.ranges import DataTask
from layerwise.data.columns import Columns, find_columns, read_labels
from layerwise.data.hub import quiet
from layerwise.data.machine import cache_folder, need
from layerwise.data.naming import few, split_of
from layerwise.data.rows import Rows, TablePart, TableRows
from layerwise.errors import LayerwiseError
from layerwise.files import check_regular, kind_of, list_files, shown

SHARD = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]+"
)  # the part of a name that differs between the parts of a table


def open_parquet(
    path: Path, in_memory_limit: int, task: DataTask = "classification", targets: Sequence[str] = ()
) -> dict[str, Rows]:
    """The splits of one parquet file, or of the parquet files anywhere under a folder.

    A file belongs to the split that its name or its folder names. One file that names none is the training split, and
    so are the numbered parts of one table.

    Raises:
        LayerwiseError: no file, one that cannot be read, or files whose names do not tell their splits.
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
    for split in sorted(
        splits, key=lambda split: split != "train"
    ):  # a column that a test split lacks is in the first split
        found[str(split)], columns = _read_parquet(splits[split], folder, in_memory_limit, columns, (task, targets))
    return {str(split): found[str(split)] for split in splits}


def _read_parquet(
    files: list[Path],
    folder: Path,
    in_memory_limit: int,
    known: Columns | None,
    wanted: tuple[DataTask, Sequence[str]],
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
                columns = first = find_columns(schema, title, known, *wanted)
            else:
                for column in (first.image, *first.labels):
                    if column not in schema.names:
                        raise LayerwiseError(
                            f"{title} has no column {column!r}, as {shown(files[0])} has; take one of them out"
                        )
                columns = find_columns(schema, title, first, *wanted)
            count = opened.metadata.num_rows
            labels: list = [None] * count
            if columns.labels:
                held = opened.read(columns=list(columns.labels))
                labels = read_labels(held.column, columns, title)
            if not mapped:
                images.append(opened.read(columns=[columns.image]).column(0))
        except LayerwiseError:
            raise
        except (
            Exception
        ) as error:  # arrow raises many kinds of errors for damaged bytes, and numbers in them may be huge
            raise LayerwiseError(f"{title} is not a readable parquet file; fetch it again") from error
        parts.append(TablePart(title, labels, columns.names, file.parent))
    if first is None or not any(part.labels for part in parts):
        raise LayerwiseError(f"{shown(files[0])} holds no rows; give a parquet file with samples")
    if mapped:
        images = [_map_parquet(files, [first.image]).column(first.image)]
    return TableRows(first.image, images, parts, files, [folder]), first


def _map_parquet(files: list[Path], columns: list[str]) -> Any:
    """The files as one arrow table on disk: parquet itself cannot be read row by row."""
    datasets = need("datasets")
    cache = cache_folder() / "arrow"
    with quiet():
        try:
            return datasets.Dataset.from_parquet(
                [str(file) for file in files], cache_dir=str(cache), columns=columns
            ).data
        except Exception as error:  # a foreign loader: a full disk comes as one of several types
            raise LayerwiseError(
                f"cannot lay {shown(files[0])} out for streaming under {cache} ({type(error).__name__}); "
                "set XDG_CACHE_HOME to a folder with room"
            ) from error
