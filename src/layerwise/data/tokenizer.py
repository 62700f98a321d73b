"""From text to tokens and back: characters, bytes, or a byte-level BPE that is trained on the text."""

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from layerwise import extras
from layerwise.core.ranges import TokenizerKind
from layerwise.errors import LayerwiseError, short, why

BYTES = 256
BATCH = 512  # pieces of text that the BPE encodes at once


class Tokenizer(ABC):
    """Maps text to tokens 0 .. V-1 and back.

    Attributes:
        kind: how text is divided.
        names: what each token stands for, printable.
        sizes: bytes of UTF-8 that each token stands for; those of the tokens of a text add up to its own.
    """

    kind: ClassVar[TokenizerKind]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32 (n,).

        Raises:
            LayerwiseError: the text holds something that no token stands for.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become the replacement character."""

    @abstractmethod
    def to_json(self) -> str:
        """The text from which `from_json` rebuilds the tokenizer."""

    def encode_all(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of pieces of text, one by one."""
        return map(self.encode, pieces)

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`, as a part of a sentence."""
        return f"SHA-256 {hashlib.sha256(self.to_json().encode()).hexdigest()}"


class Characters(Tokenizer):
    """A token per character, in the order of their code points.

    >>> found = Characters("banana")
    >>> found.names, found.encode("nab").tolist(), found.decode([1, 0])
    (('a', 'b', 'n'), [2, 0, 1], 'ba')
    """

    kind = "characters"

    def __init__(self, characters: Iterable[str]):
        self.names = tuple(sorted(set(characters)))
        self.sizes = tuple(len(name.encode()) for name in self.names)
        self._codes = np.array([ord(name) for name in self.names], dtype=np.uint32)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(_utf(text, "utf-32-le"), dtype="<u4")
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        if (unknown := self._codes[places] != codes).any():
            raise LayerwiseError(
                f"the character {chr(codes[unknown.argmax()])!r} is none of the {len(self.names)} that the text of "
                "training has; leave it out."
            )
        return places.astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.names[token] for token in tokens)

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "characters": "".join(self.names)})


class Bytes(Tokenizer):
    """A token per byte of the text in UTF-8.

    >>> Bytes().encode("é").tolist(), Bytes().decode([195, 169])
    ([195, 169], 'é')
    """

    kind = "bytes"
    names = tuple(f"0x{byte:02x}" for byte in range(BYTES))
    sizes = (1,) * BYTES

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf(text, "utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind})


class BPE(Tokenizer):
    """Byte-level byte-pair encoding of the library `tokenizers`: any text can be encoded.

    Args:
        text: the library's JSON, as in the `tokenizer.json` of many models.
    """

    kind = "bpe"

    def __init__(self, text: str):
        self._found, self._text = library_tokenizer(text), text
        names = [self._found.id_to_token(i) for i in range(self._found.get_vocab_size())]
        if None in names:
            raise LayerwiseError("its tokens are not numbered from 0 without a gap; put the right file back.")
        self.names = tuple(map(str, names))
        self.sizes = tuple(map(len, self.names))  # a character stands for a byte

    @classmethod
    def trained(cls, vocabulary: int, pieces: Iterable[str]) -> "BPE":
        """Train on pieces of text; it is smaller than `vocabulary` if the text has no more pairs to merge."""
        library = _library()
        found = library.Tokenizer(library.models.BPE())
        found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = library.decoders.ByteLevel()
        alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        found.train_from_iterator(pieces, trainer)
        return cls(found.to_str())

    def encode(self, text: str) -> np.ndarray:
        _utf(text, "utf-8")
        with in_the_library():
            return np.array(self._found.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_all(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        waiting = iter(pieces)
        while batch := list(islice(waiting, BATCH)):
            with in_the_library():
                encoded = self._found.encode_batch(batch, add_special_tokens=False)
            for found in encoded:
                yield np.array(found.ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        with in_the_library():
            return self._found.decode(list(tokens), skip_special_tokens=False)

    def to_json(self) -> str:
        return self._text


def from_json(text: str, where: str) -> Tokenizer:
    """The tokenizer that `to_json` was called on.

    Args:
        text: what `to_json` returned.
        where: the place of the text, for the error message.

    Raises:
        LayerwiseError: the text is not what `to_json` gives, or the library of a BPE is missing.

    >>> from_json(Characters("abc").to_json(), "tokenizer.json").names
    ('a', 'b', 'c')
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no table")
        if values.get("kind") == "characters" and isinstance(values.get("characters"), str) and values["characters"]:
            return Characters(values["characters"])
        if values.get("kind") == "bytes":
            return Bytes()
        if "model" not in values:
            raise ValueError(f"it is of the unknown kind {short(values.get('kind'))}")
    except (ValueError, RecursionError) as reason:
        raise LayerwiseError(f"{where} is not a tokenizer ({why(reason)}); put the file back.") from reason
    try:
        return BPE(text)
    except extras.MissingPackage:
        raise
    except LayerwiseError as reason:
        raise LayerwiseError(f"{where}: {reason}") from reason


def library_tokenizer(text: str) -> Any:
    """The tokenizer of the library `tokenizers` in a text, which cuts and fills up nothing.

    Raises:
        LayerwiseError: the text is not one, or the library is missing.
    """
    library = _library()
    with in_the_library("it is not a tokenizer of the library tokenizers"):
        found = library.Tokenizer.from_str(text)
        found.no_truncation()
        found.no_padding()
    return found


@contextlib.contextmanager
def in_the_library(failure: str = "the tokenizer cannot read the text") -> Iterator[None]:
    """A context in which whatever the library `tokenizers` raises, a panic of its Rust code too, is one sentence."""
    try:
        yield
    except BaseException as reason:
        panic = type(reason).__name__ == "PanicException"  # no subclass of Exception, and in no module
        if isinstance(reason, LayerwiseError) or not (panic or isinstance(reason, Exception)):
            raise
        raise LayerwiseError(f"{failure} ({why(reason).rstrip('.')}).") from reason


def _library() -> Any:
    found = extras.need("tokenizers", "text")
    for part in ("models", "pre_tokenizers", "decoders", "trainers"):
        extras.need(f"tokenizers.{part}", "text")
    return found


def _utf(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as reason:  # what a terminal gives for bytes that are not UTF-8
        raise LayerwiseError("the text holds bytes that are not UTF-8; give it as UTF-8.") from reason
