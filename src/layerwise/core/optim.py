"""Optimizers per group of blocks, learning-rate schedules, weight-decay groups."""

import fnmatch
import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn

from layerwise.core.param_groups import check_new
from layerwise.core.ranges import check_ranges
from layerwise.errors import LayerwiseError, short, suggestion, unknown, why

OptimizerFactory = Callable[..., torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]
"""From parameter groups to an optimizer, or to several that share the parameters."""
OptimizerChoice = str | type[torch.optim.Optimizer] | OptimizerFactory | Mapping[str, Mapping[str, Any]]
"""What a learner takes as its `optimizer`."""

_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "adam": ("Adam", {}),
    "sgd": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "rmsprop": ("RMSprop", {}),
}


@dataclass(frozen=True)
class Schedule:
    r"""Learning-rate multiplier as a pure function of the update number; no state to save.

    - `constant`: 1.
    - `cosine`: linear warm-up from 0 to 1, then $\tfrac12(1+\cos \pi s)$ down to `final`.
    - `onecycle`: half a cosine from 1/25 up to 1, then half a cosine down to `final` (Smith & Topin,
      arXiv 1708.07120, in the two-phase form).

    >>> schedule = Schedule("onecycle", total=100, warmup=0.3)
    >>> schedule(30), round(schedule(0), 3)
    (1.0, 0.04)
    """

    kind: Literal["constant", "cosine", "onecycle"] = "constant"
    """Form of the curve."""
    total: int = 0
    """Number of updates in the whole run."""
    warmup: float = 0.0
    """Share of the run that is spent warming up, in [0, 1)."""
    final: float = 1e-5
    """Multiplier at the end of the run."""

    def __post_init__(self) -> None:
        check_ranges(total=self.total, warmup=self.warmup, final=self.final)
        kinds = ["constant", "cosine", "onecycle"]
        if self.kind not in kinds:
            raise unknown("schedule", self.kind, kinds)
        if self.kind != "constant" and self.total < 1:
            raise LayerwiseError(
                f"total is {self.total}; a {self.kind} schedule needs the number of updates in the run, 1 or more."
            )

    def __call__(self, update: int) -> float:
        """Multiplier for update number `update` (0 is the first).

        Raises:
            LayerwiseError: a negative number, or none.
        """
        if not (isinstance(update, Real) and update >= 0):
            raise LayerwiseError(f"the update is {short(update)}; give its number, 0 for the first.")
        if self.kind == "constant":
            return 1.0
        rise = self.warmup * self.total
        if update < rise:
            share = update / rise
            if self.kind == "onecycle":
                return 0.04 + 0.96 * (1 - math.cos(math.pi * share)) / 2
            return (update + 1) / (rise + 1)
        share = min((update - rise) / max(self.total - rise, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2


def optimizer_factory(
    optimizer: OptimizerChoice,
    *,
    lr: float,
    weight_decay: float,
    options: Mapping[str, Any] | None = None,
) -> "Factory":
    """A function from parameter groups to optimizers.

    Args:
        optimizer: `"adamw"`, `"adam"`, `"sgd"` (Nesterov momentum 0.9), `"rmsprop"`, the name of any class in
            `torch.optim`, the dotted path of a class (`"schedulefree.AdamWScheduleFree"`), such a class, a callable
            that takes the parameter groups, or a mapping from patterns of parameter names to options (`ByName`).
        lr: learning rate; a plain callable sets its own and is scheduled from that.
        weight_decay: for tensors of two or more dimensions; norms and biases get none.
        options: further arguments of the optimizer's class, such as `{"betas": (0.9, 0.95)}`.

    Raises:
        LayerwiseError: an unknown name, an option that the class does not have, or an optimizer that needs
            a closure.
    """
    check_ranges(lr=lr, weight_decay=weight_decay)
    if isinstance(optimizer, Mapping):
        return _by_name(optimizer, {"lr": lr, "weight_decay": weight_decay, **(options or {})})
    preset: dict[str, Any] = {}
    if isinstance(optimizer, str):
        class_name, preset = _PRESETS.get(optimizer, (optimizer, {}))
        found = _imported(optimizer) if "." in optimizer else getattr(torch.optim, class_name, None)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise LayerwiseError(
                f"unknown optimizer {optimizer!r}; {suggestion(optimizer, list(_PRESETS))}, or a class of torch.optim, "
                "or the dotted path of a class, such as schedulefree.AdamWScheduleFree."
            )
        optimizer = found
    if isinstance(optimizer, torch.optim.Optimizer):
        raise LayerwiseError(
            f"the optimizer is an instance of {type(optimizer).__name__}, and every block needs one of its own; give "
            "the class, its name, or a function from parameter groups to an optimizer."
        )
    if not callable(optimizer):
        raise LayerwiseError(
            f"the optimizer is {optimizer!r}; give a name, a class of torch.optim, or a function from parameter groups."
        )
    if not isinstance(optimizer, type):
        return FromFunction(optimizer)
    if not issubclass(optimizer, torch.optim.Optimizer):
        raise LayerwiseError(f"{optimizer.__name__} is not a torch.optim.Optimizer; give one, or its name.")
    _refuse_closures(optimizer)
    cls = optimizer
    legal = inspect.signature(cls).parameters
    if options is not None and not isinstance(options, Mapping):
        raise LayerwiseError(f"optimizer_options are {options!r}; give a mapping from names to values.")
    for name in ("lr", "weight_decay"):
        if name in (options or {}):
            raise LayerwiseError(f"optimizer_options holds {name!r}, which is an option of its own; give {name}=...")
    arguments = {"lr": lr, **preset, **(options or {})}
    for name in arguments:
        if name not in legal:
            raise LayerwiseError(f"{cls.__name__} has no option {name!r}; {suggestion(name, list(legal))}.")
        if isinstance(legal[name].default, bool):  # the command line gives numbers
            if arguments[name] not in (0, 1):
                raise LayerwiseError(f"{cls.__name__}'s option {name} is {arguments[name]!r}; it is True or False.")
            arguments[name] = bool(arguments[name])
    if "weight_decay" in legal:
        arguments["weight_decay"] = weight_decay

    return FromClass(cls, arguments, can_fuse="fused" in legal and "fused" not in arguments)


def _imported(path: str) -> Any:
    """What a dotted path names, None where its module holds nothing of that name."""
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as reason:
        if reason.name is None or not f"{module}.".startswith(f"{reason.name}."):
            raise LayerwiseError(f"{module} cannot be imported ({reason}); install what it needs.") from reason
        raise LayerwiseError(
            f"there is no module {reason.name!r} for the optimizer {path!r}; install its package, or correct the name."
        ) from reason
    except (Exception, SystemExit) as reason:  # a user's module may raise anything
        raise LayerwiseError(
            f"the optimizer {path!r} cannot be imported ({type(reason).__name__}: {why(reason).rstrip('.')}); correct "
            "its module."
        ) from reason


class Factory(ABC):
    """From parameter groups to optimizers; can be pickled, as a local function cannot."""

    @abstractmethod
    def __call__(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """Optimizers that together hold the parameters of these groups, each of them once.

        Args:
            groups: as torch has them, with `names` of the parameters and the `lr_multiplier` of their block.

        Raises:
            LayerwiseError: they cannot be made.
        """

    def check_names(self, names: Sequence[str]) -> None:  # noqa: B027
        """Raise LayerwiseError if the factory speaks of parameters that the model, with these, does not have."""


@dataclass(frozen=True)
class FromClass(Factory):
    """Makes an optimizer of a class."""

    cls: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any]
    can_fuse: bool

    def __call__(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        # A loop over tensors or a differentiable step, which somebody asked for, excludes one kernel for all.
        asked = self.arguments.get("foreach") or self.arguments.get("differentiable")
        fused = {"fused": True} if self.can_fuse and not asked and _can_fuse(self.cls, groups) else {}
        groups = [{name: value for name, value in group.items() if name != "names"} for group in groups]
        try:
            return [self.cls(groups, **self.arguments, **fused)]  # pyright: ignore[reportArgumentType]
        except Exception as reason:  # a user's class may raise anything
            raise LayerwiseError(f"{self.cls.__name__} refuses its options: {why(reason).rstrip('.')}.") from reason


@dataclass(frozen=True)
class FromFunction(Factory):
    """Asks a user's function for an optimizer or several, and checks what it gives.

    The function is called with the parameter groups of one group of blocks. It may divide them further: a rate of its
    own for some, Muon for matrices and AdamW for the rest.

    >>> layer = nn.Linear(3, 2)
    >>> def function(groups):
    ...     return [torch.optim.SGD(g["params"], lr=0.1 if g["names"] == ["weight"] else 0.2) for g in groups]
    >>> groups = decay_groups([layer.weight, layer.bias], names={id(layer.weight): "weight", id(layer.bias): "bias"})
    >>> [optimizer.defaults["lr"] for optimizer in FromFunction(function)(groups)]
    [0.1, 0.2]
    """

    function: Callable[..., Any]

    def __call__(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        multipliers = {id(p): group.get("lr_multiplier", 1.0) for group in groups for p in group["params"]}
        try:
            made = self.function(groups)
        except Exception as reason:  # a user's function may raise anything
            raise LayerwiseError(f"the function that makes optimizers fails: {why(reason).rstrip('.')}.") from reason
        made = list(made) if isinstance(made, (list, tuple)) else [made]
        for optimizer in made:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise LayerwiseError(
                    f"the function that makes optimizers gave {type(optimizer).__name__}; let it return a "
                    "torch.optim.Optimizer, or a list of them."
                )
            _refuse_closures(type(optimizer))
        own = [group for optimizer in made for group in optimizer.param_groups]
        held = [id(p) for group in own for p in group["params"]]
        if sorted(held) != sorted(multipliers):
            what = "put a parameter into two optimizers" if len(held) > len(set(held)) else "left parameters out"
            raise LayerwiseError(
                f"the function that makes optimizers {what if set(held) <= set(multipliers) else 'added parameters'}; "
                "give its optimizers exactly the parameters that it is called with, each of them once."
            )
        for group in own:
            group.pop("names", None)
            factors = {multipliers[id(p)] for p in group["params"]}
            if len(factors) > 1:
                raise LayerwiseError(
                    "the function that makes optimizers joins parameters of blocks with different lr_multipliers; "
                    "keep the groups that it is called with apart."
                )
            group["lr_multiplier"] = factors.pop()
        return made


@dataclass(frozen=True)
class ByName(Factory):
    """Optimizers by patterns of parameter names; of several patterns that match, the first counts.

    A `*` stands for any part of a name, dots included. The names are the model's own; those of the rule's modules begin
    with `auxiliary.`.
    """

    factories: tuple[tuple[str, Factory], ...]

    def __call__(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        made: list[torch.optim.Optimizer] = []
        for pattern, factory in self.factories:
            chosen = []
            for group in groups:
                pairs = [
                    (p, name)
                    for p, name in zip(group["params"], group["names"], strict=True)
                    if self._pattern(name) == pattern
                ]
                if pairs:
                    chosen.append(group | {"params": [p for p, _ in pairs], "names": [name for _, name in pairs]})
            with _naming(pattern):
                found = factory(chosen) if chosen else []
                for optimizer in found:
                    check_new(optimizer)
            made += found
        return made

    def _pattern(self, name: str) -> str:
        """The first pattern that a name matches."""
        return next(pattern for pattern, _ in self.factories if fnmatch.fnmatchcase(name, pattern))

    def check_names(self, names: Sequence[str]) -> None:
        for pattern, _ in self.factories:
            if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise LayerwiseError(
                    f"the optimizer's pattern {pattern!r} matches no parameter; {suggestion(pattern, list(names)[:20])}"
                    f"{', ...' if len(names) > 20 else ''}."
                )


def _by_name(patterns: Mapping[Any, Any], common: Mapping[str, Any]) -> ByName:
    """A factory out of options by pattern; what they leave out is common to all."""
    factories = []
    for pattern, options in {**patterns, **({} if "*" in patterns else {"*": {}})}.items():
        if not isinstance(pattern, str) or not isinstance(options, Mapping):
            raise LayerwiseError(
                f"the optimizer maps {pattern!r} to {options!r}; map patterns of parameter names to options, such as "
                '{"*.lora_*": {"lr": 1e-3}}.'
            )
        own = dict(options)
        optimizer = own.pop("optimizer", "adamw")
        if isinstance(optimizer, Mapping):
            raise LayerwiseError(f"the optimizer of {pattern!r} is a mapping; give a name, a class or a function.")
        # An option that is common to all is left out where another optimizer is chosen, which may not have it.
        shared = common if "optimizer" not in options else {name: common[name] for name in ("lr", "weight_decay")}
        whole = {**shared, **own}
        lr, weight_decay = whole.pop("lr"), whole.pop("weight_decay")
        with _naming(pattern):
            made = optimizer_factory(optimizer, lr=lr, weight_decay=weight_decay, options=whole)
        factories.append((pattern, made))
    return ByName(tuple(factories))


@contextmanager
def _naming(pattern: str) -> Iterator[None]:
    """A context in which an error names the pattern that it comes from."""
    try:
        yield
    except LayerwiseError as reason:
        raise LayerwiseError(f"in the optimizer's pattern {pattern!r}, {reason}") from reason


def _refuse_closures(cls: type[torch.optim.Optimizer]) -> None:
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise LayerwiseError(
            f"{cls.__name__} needs a closure that runs the network again; choose a first-order optimizer, such as "
            "adamw."
        )


def _can_fuse(cls: Any, groups: list[dict[str, Any]]) -> bool:
    """One kernel for all tensors of a group: several times faster, where torch has it.

    That of SGD on the host leaves bfloat16 and float16 as they are, but for a few numbers at the end (torch 2.13).
    """
    tensors = [p for group in groups for p in group["params"]]
    if issubclass(cls, torch.optim.SGD) and any(p.device.type == "cpu" and p.element_size() < 4 for p in tensors):
        return False
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by its class: torch's, or one that is called a norm."""
    return "norm" in type(module).__name__.lower()


def without_decay(modules: Iterable[nn.Module]) -> set[int]:
    """Identities of these modules' own parameters that weight decay leaves alone: norms', of any shape, and biases.

    >>> norm = nn.LayerNorm((2, 4, 4))
    >>> without_decay([norm]) == {id(norm.weight), id(norm.bias)}
    True
    """
    return {
        id(p)
        for module in modules
        for name, p in module.named_parameters(recurse=False)
        if is_norm(module) or name.split("_")[0] == "bias"
    }


def sparse_gradients(modules: Iterable[nn.Module]) -> set[int]:
    """Identities of these modules' own parameters whose gradients are sparse tensors."""
    tables = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    return {id(table.weight) for table in tables}


def decay_groups(
    parameters: Iterable[nn.Parameter],
    multiplier: float = 1.0,
    exempt: Collection[int] = (),
    names: Mapping[int, str] | None = None,
) -> list[dict[str, Any]]:
    """Two parameter groups: weights, which decay, and norms, biases and other vectors, which do not.

    Args:
        parameters: of one block and its auxiliary module.
        multiplier: of the learning rate, kept in the group as `"lr_multiplier"` until the optimizer is made.
        exempt: identities of parameters of two or more dimensions that do not decay either, see `without_decay`.
        names: names of the parameters by their identity, kept in the group as `"names"` until the optimizer is made.

    >>> layer = nn.Linear(3, 2)
    >>> [len(group["params"]) for group in decay_groups(layer.parameters())]
    [1, 1]
    """
    learned = [p for p in parameters if p.is_floating_point() or p.is_complex()]  # frozen ones too: they may thaw
    weights = [p for p in learned if p.dim() >= 2 and id(p) not in exempt]
    vectors = [p for p in learned if p.dim() < 2 or id(p) in exempt]
    groups: list[dict[str, Any]] = []
    if weights:
        groups.append({"params": weights, "lr_multiplier": multiplier})
    if vectors:
        groups.append({"params": vectors, "lr_multiplier": multiplier, "weight_decay": 0.0})
    for group in groups if names is not None else ():
        group["names"] = [names.get(id(p), "") for p in group["params"]]  # pyright: ignore[reportOptionalMemberAccess]
    return groups


def in_memory_order_of(own: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """A tensor in the memory order of a parameter of the same shape; others as they are.

    torch's fused optimizers pair the elements of parameter, gradient and state by their place in memory.

    >>> in_memory_order_of(torch.zeros(2, 3).t(), torch.arange(6.0).view(3, 2)).stride()
    (1, 3)
    """
    plain = given.layout == own.layout == torch.strided and type(given) is torch.Tensor
    if not plain or given.shape != own.shape or given.stride() == own.stride():
        return given
    return torch.empty_like(own, dtype=given.dtype, device=given.device, requires_grad=False).copy_(given)


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring the state of every parameter, such as a checkpoint gave it, into the parameter's memory order."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = in_memory_order_of(parameter, value)
