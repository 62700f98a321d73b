"""Text by path, name or hub: its splits, its documents, its tokenizer, and windows of its tokens."""

import codecs
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator

from layerwise.core.randomness import derive_seed
from layerwise.core.ranges import TokenizerKind
from layerwise.data.hub import load_splits
from layerwise.data.machine import cache_folder, find_local
from layerwise.data.naming import TEST_NAMES, few, split_of
from layerwise.data.tokenizer import BPE, BYTES, Bytes, Characters, Tokenizer, from_json
from layerwise.data.tokens import TokenSource, token_file
from layerwise.errors import LayerwiseError
from layerwise.files import check_regular, kind_of, list_files, open_regular, shown

SUFFIXES = (".txt", ".text")
TEST_FRACTION = 0.1  # of a text that has no test split: its end
SPLIT_SEED = 20_240  # of the documents of that split
BLOCK = 2**20  # bytes that are read at a time
ADVICE = "give text:FILE, or text:FOLDER with train.txt, and validation.txt and test.txt if there are any"
SHAKESPEARE = "tinyshakespeare"
ORIGIN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class TextOptions(NamedTuple):
    """How a text becomes windows of tokens."""

    tokenizer: TokenizerKind = "characters"
    """characters | bytes | bpe (byte-level, trained on the training split)."""
    vocabulary: int = 4096
    """Number of tokens of a BPE."""
    window: int = 128
    """Tokens of a window T."""
    documents: bool = False
    """Whether empty lines separate documents. Their order is then random, and splits do not cut them."""


class Corpus(NamedTuple):
    """The text of a split."""

    pieces: Callable[[], Iterator[str]]
    """Reads it: documents, or blocks that end with a line."""
    key: Any
    """Identifies what it is made of, as JSON; None if that is unknown."""
    shuffled: bool = False
    """Whether its pieces come in random order."""


class TextData(NamedTuple):
    """A text, split and encoded."""

    train: TokenSource
    val: TokenSource | None
    test: TokenSource
    tokenizer: Tokenizer
    contents: tuple[str, ...]
    """What identifies the text: the digest of the tokenizer, and the contents of the splits."""
    notes: list[str]


def load_text(
    name: str, options: TextOptions, val_fraction: float, root: str | Path | None, tokenizer: Tokenizer | None = None
) -> TextData:
    """The splits of a text as windows of tokens.

    Args:
        name: `text:PATH`, a path or the name of a folder under `root`; `hf:owner/name` of a data set with a column of
            text; or `tinyshakespeare`.
        options: how it becomes windows.
        val_fraction: part of the training text that becomes the validation split, if it has none of its own.
        root: folder of local data sets.
        tokenizer: the one of a run that is continued; made from the text if not given.

    Raises:
        LayerwiseError: no such text, one that is not UTF-8, or one that is too short.
    """
    title, notes = shown(name), []
    if options.tokenizer == "bpe" and options.vocabulary <= BYTES:
        raise LayerwiseError(
            f"a vocabulary of {options.vocabulary} has no room beside the {BYTES} bytes; give --data.vocabulary "
            f"{BYTES + 1} or more, or --data.tokenizer bytes."
        )
    given = _hub(name) if name.startswith("hf:") else _files(name, root, options.documents)
    splits = _own_splits(given, title, val_fraction, notes)
    for split, fraction in (("test", TEST_FRACTION), ("val", val_fraction)):
        if split not in splits and fraction:
            splits["train"], splits[split] = _drawn(splits["train"], fraction, title, options.documents)
            if split == "test":
                what = "documents, the same in every run," if options.documents else "text, its end,"
                notes.append(f"{title} has no test split: a tenth of its {what} is the test split")
    corpora = {split: text.corpus(shuffled=options.documents and split == "train") for split, text in splits.items()}
    if tokenizer is None:
        tokenizer = _tokenizer(options, corpora)
        if options.tokenizer == "bpe" and len(tokenizer.names) < options.vocabulary:
            notes.append(f"the BPE has {len(tokenizer.names)} tokens, as the text gives no more pairs to join")
    sources, contents = {}, [tokenizer.digest]
    for split, corpus in corpora.items():
        tokens = token_file(corpus.pieces(), tokenizer, corpus.key, corpus.shuffled)
        if len(tokens.values) <= options.window:
            raise LayerwiseError(
                f"the {split} split of {title} has {len(tokens.values)} tokens, and a window takes "
                f"{options.window + 1}; give more text, or a smaller --data.window."
            )
        sources[split] = TokenSource.of(tokens.values, options.window)
        contents.append(f"{split}: {tokens.contents}")
    return TextData(sources["train"], sources.get("val"), sources["test"], tokenizer, tuple(contents), notes)


