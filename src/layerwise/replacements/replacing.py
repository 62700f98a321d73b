"""Replaces modules of a model with ones that keep less for the backward pass, or compute with fewer bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.core.cut_names import matching
from layerwise.errors import LayerwiseError, unknown
from layerwise.replacements import norms
from layerwise.replacements.activations import ApproxGELU, ApproxSiLU, MaskReLU
from layerwise.replacements.binary import BinaryConv2d, BinaryLinear
from layerwise.replacements.biper import BiPerConv2d, BiPerLinear
from layerwise.replacements.compressed import SparseLinear
from layerwise.replacements.division import DivisionBatchNorm2d, DivisionConv2d
from layerwise.replacements.low_precision import LowPrecisionConv2d, LowPrecisionLinear
from layerwise.replacements.readers import readers_of
from layerwise.replacements.shared_bits import SharedBitsConv2d, SharedBitsLinear
from layerwise.replacements.sparse import BiMaskLinear
from layerwise.replacements.velora import VeLoRALinear

Make = Callable[[Any], nn.Module]
"""Maps a module to its replacement."""


@dataclass(frozen=True)
class Replacement:
    """A named kind of module, and the modules that it replaces."""

    kinds: tuple[type[nn.Module], ...]
    """Modules of these types, not of subclasses."""
    make: Make
    takes: Callable[[Any], bool] = lambda module: True
    """Whether one module can be replaced."""
    hidden: bool = False
    """Whether the last module of these kinds, which computes the network's outputs, is not replaced."""
    merges: bool = False
    """Whether the module's parameters are merged into its readers, which needs an example batch."""


def _weights(linear: Any, conv: Any) -> Replacement:
    """A replacement of linear layers and convolutions, by a class for each."""
    return Replacement(
        (nn.Linear, nn.Conv2d), lambda m: (linear if isinstance(m, nn.Linear) else conv).of(m), hidden=True
    )


REPLACEMENTS: dict[str, Replacement] = {
    "approx_gelu": Replacement((nn.GELU,), lambda m: ApproxGELU(), lambda m: m.approximate == "none"),
    "approx_silu": Replacement((nn.SiLU,), lambda m: ApproxSiLU()),
    "mask_relu": Replacement((nn.ReLU,), lambda m: MaskReLU()),
    "ms_norm": Replacement(
        (nn.LayerNorm, nn.RMSNorm), norms.replacement, lambda m: len(m.normalized_shape) == 1, merges=True
    ),
    "division_conv": Replacement((nn.Conv2d,), DivisionConv2d.of),
    "division_norm": Replacement((nn.BatchNorm2d,), DivisionBatchNorm2d.of),
    "binary": _weights(BinaryLinear, BinaryConv2d),
    "biper": _weights(BiPerLinear, BiPerConv2d),
    "shared_bits": _weights(SharedBitsLinear, SharedBitsConv2d),
    "low_precision": _weights(LowPrecisionLinear, LowPrecisionConv2d),
    "bi_mask": Replacement(
        (nn.Linear,), BiMaskLinear.of, lambda m: m.in_features % 4 == 0 and m.out_features % 4 == 0, hidden=True
    ),
    "sparse": Replacement((nn.Linear,), SparseLinear.of, hidden=True),
    "velora": Replacement((nn.Linear,), VeLoRALinear.of, lambda m: m.in_features % 32 == 0, hidden=True),
}


def names() -> tuple[str, ...]:
    """Names of the replacements.

    >>> names()[:2]
    ('approx_gelu', 'approx_silu')
    """
    return tuple(REPLACEMENTS)


def check_name(name: str) -> None:
    """Raise LayerwiseError if no replacement has this name."""
    if name not in REPLACEMENTS:
        raise unknown("replacement", name, names())


