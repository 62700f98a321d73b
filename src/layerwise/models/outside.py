"""Networks that come from elsewhere: `hf:CONFIG_OR_FOLDER`, `timm:NAME`, `FILE.py:function`.

Each name selects a dataclass of options, like a model of the zoo. The network that it builds is an ordinary
module, which is cut at the calls of its own modules.
"""

import dataclasses
import hashlib
import inspect
import json
import typing
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from layerwise.core import own_code
from layerwise.core.calls import CallPartition
from layerwise.core.cutting import cut_at_calls
from layerwise.core.ownership import Tied
from layerwise.core.tracing import is_sequential
from layerwise.errors import LayerwiseError, suggestion
from layerwise.extras import need
from layerwise.files import kind_of, read_bytes, shown
from layerwise.models.base import ModelOptions, require

PREFIXES = ("hf:", "timm:")
FORMS = {
    "hf:CONFIG_OR_FOLDER": "A network of transformers: random weights, or those of the folder.",
    "timm:NAME": "An image network of timm, with random weights.",
    "FILE.py:function": "A network of your own, returned by a function in a file.",
}
"""Forms of the names of networks from elsewhere, with descriptions."""
GIVEN = ("classes", "outputs", "shape")
"""Arguments that a user's function may take by name: the number of outputs, and the shape of one sample."""


def is_outside(name: str) -> bool:
    """Whether a name is that of a network from elsewhere.

    >>> is_outside("hf:gpt2/config.json"), is_outside("net.py:make"), is_outside("mlp")
    (True, True, False)
    """
    return name.startswith(PREFIXES) or own_code.is_own(name)


def options(name: str, recorded: str | None = None) -> "type[OutsideModel]":
    """The dataclass of options of a network from elsewhere.

    Args:
        name: `hf:CONFIG_OR_FOLDER`, `timm:NAME` or `FILE.py:function`.
        recorded: SHA-256 of its files when a run began; checked before any of them is used.

    Raises:
        LayerwiseError: there is no such network, its package is missing, or its files have changed.
    """
    if name.startswith("timm:"):
        return _timm(name)
    if name.startswith("hf:"):
        found = _hf(name, _digest(name.removeprefix("hf:"), recorded))
    else:
        own_code.load(name, recorded)  # reads the file again, because it may have changed since
        found = _own(name, own_code.load(name))
    own_code.check_unchanged(name.removeprefix("hf:"), found.sha256, recorded)
    return found


@dataclass(frozen=True)
class OutsideModel(ModelOptions):
    """Base of the options of networks from elsewhere."""

    source: ClassVar[str] = ""
    """The name by which it was requested."""
    sha256: ClassVar[str] = ""
    """SHA-256 of its files; empty if it has none."""
    further: ClassVar[str] = ""
    """Name of the option that collects numbers which are not options themselves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        depth = getattr(self, "depth", None)
        whole = depth is None or (isinstance(depth, int) and not isinstance(depth, bool) and depth >= 1)
        require(whole, f"depth must be a whole number of at least 1, not {depth!r}.")

    @abstractmethod
    def build(self, shape: tuple[int, int, int], classes: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Build the network for samples of `shape` and `classes` outputs."""

    @property
    def positions(self) -> bool:
        """Whether the network predicts a next token at every position."""
        return False

    def tokenizer(self) -> tuple[Path, int] | None:
        """The file of the tokenizer that the network was trained with, and the token that fills up a sequence."""
        return None

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float], depth: int | None = None) -> Self:
        """Options from numbers; numbers that are not options go to the constructor or configuration."""
        own = {f.name for f in dataclasses.fields(cls)}
        if cls.further not in own:
            return super().from_numbers(numbers, depth)
        rest = {name: value for name, value in numbers.items() if name not in own}
        found = super().from_numbers({name: value for name, value in numbers.items() if name in own}, depth)
        return dataclasses.replace(found, **{cls.further: rest})


