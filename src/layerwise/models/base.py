"""Base classes of models: checked options, and a plain `nn.Sequential` that names its blocks."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

import torch
from torch import Tensor, nn

from layerwise.core.abstract import Abstract
from layerwise.core.ranges import check_largest
from layerwise.errors import LayerwiseError, suggestion


@dataclass(frozen=True)
class ModelOptions(Abstract):
    """Base of every model's options; it checks them on creation.

    A whole number must be at least 1 (or what `least` says), a `dropout` in [0, 1), and a word one
    of those that the field lists.

    Raises:
        LayerwiseError: an option is of the wrong type or out of range.

    Example:
        >>> from layerwise.models import MLP
        >>> MLP(depth=0)
        Traceback (most recent call last):
        layerwise.errors.LayerwiseError: depth must be a whole number of at least 1, not 0.
    """

    least: ClassVar[Mapping[str, int]] = {}
    """Lower bounds of whole numbers that are not 1, by name of the option."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if get_origin(field.type) is Literal:
                words = get_args(field.type)
                require(value in words, f"{name} must be one of {', '.join(words)}, not {value!r}.")
            elif field.type is int:
                least = self.least.get(name, 1)
                check_largest(name, value)
                whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
                require(whole, f"{name} must be a whole number of at least {least}, not {value!r}.")
            elif name == "dropout":
                fraction = isinstance(value, int | float) and 0 <= value < 1
                require(fraction, f"dropout must be at least 0 and less than 1, not {value!r}.")

    @property
    def tokens(self) -> bool:
        """Whether the model takes tokens (B, T) and has logits of the next one at every position."""
        return False

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float], depth: int | None = None) -> Self:
        """Options from numbers, as the command line gives them, and from a number of blocks if given.

        Raises:
            LayerwiseError: there is no such option.

        >>> from layerwise.models import MLP
        >>> MLP.from_numbers({"width": 16.0}, depth=2)
        MLP(depth=2, width=16, activation='relu', norm='none', dropout=0.0)
        """
        given: dict[str, Any] = {k: int(v) if float(v).is_integer() else v for k, v in numbers.items()}
        given |= {} if depth is None else {"depth": depth}
        legal = [field.name for field in fields(cls)]
        for name in given:
            require(name in legal, f"unknown option {name!r} of {cls.__name__}; {suggestion(name, legal)}.")
        return cls(**given)

    @abstractmethod
    def build(self, shape: tuple[int, int, int], classes: int) -> "BlockSequential":
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1, or the options do not fit the images.
        """

    def batch(self, shape: tuple[int, int, int], classes: int, samples: int) -> tuple[Any, Tensor]:
        """A random batch that the model takes, with labels; of a text, the token after each; from torch's generator."""
        if self.tokens:
            window = torch.randint(classes, (samples, shape[2] + 1))
            return window[:, :-1].contiguous(), window[:, 1:].contiguous()
        return torch.randn(samples, *shape), torch.randint(classes, (samples,))


class BlockSequential(nn.Sequential):
    """An `nn.Sequential` of blocks and a head; `forward` is the plain composition of its children.

    Example:
        >>> from layerwise.models import create
        >>> create("mlp", (1, 8, 8), 10, depth=2).block_names
        ('block1', 'block2')
    """

    input_layout = "BCHW"
    """The layout of its images; other networks do not use it."""
    tied = False
    """Whether several blocks use one parameter, so that the network has to be cut at its calls."""

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the children after which the network may be cut: all but the head."""
        return tuple(name for name, _ in self.named_children() if name != "head")


def named(**children: nn.Module) -> nn.Sequential:
    """An `nn.Sequential` of the given children, by name and in order.

    Names keep the keys of a state dict the same when an optional child (norm, dropout) comes or
    goes.
    """
    return nn.Sequential(OrderedDict(children))


def assemble(blocks: Sequence[nn.Module], head: nn.Module) -> BlockSequential:
    """Blocks (children `block1` .. `blockN`) and a head as one model."""
    children = [(f"block{number}", block) for number, block in enumerate(blocks, 1)]
    return BlockSequential(OrderedDict([*children, ("head", head)]))


def check_sizes(shape: Sequence[int], classes: int) -> None:
    """Raise LayerwiseError unless `shape` is three positive sizes and `classes` is positive."""
    good = len(shape) == 3 and all(isinstance(size, int) and size >= 1 for size in shape)
    require(good, f"shape must be three positive sizes (channels, height, width), not {tuple(shape)}.")
    require(classes >= 1, f"classes must be a whole number of at least 1, not {classes!r}.")


def require(condition: bool, sentence: str) -> None:
    """Raise LayerwiseError with `sentence` unless `condition` holds."""
    if not condition:
        raise LayerwiseError(sentence)
