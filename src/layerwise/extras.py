"""Imports optional packages when they are needed; one sentence says if they are missing."""

import importlib
from typing import Any

from layerwise.errors import LayerwiseError


class MissingPackage(LayerwiseError, ImportError):
    """An optional package is not installed, or cannot be imported."""


def need(module: str, extra: str) -> Any:
    """Import a module of an optional extra.

    Args:
        module: the module, such as `"transformers"`.
        extra: the extra of layerwise that installs it.

    Raises:
        MissingPackage: it is not installed, or cannot be imported; the sentence says what to do.

    >>> need("math", "data").sqrt(4)
    2.0
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as reason:
        if (reason.name or package).partition(".")[0] == package:
            raise MissingPackage(f"{package} is not installed; run pip install 'layerwise[{extra}]'.") from reason
        raise _broken(package, extra, reason) from reason
    except (ImportError, RuntimeError, OSError) as reason:  # for example, built for another version of torch
        raise _broken(package, extra, reason) from reason


def _broken(package: str, extra: str, reason: Exception) -> MissingPackage:
    said = " ".join(str(reason).split())[:200].rstrip(".")
    return MissingPackage(
        f"{package} is installed but cannot be imported ({said}); install compatible versions: "
        f"pip install 'layerwise[{extra}]'."
    )
