"""After which modules a model is cut at its calls: by pattern, or automatically."""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from layerwise.core.chains import check_model, is_compiled
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
            raise LayerwiseError(f"no module is called {pattern!r}; {suggestion(pattern, names)}.")
        found += [name for name in hits if name not in found]
    return found


def automatic_cuts(model: nn.Module) -> list[str]:
    """The modules of the longest list of one class, and those of its other lists of that class or of the hinted ones.

    Lists inside such a list do not count: a layer's experts are part of it. The exception is stages that all differ,
    if the lists inside them hold modules that are alike.

    >>> automatic_cuts(nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU(), nn.ReLU()]), "head": nn.Linear(1, 1)}))
    ['layers.0', 'layers.1']
    """
    lists = _blocks(_lists("", model))
    count = Counter(kind for _, members, kind in lists for _ in members)
    if max(count.values(), default=0) < 2:
        raise LayerwiseError(
            f'{type(model).__name__} holds no list of modules of one class, so cuts="auto" finds nothing; name the '
            "modules to cut after, such as cuts=[...] or a pattern."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # labels are those of decoder positions
        lists = [found for found in lists if "decoder" in found[0].split(".")] or lists
    hinted = set(getattr(model, "_no_split_modules", None) or ())  # the family's names of its blocks
    longest = max(lists, key=lambda found: (len(found[1]), count[found[2]]))
    kinds = {longest[2]} | ({kind for _, _, kind in lists if kind.__name__ in hinted} if hinted else set())
    return [name for _, members, kind in lists if kind in kinds for name in members]


_List = tuple[str, dict[str, nn.Module], type]
"""Its path, its modules by their paths, and their class."""


def _lists(path: str, module: nn.Module) -> list[_List]:
    """The outermost lists of modules of one class."""
    members = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    kinds = {type(child) for child in members.values()}
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(kinds) == 1:
        return [(path, members, kinds.pop())]
    return [found for name, child in members.items() for found in _lists(name, child)]


def _blocks(lists: list[_List]) -> list[_List]:
    """The lists, those of stages replaced by the lists of blocks in them."""
    found = []
    for path, members, kind in lists:
        inner = [within for name, child in members.items() for within in _lists(name, child)]
        staged = not _alike(lists, kind) and any(_alike(inner, within) for _, _, within in inner)
        found += _blocks(inner) if staged else [(path, members, kind)]
    return found


def _alike(lists: list[_List], kind: type) -> bool:
    """Whether two modules of this class have parameters of the same shapes."""
    modules = [child for _, members, held in lists if held is kind for child in members.values()]
    return len({tuple(p.shape for p in child.parameters()) for child in modules}) < len(modules)


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