def cut(
    model: nn.Module, cuts: str, blocks: int | None, output: str | None, tied: Tied | None
) -> nn.Module | CallPartition:
    """Cut a network from elsewhere at the calls of its modules; one that names its blocks, or is a chain, is unchanged.

    Args:
        model: the network.
        cuts: names or patterns separated by commas; `block` for those that are found automatically.
        blocks: keep this many of the cuts.
        output: name of the entry of its output that holds the logits.
        tied: which block trains a parameter that several blocks use.
    """
    if is_sequential(model) or hasattr(model, "block_names"):
        return model
    if cuts == "layer":
        raise LayerwiseError("--cuts layer needs a nn.Sequential; name modules, or give --cuts auto.")
    names = "auto" if cuts == "block" else cuts
    return cut_at_calls(model, names, output=output, tied=tied or "last", blocks=blocks)


def _words(values: Mapping[str, float]) -> dict[str, Any]:
    """Numbers of the command line; whole ones as int."""
    return {name: int(v) if float(v).is_integer() else v for name, v in values.items()}


# timm.


@dataclass(frozen=True)
class TimmModel(OutsideModel):
    """An image network of timm, with random weights."""

    further: ClassVar[str] = "options"

    depth: int | None = None
    """Number of blocks, for networks whose constructor takes a depth; their own if not given."""
    options: dict[str, float] = field(default_factory=dict)
    """Further numbers for its constructor: --model.options embed_dim 64 drop_rate 0.1."""

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build the network for images of `shape`; its input size is set, if it has a fixed one."""
        timm = need("timm", "timm")
        channels, height, width = shape
        given = {"in_chans": channels, "num_classes": classes, **_words(self.options)}
        given |= {} if self.depth is None else {"depth": self.depth}
        name = self.source.removeprefix("timm:")
        try:
            try:
                return timm.create_model(name, img_size=(height, width), **given)
            except TypeError as reason:
                if "img_size" not in str(reason):
                    raise
                return timm.create_model(name, **given)  # one that takes any size
        except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as reason:
            said = " ".join(str(reason).split())[:200].rstrip(".")
            raise LayerwiseError(
                f"timm cannot build {name!r} for images of shape {shape} ({said}); correct --model.options, or give "
                "--image-size."
            ) from reason


@cache
def _timm(name: str) -> type[OutsideModel]:
    timm = need("timm", "timm")
    wanted = name.removeprefix("timm:")
    if not timm.is_model(wanted):
        near = ", ".join(timm.list_models(f"*{wanted}*")[:5]) or "timm.list_models() lists them"
        raise LayerwiseError(f"timm knows no network {wanted!r}; did you mean one of these: {near}?")
    return type("Timm", (TimmModel,), {"source": name, "__doc__": TimmModel.__doc__})


# Functions of the user's.


@cache
def _own(name: str, function: Any) -> type[OutsideModel]:
    """Options from a function's parameters that have defaults; the others are passed by name."""
    if not callable(function):
        raise LayerwiseError(f"{name!r} names a {type(function).__name__}; name a function that returns a network.")
    try:
        parameters = dict(inspect.signature(function).parameters)
        hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    except (TypeError, ValueError, NameError) as reason:
        raise LayerwiseError(f"the parameters of {name!r} cannot be read ({reason}); correct the file.") from reason
    fields: list[Any] = []
    for parameter, how in parameters.items():
        if parameter in ("name", "sha256", "self"):
            raise LayerwiseError(f"{name!r} has a parameter called {parameter!r}, a name that runs use; rename it.")
        if parameter in GIVEN or how.kind in (how.VAR_POSITIONAL, how.VAR_KEYWORD):
            continue
        if how.default is how.empty:
            raise LayerwiseError(
                f"{name!r} asks for {parameter!r}, which nobody knows; a function is given {', '.join(GIVEN)} by name, "
                "and every other parameter needs a default."
            )
        kind = hints.get(parameter, type(how.default))
        if isinstance(how.default, (int, float, str, bool, tuple, type(None))) and not isinstance(kind, str):
            fields.append((parameter, kind, field(default=how.default)))
    made = make_dataclass("Own", fields, bases=(_OwnModel,), frozen=True)
    source, sha256 = own_code.origin(function) or (name, "")
    made.source, made.sha256, made.function = source, sha256, staticmethod(function)  # pyright: ignore[reportAttributeAccessIssue]
    made.__doc__ = inspect.cleandoc(function.__doc__ or "A network of your own.")
    return made