def replace(
    model: nn.Module, what: str | Sequence[str] | Mapping[str | type[nn.Module], str | Make], example: Any = None
) -> nn.Module:
    """Replace modules of a model in place; parameters keep their names and values, except where a layer is made sparse.

    The model is then trained like any other, with every rule. A module that is used in several places stays one module.

    Args:
        model: a model whose layers are modules: functions such as `F.gelu` cannot be replaced.
        what: names from `layerwise.replacements.names()`, each of which replaces all modules that it can; or a mapping.
            A key of the mapping is a type of module, or a name or pattern such as `"layers.*.act"`. A value is such a
            name, or a function from a module to its replacement.
        example: a batch that the model can run; needed for `"ms_norm"`, which merges the scale and shift of a norm into
            the linear layers that read it.

    Returns:
        The model, or its replacement if the model itself is one of the replaced modules.

    Raises:
        LayerwiseError: an unknown name, a pattern that matches nothing, or nothing that could be replaced.

    >>> model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 3))
    >>> replace(model, "approx_gelu")
    Sequential(
      (0): Linear(in_features=4, out_features=64, bias=True)
      (1): ApproxGELU()
      (2): Linear(in_features=64, out_features=3, bias=True)
    )
    >>> from functools import partial
    >>> replace(model, {"2": partial(VeLoRALinear.of, groups=16, scale=0.1)})[2]
    VeLoRALinear(in_features=64, out_features=3, bias=True, groups=16, scale=0.1)
    """
    if not isinstance(model, nn.Module):
        raise LayerwiseError(f"the model is a {type(model).__name__}; give a torch.nn.Module.")
    if not isinstance(what, str | Sequence | Mapping):
        raise LayerwiseError(f"what to replace is of type {type(what).__name__}; give names, or a mapping.")
    if isinstance(what, Mapping):
        asked = [(key, value) for key, value in what.items()]
    else:
        asked = [(None, name) for name in ([what] if isinstance(what, str) else what)]
    for key, value in asked:
        known = {name: m for name, m in model.named_modules(remove_duplicate=False)}
        chosen = _chosen(model, known, key)
        found = _made(model, chosen, value, example, key is None)
        if not found:
            raise LayerwiseError(_nothing(model, key, value))
        for name, module in known.items():
            if module not in found:
                continue
            if not name:
                return found[module]
            path, _, last = name.rpartition(".")
            known[path]._modules[last] = found[module]
    return model


def _chosen(
    model: nn.Module, known: Mapping[str, nn.Module], key: str | type[nn.Module] | None
) -> dict[str, nn.Module]:
    if key is None:
        return dict(known)
    if isinstance(key, str):
        return {name: known[name] for name in matching(model, [key])}
    if not (isinstance(key, type) and issubclass(key, nn.Module)):
        raise LayerwiseError(f"replace cannot choose modules by {key!r}; give a type of module, a name or a pattern.")
    return {name: module for name, module in known.items() if type(module) is key}


def _made(
    model: nn.Module, chosen: Mapping[str, nn.Module], value: str | Make, example: Any, by_itself: bool
) -> dict[nn.Module, nn.Module]:
    """The modules to replace, and their replacements."""
    if callable(value):
        return {module: value(module) for module in dict.fromkeys(chosen.values())}
    check_name(value)
    kind = REPLACEMENTS[value]
    able = [m for m in dict.fromkeys(chosen.values()) if type(m) in kind.kinds and kind.takes(m)]
    if kind.hidden and by_itself:
        last = [m for m in model.modules() if type(m) in kind.kinds][-1:]
        able = [m for m in able if m not in last]
    if kind.merges:
        able = _merged(model, able, value, example)
    found: dict[nn.Module, nn.Module] = {}
    for module in able:
        found[module] = kind.make(module).train(module.training)
    return found


def _merged(model: nn.Module, able: list[Any], name: str, example: Any) -> list[Any]:
    """Merge parameters where possible, and return the modules that then have no parameters."""
    bare = [m for m in able if m.weight is None]
    if example is None and len(bare) < len(able):
        raise LayerwiseError(f"{name} has to find the readers of each norm; give replace(..., example=a batch).")
    readers = readers_of(model, example) if len(bare) < len(able) else {}
    taken: set[nn.Module] = set()
    for norm in able:
        if norm not in bare and norm in readers:
            norms.merge(norm, readers[norm])
            taken.add(norm)
    return [norm for norm in able if norm in bare or norm in taken]


def _nothing(model: nn.Module, key: Any, value: Any) -> str:
    where = "" if key is None else f" by {key if isinstance(key, str) else key.__name__!r}"
    if not isinstance(value, str):
        return f"{type(model).__name__} holds no module that is chosen{where}; see print(model)."
    kinds = " or ".join(kind.__name__ for kind in REPLACEMENTS[value].kinds)
    return (
        f"{value} finds no module of {type(model).__name__} that it can replace{where}; it takes {kinds} modules, and "
        "cannot see functions of torch that a forward pass calls by itself."
    )
