"""Where a model may be cut, and what runs between two cuts of a traced graph."""

import functools
import os
import random
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _get_current_dispatch_mode

from layerwise.core.chains import INSTEAD, check_model, expanded, is_overridden, is_sequential, listed, opened
from layerwise.core.failures import told_by
from layerwise.core.observed import (
    PLAIN,
    attribute_of,
    generator_states,
    is_of_class,
    names_outside,
    restore_generators,
    value_of,
    values_of,
)
from layerwise.core.randomness import preserved_generators, seed_generators
from layerwise.errors import LayerwiseError


def possible_cuts(model: nn.Module) -> list[str]:
    """Names of the modules after which an uncut `model` may be cut, see `legal_cuts`."""
    check_model(model)
    if is_sequential(model):
        children = expanded(model, deep=True)
        last = max((i for i, (_, child) in enumerate(children) if _weighted(child)), default=0)
        return [name for name, _ in children[:last]]  # the head needs parameters
    opaque: set[str] = set()

    def leaf(path: str, module: nn.Module) -> bool:
        return path in opaque or (module.__module__.startswith("torch.nn") and not is_sequential(module))

    try:
        graph, ends = _trace(model, leaf)
    except LayerwiseError:
        opaque = _untraceable(model)
        if "" in opaque:
            return []
        graph, ends = _trace(model, leaf)
    order = list(graph.nodes)
    last = max(
        (
            i
            for i, node in enumerate(order)
            if node.op == "get_attr" or (node.op == "call_module" and _weighted(model.get_submodule(str(node.target))))
        ),
        default=0,
    )
    position = {node: i for i, node in enumerate(order)}
    # The last use of each value shows which values are alive after a position.
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in order}
    legal = []
    for path, nodes in ends.items():
        end = position[nodes[0]]
        alive = [n for n in order[: end + 1] if last_use[n] > end and n.op != "get_attr"]
        if len(nodes) == 1 and alive == [nodes[0]] and end < last:
            legal.append(path)
    return legal


def _untraceable(model: nn.Module) -> set[str]:
    """Names of the user modules that cannot be traced, though their parts may be; a trace treats them as leaves."""
    found: set[str] = set()
    for path, module in reversed([*model.named_modules()]):
        if module.__module__.startswith("torch.nn") and not is_sequential(module):
            continue
        prefix = f"{path}." if path else ""

        def leaf(inner: str, m: nn.Module, prefix: str = prefix) -> bool:
            return prefix + inner in found or (m.__module__.startswith("torch.nn") and not is_sequential(m))

        try:
            _trace(module, leaf)
        except LayerwiseError:
            found.add(path)
    return found


