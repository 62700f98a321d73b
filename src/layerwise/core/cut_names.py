"""After which modules a model is cut at its calls: by pattern, or automatically."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from layerwise.core.chains import check_model, is_compiled, listed
from layerwise.core.optim import is_norm
from layerwise.errors import LayerwiseError, suggestion


def matching(model: nn.Module, cuts: Sequence[str] | str) -> list[str]:
    """The names of modules that patterns match: in the order given, those of one pattern in the model's order.

    A `*` stands for one part of a name.

    >>> matching(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Tanh()), nn.ReLU()), "0.*")
    ['0.0', '0.1']
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    patterns = cuts.split(",") if isinstance(cuts, str) else list(cuts)
    found: list[str] = []
    for pattern in (p.strip() for p in patterns if p.strip()):
        parts = pattern.split(".")
        hits = [
            name
            for name in names
            if len(split := name.split(".")) == len(parts) and all(map(fnmatch.fnmatchcase, split, parts))
        ]
        if not hits:
            raise LayerwiseError(f"no module is called {pattern!r}; {inside_a_wrapper(pattern, names)}.")
        found += [name for name in hits if name not in found]
    return found


def has_patterns(cuts: Sequence[str] | str) -> bool:
    """Whether names of modules are given as patterns.

    >>> has_patterns("layers.*"), has_patterns(["layers.0", "layers.1"])
    (True, False)
    """
    return any(letter in name for name in ([cuts] if isinstance(cuts, str) else cuts) for letter in "*?[")


def inside_a_wrapper(pattern: str, names: Sequence[str]) -> str:
    """What to write instead of a name that no module has: the longer one that a wrapper such as peft's has made of it.

    >>> inside_a_wrapper("layers.*", ["base.layers", "base.layers.0"])
    "did you mean 'base.layers.*'? The model is inside a wrapper"
    """
    parts = pattern.split(".")
    for name in names:
        split = name.split(".")
        if len(split) > len(parts) and all(map(fnmatch.fnmatchcase, split[-len(parts) :], parts)):
            whole = ".".join([*split[: -len(parts)], pattern])
            return f"did you mean {whole!r}? The model is inside a wrapper"
    return suggestion(pattern, list(names))


