"""timm and torchvision next to a torch for the CPU."""

import contextlib

import pytest
import torch

MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = []


def timm():
    """The module timm, or the test is skipped.

    A torchvision that was built for another torch has none of its own operators; it can be imported when their schemas
    are known.
    """
    if not hasattr(torch.ops.torchvision, "nms") and not _library:
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))
        for schema in MISSING:
            with contextlib.suppress(RuntimeError):
                _library[0].define(schema)
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    return pytest.importorskip("timm", reason="the timm extra is not installed")