def _weighted(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class _Tracer(fx.Tracer):
    """Traces a model down to its leaves and remembers which value each module returned."""

    proxy_buffer_attributes = True  # a buffer may change after the trace, as a parameter may

    def __init__(self, leaf: Callable[[str, nn.Module], bool]):
        super().__init__()
        self.leaf = leaf
        self.ends: dict[str, list[Any]] = {}
        self.graded = torch.is_grad_enabled()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_grad_enabled() != self.graded:
            raise Switched
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        # One input; every other argument of forward takes its default.
        return root_fn, [self.root, self.create_proxy("placeholder", "h", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(module_qualified_name, m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        self.ends.setdefault(self.path_of_module(m), []).append(getattr(out, "node", None))
        return out


class Switched(Exception):
    """The forward pass switches gradients or autocast on or off around a part of itself."""


@contextmanager
def _watched(reads: dict[tuple[int, str], nn.Module] | None) -> Iterator[None]:
    """A context in which reading an attribute of a module is noted in `reads`, and autocast cannot be switched."""

    def get(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if (
            reads is not None
            and threading.get_ident() == mine
            and name not in PLAIN
            and not name.startswith("__")
            and not callable(value)
        ):
            reads[id(module), name] = module
        return value

    def switch(self: torch.autocast) -> Any:
        if threading.get_ident() == mine:
            raise Switched
        return enter(self)

    mine = threading.get_ident()
    with _TRACING:
        enter = torch.autocast.__enter__
        nn.Module.__getattribute__ = get  # pyright: ignore[reportAttributeAccessIssue]
        torch.autocast.__enter__ = switch
        try:
            yield
        finally:
            del nn.Module.__getattribute__
            torch.autocast.__enter__ = enter


_TRACING = threading.Lock()
"""Held while a trace changes classes of torch, which the whole process shares."""
os.register_at_fork(after_in_child=lambda: globals().update(_TRACING=threading.Lock()))


def _trace(
    model: nn.Module,
    leaf: Callable[[str, nn.Module], bool],
    grad: bool = True,
    reads: dict[tuple[int, str], nn.Module] | None = None,
) -> tuple[fx.Graph, dict[str, list[fx.Node]]]:
    name = type(model).__name__
    if is_overridden(model):
        raise LayerwiseError(
            f"{name} has a forward or a __call__ that replaces that of its class, so it cannot be traced; {INSTEAD}"
        )
    try:
        with torch.set_grad_enabled(grad), _watched(reads):
            tracer = _Tracer(leaf)
            graph = tracer.trace(model)
    except Switched as reason:
        raise LayerwiseError(
            f"{name}.forward switches gradients or autocast inside (torch.no_grad, torch.enable_grad, torch.autocast), "
            f"which a trace cannot represent; {INSTEAD}"
        ) from reason
    except Exception as reason:  # tracing runs the user's own forward, which may raise anything
        raise LayerwiseError(
            f"{type(model).__name__}.forward cannot be traced ({told_by(reason)}); wrap the "
            "model as nn.Sequential of its parts."
        ) from reason
    ends = {path: nodes for path, nodes in tracer.ends.items() if None not in nodes}
    return graph, ends


class Traces:
    """The parts of a traced model, traced anew whenever Python values that its forward may read have changed.

    A trace holds the branches that were taken and the numbers that were read. So there is one for each state of what
    the forward pass reads: the training mode and the plain attributes of the modules that are traced through, the
    attributes of other modules that it has read, and the global names of its functions. Anything else shows in the
    output: every trace is compared with the model itself on the first samples that arrive.

    Raises:
        LayerwiseError: what a trace cannot follow (branches on tensors, random draws outside torch's functions of
            tensors, attributes that the forward pass itself changes), or a wrong cut.
    """

    def __init__(self, model: nn.Module, cuts: tuple[str, ...]):
        self.model, self.cuts = model, cuts
        self.opened = opened(model, cuts)
        self.owned: list[set[str]] = [set() for _ in range(len(cuts) + 1)]
        self._parts: OrderedDict[Any, list[Callable[[Tensor], Any]]] = OrderedDict()
        self._compared: OrderedDict[Any, None] = OrderedDict()
        self._reads: dict[tuple[int, str], nn.Module] = {}
        self._names = names_outside(self.opened)
        self.resident: Callable[[], bool] = lambda: True
        """Whether all tensors of the model are where it can be run."""
        self._raw: OrderedDict[Any, list[tuple[Callable[[Tensor], Any], set[str]]]] = OrderedDict()
        self._wrap: Callable[[Callable[[Tensor], Any], int], Callable[[Tensor], Any]] = lambda run, _: run
        for _ in both_modes(model):
            self._made(growing=True)

    def compare(self, x: Tensor) -> None:
        """Compare the parts, one after the other, with the model itself: bit for bit, in the present state.

        Args:
            x: inputs of the model.

        Raises:
            LayerwiseError: they differ.
        """
        state = self._state()
        if state in self._compared or not self.resident() or torch.compiler.is_compiling():
            return
        if _get_current_dispatch_mode() is not None:  # something counts what is run
            return
        if state not in self._parts:
            self._made()
            state = self._state()
        runs = [run for run, _ in self._raw[state]]
        try:
            found = [_ran(run, self.model, x[:2]) for run in (self.model, self.model, _composed(runs))]
        except Exception:  # the model rejects this input; the run that needs a result raises the error
            return
        if not _same(found[0], found[1]):
            return  # the model itself is not reproducible
        if not _same(found[0], found[2]):
            raise LayerwiseError(
                f"{type(self.model).__name__}.forward does something that a trace cannot represent (a branch on a "
                f"type, a value from elsewhere, a switch of a mode); {INSTEAD}"
            )
        _kept(self._compared, self._state(), None)

    def part(self, index: int) -> Callable[[Tensor], Any]:
        """What runs as block `index` in the present state of the modules."""
        parts = self._parts.get(self._state())
        return (parts if parts is not None else self._made())[index]

    def wrap(self, index: int, wrap: Callable[[Callable[[Tensor], Any]], Callable[[Tensor], Any]]) -> None:
        """Put a function such as `torch.compile` around what runs as block `index`."""
        before = self._wrap
        self._wrap = lambda run, i: wrap(before(run, i)) if i == index else before(run, i)
        for parts in self._parts.values():
            parts[index] = wrap(parts[index])

    def _state(self) -> Any:
        own = tuple(values_of(module) for module in self.opened)
        read = tuple((key, attribute_of(module, key[1])) for key, module in self._reads.items())
        autocast = tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        return own, read, tuple(value_of(look()) for look in self._names), autocast

    def _made(self, growing: bool = False) -> list[Callable[[Tensor], Any]]:
        graph, ends = self._traced()
        found = _cut_traced(self.model, self.cuts, graph, ends)
        for i, (_, owned) in enumerate(found):
            if growing:
                self.owned[i] |= owned
            elif not owned <= self.owned[i]:
                raise LayerwiseError(
                    f"{type(self.model).__name__}.forward now runs {sorted(owned - self.owned[i])[0]!r}, which it "
                    "did not run when the model was cut; call partition(model) again."
                )
        state = self._state()
        _kept(self._raw, state, found)
        return _kept(self._parts, state, [self._wrap(run, i) for i, (run, _) in enumerate(found)])

    def _traced(self) -> tuple[fx.Graph, dict[str, list[fx.Node]]]:
        """A trace, made twice to check that the forward pass does the same each time."""
        name, before, state = type(self.model).__name__, generator_states(), self._state()
        reads: dict[tuple[int, str], nn.Module] = {}

        def leaf(path: str, _: nn.Module) -> bool:
            return not any(cut.startswith(path + ".") for cut in self.cuts)

        graph, ends = _trace(self.model, leaf, reads=reads)
        first = _text(graph, self.model)
        again = _text(_trace(self.model, leaf, grad=False)[0], self.model)
        settled = self._state()
        if settled != state:  # what only the first pass makes (an import, a cache) is there now
            _trace(self.model, leaf, grad=False)
        if self._state() != settled:
            raise LayerwiseError(
                f"{name}.forward changes attributes of its module, or values outside it, while it runs, which a "
                f"trace cannot follow; {INSTEAD}"
            )
        if generator_states() != before or first != again:
            restore_generators(before)
            raise LayerwiseError(
                f"{name}.forward does something else each time it runs (it draws random numbers, reads a clock, or "
                "asks whether gradients are on), which a trace would freeze; draw inside a module that is called, or "
                f"with functions of a tensor (torch.rand_like), or {INSTEAD}"
            )
        inside = {id(module) for module in self.opened}
        self._reads |= {
            key: module for key, module in reads.items() if key[0] not in inside or is_of_class(module, key[1])
        }
        return graph, ends


def both_modes(model: nn.Module) -> Iterator[bool]:
    """All modules in training mode, then in evaluation mode; afterwards each is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for mode in (True, False):
            for module, _ in modes:
                module.training = mode
            yield mode
    finally:
        for module, mode in modes:
            module.training = mode


def _kept(found: OrderedDict[Any, Any], state: Any, value: Any, most: int = 32) -> Any:
    """Put a value into a store of the last `most` states."""
    found[state] = value
    while len(found) > most:
        found.popitem(last=False)
    return value


def _composed(runs: Sequence[Callable[[Any], Any]]) -> Callable[[Tensor], Any]:
    def run(h: Any) -> Any:
        for part in runs:
            h = part(h.clone())
        return h

    return run


@torch.no_grad()
def _ran(run: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> Any:
    """What `run` gives under one seed of all generators; generators and buffers stay as they are."""
    before = generator_states()
    buffers = [(m._buffers, name, t) for m in model.modules() for name, t in m._buffers.items() if t is not None]
    copies = {id(t): t.clone() for _, _, t in buffers}
    for registry, name, t in buffers:
        registry[name] = copies[id(t)]
    try:
        with preserved_generators(x.device):
            seed_generators(0, x.device)
            random.seed(0)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(0)
            return run(x.clone())
    finally:
        for registry, name, t in buffers:
            registry[name] = t
        restore_generators(before)


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal, NaN to NaN."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return not isinstance(a, Tensor) and not isinstance(b, Tensor)
    return bool(((a == b) | ((a != a) & (b != b))).all())


class TracedPart:
    """A part of a traced model."""

    def __init__(self, traces: Traces, index: int):
        self.traces, self.index = traces, index

    def __call__(self, h: Tensor) -> Any:
        run = self.traces.part(self.index)
        if self.index == 0:
            self.traces.compare(h)
        return run(h)


def _text(graph: fx.Graph, model: nn.Module) -> tuple[str, list[Any]]:
    """What a trace does, and the constants that it holds."""
    constants = [node.target for node in graph.nodes if node.op == "get_attr" and "_tensor_constant" in node.target]
    values = [getattr(model, str(name)).tolist() for name in constants]
    return re.sub(r"_tensor_constant\d+", "_tensor_constant", str(graph)), values


def cut_graph(model: nn.Module, cuts: tuple[str, ...]) -> list[tuple[Callable[[Tensor], Any], set[str]]]:
    """What runs between the cuts of a traced model, and the names of its tensors."""
    traces = Traces(model, cuts)
    return [(TracedPart(traces, i), owned) for i, owned in enumerate(traces.owned)]


def _cut_traced(
    model: nn.Module, cuts: tuple[str, ...], graph: fx.Graph, ends: dict[str, list[fx.Node]]
) -> list[tuple[Callable[[Tensor], Any], set[str]]]:
    order = [node for node in graph.nodes]
    position = {node: i for i, node in enumerate(order)}
    for cut in cuts:
        if len(ends.get(cut, [])) != 1:
            how = "is not called" if cut not in ends else "is called more than once"
            raise LayerwiseError(
                f"the model cannot be cut after {cut!r}, which {how} in its forward pass; legal cuts "
                f"are {listed(possible_cuts(model))}."
            )
    stops = [position[ends[cut][0]] for cut in cuts]
    if stops != sorted(stops):
        ordered = sorted(cuts, key=lambda cut: position[ends[cut][0]])
        raise LayerwiseError(
            f"the cuts {list(cuts)} are not in the order in which the model runs; give them as {ordered}."
        )
    parts = []
    entry = next(node for node in order if node.op == "placeholder")
    for name, stop in zip([*cuts, "head"], [*stops, len(order) - 1], strict=True):
        first = position[entry] + 1
        nodes = [n for n in order[first : stop + 1] if n.op not in ("placeholder", "output")]
        result = order[stop] if name != "head" else order[-1].args[0]
        parts.append(_subgraph(model, entry, nodes, result, name))
        entry = order[stop]
    return parts


def _subgraph(
    model: nn.Module, entry: fx.Node, nodes: list[fx.Node], result: Any, name: str
) -> tuple[Callable[[Tensor], Any], set[str]]:
    part = fx.Graph(owning_module=None)
    copies = {entry: part.placeholder("h")}
    owned: set[str] = set()
    for node in nodes:
        for needed in node.all_input_nodes:
            if needed in copies:
                continue
            if needed.op != "get_attr":
                raise LayerwiseError(
                    f"block {name!r} needs the value {needed.name!r} from before its own input (a skip "
                    f"connection crosses the cut); legal cuts are {listed(possible_cuts(model))}."
                )
            copies[needed] = part.node_copy(needed)  # a parameter of the model itself
            owned.add(str(needed.target))
        copies[node] = part.node_copy(node, lambda n: copies[n])
        if node.op == "get_attr":
            owned.add(str(node.target))
        elif node.op == "call_module":
            child = model.get_submodule(str(node.target))
            tensors = [*child.named_parameters(), *child.named_buffers()]
            owned |= {f"{node.target}.{n}" for n, _ in tensors}
    part.output(map_arg(result, lambda n: copies[n]))
    # Python source that looks everything up in the model; faster than fx.Interpreter, and dynamo can read it.
    source = part.python_code("self")
    exec(source.src, source.globals)
    return functools.partial(source.globals["forward"], model), owned
