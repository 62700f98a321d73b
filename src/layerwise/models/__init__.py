"""A small model zoo with one interface: the option `depth`, named blocks and a head.

Every model is an `nn.Sequential` of blocks (`block1` .. `blockN`; `sid_cascade` names its parts)
and `head`, for images (B, channels, height, width) to logits (B, classes), or to a map of them
(`fcn`), or for tokens (B, T) to logits of the next one (B, T, V) (`gpt`, and `rnn`, `gru`, `lstm`
with `sequence="tokens"`). Its attribute `block_names` lists the children after which it may be cut.
Networks from elsewhere (`hf:`, `timm:`, `FILE.py:function`) are built by name too; they are cut at
the calls of their own modules.

Example:
    >>> from layerwise import models
    >>> model = models.create("mlp", shape=(1, 8, 8), classes=10, depth=2, width=32)
    >>> [name for name, _ in model.named_children()]
    ['block1', 'block2', 'head']
"""

import inspect
from dataclasses import fields
from typing import Any

from layerwise.core.graphs import Graph
from layerwise.errors import LayerwiseError, unknown
from layerwise.models import outside
from layerwise.models.base import BlockSequential, ModelOptions
from layerwise.models.fcn import FCN
from layerwise.models.gnn import GAT, GCN, GraphModelOptions
from layerwise.models.gpt import GPT
from layerwise.models.mlp import MLP
from layerwise.models.noprop import NoProp, NoPropCT, NoPropFM
from layerwise.models.outside import OutsideModel
from layerwise.models.recurrent import GRU, LSTM, RNN, Recurrent
from layerwise.models.resnet import ResNet
from layerwise.models.reversible import Reversible
from layerwise.models.sid_cascade import SIDCascade
from layerwise.models.vgg import VGG
from layerwise.models.vit import ViT

__all__ = [
    "FCN",
    "GAT",
    "GCN",
    "GPT",
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "VGG",
    "BlockSequential",
    "GraphModelOptions",
    "ModelOptions",
    "NoProp",
    "NoPropCT",
    "NoPropFM",
    "OutsideModel",
    "Recurrent",
    "ResNet",
    "Reversible",
    "SIDCascade",
    "ViT",
    "create",
    "describe",
    "name_of",
    "names",
    "options",
]

_MODELS: dict[str, type[ModelOptions]] = {
    "fcn": FCN,
    "gat": GAT,
    "gcn": GCN,
    "gpt": GPT,
    "gru": GRU,
    "lstm": LSTM,
    "mlp": MLP,
    "noprop": NoProp,
    "noprop_ct": NoPropCT,
    "noprop_fm": NoPropFM,
    "resnet": ResNet,
    "reversible": Reversible,
    "rnn": RNN,
    "sid_cascade": SIDCascade,
    "vgg": VGG,
    "vit": ViT,
}


def names() -> tuple[str, ...]:
    """Names of all models.

    Example:
        >>> names()[:4]
        ('fcn', 'gat', 'gcn', 'gpt')
    """
    return tuple(_MODELS)


def options(name: str, recorded: str | None = None) -> type[ModelOptions]:
    """The dataclass of a model's options and their defaults.

    Args:
        name: one of `names()`, or `hf:CONFIG_OR_FOLDER`, `timm:NAME`, `FILE.py:function`.
        recorded: SHA-256 of the files of such a model when a run began; they are refused if they have changed since.

    Raises:
        LayerwiseError: there is no model of that name.

    Example:
        >>> options("vgg")(depth=8)
        VGG(depth=8, width=64, dropout=0.0)
    """
    if outside.is_outside(name):
        return outside.options(name, recorded)
    if name not in _MODELS:
        raise unknown("model", name, (*names(), *outside.FORMS))
    return _MODELS[name]


def name_of(options_: ModelOptions) -> str:
    """The name of a model's options.

    >>> name_of(options("vgg")())
    'vgg'
    """
    if isinstance(options_, OutsideModel):
        return options_.source
    return next(name for name, kind in _MODELS.items() if kind is type(options_))


def create(name: str, shape: tuple[int, int, int], classes: int, *, graph: Graph | None = None, **options_: Any) -> Any:
    """Build a model by name for images of `shape` (channels, height, width) and `classes` logits.

    Args:
        name: as for `options`.
        shape: channels, height and width of an image; of windows of T tokens (1, 1, T).
        classes: number of logits.
        graph: the graph that links the nodes, for a graph network (`gcn`, `gat`).
        **options_: fields of `options(name)`; what is left out takes its default.

    Raises:
        LayerwiseError: unknown model or option, or an option that is out of range or does not fit.

    Example:
        >>> create("vit", (1, 8, 8), 10, depth=2).block_names
        ('block1', 'block2')
    """
    kind = options(name)
    legal = [field.name for field in fields(kind)]
    for option in options_:
        if option not in legal:
            raise unknown(f"option of {name}", option, legal)
    made = kind(**options_)
    if isinstance(made, GraphModelOptions):
        return made.build(shape, classes, graph)
    if graph is not None:
        raise LayerwiseError(f"the model {name} cannot use a graph; choose gcn or gat, or leave it out.")
    return made.build(shape, classes)


def describe(name: str) -> str:
    """Describe a model in a few lines, with its options and their defaults.

    Raises:
        LayerwiseError: there is no model of that name.

    Example:
        >>> print(describe("mlp").splitlines()[0])
        Fully connected network: block i is a linear layer, norm, activation and dropout.
    """
    kind = options(name)
    text = inspect.getdoc(kind) or ""
    dials = [f"  {field.name} = {field.default}" for field in fields(kind)]
    return "\n".join([text.partition("Example:")[0].rstrip(), "", "Options:", *dials])