def automatic_cuts(model: nn.Module) -> list[str]:
    """The modules after which a model is cut if nobody says where, in the order in which it holds them.

    They are those of the longest list of blocks, of its other lists with a class in common, and of the lists of classes
    that the model hints at. Lists inside such a list do not count: a layer's experts are part of it. The exception is
    stages that all differ, if the lists inside them hold modules that are alike. A model without such a list, or with
    one of no more than half of its single layers, gives its parts that hold weight matrices or kernels, including
    those of its head.

    >>> layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    >>> automatic_cuts(nn.ModuleDict({"layers": layers, "head": nn.Linear(1, 1)}))
    ['layers.0', 'layers.1']
    >>> automatic_cuts(nn.ModuleDict({"one": nn.Linear(1, 1), "norm": nn.LayerNorm(1), "two": nn.Linear(1, 1)}))
    ['one', 'two']
    """
    lists = _blocks(_lists("", model))
    count = Counter(kinds for _, members, kinds in lists for _ in members)
    if max(count.values(), default=0) < 2:
        return _parts(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # labels are those of decoder positions
        lists = [found for found in lists if "decoder" in found[0].split(".")] or lists
    hinted = set(getattr(model, "_no_split_modules", None) or ())  # the family's names of its blocks
    longest = max(lists, key=lambda found: (len(found[1]), count[found[2]]))
    wanted = longest[2] | {kind for _, _, kinds in lists for kind in kinds if kind.__name__ in hinted}
    chosen = {name: module for _, members, kinds in lists if kinds & wanted for name, module in members.items()}
    return _parts(model) if _is_a_small_part(model, chosen) else list(chosen)


def lists_beside(model: nn.Module, cuts: Sequence[str]) -> dict[str, list[nn.Module]]:
    """The lists of at least two modules with weights that neither lie in a cut module nor hold one, by their paths.

    >>> layers = {name: nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]) for name in ("down", "up")}
    >>> list(lists_beside(nn.ModuleDict(layers), ["down.0", "down.1"]))
    ['up']
    """
    found = {}
    for path, members, kinds in _lists("", model):
        apart = not any(f"{cut}.".startswith(f"{path}.") or f"{path}.".startswith(f"{cut}.") for cut in cuts)
        weighted = [child for child in members.values() if has_matrix(child)]
        if apart and len(weighted) > 1 and not kinds <= _TABLES:
            found[path] = weighted
    return found


def _is_a_small_part(model: nn.Module, chosen: Mapping[str, nn.Module]) -> bool:
    """Whether modules are single layers, and no more than half of the model's, as those of a head are."""
    layers = {id(m) for m in model.modules() if has_matrix(m) and _is_layer(m)}
    within = layers & {id(m) for m in chosen.values()}
    return all(map(_is_layer, chosen.values())) and 2 * len(within) <= len(layers)


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None


_TABLES = frozenset((nn.Embedding, nn.EmbeddingBag))
"""Modules that take indices, and so never what a block before them gives."""
_List = tuple[str, dict[str, nn.Module], frozenset[type]]
"""Its path, its modules by their paths, and their classes."""


def _lists(path: str, module: nn.Module) -> list[_List]:
    """The outermost lists of blocks: modules of one class, or of several in a `nn.ModuleList`.

    Of the latter only those with weights count, the others (activations, norms) belong to the block after them. So
    do several classes in a `nn.Sequential` if none of them is a single layer.
    """
    members = _children(path, module)
    kinds = frozenset(type(child) for child in members.values())
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(kinds) == 1:
        return [(path, members, kinds)]
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        members = {name: child for name, child in members.items() if has_matrix(child)}
        chain = isinstance(module, nn.Sequential)
        if len(members) > 1 and not (chain and any(map(_is_layer, members.values()))):
            return [(path, members, frozenset(type(child) for child in members.values()))]
    return [found for name, child in _children(path, module).items() for found in _lists(name, child)]


def _children(path: str, module: nn.Module) -> dict[str, nn.Module]:
    return {f"{path}.{name}" if path else name: child for name, child in module.named_children()}


def _blocks(lists: list[_List]) -> list[_List]:
    """The lists, those of stages replaced by the lists of blocks in them, which count as one."""
    found = []
    for path, members, kinds in lists:
        inner = [within for name, child in members.items() for within in _lists(name, child)]
        inner = [within for within in inner if not all(map(_is_layer, within[1].values()))]  # layers of a block
        lists_of_lists = all(issubclass(kind, nn.ModuleList) for kind in kinds)  # never called themselves
        staged = lists_of_lists or (not _alike(lists, kinds) and any(_alike(inner, within) for _, _, within in inner))
        if not staged:
            found.append((path, members, kinds))
            continue
        joined: dict[frozenset[type], dict[str, nn.Module]] = {}
        for _, within, of in _blocks(inner):
            joined.setdefault(of, {}).update(within)
        found += [(path, within, of) for of, within in joined.items()]
    return [blocks for blocks in found if not blocks[2] <= _TABLES]


def _alike(lists: list[_List], kinds: frozenset[type]) -> bool:
    """Whether two modules of one of these classes have parameters of the same shapes."""
    modules = [child for _, members, held in lists if held == kinds for child in members.values()]
    return len({(type(child), *(p.shape for p in child.parameters())) for child in modules}) < len(modules)


def _parts(model: nn.Module) -> list[str]:
    """The parts of a model that hold weight matrices or kernels: at least three, or two layers.

    A model with a single such part is looked into, and so are containers where there are fewer than three.
    """
    parts = _weighted("", model)
    while len(parts) == 1 and (inner := _weighted(*next(iter(parts.items())))):
        parts = inner
    if len(parts) < 3:
        opened = [_weighted(n, m) if type(m) is nn.Sequential else {n: m} for n, m in parts.items()]
        parts = {name: part for found in opened for name, part in found.items()}
    if len(parts) < 2 or (len(parts) < 3 and not all(map(_is_layer, parts.values()))):
        alone = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 1]
        why = (
            f" ({alone[0]!r} holds a single module; a layer that is called again and again has one set of weights and "
            "is no block, but a module that holds all of its calls can be one)"
            if alone
            else ""
        )
        holder = alone[0].rpartition(".")[0] if alone else ""
        raise LayerwiseError(
            f"{type(model).__name__} holds no list of blocks{why}, so it cannot be cut automatically; name the modules "
            f"to cut after, such as cuts={[holder] if holder else '[...]'} or a pattern."
        )
    return list(parts)


def _weighted(path: str, module: nn.Module) -> dict[str, nn.Module]:
    """The children of a module that hold weights; those of a list, which is never called itself, in its place."""
    found: dict[str, nn.Module] = {}
    for name, child in _children(path, module).items():
        if type(child).forward is nn.Module.forward:
            found |= _weighted(name, child)
        elif has_matrix(child):
            found[name] = child
    return found


def has_matrix(module: nn.Module) -> bool:
    """Whether a weight matrix or kernel lies in the module; what a norm learns is none, whatever its shape."""
    return any(p.dim() >= 2 for m in module.modules() if not is_norm(m) for p in m.parameters(recurse=False))