@dataclass(frozen=True)
class _OwnModel(OutsideModel):
    function: ClassVar[Callable[..., Any]]

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        known = {"classes": classes, "outputs": classes, "shape": shape}
        wanted = inspect.signature(self.function).parameters
        given = {name: value for name, value in known.items() if name in wanted}
        given |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        try:
            made = self.function(**given)
        except LayerwiseError:
            raise
        except Exception as reason:  # a user's code may raise anything
            said = " ".join(str(reason).split())[:200].rstrip(".")
            raise LayerwiseError(
                f"{self.source!r} fails ({type(reason).__name__}: {said}); correct it, or its --model.* options."
            ) from reason
        if not isinstance(made, nn.Module):
            raise LayerwiseError(f"{self.source!r} returns {type(made).__name__}; let it return a torch.nn.Module.")
        if made in _made:
            raise LayerwiseError(
                f"{self.source!r} returns the same network each time, so that what one learns changes the others; let "
                "it build a new one in every call."
            )
        _made.add(made)
        return made


_made: "WeakSet[nn.Module]" = WeakSet()
"""The networks that functions of the user's have returned."""


# transformers.


@dataclass(frozen=True)
class HFModel(OutsideModel):
    """A network of transformers: its weights where the folder holds some, random ones otherwise."""

    further: ClassVar[str] = "config"

    depth: int | None = None
    """Number of layers (num_hidden_layers; default: that of the configuration)."""
    config: dict[str, float] = field(default_factory=dict)
    """Numbers of the configuration that are replaced: --model.config hidden_size 64 num_attention_heads 4."""
    task: Literal["auto", "image", "sequence", "causal"] = "auto"
    """What is predicted: a class per image, a class per sequence of tokens, or the next token; from the configuration
    if auto."""
    length: int = 64
    """Tokens per sequence of a random batch, in bench."""
    lora: int | None = None
    """Rank of LoRA's adapters (peft) in all linear layers of the blocks: of the network itself only the classifier
    learns then. None if not given."""

    @property
    def positions(self) -> bool:
        return self._kind(self._config()) == "causal"

    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Build the network: the `AutoModel` of its task."""
        transformers = need("transformers", "hf")
        config = self._config()
        kind = self._kind(config)
        if kind != "causal":
            config.num_labels = classes
        elif shape[:2] == (1, 1):  # windows of a text, whose tokenizer gives the vocabulary
            require(
                not self._weights() or config.vocab_size == classes,
                f"{shown(self._path)} has weights for a vocabulary of {config.vocab_size} tokens, and the text has "
                f"{classes}; give its configuration alone (config.json), so that new weights are drawn.",
            )
            config.vocab_size = classes
        if kind == "image" and not self._weights():
            config.num_channels = shape[0]
            if hasattr(config, "image_size"):
                config.image_size = shape[1] if shape[1] == shape[2] else (shape[1], shape[2])
        if kind == "sequence" and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0  # some networks pool the last token that is not padding
        if kind == "sequence" and shape[:2] == (1, 1):
            most = getattr(config, "max_position_embeddings", None) or shape[2]
            require(
                shape[2] <= most,
                f"a window of {shape[2]} tokens is longer than the {most} positions of {shown(self._path)}; give a "
                "smaller --data.window.",
            )
        if hasattr(config, "use_cache"):
            config.use_cache = False  # the cached outputs of every layer grow with depth
        auto = getattr(transformers, AUTO[kind])
        try:
            if self._weights():
                made = auto.from_pretrained(
                    self._path,
                    trust_remote_code=False,  # by default it asks the user whether to run code of the folder
                    config=config,
                    use_safetensors=True,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,  # a classifier with another number of classes is replaced
                ).float()
            else:
                made = auto.from_config(config, trust_remote_code=False)
            if kind == "sequence" and shape[:2] == (1, 1):
                made.register_forward_pre_hook(WithoutPadding(config.pad_token_id), with_kwargs=True)
            return with_adapters(made, self.lora) if self.lora else made
        except Exception as reason:  # errors of many kinds, about sizes that do not fit together
            said = " ".join(str(reason).split())[:200].rstrip(".")
            raise LayerwiseError(
                f"transformers cannot build {shown(self._path)} ({said}); correct --model.config, or --model.task."
            ) from reason

    def batch(self, shape: tuple[int, int, int], classes: int, samples: int) -> tuple[Any, Tensor]:
        kind = self._kind(config := self._config())
        if kind == "image":
            return super().batch(shape, classes, samples)
        tokens = torch.randint(config.vocab_size, (samples, self.length))
        return {"input_ids": tokens}, tokens if kind == "causal" else torch.randint(classes, (samples,))

    def tokenizer(self) -> tuple[Path, int] | None:
        config, file = self._config(), Path(self._path) / "tokenizer.json"
        if self._kind(config) != "sequence" or kind_of(file) != "file":
            return None
        return file, getattr(config, "pad_token_id", None) or 0

    @property
    def _path(self) -> str:
        return self.source.removeprefix("hf:")

    def _weights(self) -> bool:
        return kind_of(self._path) == "folder" and any(Path(self._path).glob("*.safetensors"))

    def _config(self) -> Any:
        transformers = need("transformers", "hf")
        changed = _words(self.config) | ({} if self.depth is None else {"num_hidden_layers": self.depth})
        try:
            config = transformers.AutoConfig.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
        except Exception as reason:  # errors of many kinds
            said = " ".join(str(reason).split())[:200].rstrip(".")
            raise LayerwiseError(f"{shown(self._path)} is not a configuration of transformers ({said}).") from reason
        for name, value in changed.items():
            if not hasattr(config, name):
                near = suggestion(name, sorted(config.to_dict()))
                raise LayerwiseError(f"the configuration {shown(self._path)} has no {name!r}; {near}.")
            setattr(config, name, value)
        return config

    def _kind(self, config: Any) -> str:
        if self.task != "auto":
            return self.task
        auto = need("transformers.models.auto.modeling_auto", "hf")
        named = " ".join(config.architectures or [])
        for kind, words in (("image", "ImageClassification"), ("sequence", "SequenceClassification")):
            if words in named:
                return kind
        if config.model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            return "image"
        decodes = getattr(config, "is_decoder", False)
        masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes
        if config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked:
            return "causal"
        return "sequence"


class WithoutPadding:
    """Hides padding tokens from attention: a hook of a model that gets only tokens."""

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's arguments, with a mask."""
        if len(args) != 1 or kwargs.get("attention_mask") is not None:
            return None
        seen = args[0] != self.padding
        seen[:, 0] = True  # a window of only padding must attend to something
        return args, kwargs | {"attention_mask": seen.long()}


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """The model with LoRA's adapters in its linear layers; besides them, everything outside its trunk learns."""
    peft = need("peft", "hf")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="SEQ_CLS")
    made = peft.inject_adapter_in_model(config, model)
    trunk = getattr(model, "base_model_prefix", "")
    for name, parameter in made.named_parameters():
        if not name.startswith(f"{trunk}."):
            parameter.requires_grad_(True)
    return made


