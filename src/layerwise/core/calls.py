"""A model cut at the calls of its own modules: its own forward pass runs, and pauses after every cut.

Nothing is traced. What the forward pass does between the cuts (masks, skips, caches, branches, any arguments) is its
own business; only the teaching tensor of each cut, which the rule reads, goes to the engine and back.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Partition, Unchanged, check_fits, sort_names
from layerwise.core.call_blocks import CallBlock
from layerwise.core.coroutine import Pass, called_instead, devices_of, without_severing
from layerwise.core.crossing import Crossing, Uses
from layerwise.core.cut_names import Unordered, check_cuts, lists_beside
from layerwise.core.failures import KNOWN, told_by
from layerwise.core.keeping import exchanged, tensors_kept
from layerwise.core.layout import Layouts, declared_layouts
from layerwise.core.ownership import Tied, owner_of, ownership
from layerwise.core.parts import MicroBatch
from layerwise.core.reading import Output, Read, arguments, logits_in, places, readers
from layerwise.core.regular import BlockByBlock
from layerwise.core.remote import Elsewhere, form_of, needed, shown_as_nan, without_memory
from layerwise.core.trees import copied, tensors
from layerwise.errors import LayerwiseError


class CallPartition(Partition):
    """A model cut at the calls of its own modules; see `cut_at_calls`.

    Attributes:
        tied: which block trains a parameter that several blocks use.
        shared: names of such parameters, with the numbers of the blocks; known after a probe.
        crossings: tensors other than the teaching tensors that cross cuts; known after a probe.
        irregular: why the blocks cannot be run one by one, outside the forward pass; empty if they can, None before
            a probe.
        keeps: places in its modules where the forward pass stores tensors; known after a probe.
        beside: single numbers with a history that the open pass has returned beside the logits.
        asked_by: name of the rule, for errors.
        again: the reason why blocks must be run one by one, such as "rule 'interlocking' runs ..."; or empty.
        first: number of the first block here; those before it are on other ranks.
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
        # Both share their dictionaries: replacing a child or a parameter in one replaces it in the other.
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        known = dict(model.named_modules(remove_duplicate=False))
        check_cuts(model, cuts, known)
        if tied not in ("last", "first", "frozen"):
            raise LayerwiseError(f"tied is {tied!r}; choose last, first or frozen.")
        reader_of = readers(cuts, read)
        self.__dict__.update(model=model, cuts=tuple(cuts), output=output, read=read, tied=tied, _known=known)
        self.__dict__.update(layout=declared_layouts(layout, [*cuts, "head"]), input_layout=None)
        self.__dict__.update(
            blocks=[CallBlock(name, i, self) for i, name in enumerate(cuts)],
            head=CallBlock("head", len(cuts), self),
            shared={},
            crossings=[],
            irregular=None,
            keeps=[],
            beside=(),
            asked_by="",
            again="",
            first=0,
            _stops=[(name, known[name], reader_of[name]) for name in cuts],
            _used={},
            _forms=[],
            _elsewhere=[],
            _batch=None,
            _received=None,
            _compiled=[],
            _pass=None,
            _passes={},
            _make=None,
            _part=None,
            _unordered=None,
            _severs=None,
            _devices=devices_of(self.model.parameters()),
            _unchanged=Unchanged(type(model).__name__),
            _configs=_with_caches(model),
        )
        self.training = model.training
        self._own({})

    owns_by_use = True
    output: Output
    read: Read
    tied: Tied
    shared: dict[str, set[int]]
    crossings: list[Crossing]
    irregular: str | None
    keeps: Sequence[str]
    beside: Sequence[Tensor]
    asked_by: str
    again: str
    first: int
    _stops: list[tuple[str, nn.Module, Callable[[Any], Tensor]]]
    _used: Mapping[str, set[int]]
    """By the name of a parameter or buffer, the blocks that use it; known after a probe."""
    _forms: list[tuple[Any, Tensor]]
    """Outputs of the modules of the cuts; known after a probe."""
    _elsewhere: list[tuple[dict[str, Any], str]]
    """Where tensors of other ranks would be stored."""
    _batch: Any
    """Of the current pass."""
    _received: Elsewhere | None
    _compiled: list[tuple[nn.Module, Callable[..., Any]]]
    """Modules of cuts, and the functions called instead of their forward."""
    _pass: Pass | BlockByBlock | None
    """The pass that runs now."""
    _passes: dict[int | None, Pass | BlockByBlock]
    """All open passes, by the number of their part of the batch."""
    _make: Callable[[], Pass | BlockByBlock] | None
    """Opens another pass."""
    _part: MicroBatch | None
    """The part of the batch that runs now."""
    _unordered: Unordered | None
    """What the cuts are chosen from, while the order of the calls is still unknown."""
    _unchanged: Unchanged
    _configs: list[Any]
    """Configurations that say whether every layer keeps its keys and values for generation."""
    _devices: tuple[str, ...]
    """Device types whose autocast a pass manages."""
    _severs: bool | None
    """Whether passes have to detach blocks from the graphs of earlier ones; None until a training pass has shown it."""

    def forward(self, x: Any) -> Tensor:
        """The logits that `output` finds in the model's own output for a batch."""
        if all(block.before is None for block in [*self.blocks, self.head]):
            return self._unchanged(self._whole, x, self.model.training)
        with self.passing(sever=False):  # offloaded parameters are fetched block by block
            for block in [*self.blocks, self.head]:
                x = block(x)
        return x

    def _whole(self, x: Any) -> Tensor:
        args, kwargs = arguments(x)
        out = self.model(*args, **kwargs)
        logits = logits_in(out, self.output, type(self.model).__name__)
        if logits is not out and self._pass is not None:
            beside = [t for t in tensors(out) if t.dim() == 0 and t.grad_fn is not None and t is not logits]
            self.__dict__["beside"] = beside
        return logits

    @contextmanager
    def passing(self, batch: Any = None, sever: bool = True) -> Iterator[None]:
        """A context in which the blocks can be run, one after the other; an unfinished pass is abandoned.

        Args:
            batch: the model's input; needed if its first blocks are on other ranks.
            sever: whether to detach blocks from the graphs of earlier ones, if needed.
        """
        self.__dict__["_batch"] = batch
        if self.first and not self._elsewhere:
            self.__dict__["_elsewhere"] = without_memory(self.model)
        with ExitStack() as kept, shown_as_nan(self._elsewhere, self._device()):
            kept.enter_context(self._holding(lambda: self._opened(sever and self._severs is not False)))
            kept.callback(self._look_for_severed)
            yield

    def _look_for_severed(self) -> None:
        """The probe has run in evaluation mode; in training something else may cross."""
        severed = [one.severed for one in self._passes.values() if one.severed is not None and one.severed.mark]
        if self._severs is None and severed:
            self.__dict__["_severs"] = any(s.found for s in severed) or any(c.kept for c in self.crossings)

    def turn_to(self, part: MicroBatch) -> None:
        """Let the blocks run a part of the batch: each part has its own forward pass, which waits while others run."""
        if part.index not in self._passes:
            assert self._make is not None
            self._passes[part.index] = self._make()
        self.__dict__.update(_pass=self._passes[part.index], _part=part)

    @contextmanager
    def _holding(self, make: Callable[[], Pass | BlockByBlock]) -> Iterator[Pass | BlockByBlock]:
        outer = {name: self.__dict__[name] for name in ("_pass", "_passes", "_make", "_part", "beside")}
        opened = make()
        # The outer one is of a step in which a rule asks what the network predicts.
        self.__dict__.update(_pass=opened, _passes={None: opened}, _make=make, _part=None)
        try:
            with ExitStack() as ended:
                ended.enter_context(_without_caches(self._configs))
                for module, forward in self._compiled if outer["_pass"] is None else ():
                    ended.enter_context(called_instead(module, forward))
                ended.callback(self._close_all)
                yield opened
        finally:
            self.__dict__.update(outer)

    def _close_all(self) -> None:
        for opened in self._passes.values():
            opened.close()

    def compile(self, index: int, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a cut module's forward by its wrapped version while a pass is open.

        Raises:
            LayerwiseError: another cut lies inside the module, so the pass pauses there.
        """
        name, module, _ = self._stops[index]
        inner = next((cut for cut in self.cuts if cut.startswith(name + ".")), None)
        if inner is not None:
            raise LayerwiseError(
                f"block {name!r} cannot be compiled, because the cut {inner!r} lies inside it; leave compile or one "
                "of the two cuts out."
            )
        self._compiled.append((module, without_severing(wrap(module.forward))))

    def _opened(self, sever: bool, one_by_one: bool | None = None) -> Pass | BlockByBlock:
        if not (bool(self.again) if one_by_one is None else one_by_one):
            return Pass(self._stops, self._whole, self._devices, sever, self._stand_in, range(self.first))
        return BlockByBlock(self._stops, self._whole, self._devices, self._device(), self.blocks[0])

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    def _stand_in(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._received is not None
        return self._received(index, args, kwargs)

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
        if index == self.first > 0:
            self.__dict__["_received"] = Elsewhere(self._forms, index - 1, h)
            h = self._batch if self._part is None else self._part.of(self._batch)
        return self._pass.pull(index, h)

    def call(self, index: int, h: Tensor, module: nn.Module) -> Tensor:
        """Call another module instead of that of block `index`, with the arguments of the open pass."""
        assert isinstance(self._pass, BlockByBlock)
        return self._pass.call(index, h, module)

    def skipped(self, index: int) -> bool:
        """Whether the open pass has skipped the block."""
        return self._pass is not None and index in self._pass.skipped

    def probe(self, x: Any) -> list[Tensor]:
        """Run a batch and find which block uses which parameters, and which tensors cross the cuts.

        Args:
            x: the batch.

        Returns:
            The outputs of the blocks and the logits.

        Raises:
            LayerwiseError: the model does not take the batch, or a cut is not called, or not once, or out of order.
        """
        own_batch, x = x, copied(x)  # the model may write into it
        batch = [(place, t) for place, t in places(x) if isinstance(t, Tensor)]
        self.__dict__["_devices"] = devices_of([*self.model.parameters(), *(t for _, t in batch)])
        uses, layouts = Uses(self._one_name_each(), batch), Layouts()
        declared = self.layout if isinstance(self.layout, Mapping) else {}
        common = self.layout if isinstance(self.layout, str) else None
        samples = next((len(t) for _, t in batch if t.dim()), 0)
        outputs, h, kept = [], x, tensors_kept(self.model)
        forms: list[tuple[Any, Tensor]] = []
        with ExitStack() as hooks, torch.enable_grad(), layouts:
            opened = hooks.enter_context(self._holding(lambda: self._opened(sever=False, one_by_one=False)))
            assert isinstance(opened, Pass)
            for _, module, _ in self._stops:
                hooks.callback(module.register_forward_pre_hook(uses.enter).remove)
            for _, t in batch:
                if t.dim() and len(t) == samples:
                    own = getattr(self.model, "input_layout", None)
                    given = declared.get("input", own if own is not None and len(own) == t.dim() else None)
                    layouts.begin(t, given if given is not None and len(given) == t.dim() else None)
            for block in [*self.blocks, self.head]:
                uses.block = block.index  # pyright: ignore[reportAttributeAccessIssue]
                uses.inside = False
                try:
                    with uses:
                        out = block.probed(h)  # pyright: ignore[reportAttributeAccessIssue]
                except KNOWN as reason:
                    raise LayerwiseError(
                        f"{type(self.model).__name__} cannot take this batch ({type(reason).__name__} after cut "
                        f"{self.cuts[block.index - 1]!r}: {told_by(reason)}); check the model against the "  # pyright: ignore[reportAttributeAccessIssue]
                        "data."
                        if block is not self.blocks[0]
                        else f"{type(self.model).__name__} cannot take this batch: {told_by(reason)}; "
                        "check the model against the data."
                    ) from reason
                if not block.ran:  # pyright: ignore[reportAttributeAccessIssue]
                    raise LayerwiseError(
                        f"cut {block.name!r} is not called in the forward pass, or after a later cut; name modules "
                        "that are called, in their order."
                    )
                if isinstance(x, Tensor):  # of other batches, the first size may be a length
                    layouts.check_mixing(block.name)
                given = declared.get(block.name, common if common is not None and len(common) == out.dim() else None)
                if given is not None:
                    layouts.begin(out, given)
                block.layout = layouts.of(out, samples)
                if block is not self.head:
                    forms.append(form_of(opened.whole, out))
                h = out.detach()
                uses.hand_over(out, h)
                outputs.append(h.clone())  # the next block may write into it
            self.__dict__["input_layout"] = layouts.of(x, len(x)) if isinstance(x, Tensor) else None
        check_fits(self.layout, outputs)
        self._own(uses.used)
        self._check_head(uses.used)
        self.__dict__.update(crossings=uses.crossings, _forms=forms, _used=uses.used)
        self.__dict__["keeps"] = exchanged(kept, self.model)
        if self.again or all(block.before is None for block in self.blocks):
            self.__dict__["irregular"] = self._why_irregular(own_batch, outputs)
        if self.again and self.irregular:
            raise LayerwiseError(
                f"{self.again}, and the blocks of {type(self.model).__name__} run once per step, inside one forward "
                f"pass: {self.irregular}; choose a rule such as local_ce, or give a model that partition() can trace."
            )
        return outputs

    @torch.no_grad()
    def arrange(self, x: Any) -> None:
        """Put the blocks in the order in which the model calls their modules for a batch, if nobody has said it.

        Modules that a pattern matches, or that were found automatically, may belong to the head: then they are no cuts.

        Args:
            x: the batch.

        Raises:
            LayerwiseError: no module that was found can be a block, or there are fewer than the blocks asked for.
        """
        if self._unordered is None or any(p.is_meta for p in self.parameters()):
            return
        try:
            names = self._unordered.cuts(self.model, lambda: self.forward(x))
        except KNOWN:  # the probe says what is wrong with the batch
            return
        reader_of = readers(names, self.read)
        declared_layouts(self.layout, [*names, "head"])
        known = {block.name: block for block in self.blocks}
        blocks = [known.get(name) or CallBlock(name, i, self) for i, name in enumerate(names)]
        for index, block in enumerate([*blocks, self.head]):
            block.index = index  # pyright: ignore[reportAttributeAccessIssue]
        stops = [(name, self._known[name], reader_of[name]) for name in names]
        self.__dict__.update(cuts=tuple(names), blocks=blocks, _stops=stops, _unordered=None)

    def outside(self) -> set[str]:
        """Names of the tensors in no module of a cut, or in several; before a probe."""
        own = {name for block in [*self.blocks, self.head] for name in block.names()}
        return {name for name in self._one_name_each() if name not in own or name in self.shared}

    def keep_only(self, first: int, stop: int) -> set[str]:
        """Prepare to run only a range of the blocks; see `Partition.keep_only`."""
        if self.again:
            raise LayerwiseError(
                f"{self.again}, and others of them are on other ranks; train it in one process, or choose a rule and "
                "options under which each block runs once, such as plain local_ce."
            )
        owned = {name for block in [*self.blocks, self.head] for name in block.names()}
        learned = {name for name, p in self.model.named_parameters() if p.requires_grad and name in owned}
        found = needed(self.crossings, self._used, learned, [*self.cuts, "head"], range(first, stop))
        self.__dict__["first"] = first
        return found

    def _why_irregular(self, x: Any, outputs: Sequence[Tensor]) -> str:
        """Why the blocks cannot be run one by one; empty if they then give the same bits."""
        crossing = next((c for c in self.crossings if c.stopped), None)
        if crossing is not None:
            return f"a gradient crosses with {crossing}"
        h = x
        try:
            with self._holding(lambda: self._opened(sever=False, one_by_one=True)), torch.enable_grad():
                for block, out in zip([*self.blocks, self.head, self.head], [*outputs, outputs[-1]], strict=True):
                    h = block(outputs[-2] if block is self.head else h).detach()
                    if not torch.equal(h, out):
                        return f"run on its own, block {block.name!r} gives other bits"
        except LayerwiseError as reason:
            return str(reason).partition(", so that")[0]
        except Exception as reason:  # the model's own code is run here in an unusual way, and may fail
            return f"{type(reason).__name__} where they are run one by one"
        return ""

    def describe(self) -> str:
        """One line per block with its parameters, below it the lists of modules in it and what else crosses to it.

        Known after a probe: after the first step, or if an example was given.
        """
        lines, names = [], [*self.cuts, "head"]
        beside = lists_beside(self.model, self.cuts)
        for index, block in enumerate([*self.blocks, self.head]):
            layout = block.layout or "unknown layout"
            lines.append(f"{block.name}: {layout}, {sum(p.numel() for p in block.parameters())} parameters")
            own = {id(p) for p in block.parameters()}
            for path, modules in beside.items():
                if all(id(p) in own for module in modules for p in module.parameters()):
                    lines.append(f"  holds the list {path!r} of {len(modules)} modules, after which nothing is cut")
            for crossing in self.crossings:
                if crossing.made < index and index in crossing.used:
                    source = "the batch" if crossing.made < 0 else f"block {names[crossing.made]!r}"
                    stopped = "; its gradient is stopped" if crossing.stopped else ""
                    kept = ", and its graph stays until the pass ends" if crossing.kept else ""
                    lines.append(f"  uses {crossing} of {source}{stopped}{kept}")
        for name, blocks in self.shared.items():
            where = ", ".join(names[i] for i in sorted(blocks))
            who = "nobody" if self.tied == "frozen" else names[owner_of(blocks, self.tied) or 0]
            lines.append(f"{name} is used by {where}; it is trained by {who}")
        if self.irregular is not None:
            regular = "regular: its blocks can be run one by one"
            lines.append(f"not regular: {self.irregular}" if self.irregular else regular)
        return "\n".join(lines)

    def with_layout(self, layout: Mapping[str, str] | str) -> "CallPartition":
        """The same cuts, with the layout declared."""
        found = CallPartition(self.model, self.cuts, self.output, self.read, self.tied, layout)
        found.__dict__["_unordered"] = self._unordered
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self.model, self.cuts, self.output, self.read, self.tied, self.layout)
        return CallPartition, given, {"_unordered": self._unordered}

    def _one_name_each(self) -> dict[str, Tensor]:
        return dict([*self.model.named_parameters(), *self.model.named_buffers()])

    def _check_head(self, used: Mapping[str, set[int]]) -> None:
        if not any(len(self.cuts) in used.get(name, ()) for name, _ in self.model.named_parameters()):
            raise LayerwiseError(
                f"nothing after the last cut {self.cuts[-1]!r} uses parameters, so there is no head; leave it out."
            )

    def _own(self, used: Mapping[str, set[int]]) -> None:
        """Give every parameter and buffer to a block, and warn of parameters that none uses."""
        found = ownership(self.model, self.cuts, used, self.tied)
        for block, names in zip([*self.blocks, self.head], found.names, strict=True):
            block._names = names
            block.users = {name: set(used[name]) for name in names if len(used.get(name, ())) > 1}
        sort_names(self.model, [*self.blocks, self.head])
        self.__dict__["shared"] = found.shared
        if found.unused:
            warnings.warn(
                f"no block uses these parameters in the forward pass, so they do not learn: {', '.join(found.unused)}",
                stacklevel=2,
            )


def _with_caches(model: nn.Module) -> list[Any]:
    """The configurations of `transformers` in a model that say whether layers cache keys and values."""
    found = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return [
        config
        for config in found.values()
        if hasattr(config, "use_cache") and any(c.__module__.startswith("transformers.") for c in type(config).__mro__)
    ]


@contextmanager
def _without_caches(configs: Sequence[Any]) -> Iterator[None]:
    """A context in which layers keep no keys and values: nothing reads them here, and they would grow with depth."""
    on = [config for config in configs if config.use_cache]
    for config in on:
        config.use_cache = False
    try:
        yield
    finally:
        for config in on:
            config.use_cache = True