# Where text is.


class ByteRange(NamedTuple):
    """A range of bytes of a file."""

    path: str
    start: int
    stop: int


class Text:
    """The text of a split before it is divided into pieces: ranges of files, in order.

    Args:
        parts: where it is.
        documents: whether empty lines separate documents.
        chosen: which documents belong to the split; all if not given.
    """

    def __init__(self, parts: Sequence[ByteRange], documents: bool, chosen: tuple[Any, set[int]] | None = None):
        self.parts, self.documents, self.chosen = parts, documents, chosen

    def pieces(self) -> Iterator[str]:
        """Documents, or blocks that end with a line."""
        blocks = chain.from_iterable(map(_blocks, self.parts))
        if not self.documents:
            return blocks
        found = _documents(blocks)
        return found if self.chosen is None else (text for i, text in enumerate(found) if i in self.chosen[1])

    def corpus(self, shuffled: bool) -> Corpus:
        """The text, with a key that identifies it."""
        times = [os.stat(part.path).st_mtime_ns for part in self.parts]
        key = [[*part, time] for part, time in zip(self.parts, times, strict=True)]
        return Corpus(self.pieces, [key, self.documents, self.chosen and self.chosen[0]], shuffled)

    def split(self, fraction: float, title: str) -> tuple["Text", "Text"]:
        """The rest, and the last `fraction` of the text, which begins with a line; or that share in drawn documents."""
        if self.documents:
            return self._drawn(fraction, title)
        sizes = [part.stop - part.start for part in self.parts]
        at = sum(sizes) - round(fraction * sum(sizes))
        before, after, passed = [], [], 0
        for part, size in zip(self.parts, sizes, strict=True):
            middle = min(max(part.start + at - passed, part.start), part.stop)
            if part.start < middle < part.stop:
                middle = _line_at(part.path, middle, part.stop)
            before += [part._replace(stop=middle)] if middle > part.start else []
            after += [part._replace(start=middle)] if middle < part.stop else []
            passed += size
        return Text(before, False), Text(after, False)

    def _drawn(self, fraction: float, title: str) -> tuple["Text", "Text"]:
        kept = None if self.chosen is None else self.chosen[1]
        sizes = {i: len(text) for i, text in enumerate(_documents(chain.from_iterable(map(_blocks, self.parts))))}
        places = [i for i in sizes if kept is None or i in kept]
        if len(places) < 2:
            raise LayerwiseError(
                f"{title} holds {len(places)} documents, parted by empty lines, which is too few to take some for a "
                "split; give more, or leave --data.documents out."
            )
        generator = Generator().manual_seed(derive_seed(SPLIT_SEED, "documents"))
        order = [places[i] for i in torch.randperm(len(places), generator=generator, device="cpu").tolist()]
        wanted, size, taken = fraction * sum(sizes[i] for i in places), 0, set[int]()
        for place in order[:-1]:
            if taken and size >= wanted:
                break
            taken.add(place)
            size += sizes[place]
        history = [] if self.chosen is None else self.chosen[0]
        rest = set(places) - taken
        return (
            Text(self.parts, True, ([*history, fraction, 0], rest)),
            Text(self.parts, True, ([*history, fraction, 1], taken)),
        )


