"""Opens files that a user named: only regular files, and every refusal is one sentence."""

import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from layerwise.errors import LayerwiseError

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
ADVICE = "give the path of a file"


class UnreadableFile(LayerwiseError):
    """A file exists, or may exist, and cannot be read."""


class MissingFile(UnreadableFile):
    """There is no file of this name."""


def shown(path: str | os.PathLike[str]) -> str:
    """Show a path in a sentence: on one line, printable, a very long one without its middle.

    >>> shown("a/b.png"), shown("a" + chr(0))
    ('a/b.png', "'a\\\\x00'")
    """
    text = str(path)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def kind_of(path: str | os.PathLike[str], advice: str = ADVICE) -> str | None:
    """The kind of a path, links followed: "file", "folder", "named pipe", "socket", "device"; None if it is missing.

    Raises:
        UnreadableFile: a name that no file can have, or a parent folder without permission.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as reason:  # too long, a NUL, no permission, a loop of links
        raise _refused(path, reason, advice) from reason
    return KINDS.get(stat.S_IFMT(mode), "special file")


def check_regular(path: str | os.PathLike[str], advice: str = ADVICE, inside: Path | None = None) -> os.stat_result:
    """Return the status of a regular file, links followed.

    Args:
        path: from the user.
        advice: what to do about a refused file; the end of the sentence.
        inside: folder in which the file itself must be, even through links (default: anywhere).

    Raises:
        MissingFile: nothing of this name.
        UnreadableFile: a folder, a pipe, a device; a name that no file can have; a file outside `inside`.
    """
    kind = kind_of(path, advice)
    if kind is None:
        raise MissingFile(f"there is no file {shown(path)}; {advice}.")
    if kind != "file":
        raise UnreadableFile(f"{shown(path)} is a {kind}, not a file; {advice}.")
    try:
        if inside is not None and not Path(path).resolve().is_relative_to(inside.resolve()):
            raise UnreadableFile(
                f"{shown(path)} lies outside the folder {shown(inside)}, or is a link that leads out of it; "
                "put the file itself there."
            )
        return os.stat(path)
    except (OSError, ValueError, RuntimeError) as reason:
        raise _refused(path, reason, advice) from reason


def open_regular(path: str | os.PathLike[str], advice: str = ADVICE, inside: Path | None = None) -> BinaryIO:
    """Open a regular file for reading bytes; never waits for a pipe and never touches a device.

    The arguments and the errors are those of `check_regular`; without permission to read it raises `UnreadableFile`.
    """
    check_regular(path, advice, inside)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(path, flags)  # non-blocking, in case the name has become a pipe in the meantime
    except FileNotFoundError as reason:
        raise MissingFile(f"there is no file {shown(path)}; {advice}.") from reason
    except (OSError, ValueError) as reason:
        raise _refused(path, reason, advice) from reason
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableFile(f"{shown(path)} is not a file; {advice}.")
    return os.fdopen(handle, "rb")


def open_to_append(path: str | os.PathLike[str], advice: str = ADVICE) -> TextIO:
    """Open a regular file for writing text at its end; it is made if there is none.

    Args:
        path: in a folder of the user; links are not followed, and pipes and devices are not opened.
        advice: what to do about a refused file; the end of the sentence.

    Raises:
        UnreadableFile: it is a link, a folder, a pipe or a device.
        OSError: it cannot be written, for example because the disk is full.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as reason:
        if os.path.islink(path):
            raise UnreadableFile(f"{shown(path)} is a link, and is not written through; {advice}.") from reason
        if kind_of(path, advice) in (None, "file"):
            raise
        raise UnreadableFile(f"{shown(path)} is a {kind_of(path)}, not a file; {advice}.") from reason
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableFile(f"{shown(path)} is a {kind_of(path)}, not a file; {advice}.")
    return os.fdopen(handle, "a", encoding="utf-8")


def read_bytes(
    path: str | os.PathLike[str], advice: str = ADVICE, inside: Path | None = None, limit: int = 2**30
) -> bytes:
    """Read a regular file of at most `limit` bytes; errors as of `open_regular`."""
    with open_regular(path, advice, inside) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UnreadableFile(f"{shown(path)} has {size} bytes, more than the {limit} that are read; {advice}.")
        try:
            return file.read()
        except (OSError, MemoryError) as reason:
            raise _refused(path, reason, advice) from reason


def read_text(
    path: str | os.PathLike[str], advice: str = ADVICE, inside: Path | None = None, limit: int = 2**30
) -> str:
    """Read a regular UTF-8 file, with or without a byte order mark; errors as of `open_regular`."""
    content = read_bytes(path, advice, inside, limit)
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()  # converts line ends to \n
    except UnicodeDecodeError as reason:
        raise UnreadableFile(f"{shown(path)} is not UTF-8 text; {advice}.") from reason


def list_files(folder: Path, suffixes: Sequence[str] = (), advice: str = "give the path of a folder") -> list[Path]:
    """List all files below a folder, in the order of their names.

    Hidden files and folders, and those that macOS adds to archives (`._NAME`, `__MACOSX`), are left out. Links to
    folders are not followed: their targets are in the list already.

    Args:
        folder: where to look.
        suffixes: lower-case suffixes with their dot, compared without regard to case (default: all files).
        advice: the end of the sentence.

    Raises:
        UnreadableFile: not a folder, a subfolder that cannot be read, or a link to a folder elsewhere.
    """
    if kind_of(folder, advice) != "folder":
        raise UnreadableFile(f"{shown(folder)} is not a folder; {advice}.")
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for linked in (path for name in folders if (path := Path(parent, name)).is_symlink()):
            if not linked.resolve().is_relative_to(folder.resolve()):
                raise UnreadableFile(f"{shown(linked)} is a link out of {shown(folder)}; put the folder itself there.")
        found += [
            Path(parent, name)
            for name in names
            if not is_hidden(name) and (not suffixes or os.path.splitext(name)[1].lower() in suffixes)
        ]
    return sorted(found)


def list_folders(folder: Path) -> list[Path]:
    """List the folders in a folder, in the order of their names, except those that `list_files` leaves out."""
    return sorted(path for path in _entries(folder) if not is_hidden(path.name) and kind_of(path) == "folder")


def is_hidden(name: str) -> bool:
    """Whether a name is hidden, or one that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def _entries(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except (OSError, ValueError) as reason:
        raise _refused(folder, reason, "give the path of a folder") from reason


def _raise(reason: OSError) -> None:
    raise _refused(reason.filename, reason, "give yourself the right to read it") from reason


def _refused(path: str | os.PathLike[str], reason: Exception, advice: str) -> UnreadableFile:
    why = getattr(reason, "strerror", None) or str(reason).partition("\n")[0] or type(reason).__name__
    return UnreadableFile(f"{shown(path)} cannot be read ({why}); {advice}.")
