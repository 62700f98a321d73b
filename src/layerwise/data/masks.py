"""Image folders with a mask per image: a class number for every pixel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.data.folders import SUFFIXES, inner_folder, split_folders
from layerwise.data.machine import need
from layerwise.data.naming import TEST_NAMES, few
from layerwise.data.pictures import ImageFormat, Unfit, open_picture, refusal, upright
from layerwise.data.rows import FileRows
from layerwise.errors import LayerwiseError
from layerwise.files import kind_of, list_files, list_folders, shown

IGNORED = 255  # the value of a mask's ignored pixels, as in most data sets
ADVICE = "give a grey or palette picture whose pixels are class numbers, with 255 for pixels to leave out"


def open_masks(path: Path) -> dict[str, tuple[FileRows, FileRows]]:
    """Images and masks of every split: `path`/images and `path`/masks, or such folders inside train, test, ...

    An image and its mask have the same path below the two folders, except for the suffix.

    Raises:
        LayerwiseError: no such folders, no images, an image without a mask.
    """
    if kind_of(path) != "folder":
        raise LayerwiseError(f"{shown(path)} is not a folder; give imagefolder: a folder with images/ and masks/")
    folders = list_folders(path)
    if {"images", "masks"} <= {folder.name for folder in folders}:
        return {"train": _pairs(path)}
    splits = split_folders(path, folders)
    if "train" not in splits:
        raise LayerwiseError(
            f"{shown(path)} holds no folders images and masks, nor a folder train with both, only "
            f"{few([folder.name for folder in folders]) or 'files'}; lay it out as images/NAME.png and masks/NAME.png"
        )
    return {split: _pairs(inner_folder(splits[split], split)) for split in ("train", *TEST_NAMES) if split in splits}


def _pairs(folder: Path) -> tuple[FileRows, FileRows]:
    images, masks = (_by_name(folder / kind) for kind in ("images", "masks"))
    if not images:
        raise LayerwiseError(f"no images under {shown(folder / 'images')}; put them there, and masks into masks/")
    bare = next((file for name, file in images.items() if name not in masks), None)
    if bare is not None:
        raise LayerwiseError(f"{shown(bare)} has no mask of the same name in {shown(folder / 'masks')}; add it")
    rows = FileRows(folder, list(images.values()), [0] * len(images))
    left = [str(name) for name in masks if name not in images]
    if left:
        rows.notes = (f"{len(left)} masks of {shown(folder)} have no image and are left out: {few(left)}",)
    return rows, FileRows(folder, [masks[name] for name in images])


def _by_name(folder: Path) -> dict[Path, Path]:
    files = list_files(folder, SUFFIXES) if kind_of(folder) == "folder" else []
    return {file.relative_to(folder).with_suffix(""): file for file in files}


def decoded_masks(rows: FileRows, form: ImageFormat) -> Tensor:
    """The masks, uint8 (N, H, W): cropped as `decode` crops images, and scaled to the nearest pixel."""
    masks = torch.empty(len(rows), form.height, form.width, dtype=torch.uint8, device="cpu")
    for row in range(len(rows)):
        try:
            masks[row] = torch.from_numpy(_numbers(rows.read(row), form))
        except Exception as reason:  # PIL raises many kinds of errors for a broken file
            raise refusal(rows.where(row), reason) from reason
    return masks


def _numbers(content: bytes, form: ImageFormat) -> np.ndarray:
    pil, ops = need("PIL.Image"), need("PIL.ImageOps")
    image: Any = open_picture(content)
    image.load()
    image = upright(image)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N"):
        raise Unfit(f"is a mask in colours ({image.mode}); {ADVICE}")
    numbers = np.asarray(image)
    if numbers.min() < 0 or numbers.max() > IGNORED:
        raise Unfit(f"holds the number {int(numbers.max())}, and masks have at most {IGNORED} classes; {ADVICE}")
    image = pil.fromarray(numbers.astype(np.uint8))
    if image.size != (form.width, form.height):
        image = ops.fit(image, (form.width, form.height), pil.Resampling.NEAREST)
    return np.array(image)


def classes_of(masks: Sequence[Tensor], title: str) -> tuple[tuple[str, ...], list[Tensor], list[str]]:
    """Names of the classes of the training masks, the masks of all splits, and notes.

    Masks that hold only 0 and 255 are black and white: 255 is then class 1.

    Raises:
        LayerwiseError: fewer than two classes, or a number in another split that the training masks do not have.
    """
    present = [torch.bincount(part.flatten(), minlength=256) > 0 for part in masks]
    notes: list[str] = []
    values = torch.stack(present).any(0)
    if values.nonzero().flatten().tolist() == [0, IGNORED]:
        masks, present = [part // IGNORED for part in masks], [torch.arange(256, device="cpu") < 2 for _ in masks]
        notes.append(f"the masks of {title} are black and white: white is class 1")
    highest = [int(found[:IGNORED].nonzero().max()) if bool(found[:IGNORED].any()) else -1 for found in present]
    if highest[0] < 1:
        raise LayerwiseError(f"the training masks of {title} hold fewer than two classes; {ADVICE}")
    if max(highest) > highest[0]:
        raise LayerwiseError(
            f"the masks of {title} hold class {max(highest)} in another split, and at most {highest[0]} in the "
            "training split; correct them"
        )
    return tuple(map(str, range(highest[0] + 1))), list(masks), notes