class HubText:
    """A split of a data set on the hub: its rows are documents.

    Args:
        rows: of `datasets`.
        column: the one that holds text.
        chosen: numbers of the rows; all if not given.
    """

    def __init__(self, rows: Any, column: str, chosen: Sequence[int] | None = None):
        self.rows, self.column = rows, column
        self.chosen = range(len(rows)) if chosen is None else chosen

    def pieces(self) -> Iterator[str]:
        """The rows, an empty line after each."""
        for place in self.chosen:
            yield f"{self.rows[place][self.column]}\n\n"

    def corpus(self, shuffled: bool) -> Corpus:
        """The text, identified by the fingerprint of `datasets`."""
        key = [self.rows._fingerprint, self.column, hashlib.sha256(json.dumps(list(self.chosen)).encode()).hexdigest()]
        return Corpus(self.pieces, key, shuffled)

    def split(self, fraction: float, title: str) -> tuple["HubText", "HubText"]:
        """The rest, and `fraction` of the rows, drawn."""
        count = round(fraction * len(self.chosen))
        if not 0 < count < len(self.chosen):
            raise LayerwiseError(f"{title} holds {len(self.chosen)} rows, which is too few to split; give more.")
        generator = Generator().manual_seed(derive_seed(SPLIT_SEED, "documents"))
        taken = set(torch.randperm(len(self.chosen), generator=generator, device="cpu")[:count].tolist())
        parts = [[row for i, row in enumerate(self.chosen) if (i in taken) == wanted] for wanted in (False, True)]
        return HubText(self.rows, self.column, parts[0]), HubText(self.rows, self.column, parts[1])


AnyText = Text | HubText


def _files(name: str, root: str | Path | None, documents: bool) -> dict[str, AnyText]:
    """The splits of a file or a folder of text, by their usual names."""
    if name == SHAKESPEARE:
        folder = find_local(name, root)
        if folder is None:
            raise LayerwiseError(
                f"{name} is not on this machine; put {ORIGIN} into {name}/input.txt of the folder that LAYERWISE_DATA "
                "names, or give --data text:FILE."
            )
        files = list_files(folder, SUFFIXES)
        found = {"train": files}
    else:
        given = name.partition(":")[2]
        path = Path(given)
        kind = kind_of(path, ADVICE) if given else None
        if kind is None and given and not path.is_absolute() and (local := find_local(given, root)) is not None:
            path, kind = local, "folder"
        if kind is None:
            raise LayerwiseError(f"there is no file or folder {shown(path)}; {ADVICE}.")
        found = {"train": [path]} if kind != "folder" else _by_split(path)
    texts: dict[str, AnyText] = {}
    for split, files in found.items():
        parts = [ByteRange(os.path.abspath(file), 0, check_regular(file, ADVICE).st_size) for file in files]
        if not any(part.stop for part in parts):
            raise LayerwiseError(f"the {split} split of {shown(name)} is empty; {ADVICE}.")
        texts[split] = Text(parts, documents)
    return texts


def _by_split(folder: Path) -> dict[str, list[Path]]:
    files = list_files(folder, SUFFIXES)
    found: dict[str, list[Path]] = {}
    for file in files:
        if (split := split_of(file.stem, anywhere=True)) is not None:
            found.setdefault(split, []).append(file)
    if "train" not in found:
        names = few([str(file.relative_to(folder)) for file in files]) if files else "no file of text"
        raise LayerwiseError(f"{shown(folder)} has no train.txt, only {names}; {ADVICE}.")
    return found


def _hub(name: str) -> dict[str, AnyText]:
    found: dict[str, AnyText] = {}
    for split, rows in load_splits(name.removeprefix("hf:")).items():
        columns = [
            column for column, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")
        ]
        column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
        if column is None:
            raise LayerwiseError(
                f"{name} has no column called text among its columns {few(list(rows.features))}; give a data set of "
                "text."
            )
        found[split_of(split) or split] = HubText(rows, column)
    return found


