"""A network of the gallery with its batch, and how it is trained."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import LanguageModel, Segmentation

CLASSES, VOCABULARY, SAMPLES, TOKENS = 5, 64, 8, 16


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


@dataclass
class Entry:
    """A network with a batch, and how it is trained."""

    model: nn.Module
    batch: Any
    """What `step` gets: a mapping with `labels`, or a tuple of the input and the labels."""
    cuts: str | list[str] = "auto"
    task: Any = None
    output: Callable[[Any], Tensor] | None = None
    plain: Callable[[Any, Any], Tensor] = _own_loss
    """The loss of an ordinary loop: from model and batch."""


def logits_of(out: Any) -> Tensor:
    """The logits in a library's output."""
    return out.logits


def ids(samples: int = SAMPLES, tokens: int = TOKENS) -> Tensor:
    """Random tokens."""
    return torch.randint(3, VOCABULARY, (samples, tokens))


def images(size: int = 16) -> Tensor:
    """Random images."""
    return torch.randn(SAMPLES, 3, size, size)


def labels() -> Tensor:
    """A class per sample."""
    return torch.arange(SAMPLES) % CLASSES


def text() -> dict[str, Tensor]:
    """Tokens, a mask with padding, labels with -100 there."""
    tokens, mask = ids(), torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[0, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def language(model: nn.Module, **batch: Tensor) -> Entry:
    """A model of `transformers` for the next token."""
    return Entry(model, text() | batch, task=LanguageModel(), output=logits_of)


def classifier(model: nn.Module, x: Tensor | None = None, **options: Any) -> Entry:
    """A model of one tensor with a class per sample."""
    batch = (images() if x is None else x, labels())
    return Entry(model, batch, plain=lambda model, b: F.cross_entropy(model(b[0]), b[1]), **options)


def pixels(model: nn.Module, x: Tensor, output: Callable[[Any], Tensor] | None = None, **options: Any) -> Entry:
    """A model of images with a class per pixel: which of `CLASSES` ranges its brightness lies in."""
    bounds = torch.linspace(-0.6, 0.6, CLASSES - 1)
    y = torch.bucketize(F.avg_pool2d(x.mean(1, keepdim=True), 3, 1, 1)[:, 0], bounds / 2)
    y[0, :2] = -100

    def plain(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out if output is None else output(out), batch[1])

    return Entry(model, (x, y), task=Segmentation(), output=output, plain=plain, **options)


def torchvision_here() -> None:
    """Make a torchvision for CUDA importable together with a torch for the CPU.

    Its compiled operators cannot be loaded then, and importing it fails at their names, so the names are defined here.
    None of the networks runs such an operator.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or torch.version.cuda is not None:
        return
    if "+cu" in (Path(found.origin).parent / "version.py").read_text() and not hasattr(torchvision_here, "library"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_here.__dict__["library"] = library  # kept, because the names end with it