AUTO = {
    "image": "AutoModelForImageClassification",
    "sequence": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
}


@cache
def _hf(name: str, digest: str) -> type[OutsideModel]:
    need("transformers", "hf")
    return type("HF", (HFModel,), {"source": name, "sha256": digest, "__doc__": HFModel.__doc__})


def _digest(path: str, recorded: str | None) -> str:
    """SHA-256 of a configuration, and of the weights beside it if a folder is given."""
    folder = kind_of(path) == "folder"
    file = Path(path) / "config.json" if folder else Path(path)
    advice = "give a configuration of transformers (a JSON file), or a folder that holds config.json"
    if recorded is not None:
        advice = "the run was made from it, so put it back, or start the command in the folder that was used then"
    try:
        content = read_bytes(file, advice)
        if "model_type" not in json.loads(content):
            raise LayerwiseError(f"{shown(file)} names no model_type; {advice}.")
    except (ValueError, TypeError) as reason:
        raise LayerwiseError(f"{shown(file)} is not a configuration in JSON; {advice}.") from reason
    digest = hashlib.sha256(content)
    for weights in sorted(Path(path).glob("*.safetensors")) if folder else ():
        status = weights.stat()
        digest.update(bytes.fromhex(_digest_of_file(str(weights), status.st_size, status.st_mtime_ns)))
    return digest.hexdigest()


@cache
def _digest_of_file(path: str, size: int, time: int) -> str:
    """SHA-256 of a large file, computed once for each version of it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