def _own_splits(given: dict[str, AnyText], title: str, val_fraction: float, notes: list[str]) -> dict[str, AnyText]:
    """The splits that a text comes with, as train, val and test."""
    if "train" not in given:
        raise LayerwiseError(f"{title} has no training split, only {', '.join(given)}; give one named train.")
    found = {"train": given.pop("train")}
    for split in [split for split in TEST_NAMES if split in given]:
        use = "val" if split != "test" and "test" in found else "test"
        if use in found:
            notes.append(f"the split {split!r} of {title} is a second validation split and is left out")
        elif use == "val" and not val_fraction:
            notes.append(f"the validation fraction is 0: {title}'s own validation split is not used")
        else:
            found[use] = given[split]
            if use == "val":
                notes.append(f"{title} has its own validation split: the validation fraction takes no training text")
            elif split != "test":
                notes.append(f"{title} has no test split: its split {split!r} is used as the test split")
    return found


def _drawn(text: Any, fraction: float, title: str, documents: bool) -> tuple[AnyText, AnyText]:
    rest, part = text.split(fraction, title)
    if isinstance(part, Text) and not documents and not (part.parts and rest.parts):
        raise LayerwiseError(f"{title} is too short to be split; give more text.")
    return rest, part


# Reading.


def _blocks(part: ByteRange) -> Iterator[str]:
    """The text of a range of a file in blocks that end with a line, line ends as one character."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    waiting, at = "", part.start
    with open_regular(part.path, ADVICE) as file:
        file.seek(at)
        while at < part.stop:
            content = file.read(min(BLOCK, part.stop - at))
            if not content:
                break
            if at == 0:
                content = content.removeprefix(codecs.BOM_UTF8)
            at = file.tell()
            try:
                waiting += decoder.decode(content, final=at >= part.stop)
            except UnicodeDecodeError as reason:
                raise LayerwiseError(f"{shown(part.path)} is not UTF-8 text; {ADVICE}.") from reason
            end = waiting.rfind("\n") + 1
            if end or len(waiting) > 4 * BLOCK:  # a line may be longer than what can be kept
                yield waiting[: end or None]
                waiting = waiting[end:] if end else ""
    if waiting:
        yield waiting


GAP = re.compile(r"\n(?:[ \t]*\n)+")  # empty lines


def _documents(blocks: Iterable[str]) -> Iterator[str]:
    """The documents of a text, which empty lines separate; each ends with one."""
    waiting = ""
    for block in blocks:
        *whole, waiting = GAP.split(waiting + block)
        yield from (f"{text.strip(chr(10))}\n\n" for text in whole if text.strip())
    if waiting.strip():
        yield f"{waiting.strip(chr(10))}\n\n"


def _line_at(path: str, position: int, stop: int) -> int:
    """Where the first line at or after a position begins; the next character if there is no further line."""
    with open_regular(path, ADVICE) as file:
        file.seek(position - 1)
        file.readline(BLOCK)
        if file.tell() < stop and file.tell() - position < BLOCK - 1:
            return file.tell()
        file.seek(position)
        while position < stop and file.read(1)[0] & 0xC0 == 0x80:
            position += 1
    return position


# Tokenizers.


def _tokenizer(options: TextOptions, corpora: dict[str, Corpus]) -> Tokenizer:
    """The tokenizer of a text: of all its characters, or a BPE of its training split, kept in the user's cache."""
    if options.tokenizer == "bytes":
        return Bytes()
    used = list(corpora.values()) if options.tokenizer == "characters" else [corpora["train"]]
    keys = [corpus.key for corpus in used]
    path = None
    if None not in keys:
        text = json.dumps([options.tokenizer, options.vocabulary, keys])
        path = cache_folder() / "tokens" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.tokenizer.json"
        try:
            return from_json(path.read_text(), str(path))
        except (OSError, ValueError):
            pass
        except LayerwiseError as reason:
            if isinstance(reason, ImportError):
                raise
    if options.tokenizer == "characters":
        found: Tokenizer = Characters(set().union(*(piece for corpus in used for piece in corpus.pieces())))
    else:
        found = BPE.trained(options.vocabulary, used[0].pieces())
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            partial.write_text(found.to_json())
            os.replace(partial, path)
        except OSError:  # no space or no permission: the cache is optional
            pass
    return found
