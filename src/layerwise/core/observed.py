"""What a forward pass may read besides its tensors, as values that can be compared: attributes, globals, generators."""

import random
import sys
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset(vars(nn.Module())) - {"training"}
_LIBRARIES = ("torch", "numpy", "math", "builtins", "typing", "functools", "itertools", "layerwise", "operator")


def values_of(module: nn.Module) -> Any:
    """Training mode and plain attributes of a module."""
    found = vars(module).items()
    return tuple((n, value_of(v)) for n, v in found if n not in PLAIN and not n.startswith("_tensor_constant"))


def is_of_class(module: nn.Module, name: str) -> bool:
    """Whether an attribute is held by the module's class, not by itself."""
    return name not in vars(module)


def attribute_of(module: nn.Module, name: str) -> Any:
    """An attribute of a module or of its class; a property counts as what it reads itself."""
    if name in vars(module):
        return value_of(vars(module)[name])
    found = next((vars(kind)[name] for kind in type(module).__mro__ if name in vars(kind)), None)
    return None if hasattr(found, "__get__") else value_of(found)


def names_outside(modules: Sequence[nn.Module]) -> list[Callable[[], Any]]:
    """How to look up the values outside modules that their functions name: globals, closures, their attributes."""
    found: dict[Any, Callable[[], Any]] = {}
    seen: set[int] = set()

    def add(holder: Any, names: Sequence[str]) -> None:
        """Attributes of a module of Python, or of a class, that are named in a function."""
        for name in names:
            value = vars(holder).get(name)
            if isinstance(value, FunctionType):
                follow(value)
            elif value is not None and not callable(value) and not isinstance(value, (ModuleType, property)):
                found[id(holder), name] = lambda holder=holder, name=name: vars(holder).get(name)

    def meet(key: Any, look: Callable[[], Any], names: Sequence[str]) -> None:
        value = look()
        if isinstance(value, FunctionType):
            follow(value)
        elif isinstance(value, (ModuleType, type)):
            where = value.__name__ if isinstance(value, ModuleType) else value.__module__
            if where.partition(".")[0] not in _LIBRARIES:
                add(value, names)
        elif isinstance(value, nn.Module):
            return
        else:
            found[key] = look

    def follow(function: Any) -> None:
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or id(function.__code__) in seen:
            return
        seen.add(id(function.__code__))
        if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            return
        codes = [function.__code__]
        for code in codes:
            codes += [c for c in code.co_consts if hasattr(c, "co_names")]
        names = [name for code in codes for name in code.co_names]
        space = function.__globals__
        for name in names:
            if name in space:
                meet((id(space), name), lambda space=space, name=name: space.get(name), names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name != "__class__":
                meet(id(cell), lambda cell=cell: _content(cell), names)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            meet((id(function), id(value)), lambda value=value: value, names)

    for module in modules:
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] not in _LIBRARIES:
                for value in vars(kind).values():
                    follow(value.fget if isinstance(value, property) else getattr(value, "__func__", value))
    return [*found.values()]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def value_of(value: Any, depth: int = 3, seen: frozenset[int] = frozenset()) -> Any:
    """A value that changes when a plain value does, or anything plain inside a container or a bag of attributes."""
    if value is None or isinstance(value, (bool, int, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (float, complex)):  # NaN is not equal to itself, and -0.0 is equal to 0.0
        return type(value), repr(value)
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, random.Random):
        try:
            return hash(value.getstate())
        except (NotImplementedError, TypeError):  # random.SystemRandom has no state
            return id(value)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if isinstance(value, (nn.Module, type, ModuleType, FunctionType, MethodType)) or id(value) in seen:
        return id(value)
    seen |= {id(value)}
    if isinstance(value, (list, tuple)):
        return tuple(value_of(v, depth, seen) for v in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(map(repr, value))
    if isinstance(value, dict):
        return tuple((repr(k), value_of(v, depth, seen)) for k, v in value.items())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            plain = value.dtype.kind != "O"
            return value.shape, str(value.dtype), value.tobytes() if plain else repr(value.tolist())
        if isinstance(value, numpy.generic):
            return type(value).__name__, repr(value)
        if isinstance(value, numpy.random.Generator):
            return repr(value.bit_generator.state)
        if isinstance(value, numpy.random.RandomState):
            return repr(value.get_state(legacy=False))
    if hasattr(value, "__dict__") and depth:
        return id(value), tuple((k, value_of(v, depth - 1, seen)) for k, v in vars(value).items())
    return id(value)


def generator_states() -> tuple[Any, ...]:
    """States of the random generators that a forward pass may use without a tensor."""
    numpy = sys.modules.get("numpy")
    states = None if numpy is None else numpy.random.get_state()
    drawn = None if states is None else (states[0], states[1].tobytes(), *states[2:])
    return random.getstate(), drawn, bytes(torch.random.get_rng_state().tolist())


def restore_generators(states: tuple[Any, ...]) -> None:
    """Put random generators back to what `generator_states` gave."""
    random.setstate(states[0])
    torch.random.set_rng_state(torch.tensor(list(states[2]), dtype=torch.uint8, device="cpu"))
    if states[1] is not None:
        numpy = sys.modules["numpy"]
        name, keys, *rest = states[1]
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
