"""Where a model may be cut, and what runs between two cuts: chains of modules, or parts of a traced graph."""

import functools
import random
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from layerwise.errors import LayerwiseError


def legal_cuts(model: nn.Module) -> list[str]:
    """Names of the modules after which `model` may be cut: one tensor crosses there and no other.

    Found by tracing; where the model cannot be traced, the children of its `nn.Sequential` parts.

    >>> legal_cuts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    ['0', '1']
    """
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
    """Names of the modules of one's own that cannot be traced, though their parts may be: they are cut around."""
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


def listed(names: Sequence[str], most: int = 24) -> str:
    """Names in a sentence, the first `most` of them."""
    if not names:
        return "none (wrap the model as nn.Sequential of its parts)"
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _weighted(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def check_model(model: Any) -> None:
    """Raise LayerwiseError where `model` is no module, or a module around the one that is to be trained."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise LayerwiseError(f"the model is a {name}; give a torch.nn.Module.")
    if name == "OptimizedModule":
        raise LayerwiseError(
            "the model is compiled as a whole, which hides its blocks; give the module itself (model._orig_mod) and "
            "Learner(..., compile=True), which compiles each block."
        )
    if isinstance(model, nn.DataParallel):
        raise LayerwiseError(
            "the model is wrapped in DataParallel, whose replicas live for one call only; give model.module, and "
            "several processes with Learner(..., replicas=...) or --parallel data."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel) or name == "FullyShardedDataParallel":
        raise LayerwiseError(
            f"the model is wrapped in {name}, which waits for the gradients of the whole network; give model.module "
            "and Learner(..., replicas=...) or --parallel data, which average block by block."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise LayerwiseError(
            "the model is a ScriptModule, which cannot be cut; give the Python module that it was made from."
        )


def is_sequential(module: nn.Module) -> bool:
    """Whether the module runs its children one after the other and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def expanded(
    model: nn.Module, cuts: Sequence[str] = (), deep: bool = False, prefix: str = ""
) -> list[tuple[str, nn.Module]]:
    """The children of nested `nn.Sequential` containers, opened only where a cut lies inside (or all, if `deep`)."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in model._modules.items():  # named_children() leaves out a child held twice
        if child is None:
            continue
        path = prefix + name
        if is_sequential(child) and child._modules:
            inside = any(cut.startswith(path + ".") for cut in cuts)
            if inside or deep:
                found += expanded(child, cuts, deep, path + ".")
                continue
        found.append((path, child))
    return found


class Chain:
    """The composition of modules."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules

    def __call__(self, h: Tensor) -> Tensor:
        for module in self.modules:
            h = module(h)
        return h


def cut_sequential(model: nn.Module, cuts: tuple[str, ...]) -> list[tuple[Callable[[Tensor], Any], set[str]]]:
    """What runs between the cuts of nested `nn.Sequential` containers, and the names of its tensors."""
    children = expanded(model, cuts)
    order = [name for name, _ in children]
    ends = [order.index(cut) + 1 for cut in cuts]
    if ends != sorted(ends):
        raise LayerwiseError(
            f"the cuts {list(cuts)} are not in the order in which the model runs; give them as "
            f"{[name for name in order if name in cuts]}."
        )
    parts = []
    for start, end in zip([0, *ends], [*ends, len(order)], strict=True):
        owned = {
            f"{path}.{name}"
            for path, child in children[start:end]
            for name, _ in [*child.named_parameters(), *child.named_buffers()]
        }
        parts.append((Chain([child for _, child in children[start:end]]), owned))
    return parts


class _Tracer(fx.Tracer):
    """Traces a model down to its leaves and remembers which value each module returned."""

    proxy_buffer_attributes = True  # a buffer may change after the trace, as a parameter may

    def __init__(self, leaf: Callable[[str, nn.Module], bool]):
        super().__init__()
        self.leaf = leaf
        self.ends: dict[str, list[Any]] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        # One input; every other argument of forward takes its default.
        return root_fn, [self.root, self.create_proxy("placeholder", "h", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(module_qualified_name, m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        self.ends.setdefault(self.path_of_module(m), []).append(getattr(out, "node", None))
        return out


def _trace(model: nn.Module, leaf: Callable[[str, nn.Module], bool]) -> tuple[fx.Graph, dict[str, list[fx.Node]]]:
    tracer = _Tracer(leaf)
    try:
        graph = tracer.trace(model)
    except Exception as reason:  # tracing runs the user's own forward, which may raise anything
        raise LayerwiseError(
            f"{type(model).__name__}.forward cannot be traced ({str(reason).splitlines()[0]}); wrap the "
            "model as nn.Sequential of its parts."
        ) from reason
    ends = {path: nodes for path, nodes in tracer.ends.items() if None not in nodes}
    return graph, ends


class Traces:
    """The parts of a traced model, traced anew whenever Python values that its forward may read have changed.

    A trace holds the branches that were taken and the numbers that were read. So there is one for each state of the
    modules that are traced through: their training mode, and their attributes as far as they are plain values.

    Raises:
        LayerwiseError: what a trace cannot follow (branches on tensors, random draws outside of torch's functions of
            tensors, attributes that the forward pass itself changes), or a wrong cut.
    """

    def __init__(self, model: nn.Module, cuts: tuple[str, ...]):
        self.model, self.cuts = model, cuts
        self.opened = opened(model, cuts)
        self.owned: list[set[str]] = [set() for _ in range(len(cuts) + 1)]
        self._parts: dict[Any, list[Callable[[Tensor], Any]]] = {}
        self._wrap: Callable[[Callable[[Tensor], Any], int], Callable[[Tensor], Any]] = lambda run, _: run
        modes = [(module, module.training) for module in self.opened]
        try:
            for mode in (True, False):
                for module in self.opened:
                    module.training = mode
                self._made(self._state(), growing=True)
        finally:
            for module, mode in modes:
                module.training = mode

    def part(self, index: int) -> Callable[[Tensor], Any]:
        """What runs as block `index` in the present state of the modules."""
        state = self._state()
        parts = self._parts.get(state)
        return (parts if parts is not None else self._made(state))[index]

    def wrap(self, index: int, wrap: Callable[[Callable[[Tensor], Any]], Callable[[Tensor], Any]]) -> None:
        """Put a function such as `torch.compile` around what runs as block `index`."""
        before = self._wrap
        self._wrap = lambda run, i: wrap(before(run, i)) if i == index else before(run, i)
        for parts in self._parts.values():
            parts[index] = wrap(parts[index])

    def _state(self) -> Any:
        return tuple(_values(module) for module in self.opened)

    def _made(self, state: Any, growing: bool = False) -> list[Callable[[Tensor], Any]]:
        graph, ends = self._traced(state)
        found = _cut_traced(self.model, self.cuts, graph, ends)
        for i, (_, owned) in enumerate(found):
            if growing:
                self.owned[i] |= owned
            elif not owned <= self.owned[i]:
                raise LayerwiseError(
                    f"{type(self.model).__name__}.forward now runs {sorted(owned - self.owned[i])[0]!r}, which it did "
                    "not when the model was cut; call partition(model) again."
                )
        self._parts[state] = [self._wrap(run, i) for i, (run, _) in enumerate(found)]
        return self._parts[state]

    def _traced(self, state: Any) -> tuple[fx.Graph, dict[str, list[fx.Node]]]:
        """A trace, made twice to see that the forward pass does the same each time."""
        name, before = type(self.model).__name__, _generators()

        def leaf(path: str, _: nn.Module) -> bool:
            return not any(cut.startswith(path + ".") for cut in self.cuts)

        graph, ends = _trace(self.model, leaf)
        first = _text(graph, self.model)
        again = _text(_trace(self.model, leaf)[0], self.model)
        if self._state() != state:
            raise LayerwiseError(
                f"{name}.forward changes attributes of its module while it runs, which a trace cannot follow; wrap the "
                "model as nn.Sequential of its parts."
            )
        if _generators() != before or first != again:
            _restore(before)
            raise LayerwiseError(
                f"{name}.forward draws random numbers that a trace would freeze; draw them inside a module that "
                "is called, or with functions of a tensor (torch.rand_like), or wrap the model as nn.Sequential of its "
                "parts."
            )
        return graph, ends


class TracedPart:
    """A part of a traced model."""

    def __init__(self, traces: Traces, index: int):
        self.traces, self.index = traces, index

    def __call__(self, h: Tensor) -> Any:
        return self.traces.part(self.index)(h)


def opened(model: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The modules whose own call does not happen when the model is run part by part: the root, and what holds a cut."""
    named = model.named_modules(remove_duplicate=False)
    return [module for path, module in named if path == "" or any(cut.startswith(path + ".") for cut in cuts)]


_PLAIN = frozenset(vars(nn.Module())) - {"training"}


def _values(module: nn.Module) -> Any:
    """Training mode and plain attributes of a module."""
    found = vars(module).items()
    return tuple((n, _value(v)) for n, v in found if n not in _PLAIN and not n.startswith("_tensor_constant"))


def _value(value: Any, depth: int = 3) -> Any:
    """A value that changes when a plain value does, or anything plain inside a container or a bag of attributes."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value).__name__, repr(value)
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value) or depth == 0:
        return id(value)
    if isinstance(value, (list, tuple)):
        return tuple(_value(v, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(map(repr, value))
    if isinstance(value, dict):
        return tuple((repr(k), _value(v, depth - 1)) for k, v in value.items())
    if hasattr(value, "__dict__"):
        return tuple((k, _value(v, depth - 1)) for k, v in vars(value).items())
    return id(value)


def _generators() -> tuple[Any, ...]:
    """States of the random generators that a forward pass may use without a tensor."""
    numpy = sys.modules.get("numpy")
    states = None if numpy is None else numpy.random.get_state()
    drawn = None if states is None else (states[0], states[1].tobytes(), *states[2:])
    return random.getstate(), drawn, bytes(torch.random.get_rng_state().tolist())


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    torch.random.set_rng_state(torch.tensor(list(states[2]), dtype=torch.uint8))
    if states[1] is not None:
        numpy = sys.modules["numpy"]
        name, keys, *rest = states[1]
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


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
                f"are {listed(legal_cuts(model))}."
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
                    f"connection crosses the cut); legal cuts are {listed(legal_cuts(model))}."
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
