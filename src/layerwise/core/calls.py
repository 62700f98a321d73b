"""A model cut at the calls of its own modules: its own forward pass runs, and stops behind every cut.

Nothing is traced. What the forward pass does between the cuts (masks, skips, caches, branches, any arguments) is its
own affair; only the teaching tensor of each cut is handed to the engine and back.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block, Partition, declared_layouts
from layerwise.core.chains import check_model
from layerwise.core.coroutine import Pass, devices_of, reading
from layerwise.core.crossing import Crossing, Uses
from layerwise.core.layout import Layouts
from layerwise.core.trees import tensors
from layerwise.errors import LayerwiseError, suggestion

Tied = Literal["last", "first", "frozen"]
Output = Callable[[Any], Tensor] | str | None
Read = Callable[[Any], Tensor] | Mapping[str, Callable[[Any], Tensor]] | None


class CallBlock(Block):
    """What a model's forward pass runs between two cuts.

    It can be called only while its partition has a pass open, once and in order.
    """

    def __init__(self, name: str, index: int, network: "CallPartition"):
        super().__init__(name, network.model, self._pull, set())
        self.index, self._network = index, network

    def __call__(self, h: Any) -> Tensor:
        """Run the model's own forward pass on to the next cut; `h` is the whole batch for the first block."""
        return self.run(h)

    def _pull(self, h: Any) -> Tensor:
        return self._network.pull(self.index, h)

    @property
    def ran(self) -> bool:
        """Whether the pass under way has called the block's module; a pass may leave one out."""
        return not self._network.skipped(self.index)

    def redrawn(self, device: torch.device) -> nn.Sequential:
        """There is no chain of modules to copy.

        Raises:
            LayerwiseError: always.
        """
        raise LayerwiseError(
            f"rule {self._network.asked_by!r} copies the layers of later blocks, and a model that is cut at its calls "
            "has no such layers to copy; choose a rule such as local_ce, or give an nn.Sequential."
        )


