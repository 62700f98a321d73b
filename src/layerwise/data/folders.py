"""Image folders: which folders are splits, and which are classes."""

import re
from collections.abc import Sequence
from pathlib import Path

from layerwise.data.naming import SPLITS, TEST_NAMES, check_words, few, split_of
from layerwise.data.rows import FileRows, Rows
from layerwise.errors import LayerwiseError
from layerwise.files import kind_of, list_files, list_folders, shown

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga"),
)


def open_imagefolder(path: Path) -> dict[str, Rows]:
    """The splits of `path`/train, `path`/test, ..., or `path` as the training split.

    A folder is a split by its name (`split_of`). If no folder is the training split, all are classes.

    Raises:
        LayerwiseError: no folder, no images, two folders of one split, or folders that look like splits of which none
            is the training split.
    """
    if kind_of(path) != "folder":
        raise LayerwiseError(f"{shown(path)} is not a folder; give imagefolder: a folder with one folder per class")
    folders = list_folders(path)
    splits = split_folders(path, folders)
    if "train" not in splits:
        notes = _check_classes(path, folders)
        rows = class_folders(path)
        rows.notes += notes
        return {"train": rows}
    used = set(splits.values())
    found: dict[str, Rows] = {"train": class_folders(inner_folder(splits.pop("train"), "train"))}
    for split in (split for split in TEST_NAMES if split in splits):
        folder = inner_folder(splits[split], split)
        images = list_files(folder, SUFFIXES)
        unlabelled = images and not list_folders(folder)
        found[split] = FileRows(folder, images) if unlabelled else class_folders(folder)
    others = [folder.name for folder in folders if folder not in used]
    if others:
        found["train"].notes += (f"folders of {shown(path)} that are not splits and are left out: {few(others)}",)
    return found


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
        rows.notes = (f"{others} files under {shown(folder)} are not images in a class folder and are left out",)
    return rows


def split_folders(path: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """The folder of each split; an exact name takes precedence over one with other words in its name."""
    candidates: dict[str, list[Path]] = {}
    for folder in folders:
        split, plain = split_of(folder.name), folder.name.lower()
        # Classes may be called "bullet_train" or "training", but a training split holds folders.
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


def inner_folder(folder: Path, split: str) -> Path:
    """A split's folder, or its only subfolder if that names the same split, as in seg_train/seg_train."""
    inner = list_folders(folder)
    return inner[0] if len(inner) == 1 and split_of(inner[0].name) == split else folder


PART = re.compile(r"(fold|part|partition|split|shard|chunk|batch|subset|set)s?([ _-]?(\d+|[a-z]))?", re.IGNORECASE)
"""The name of a part of a data set, such as fold1 or part_a."""


def _check_classes(path: Path, folders: Sequence[Path]) -> tuple[str, ...]:
    """Refuse folders that are not classes: all have names of splits, or are parts or hold splits of the same classes.

    Returns:
        A note if classes hold the same folders, as in CLASS/left and CLASS/right: another layout might be meant.
    """
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
    if len(shared) < 2:
        return ()
    if all(PART.fullmatch(name) for name in names):
        raise LayerwiseError(
            f"the folders of {shown(path)} ({few(names)}) all hold the same folders ({few(shared)}), so they look like "
            "splits and not like classes; call one of them train and the others test and val"
        )
    if len({split_of(name) for name in shared} - {None}) > 1:
        raise LayerwiseError(
            f"the folders of {shown(path)} ({few(names)}) each hold splits ({few(shared)}); put train and test above "
            "the classes, as in train/CLASS/NAME.png"
        )
    return (
        f"the folders of {shown(path)} ({few(names)}) are the classes, and all hold the same folders "
        f"({few(shared)}); if these are the classes, call the folders above them train and test",
    )
