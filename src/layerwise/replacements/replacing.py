"""Replaces modules of a model with ones that keep less for the backward pass, or compute with fewer bits."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.core.cut_names import matching
from layerwise.errors import LayerwiseError, short, unknown
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
    own_weight: bool = False
    """Whether the replacement has a weight of its own, so that modules whose weight is shared stay."""
    plain: bool = False
    """Whether the parameters alone, in the replaced module, compute the same in evaluation."""


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _weights(linear: Any, conv: Any) -> Replacement:
    """A replacement of linear layers and convolutions, by a class for each."""
    return Replacement(
        (nn.Linear, nn.Conv2d), lambda m: (linear if isinstance(m, nn.Linear) else conv).of(m), hidden=True
    )


REPLACEMENTS: dict[str, Replacement] = {
    "approx_gelu": Replacement((nn.GELU,), lambda m: ApproxGELU(), lambda m: m.approximate == "none", plain=True),
    "approx_silu": Replacement((nn.SiLU,), lambda m: ApproxSiLU(), plain=True),
    "mask_relu": Replacement((nn.ReLU,), lambda m: MaskReLU(), plain=True),
    "ms_norm": Replacement(
        (nn.LayerNorm, nn.RMSNorm), norms.replacement, lambda m: len(m.normalized_shape) == 1, merges=True
    ),
    "division_conv": Replacement((nn.Conv2d,), DivisionConv2d.of, plain=True),
    "division_norm": Replacement((nn.BatchNorm2d,), DivisionBatchNorm2d.of, plain=True),
    "binary": _weights(BinaryLinear, BinaryConv2d),
    "biper": _weights(BiPerLinear, BiPerConv2d),
    "shared_bits": _weights(SharedBitsLinear, SharedBitsConv2d),
    "low_precision": _weights(LowPrecisionLinear, LowPrecisionConv2d),
    "bi_mask": Replacement(
        (nn.Linear,), BiMaskLinear.of, lambda m: m.in_features % 4 == 0 and m.out_features % 4 == 0, hidden=True
    ),
    "sparse": Replacement((nn.Linear,), SparseLinear.of, hidden=True, own_weight=True),
    "velora": Replacement((nn.Linear,), VeLoRALinear.of, lambda m: m.in_features % 32 == 0, hidden=True),
}


def names() -> tuple[str, ...]:
    """Names of the replacements.

    >>> names()[:2]
    ('approx_gelu', 'approx_silu')
    """
    return tuple(REPLACEMENTS)


def loads_plainly(name: str) -> bool:
    """Whether the weights of a network with this replacement predict the same in a network without it."""
    return REPLACEMENTS[name].plain


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
        LayerwiseError: an unknown name, a pattern that matches nothing, or nothing that could be replaced; a module
            with hooks, which the replacement would not have; a shared weight that would not be shared any more.

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
    asked = _asked(model, what)
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
            _run_modules(model, name)
    return model


def _asked(
    model: Any, what: str | Sequence[str] | Mapping[str | type[nn.Module], str | Make]
) -> list[tuple[str | type[nn.Module] | None, str | Make]]:
    """What is asked for, checked before anything is replaced."""
    if not isinstance(model, nn.Module):
        raise LayerwiseError(f"the model is a {type(model).__name__}; give a torch.nn.Module.")
    if not isinstance(what, str | Sequence | Mapping):
        raise LayerwiseError(f"what to replace is of type {type(what).__name__}; give names, or a mapping.")
    if isinstance(what, Mapping):
        asked: list[Any] = list(what.items())
    else:
        asked = [(None, name) for name in ([what] if isinstance(what, str) else what)]
    for key, value in asked:
        if isinstance(value, str) or not callable(value):
            check_name(value)
        _chosen(model, dict(model.named_modules(remove_duplicate=False)), key)
    return asked


def _run_modules(model: nn.Module, name: str) -> None:
    """Make torch's transformer layers around a module run it: in evaluation they use the weights of their parts."""
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        if isinstance(around, nn.TransformerEncoderLayer):
            around.activation_relu_or_gelu = 0  # what torch asks before it takes that shorter path
        if isinstance(around, nn.TransformerEncoder):
            around.use_nested_tensor = False


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
        found = {module: value(module) for module in dict.fromkeys(chosen.values())}
        _check_made(model, found)
        return found
    kind = REPLACEMENTS[value]
    able = [m for m in dict.fromkeys(chosen.values()) if type(m) in kind.kinds and kind.takes(m)]
    if kind.hidden and by_itself:
        last = [m for m in model.modules() if type(m) in kind.kinds][-1:]
        able = [m for m in able if m not in last]
    if kind.own_weight and by_itself:
        shared = _shared(model)
        able = [m for m in able if m.weight not in shared]
    for module in able:
        _check_plain(model, module)
    if kind.merges:
        able = _merged(model, able, value, example)
    found = {}
    for module in able:
        found[module] = kind.make(module).train(module.training)
    _check_made(model, found)
    return found


def _check_plain(model: nn.Module, module: nn.Module) -> None:
    """Raise LayerwiseError if a module does more than its class says, which its replacement would not do."""
    hooks = any(vars(module).get(name) for name in HOOKS)
    if hooks or "forward" in vars(module):
        raise LayerwiseError(
            f"the module {_name(model, module)!r} has hooks (of weight_norm, spectral_norm or prune, or your own), "
            "which its replacement would not have; take them off first, or choose other modules by a mapping."
        )


def _check_made(model: nn.Module, found: Mapping[nn.Module, nn.Module]) -> None:
    """Raise LayerwiseError if a replacement is no module, is never run, or does not share a weight that is shared."""
    shared = _shared(model)
    inside = {
        own
        for attention in model.modules()
        if isinstance(attention, nn.MultiheadAttention)
        for own in attention.modules()
        if own is not attention
    }
    for module, made in found.items():
        name = _name(model, module)
        if not isinstance(made, nn.Module):
            raise LayerwiseError(f"the replacement of {name!r} is {short(made)}, and no module; return an nn.Module.")
        if module in inside:
            raise LayerwiseError(
                f"{name!r} is a part of torch's attention, which uses its weights and never runs it; leave it out."
            )
        kept = {*made.parameters()}
        if any(p in shared and p not in kept for p in module.parameters()):
            raise LayerwiseError(
                f"{name!r} shares its weight with another module, and its replacement would have one of its own; leave "
                "it out."
            )


def _shared(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that more than one module holds."""
    held = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, times in held.items() if times > 1}


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _merged(model: nn.Module, able: list[Any], name: str, example: Any) -> list[Any]:
    """Merge parameters where possible, and return the modules that then have no parameters."""
    bare = [m for m in able if m.weight is None]
    if any(p.is_meta for module in able for p in module.parameters()):
        raise LayerwiseError(
            f"{name} merges the scales of norms into other weights, and on the meta device there are none yet; make "
            "the model on a device, or leave the norms out."
        )
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