class CallPartition(Partition):
    """A model cut at the calls of its own modules; see `cut_at_calls`.

    Attributes:
        tied: who trains a parameter that several blocks use.
        shared: names of such parameters, with the numbers of the blocks; known after a probe.
        crossings: what else than the teaching tensors crosses cuts; known after a probe.
        asked_by: name of the rule that is served, for messages.
    """

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[str],
        output: Output = None,
        read: Read = None,
        tied: Tied = "last",
        layout: Mapping[str, str] | str | None = None,
    ):
        nn.Module.__init__(self)
        # One set of dictionaries for both: whatever replaces a child or a parameter in the one does in the other.
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        known = dict(model.named_modules(remove_duplicate=False))
        _check_cuts(model, cuts, known)
        if tied not in ("last", "first", "frozen"):
            raise LayerwiseError(f"tied is {tied!r}; choose last, first or frozen.")
        readers = _readers(cuts, read)
        self.__dict__.update(model=model, cuts=tuple(cuts), output=output, read=read, tied=tied, _known=known)
        self.__dict__.update(layout=declared_layouts(layout, [*cuts, "head"]), input_layout=None)
        self.__dict__.update(
            blocks=[CallBlock(name, i, self) for i, name in enumerate(cuts)],
            head=CallBlock("head", len(cuts), self),
            shared={},
            crossings=[],
            asked_by="",
            _stops=[(name, known[name], readers[name]) for name in cuts],
            _pass=None,
            _severs=None,
        )
        self.training = model.training
        self._own({})

    output: Output
    read: Read
    tied: Tied
    shared: dict[str, set[int]]
    crossings: list[Crossing]
    asked_by: str
    _stops: list[tuple[str, nn.Module, Callable[[Any], Tensor]]]
    _pass: Pass | None
    _severs: bool | None
    """Whether passes have to keep blocks from the graphs of earlier ones; None until a training pass has shown it."""

    def forward(self, x: Any) -> Tensor:
        """The logits that `output` finds in the model's own output for a batch."""
        args, kwargs = arguments(x)
        return self._logits(self.model(*args, **kwargs))

    @contextmanager
    def passing(self, sever: bool = True) -> Iterator[None]:
        """A context in which the blocks can be run, one after the other; a pass that is not finished is given up.

        Args:
            sever: whether blocks are kept from the graphs of earlier ones, where that is needed.
        """
        devices = devices_of(dict(self.model.named_parameters()))
        opened = Pass(self._stops, self.forward, devices, sever=sever and self._severs is not False)
        self.__dict__["_pass"] = opened
        try:
            yield
        finally:
            self.__dict__["_pass"] = None
            if self._severs is None and opened.severed is not None and opened.severed.mark:
                # The probe has run in evaluation mode; in training something else may cross.
                self.__dict__["_severs"] = opened.severed.found or any(c.kept for c in self.crossings)
            opened.close()

    def pull(self, index: int, h: Any) -> Tensor:
        """Run block `index` of the open pass.

        Raises:
            LayerwiseError: there is no open pass, or the block is not next.
        """
        if self._pass is None:
            who = f"rule {self.asked_by!r}" if self.asked_by else "somebody"
            raise LayerwiseError(
                f"{who} runs block {[*self.cuts, 'head'][index]!r} on its own, but a model that is cut at its calls "
                "runs its blocks in one forward pass; choose a rule such as local_ce, or give a model that partition() "
                "can trace."
            )
        return self._pass.pull(index, h)

    def skipped(self, index: int) -> bool:
        """Whether the open pass has left the block out."""
        return self._pass is not None and index in self._pass.skipped

    def probe(self, x: Any) -> list[Tensor]:
        """Run a batch and find out which block uses which parameters, and what crosses the cuts.

        Args:
            x: the batch.

        Returns:
            The outputs of the blocks and the logits.

        Raises:
            LayerwiseError: the model does not take the batch, or a cut is not called, or not once, or out of order.
        """
        batch = [(place, t) for place, t in _places(x) if isinstance(t, Tensor)]
        uses, layouts = Uses(self._one_name_each(), batch), Layouts()
        declared = self.layout if isinstance(self.layout, Mapping) else {}
        common = self.layout if isinstance(self.layout, str) else None
        samples = next((len(t) for _, t in batch if t.dim()), 0)
        outputs, h = [], x
        with self.passing(sever=False), torch.enable_grad(), layouts:
            for _, t in batch:
                if t.dim() and len(t) == samples:
                    own = getattr(self.model, "input_layout", None)
                    given = declared.get("input", own if own is not None and len(own) == t.dim() else None)
                    layouts.begin(t, given if given is not None and len(given) == t.dim() else None)
            for block in [*self.blocks, self.head]:
                uses.block = block.index  # pyright: ignore[reportAttributeAccessIssue]
                try:
                    with uses:
                        out = block(h)
                except (RuntimeError, ValueError, IndexError, TypeError) as reason:
                    raise LayerwiseError(
                        f"{type(self.model).__name__} cannot take this batch ({type(reason).__name__} after cut "
                        f"{self.cuts[block.index - 1]!r}: {str(reason).splitlines()[0]}); check the model against the "  # pyright: ignore[reportAttributeAccessIssue]
                        "data."
                        if block is not self.blocks[0]
                        else f"{type(self.model).__name__} cannot take this batch: {str(reason).splitlines()[0]}; "
                        "check the model against the data."
                    ) from reason
                if not block.ran:  # pyright: ignore[reportAttributeAccessIssue]
                    raise LayerwiseError(
                        f"cut {block.name!r} is not called in the forward pass, or after a later cut; name modules "
                        "that are called, in their order."
                    )
                if layouts.mixing is not None:
                    layouts.mixing = None  # the model's own affair: its forward pass may turn tensors round
                given = declared.get(block.name, common if common is not None and len(common) == out.dim() else None)
                if given is not None:
                    layouts.begin(out, given)
                block.layout = layouts.of(out, samples) or self._likely_layout(out)
                uses.hand_over(out)
                h = out.detach()
                outputs.append(h)
            self.__dict__["input_layout"] = layouts.of(x, len(x)) if isinstance(x, Tensor) else None
        self._own(uses.used)
        self.__dict__["crossings"] = uses.crossings
        return outputs

    def describe(self) -> str:
        """One line per block with its parameters, and under it what crosses the cut before beside the teaching tensor.

        Known after a probe: after the first step, or where an example was given.
        """
        lines, names = [], [*self.cuts, "head"]
        for index, block in enumerate([*self.blocks, self.head]):
            layout = block.layout or "unknown layout"
            lines.append(f"{block.name}: {layout}, {sum(p.numel() for p in block.parameters())} parameters")
            for crossing in self.crossings:
                if crossing.made < index and index in crossing.used:
                    source = "the batch" if crossing.made < 0 else f"block {names[crossing.made]!r}"
                    stopped = "; its gradient is stopped" if crossing.stopped else ""
                    kept = ", and its graph stays until the pass ends" if crossing.kept else ""
                    lines.append(f"  uses {crossing} of {source}{stopped}{kept}")
        for name, blocks in self.shared.items():
            where = ", ".join(names[i] for i in sorted(blocks))
            who = "nobody" if self.tied == "frozen" else names[_owner(blocks, self.tied) or 0]
            lines.append(f"{name} is used by {where}; it is trained by {who}")
        return "\n".join(lines)

    def with_layout(self, layout: Mapping[str, str] | str) -> "CallPartition":
        """The same cuts, with the layout declared."""
        return CallPartition(self.model, self.cuts, self.output, self.read, self.tied, layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return CallPartition, (self.model, self.cuts, self.output, self.read, self.tied, self.layout)

    def _logits(self, out: Any) -> Tensor:
        found = out
        if callable(self.output):
            found = self.output(out)
        elif self.output is not None:
            found = out[self.output] if isinstance(out, Mapping) else getattr(out, self.output)
        elif not isinstance(out, Tensor):
            found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        if not isinstance(found, Tensor):
            raise LayerwiseError(
                f"{type(self.model).__name__} returns {type(out).__name__}, and no tensor of logits is known in it; "
                "give output=..., a function such as lambda out: out.logits, or the name of the entry."
            )
        return found

    def _likely_layout(self, out: Tensor) -> str | None:
        """The layout where the functions did not tell: a norm's weight of the last size says that features are last."""
        if out.dim() != 3:
            return None
        sizes = {p.numel() for p in self.model.parameters() if p.dim() == 1}
        return "BLC" if out.shape[2] in sizes and out.shape[1] not in sizes else None

    def _one_name_each(self) -> dict[str, Tensor]:
        return dict([*self.model.named_parameters(), *self.model.named_buffers()])

    def _own(self, used: Mapping[str, set[int]]) -> None:
        """Give every parameter and buffer to a block: that uses it, or in whose module it lies if none does."""
        aliases: dict[int, list[str]] = {}
        every = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in every:
            aliases.setdefault(id(tensor), []).append(name)
        owned: list[set[str]] = [set() for _ in range(len(self.cuts) + 1)]
        shared, unowned = {}, []
        learn = dict(self.model.named_parameters())
        for name, tensor in self._one_name_each().items():
            blocks = set(used.get(name, ())) or {
                i for alias in aliases[id(tensor)] if (i := self._inside(alias)) is not None
            }
            if name in learn and len(blocks) > 1:
                shared[name] = blocks
            owner = _owner(blocks, self.tied if name in learn else "last")
            if owner is not None:
                owned[owner].add(name)
            elif not blocks and used and name in learn and tensor.requires_grad:
                unowned.append(name)
        for block, names in zip([*self.blocks, self.head], owned, strict=True):
            block._names = names
        self.__dict__["shared"] = shared
        if unowned:
            warnings.warn(
                f"no block uses these parameters in the forward pass, so they do not learn: {', '.join(unowned)}",
                stacklevel=2,
            )

    def _inside(self, name: str) -> int | None:
        """The innermost cut whose module holds the parameter."""
        holding = [i for i, cut in enumerate(self.cuts) if name.startswith(cut + ".")]
        return max(holding, key=lambda i: len(self.cuts[i]), default=None)


def _owner(blocks: set[int], tied: Tied) -> int | None:
    if len(blocks) < 2:
        return next(iter(blocks), None)
    return {"last": max(blocks), "first": min(blocks), "frozen": None}[tied]


def cut_at_calls(
    model: nn.Module,
    cuts: Sequence[str] | str = "auto",
    *,
    output: Output = None,
    read: Read = None,
    tied: Tied = "last",
    blocks: int | None = None,
    layout: Mapping[str, str] | str | None = None,
) -> CallPartition:
    """Cut any model at the calls of its own modules; its own forward pass runs, nothing is traced.

    Args:
        model: any module. It may take several arguments, keywords, masks, and return what it likes.
        cuts: names of modules, in the order in which they are called, or patterns (`"model.layers.*"`): a module that
            is called ends a block with its call. What runs after the last one is the head. `"auto"` takes the longest
            list of modules of one class.
        output: where the logits are in the model's output: a function, or the name of an entry. Not needed for a
            tensor, or where the entry is called `logits`.
        read: where the teaching tensor is in a cut module's output, its first tensor of real numbers if not given: a
            function, or one per cut by name.
        tied: who trains a parameter that several blocks use: the `"last"` of them, the `"first"`, or nobody
            (`"frozen"`).
        blocks: keep this many of the cuts, evenly spaced.
        layout: where outputs have batch, channels and positions, where the layers do not tell, see `partition`.

    Raises:
        LayerwiseError: a wrong cut, or a model that cannot be stopped at its calls.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [block.name for block in cut_at_calls(net, ["1", "3"]).blocks]
    ['1', '3']
    """
    check_model(model)
    if isinstance(model, Partition):
        raise LayerwiseError("the model is cut already; give the model itself, or leave the cuts out.")
    names = automatic_cuts(model) if cuts == "auto" else matching(model, cuts)
    if blocks is not None:
        if not 1 <= blocks <= len(names):
            raise LayerwiseError(f"blocks={blocks} is not possible: there are {len(names)} cuts; give 1 to that many.")
        names = [names[(i + 1) * len(names) // blocks - 1] for i in range(blocks)]
    return CallPartition(model, names, output, read, tied, layout)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward pass: a tensor, a tuple of arguments, or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    return (batch, {}) if isinstance(batch, tuple) else ((batch,), {})


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

    >>> automatic_cuts(nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU(), nn.ReLU()]), "head": nn.Linear(1, 1)}))
    ['layers.0', 'layers.1']
    """
    lists: list[tuple[str, list[str], type]] = []
    for path, module in model.named_modules():
        children = list(module.named_children())
        kinds = {type(child) for _, child in children}
        inside = any(path.startswith(name + ".") for _, names, _ in lists for name in names)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1 and len(kinds) == 1 and not inside:
            prefix = path + "." if path else ""
            lists.append((path, [prefix + name for name, _ in children], kinds.pop()))
    if not lists:
        raise LayerwiseError(
            f'{type(model).__name__} holds no list of modules of one class, so cuts="auto" finds nothing; name the '
            "modules to cut behind, such as cuts=[...] or a pattern."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # labels are those of decoder positions
        lists = [found for found in lists if "decoder" in found[0].split(".")] or lists
    hinted = set(getattr(model, "_no_split_modules", None) or ())  # what the family calls its blocks
    longest = max(lists, key=lambda found: len(found[1]))
    kinds = {longest[2]} | ({kind for _, _, kind in lists if kind.__name__ in hinted} if hinted else set())
    return [name for _, names, kind in lists if kind in kinds for name in names]


def _check_cuts(model: nn.Module, cuts: Sequence[str], known: Mapping[str, nn.Module]) -> None:
    if not cuts:
        raise LayerwiseError('name at least one module to cut behind, or give cuts="auto".')
    check_model(model)
    seen: dict[int, str] = {}
    for cut in cuts:
        if cut not in known or cut == "":
            raise LayerwiseError(f"no module is called {cut!r}; {suggestion(cut, [n for n in known if n])}.")
        other = seen.setdefault(id(known[cut]), cut)
        if other != cut or list(cuts).count(cut) > 1:
            raise LayerwiseError(f"the cuts {other!r} and {cut!r} are one module; name each module once.")
        if isinstance(known[cut], nn.ModuleList) or type(known[cut]).forward is nn.Module.forward:
            raise LayerwiseError(
                f"cut {cut!r} is a {type(known[cut]).__name__}, which is never called itself; name what it holds, such "
                f"as {cut + '.*'!r}."
            )
    for name, module in known.items():
        stops = any(cut == name or cut.startswith(name + ".") or name == "" for cut in cuts)
        compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        if stops and (compiled or isinstance(module, torch.jit.ScriptModule)):
            what = "compiled" if compiled else "a ScriptModule"
            raise LayerwiseError(
                f"module {name!r} is {what}, so that its forward pass cannot be stopped inside; give the model as it "
                "was before, or compile modules inside the blocks."
            )


def _readers(cuts: Sequence[str], read: Read) -> dict[str, Callable[[Any], Tensor]]:
    if isinstance(read, Mapping):
        for name in read:
            if name not in cuts:
                raise LayerwiseError(f"read names no cut {name!r}; {suggestion(name, list(cuts))}.")
        return {name: reading(name, read.get(name)) for name in cuts}
    return {name: reading(name, read) for name in cuts}


def _places(batch: Any) -> list[tuple[str, Any]]:
    """The values of a batch by their places in it."""
    if isinstance(batch, Mapping):
        return [(str(name), t) for name, value in batch.items() for t in tensors(value)]
    if isinstance(batch, tuple):
        return [(f"argument {i}", t) for i, value in enumerate(batch) for t in tensors(value)]
    return [("the input", batch)]