class _Calls(TorchFunctionMode):
    """Notes which modules end a call, and where in this order functions of torch use a parameter."""

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.ended: list[int] = []
        """Numbers of the modules."""
        self.uses: set[int] = set()
        """How many calls had ended when a parameter was used."""
        self._own = {id(p) for p in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(self.ended) not in self.uses and any(id(t) in self._own for t in tree_iter((args, kwargs))):
            self.uses.add(len(self.ended))
        return func(*args, **(kwargs or {}))


def in_order_of_calls(model: nn.Module, names: Sequence[str], run: Callable[[], Any], found: bool) -> list[str]:
    """The names in the order in which a pass of the model calls their modules; what comes last may be left to the head.

    Args:
        model: the model.
        names: of modules in it.
        run: runs the pass.
        found: whether the names were found automatically; then those are left out that are not called exactly once.

    Returns:
        The names, without the last ones if no parameter is used after them: those are the head, or a part of it.

    Raises:
        LayerwiseError: none is left.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = _Calls(model.parameters())
    handles = [
        modules[name].register_forward_hook(lambda *_, number=number: calls.ended.append(number))
        for number, name in enumerate(names)
    ]
    try:
        with calls:
            run()
    finally:
        for handle in handles:
            handle.remove()
    count = Counter(calls.ended)
    kept = [i for i in range(len(names)) if count[i] == 1 or not found]
    order = sorted(kept, key=lambda i: calls.ended.index(i) if i in count else len(calls.ended))
    last = max(calls.uses, default=0)
    while len(order) > (0 if found else 1) and order[-1] in count and calls.ended.index(order[-1]) >= last:
        order.pop()
    if not order:
        raise LayerwiseError(
            f"a pass of {type(model).__name__} calls none of {listed(names, 4)} exactly once and then uses further "
            "parameters, so that it cannot be cut automatically; a layer that is called again and again is no block, "
            "but a module that holds all of its calls can be one: name it, cuts=[...]."
        )
    return [names[i] for i in order]


def spaced(names: Sequence[str], blocks: int | None) -> list[str]:
    """So many of the names, evenly spaced and with the last one; all of them for None.

    >>> spaced(["a", "b", "c", "d"], 2)
    ['b', 'd']
    """
    if blocks is None:
        return list(names)
    if not 1 <= blocks <= len(names):
        raise LayerwiseError(f"blocks={blocks} is not possible: there are {len(names)} cuts; give 1 to that many.")
    return [names[(i + 1) * len(names) // blocks - 1] for i in range(blocks)]


@dataclass(frozen=True)
class Unordered:
    """Names of modules whose order of calls is still unknown, and of which the last may be the head."""

    names: tuple[str, ...]
    found: bool
    """Whether they were found automatically, rather than matched by patterns."""
    blocks: int | None
    """How many of them to cut after."""

    def cuts(self, model: nn.Module, run: Callable[[], Any]) -> list[str]:
        """The cuts as a pass shows them."""
        return spaced(in_order_of_calls(model, self.names, run, self.found), self.blocks)


def check_cuts(model: nn.Module, cuts: Sequence[str], known: Mapping[str, nn.Module]) -> None:
    """Raise LayerwiseError unless a pass of the model can be paused after each of these modules.

    Args:
        model: the model.
        cuts: names of modules.
        known: its modules by name.
    """
    if not cuts:
        raise LayerwiseError('name at least one module to cut after, or give cuts="auto".')
    check_model(model)
    seen: dict[int, str] = {}
    for cut in cuts:
        if cut not in known or cut == "":
            raise LayerwiseError(f"no module is called {cut!r}; {suggestion(cut, [n for n in known if n])}.")
        other = seen.setdefault(id(known[cut]), cut)
        if other != cut or list(cuts).count(cut) > 1:
            raise LayerwiseError(f"the cuts {other!r} and {cut!r} are one module; name each module once.")
        if hasattr(known[cut], "_orig_mod"):
            raise LayerwiseError(
                f"cut {cut!r} is compiled by torch.compile, which hides its calls; put the module itself back (its "
                "_orig_mod), and give compile=True, which compiles each block."
            )
        if isinstance(known[cut], nn.ModuleList) or type(known[cut]).forward is nn.Module.forward:
            raise LayerwiseError(
                f"cut {cut!r} is a {type(known[cut]).__name__}, which is never called itself; name what it holds, such "
                f"as {cut + '.*'!r}."
            )
    for name, module in known.items():
        stops = any(cut == name or cut.startswith(name + ".") or name == "" for cut in cuts)
        compiled = is_compiled(module)
        if stops and (compiled or isinstance(module, torch.jit.ScriptModule)):
            what = "compiled" if compiled else "a ScriptModule"
            raise LayerwiseError(
                f"module {name!r} is {what}, so that its forward pass cannot pause inside; give the model as it "
                "was before, or compile modules inside the blocks."
            )
