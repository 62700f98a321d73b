"""Partition a model into gradient-isolated blocks and a head, without changing what it computes."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils.flop_counter import FlopCounterMode

from layerwise.errors import LayerwiseError


class Block:
    """A contiguous part of a model: what runs between two cuts.

    A block owns no module. It holds the names of its parameters and buffers inside the model and looks
    them up when asked, so that it stays right when the model is moved, cast, compiled or sharded.

    Attributes:
        name: the cut behind the block (`"head"` for the part behind the last cut).
        run: the function from the block's input tensor to its output tensor.
        before: called before every run, if anything; an offloaded block has to be fetched.
    """

    def __init__(self, name: str, model: nn.Module, run: Callable[[Tensor], Any], names: set[str]):
        self.name = name
        self.run = run
        self.before: Callable[[], None] | None = None
        self._model = model
        self._names = names

    def __call__(self, h: Tensor) -> Tensor:
        """Run the block. Raises LayerwiseError when it returns anything but one tensor."""
        if self.before is not None:
            self.before()
        out = self.run(h)
        if not isinstance(out, Tensor):
            raise LayerwiseError(
                f"block {self.name!r} returns {type(out).__name__}, not one tensor, so nothing can be "
                f"passed on; cut elsewhere: {_listed(legal_cuts(self._model))}."
            )
        return out

    @property
    def ran(self) -> bool:
        """Whether the block has run in the pass under way; a model that is cut at its calls may leave one out."""
        return True

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Pairs of the parameter's name in the model and the parameter."""
        return (item for item in self._model.named_parameters() if item[0] in self._names)

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of the buffer's name in the model and the buffer."""
        return (item for item in self._model.named_buffers() if item[0] in self._names)

    def parameters(self) -> list[nn.Parameter]:
        """The block's parameters, in the model's order."""
        return [parameter for _, parameter in self.named_parameters()]

    def tensor(self, name: str) -> Tensor:
        """The block's parameter or buffer `name` (its name in the model), on the device.

        Raises:
            LayerwiseError: the block has none of that name.
        """
        if self.before is not None:
            self.before()
        for found, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if found == name:
                return tensor
        raise LayerwiseError(f"block {self.name!r} has no tensor {name!r}.")

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Where the block's parameters and buffers are held: a module's registry, and the name in it."""
        found = []
        for name in sorted(self._names):
            path, _, last = name.rpartition(".")
            module = self._model.get_submodule(path)
            found.append((module._parameters if last in module._parameters else module._buffers, last))
        return found

    def redrawn(self, device: torch.device) -> nn.Sequential:
        """A module of the block's layers and sizes with weights of its own, drawn by each layer's `reset_parameters`.

        Args:
            device: where it lives; the block itself may be on another one, or on none (`meta`).

        Raises:
            LayerwiseError: the block was traced out of a model, so there is no chain of modules to copy, or a module
                of it holds parameters and cannot draw them anew.

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> Partition(net, ["1", "3"]).blocks[1].redrawn(torch.device("cpu"))
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
        )
        """
        if not isinstance(self.run, _Chain):
            raise LayerwiseError(
                f"block {self.name!r} was traced out of {type(self._model).__name__}, so no module can be copied with "
                "new weights; wrap the model as nn.Sequential of its parts."
            )
        made = copy.deepcopy(nn.Sequential(*self.run.modules)).to_empty(device=device)
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                raise LayerwiseError(
                    f"block {self.name!r} holds a {type(module).__name__}, which has no reset_parameters(), so it "
                    "cannot be copied with new weights; give it that method."
                )
        return made

    def __repr__(self) -> str:
        return f"Block({self.name!r}, {sum(p.numel() for p in self.parameters())} parameters)"


class Partition(nn.Module):
    """A model seen as `blocks` and a `head`; it computes exactly what the model computes.

    It shares the model's own registries, so parameter names, `state_dict()` keys, `.to()`, `.train()` and
    hooks are the model's. A pickle holds the model and the names of the cuts, no code.

    Attributes:
        model: the model that was cut.
        cuts: names of the modules behind which the model is cut.
        blocks: the blocks, in the order in which they run.
        head: what runs behind the last cut; it maps the last block's output to logits.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[str]):
        super().__init__()
        # One set of dictionaries for both: whatever replaces a child or a parameter in the one does in the other.
        self._modules, self._parameters, self._buffers = (
            model._modules,
            model._parameters,
            model._buffers,
        )
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.__dict__.update(model=model, cuts=tuple(cuts))
        *blocks, head = _cut(model, tuple(cuts))
        self.__dict__.update(blocks=blocks, head=head, _known=dict(model.named_modules(remove_duplicate=False)))
        self.training = model.training

    model: nn.Module
    cuts: tuple[str, ...]
    blocks: list[Block]
    head: Block
    _known: dict[str, nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks and the head: the model's output for `x`, bit for bit."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def train(self, mode: bool = True) -> "Partition":
        """Set training or evaluation mode, on the model itself too."""
        self.model.train(mode)
        self.training = mode
        return self

    def passing(self) -> AbstractContextManager[None]:
        """A context in which the blocks can be run: always, for a model that is cut into functions."""
        return nullcontext()

    def check_modules(self) -> None:
        """Raise LayerwiseError where a module of the model was replaced: its block still runs the old one."""
        now = dict(self.model.named_modules(remove_duplicate=False))
        for name, module in self._known.items():
            if now.get(name) is not module:
                raise LayerwiseError(
                    f"module {name!r} was replaced after the model was cut; call partition(model) again."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return Partition, (self.model, self.cuts)


def partition(
    model: nn.Module,
    cuts: Sequence[str] | str | None = None,
    *,
    blocks: int | None = None,
    example: Tensor | None = None,
) -> Partition:
    """Cut a model into gradient-isolated blocks and a head.

    Args:
        model: any module with one tensor in and one tensor out. A `nn.Sequential` needs nothing else:
            every child with a weight matrix or kernel starts a block, other children (activation, pooling,
            normalisation) join the block before them, and the last such child is the head. A model may
            name its own cuts in an attribute `block_names`. Any other model is traced with `torch.fx`.
        cuts: names of the modules behind which to cut (`["layer1", "layer2.0"]`); what runs behind the
            last one is the head. `"layer"` cuts as finely as is possible, `"block"` is the default.
        blocks: join the blocks found to this many, so that the largest number of floating-point
            operations in one block is as small as possible (measured on `example`).
        example: one batch of inputs, needed for `blocks`.

    Returns:
        The partition; `partition(model)(x)` equals `model(x)` bit for bit.

    Raises:
        LayerwiseError: an unknown cut, a cut that another tensor crosses (a skip connection), parameters
            shared by two blocks, a head without parameters, a model that cannot be traced, more blocks
            than there are places to cut. The sentence lists the legal cuts.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [block.name for block in partition(net).blocks], partition(net).head.name
    (['1', '3'], 'head')
    """
    if isinstance(model, Partition):
        return model
    if cuts is None or cuts == "block":
        cuts = _default_cuts(model)
    elif cuts == "layer":
        cuts = _finest_cuts(model)
    elif isinstance(cuts, str):
        cuts = [name.strip() for name in cuts.split(",") if name.strip()]
    if blocks is not None:
        cuts = _balanced(model, cuts, blocks, example)
    return Partition(model, cuts)


def legal_cuts(model: nn.Module) -> list[str]:
    """Names of the modules behind which `model` may be cut: one tensor crosses there and no other.

    Found by tracing; where the model cannot be traced, the children of its `nn.Sequential` parts.

    >>> legal_cuts(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    ['0', '1']
    """
    if _is_sequential(model):
        children = _expanded(model, deep=True)
        last = max((i for i, (_, child) in enumerate(children) if _weighted(child)), default=0)
        return [name for name, _ in children[:last]]  # the head needs parameters
    try:
        graph, ends = _trace(
            model,
            leaf=lambda _, m: m.__module__.startswith("torch.nn") and not _is_sequential(m),
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


def _listed(names: Sequence[str], most: int = 24) -> str:
    if not names:
        return "none (wrap the model as nn.Sequential of its parts)"
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _weighted(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _expanded(
    model: nn.Module, cuts: Sequence[str] = (), deep: bool = False, prefix: str = ""
) -> list[tuple[str, nn.Module]]:
    """The children of nested `nn.Sequential` containers, opened only where a cut lies inside (or all, if `deep`)."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in model._modules.items():  # named_children() leaves out a child held twice
        if child is None:
            continue
        path = prefix + name
        if _is_sequential(child) and child._modules:
            inside = any(cut.startswith(path + ".") for cut in cuts)
            if inside or deep:
                found += _expanded(child, cuts, deep, path + ".")
                continue
        found.append((path, child))
    return found


def _default_cuts(model: nn.Module) -> list[str]:
    names = getattr(model, "block_names", None)
    if names is not None:
        return list(names)
    if _is_sequential(model):
        return _weighted_cuts(model, deep=False)
    raise LayerwiseError(
        f"{type(model).__name__} is not a nn.Sequential and names no blocks of its own, so say where to "
        f"cut it: cuts=[...] out of {_listed(legal_cuts(model))}."
    )


def _finest_cuts(model: nn.Module) -> list[str]:
    if not _is_sequential(model):
        raise LayerwiseError(
            f'cuts="layer" needs a nn.Sequential, not {type(model).__name__}; name the cuts: '
            f"cuts=[...] out of {_listed(legal_cuts(model))}."
        )
    cuts = _weighted_cuts(model, deep=True)
    # A model's own names tell where its head begins; a head of several modules is not taken apart.
    names = getattr(model, "block_names", None)
    if names is None:
        return cuts
    order = [name for name, _ in _expanded(model, deep=True)]
    end = max(i for i, name in enumerate(order) if f"{name}.".startswith(f"{names[-1]}."))
    last = order[end]
    return [cut for cut in cuts if order.index(cut) < end and cut != last] + [names[-1]]


def _weighted_cuts(model: nn.Module, deep: bool) -> list[str]:
    """Cut before every child with a weight of two or more dimensions; the others join the child before."""
    children = _expanded(model, deep=deep)
    starts = [i for i, (_, child) in enumerate(children) if any(p.dim() >= 2 for p in child.parameters())]
    if len(starts) < 2:
        raise LayerwiseError(
            f"{type(model).__name__} has {len(starts)} children with weights, and a partition needs at "
            "least two, a block and a head; use a deeper model or name the cuts."
        )
    return [children[start - 1][0] for start in starts[1:]]


def _cut(model: nn.Module, cuts: tuple[str, ...]) -> list[Block]:
    """The blocks and the head between `cuts`, checked."""
    if not cuts:
        raise LayerwiseError(f"name at least one cut, out of {_listed(legal_cuts(model))}.")
    if len(set(cuts)) < len(cuts):
        raise LayerwiseError(f"a cut is named twice in {list(cuts)}; name each once.")
    known = dict(model.named_modules(remove_duplicate=False))
    for cut in cuts:
        if cut not in known or cut == "":
            raise LayerwiseError(f"unknown cut {cut!r}; legal cuts are {_listed(legal_cuts(model))}.")
    if _is_sequential(model) and set(cuts) <= {name for name, _ in _expanded(model, cuts)}:
        parts = _cut_sequential(model, cuts)
    else:
        parts = _cut_graph(model, cuts)
    names = [*cuts, "head"]
    blocks = [Block(name, model, run, owned) for name, (run, owned) in zip(names, parts, strict=True)]
    _check_ownership(model, blocks)
    return blocks


class _Chain:
    """The composition of modules."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules

    def __call__(self, h: Tensor) -> Tensor:
        for module in self.modules:
            h = module(h)
        return h


def _cut_sequential(model: nn.Module, cuts: tuple[str, ...]) -> list[tuple[Callable[[Tensor], Any], set[str]]]:
    children = _expanded(model, cuts)
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
        parts.append((_Chain([child for _, child in children[start:end]]), owned))
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


def _cut_graph(model: nn.Module, cuts: tuple[str, ...]) -> list[tuple[Callable[[Tensor], Any], set[str]]]:
    graph, ends = _trace(model, leaf=lambda path, _: not any(cut.startswith(path + ".") for cut in cuts))
    order = [node for node in graph.nodes]
    position = {node: i for i, node in enumerate(order)}
    for cut in cuts:
        if len(ends.get(cut, [])) != 1:
            how = "is not called" if cut not in ends else "is called more than once"
            raise LayerwiseError(
                f"the model cannot be cut behind {cut!r}, which {how} in its forward pass; legal cuts "
                f"are {_listed(legal_cuts(model))}."
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
                    f"connection crosses the cut); legal cuts are {_listed(legal_cuts(model))}."
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


def _check_ownership(model: nn.Module, blocks: list[Block]) -> None:
    owner: dict[int, tuple[str, str]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for block in blocks:
        for name in sorted(block._names & tensors.keys()):
            first, first_name = owner.setdefault(id(tensors[name]), (block.name, name))
            if first != block.name:
                raise LayerwiseError(
                    f"the parameter {first_name!r} of block {first!r} is shared with block "
                    f"{block.name!r}, so they cannot be trained apart; cut so that one block holds "
                    f"both, out of {_listed(legal_cuts(model))}."
                )
    *_, head = blocks
    if not head.parameters():
        raise LayerwiseError(
            f"nothing behind the last cut {blocks[-2].name!r} has parameters, so there is no head; leave "
            f"that cut out, legal cuts are {_listed(legal_cuts(model))}."
        )


def _balanced(model: nn.Module, cuts: Sequence[str], blocks: int, example: Tensor | None) -> list[str]:
    """Choose `blocks` of the cuts so that the costliest block is as cheap as can be."""
    if not 1 <= blocks <= len(cuts):
        raise LayerwiseError(
            f"blocks={blocks} is not possible: the model can be cut into 1 to {len(cuts)} blocks and a head."
        )
    if blocks == len(cuts):
        return list(cuts)
    if blocks == 1:
        return [cuts[-1]]
    if example is None:
        raise LayerwiseError(f"blocks={blocks} is balanced by measured cost; give example=..., a batch of inputs.")
    *cost, _ = operations(Partition(model, cuts), example)
    return [cuts[end - 1] for end in balanced_ends(cost, blocks)]


def balanced_ends(cost: Sequence[float], parts: int) -> list[int]:
    """Ends of `parts` contiguous, non-empty ranges whose largest summed cost is as small as can be.

    >>> balanced_ends([1, 1, 4, 1, 1], 3)
    [2, 3, 5]
    """
    total = [0, *torch.tensor(cost).cumsum(0).tolist()]
    # best[k][i]: the smallest possible maximum when the first i are joined to k.
    best = {(0, 0): (0, 0)}
    for k in range(1, parts + 1):
        for i in range(k, len(cost) + 1):
            best[k, i] = min(
                (max(best[k - 1, j][0], total[i] - total[j]), j) for j in range(k - 1, i) if (k - 1, j) in best
            )
    ends, i = [], len(cost)
    for k in range(parts, 0, -1):
        ends.append(i)
        i = best[k, i][1]
    return ends[::-1]


def operations(parts: Partition, example: Tensor) -> list[int]:
    """Floating-point operations of the forward pass of each block and the head; exact, the same on every machine."""
    was_training = parts.training
    parts.eval()
    costs, h = [], example
    with torch.no_grad():
        for block in [*parts.blocks, parts.head]:
            with FlopCounterMode(display=False) as counter:
                h = block(h)
            costs.append(counter.get_total_flops())
    parts.train(was_training)
    return costs
