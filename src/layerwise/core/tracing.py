"""Where a model may be cut, and what runs between two cuts: chains of modules, or parts of a traced graph."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from layerwise.errors import LayerwiseError


def legal_cuts(model: nn.Module) -> list[str]:
    """Names of the modules behind which `model` may be cut: one tensor crosses there and no other.

    Found by tracing; where the model cannot be traced, the children of its `nn.Sequential` parts.

    >>> legal_cuts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    ['0', '1']
    """
    if is_sequential(model):
        children = expanded(model, deep=True)
        last = max((i for i, (_, child) in enumerate(children) if _weighted(child)), default=0)
        return [name for name, _ in children[:last]]  # the head needs parameters
    try:
        graph, ends = _trace(
            model,
            leaf=lambda _, m: m.__module__.startswith("torch.nn") and not is_sequential(m),
        )
    except LayerwiseError:
        return []
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
    # The last use of each value tells which values are alive behind a position.
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in order}
    legal = []
    for path, nodes in ends.items():
        end = position[nodes[0]]
        alive = [n for n in order[: end + 1] if last_use[n] > end and n.op != "get_attr"]
        if len(nodes) == 1 and alive == [nodes[0]] and end < last:
            legal.append(path)
    return legal


def listed(names: Sequence[str], most: int = 24) -> str:
    """Names in a sentence, the first `most` of them."""
    if not names:
        return "none (wrap the model as nn.Sequential of its parts)"
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _weighted(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


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


def cut_graph(model: nn.Module, cuts: tuple[str, ...]) -> list[tuple[Callable[[Tensor], Any], set[str]]]:
    """What runs between the cuts of a traced model, and the names of its tensors."""
    graph, ends = _trace(model, leaf=lambda path, _: not any(cut.startswith(path + ".") for cut in cuts))
    order = [node for node in graph.nodes]
    position = {node: i for i, node in enumerate(order)}
    for cut in cuts:
        if len(ends.get(cut, [])) != 1:
            how = "is not called" if cut not in ends else "is called more than once"
            raise LayerwiseError(
                f"the model cannot be cut behind {cut!r}, which {how} in its forward pass; legal cuts "
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
