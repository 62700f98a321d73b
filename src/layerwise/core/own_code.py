"""Code of the user, named as `FILE.py:NAME`: loaded, and recognised when it has changed.

A file is run when its name is looked up, as `python FILE.py` would run it. A run records the name and the SHA-256 of
the file; what was recorded is checked before the file is run.
"""

import hashlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

from layerwise.errors import LayerwiseError, suggestion
from layerwise.files import MissingFile, read_bytes, shown

_modules: dict[tuple[str, str], Any] = {}
"""What a file with these contents has defined."""
_origins: dict[int, tuple[str, str]] = {}
"""By identity of what was loaded: its name, and the SHA-256 of its file. Modules keep what they define alive."""


def is_own(name: str) -> bool:
    """Whether a name has the form `FILE.py:NAME`.

    >>> is_own("nets/net.py:make"), is_own("sll"), is_own("timm:resnet18")
    (True, False, False)
    """
    file, colon, _ = name.rpartition(":")
    return bool(colon) and file.endswith(".py")


def load(name: str, recorded: str | None = None) -> Any:
    """What `FILE.py:NAME` names; the file is run.

    Args:
        name: the file and the name in it.
        recorded: SHA-256 of the file when a run began.

    Raises:
        LayerwiseError: no such file or name, a file that fails, or one that has changed since the run began.
    """
    file, _, attribute = name.rpartition(":")
    try:
        content = read_bytes(file, "give the path of a Python file and a name in it: FILE.py:NAME")
    except MissingFile as reason:
        advice = "start the command in the folder from which the run was started" if recorded else "correct the path"
        raise LayerwiseError(f"there is no file {shown(file)}, which {name!r} names; {advice}.") from reason
    digest = hashlib.sha256(content).hexdigest()
    check_unchanged(file, digest, recorded)
    module = _modules.get((file, digest)) or _run(file, digest, content)
    found = getattr(module, attribute, None)
    if found is None:
        own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
        names = [n for n, value in own.items() if callable(value) and not n.startswith("_")]
        advice = suggestion(attribute, names) if names else "it has no functions or classes of its own"
        raise LayerwiseError(f"{shown(file)} defines no {attribute!r}; {advice}.")
    _origins[id(found)] = name, digest
    return found


def check_unchanged(file: str, digest: str, recorded: str | None) -> None:
    """Raise LayerwiseError if a file is not the one that a run has recorded."""
    if recorded is not None and digest != recorded:
        raise LayerwiseError(
            f"{shown(file)} has changed since the run began, so it may describe something else; put the old file back, "
            "or start a new run."
        )


def origin(loaded: Any) -> tuple[str, str] | None:
    """The name that something was loaded by, and the SHA-256 of its file; None for what comes with a package."""
    return _origins.get(id(loaded))


def _run(file: str, digest: str, content: bytes) -> Any:
    path = Path(file)
    module = types.ModuleType(f"layerwise_own_{path.stem}_{digest[:12]}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses and pickles look their module up there
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # its neighbours can be imported, after everything that is installed
    try:
        exec(compile(content, file, "exec"), vars(module))
    except (Exception, SystemExit) as reason:  # a user's code may raise anything
        del sys.modules[module.__name__]
        lines = [frame.lineno for frame in inspect.trace() if frame.filename == file]
        line = getattr(reason, "lineno", None) or (lines[-1] if lines else None)
        where = f" in line {line}" if line else ""
        raise LayerwiseError(
            f"{shown(file)} fails{where} ({type(reason).__name__}: {' '.join(str(reason).split())[:200]}); correct the "
            "file."
        ) from reason
    _modules[file, digest] = module
    return module
