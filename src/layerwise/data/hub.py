"""Data sets on the Hugging Face hub, downloaded once and mapped from the cache of `datasets`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from layerwise.core.ranges import DataTask
from layerwise.data.columns import find_columns, read_labels
from layerwise.data.machine import need
from layerwise.data.naming import split_of
from layerwise.data.rows import Rows, TablePart, TableRows
from layerwise.errors import LayerwiseError, short
from layerwise.files import kind_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?")
"""Legal names of data sets on the hub; `datasets` would accept a path, too."""


def open_hub(
    repository: str, advice: str = "", task: DataTask = "classification", targets: Sequence[str] = ()
) -> dict[str, Rows]:
    """The splits of a data set on the Hugging Face hub, downloaded once and mapped from its cache."""
    found, datasets = load_splits(repository, advice), need("datasets")
    caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(need("huggingface_hub.constants").HF_HUB_CACHE)]
    splits = {}
    for split, rows in found.items():
        title = f"{repository} ({split})"
        columns = find_columns(rows.features.arrow_schema, title, None, task, targets)
        labels = read_labels(rows.data.column, columns, title) if columns.labels else [None] * len(rows)
        part = TablePart(title, labels, columns.names, None)
        files = [Path(cached["filename"]) for cached in rows.cache_files]
        splits[split] = TableRows(columns.image, [rows.data.column(columns.image)], [part], files, caches)
    known = [split_of(split) for split in splits]
    return {
        (of if of is not None and of not in splits and known.count(of) == 1 else split): rows
        for (split, rows), of in zip(splits.items(), known, strict=True)
    }


def load_splits(repository: str, advice: str = "") -> Any:
    """The splits of a data set on the hub as `datasets` has them.

    Raises:
        LayerwiseError: there is none of this name, or it cannot be reached; `advice` ends the sentence.
    """
    datasets = need("datasets")
    if not NAME.fullmatch(repository):
        raise LayerwiseError(
            f"{short(repository)} is not the name of a data set on the Hugging Face hub; give hf:owner/name, and "
            "imagefolder:, parquet: or text: for files of your own."
        )
    if kind_of(repository) == "folder":  # `datasets` would read it silently
        raise LayerwiseError(
            f"hf:{repository} is a folder here, too; start the command elsewhere, or give imagefolder:{repository}, "
            f"parquet:{repository} or text:{repository} for the folder."
        )
    with quiet():
        unreachable = _unreachable(repository)
        try:
            with _offline() if unreachable else nullcontext():
                return datasets.load_dataset(repository)
        except Exception as error:  # the network stack and a foreign loader may raise anything
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            reason = reason.replace("OfflineModeIsEnabled", unreachable)
            raise LayerwiseError(
                f"cannot get {repository} from the Hugging Face hub ({type(error).__name__}: {reason}); "
                f"check the name and the network{advice}"
            ) from error


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
    """Let `datasets` use only its cache."""
    places = [need("datasets").config, need("huggingface_hub.constants")]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextmanager
def quiet() -> Iterator[None]:
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
