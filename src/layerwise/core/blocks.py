"""Divides a model into gradient-isolated blocks and a head without changing what it computes."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.chains import (
    Chain,
    Opened,
    check_hooks,
    check_model,
    cut_sequential,
    expanded,
    is_sequential,
    listed,
    opened,
)
from layerwise.core.drawing import draw
from layerwise.core.failures import KNOWN, told_by
from layerwise.core.keeping import buffers_put_back
from layerwise.core.layout import Layouts, declared_layouts
from layerwise.core.parts import MicroBatch
from layerwise.core.tracing import TracedPart, both_modes, cut_graph, possible_cuts
from layerwise.core.trees import copied, tensors
from layerwise.errors import LayerwiseError


class Unchanged:
    """Runs a function that may begin with an in-place operation, without changing its input.

    Whether it writes into its input is determined by the first run, on a copy; in training and in evaluation apart,
    as dropout differs. A copy is made in every run where it does, and in none where it does not.

    Args:
        name: of the block, for the error.
    """

    def __init__(self, name: str):
        self.name = name
        self._writes: dict[bool, bool] = {}

    def __call__(self, run: Callable[[Any], Any], h: Any, training: bool) -> Any:
        """What `run(h)` gives, for a tensor or a batch of several.

        Raises:
            LayerwiseError: it writes into its input now, but did not before.
        """
        writes = self._writes.get(training)
        given = h if writes is False else copied(h)
        found = tensors(given)
        if any(t.is_inference() for t in found):  # changes of these tensors are not counted
            return run(given)
        versions = [t._version for t in found]
        out = run(given)
        written = [t._version for t in found] != versions
        if written and writes is False:
            raise LayerwiseError(
                f"block {self.name!r} writes into its input in some passes and not in others; give it an operation "
                "that is not in-place."
            )
        self._writes[training] = written or bool(writes)
        return out


class Block:
    """A contiguous part of a model: what runs between two cuts.

    A block owns no module. It holds the names of its parameters and buffers inside the model and looks
    them up when needed, so it stays correct when the model is moved, cast, compiled or sharded.

    Attributes:
        name: the cut after the block (`"head"` for the part after the last cut).
        run: the function from the block's input tensor to its output tensor.
        before: called before every run, if set; fetches an offloaded block.
        layout: where batch, channels and positions are in the output; None if unknown.
        compiled: whether the block runs through `compile`, so that its modules are not called one by one.
        users: by the name of a tensor of this block, the numbers of all blocks that use it, where others do.
    """

    def __init__(self, name: str, model: nn.Module, run: Callable[[Tensor], Any], names: set[str]):
        self.name = name
        self.run = run
        self.before: Callable[[], None] | None = None
        self.layout: str | None = None
        self.users: dict[str, set[int]] = {}
        self._model = model
        self._names = names
        self._order: dict[str, None] = {}
        self.compiled = False
        self._opened: list[Opened] = []
        """Modules that contain the block, and are not called themselves."""
        self._unchanged = Unchanged(name)

    def __call__(self, h: Tensor) -> Tensor:
        """Run the block; the input is not changed, even if the block begins with an in-place operation.

        Raises:
            LayerwiseError: the block returns anything but one tensor of real numbers, or has hooks that would not run.
        """
        if self.before is not None:
            self.before()
        check_hooks(self._opened)
        out = self._unchanged(self.run, h, self._model.training)
        if not isinstance(out, Tensor):
            raise LayerwiseError(
                f"block {self.name!r} returns {type(out).__name__}, not one tensor, so nothing can be "
                f"passed on; cut elsewhere: {listed(possible_cuts(self._model))}."
            )
        return out

    @property
    def beside(self) -> Sequence[Tensor]:
        """Single numbers with a history that the model has just returned beside its logits; the head's alone."""
        return ()

    @property
    def ran(self) -> bool:
        """Whether the block has run in the current pass; a model that is cut at its calls may skip one."""
        return True

    def compile(self, wrap: Callable[[Callable[[Tensor], Any]], Callable[[Tensor], Any]]) -> None:
        """Wrap the block's function, for example with `torch.compile`."""
        if isinstance(self.run, TracedPart):
            self.run.traces.wrap(self.run.index, wrap)
        else:
            self.run = wrap(self.run)

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self._model.training

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Pairs of the parameter's name in the model and the parameter."""
        return self._held("_parameters")

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of the buffer's name in the model and the buffer."""
        return self._held("_buffers")

    def _held(self, kind: str) -> Iterator[tuple[str, Any]]:
        # Looked up one by one: a pass through the whole model for every block would be quadratic in depth.
        if self._order.keys() != self._names:  # other passes of a traced model may add names
            sort_names(self._model, [self])
        seen: set[int] = set()
        for name in self._order:
            path, _, last = name.rpartition(".")
            tensor = getattr(self._model.get_submodule(path), kind).get(last)
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def names(self) -> list[str]:
        """Names of the block's parameters and buffers in the model."""
        return sorted(self._names)

    def parameters(self) -> list[nn.Parameter]:
        """The block's parameters, in the model's order."""
        return [parameter for _, parameter in self.named_parameters()]

    def modules(self) -> list[nn.Module]:
        """The modules that hold the block's parameters themselves."""
        paths = dict.fromkeys(name.rpartition(".")[0] for name, _ in self.named_parameters())
        return [self._model.get_submodule(path) for path in paths]

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
        """Where the block's parameters and buffers are stored: a module's registry, and the name in it."""
        return [self.place(name) for name in self.names()]

    def place(self, name: str) -> tuple[dict[str, Any], str]:
        """Where a tensor of the model is stored."""
        path, _, last = name.rpartition(".")
        module = self._model.get_submodule(path)
        return (module._parameters if last in module._parameters else module._buffers), last

    def redrawn(self, device: torch.device) -> nn.Sequential:
        """Copy the block's modules with new weights, drawn by each layer's `reset_parameters`.

        Args:
            device: of the copy; the block itself may be on another one, or on none (`meta`).

        Raises:
            LayerwiseError: the block was traced out of a model, so there is no chain of modules to copy, or a module
                of it has parameters that it cannot redraw.

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> Partition(net, ["1", "3"]).blocks[1].redrawn(torch.device("cpu"))
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
        )
        """
        if not isinstance(self.run, Chain):
            raise LayerwiseError(
                f"block {self.name!r} was traced out of {type(self._model).__name__}, so no module can be copied with "
                "new weights; wrap the model as nn.Sequential of its parts."
            )
        made = copy.deepcopy(nn.Sequential(*self.run.modules)).to_empty(device=device)
        unable = draw(made)
        if unable is not None:
            raise LayerwiseError(
                f"block {self.name!r} holds a {unable.__name__}, which has no reset_parameters(), so it cannot be "
                "copied with new weights; give it that method."
            )
        return made

    def __repr__(self) -> str:
        layout = "" if self.layout is None else f", {self.layout}"
        return f"Block({self.name!r}, {sum(p.numel() for p in self.parameters())} parameters{layout})"


class Partition(nn.Module):
    """A model seen as `blocks` and a `head`; it computes exactly what the model computes.

    It shares the model's registries, so parameter names, `state_dict()` keys, `.to()`, `.train()` and
    hooks are the model's. A pickle holds the model and the names of the cuts, no code.

    Attributes:
        model: the model that was cut.
        cuts: names of the modules after which the model is cut.
        blocks: the blocks, in the order in which they run.
        head: what runs after the last cut; it maps the last block's output to logits.
        layout: what was declared of the blocks' outputs, and of the `"input"`.
        input_layout: the layout of the model's input; None if unknown.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[str], layout: Mapping[str, str] | str | None = None):
        super().__init__()
        check_model(model)
        # Both share their dictionaries: replacing a child or a parameter in one replaces it in the other.
        self._modules, self._parameters, self._buffers = (
            model._modules,
            model._parameters,
            model._buffers,
        )
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.__dict__.update(model=model, cuts=tuple(cuts))
        *blocks, head = _cut(model, tuple(cuts))
        if isinstance(head.run, TracedPart):
            head.run.traces.resident = lambda: all(block.before is None for block in (*blocks, head))
        self.__dict__.update(blocks=blocks, head=head, _known=dict(model.named_modules(remove_duplicate=False)))
        self.__dict__.update(layout=declared_layouts(layout, [*cuts, "head"]), input_layout=None)
        self.training = model.training

    output_layer: nn.Linear | None = None
    """The linear layer that the head calls last and that gives the network's outputs, where there is one; known after a
    learner's probe."""
    output_copy: Tensor | None = None
    """The matrix that blocks read instead of that layer's, if that is on another rank, or an older one is needed."""
    owns_by_use = False
    """Whether only a probe shows to which block a parameter belongs."""
    keeps: Sequence[str] = ()
    """Places in its modules where a waiting pass keeps tensors."""
    model: nn.Module
    cuts: tuple[str, ...]
    blocks: list[Block]
    head: Block
    layout: Mapping[str, str] | str | None
    input_layout: str | None
    _known: dict[str, nn.Module]

    @property
    def sites(self) -> list[Block]:
        """The blocks, then the head."""
        return [*self.blocks, self.head]

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

    def passing(self, batch: Any = None) -> AbstractContextManager[None]:
        """A context in which the blocks can be run: always, for a model that is cut into functions.

        Args:
            batch: the model's input; needed if its first blocks are on other ranks.
        """
        return nullcontext()

    def turn_to(self, part: MicroBatch) -> None:
        """Switch the blocks to a part of the batch; nothing to do for a model that is cut into functions."""

    def arrange(self, x: Any) -> None:
        """Put the blocks in the order in which the model calls them, if only a run can show it."""

    def outside(self) -> set[str]:
        """Names of the tensors that are used between the blocks: none, for a model that is cut into functions."""
        return set()

    def keep_only(self, first: int, stop: int) -> set[str]:
        """Prepare to run only a range of the blocks, as one of several ranks does.

        Args:
            first: number of the first one.
            stop: number of the one after the last.

        Returns:
            Names of the other blocks' tensors that are still needed.

        Raises:
            LayerwiseError: these blocks need more from the others than the tensor that one passes to the next.
        """
        return set()

    def check_modules(self) -> None:
        """Raise LayerwiseError if a module of the model was replaced: its block still runs the old one."""
        now = dict(self.model.named_modules(remove_duplicate=False))
        for name, module in self._known.items():
            if now.get(name) is not module:
                raise LayerwiseError(
                    f"module {name!r} was replaced after the model was cut; call partition(model) again."
                )

    @property
    def layouts(self) -> tuple[str | None, ...]:
        """The layouts of the blocks' and the head's outputs; None where one is not known."""
        return tuple(block.layout for block in [*self.blocks, self.head])

    @torch.no_grad()
    def probe(self, x: Tensor) -> list[Tensor]:
        """Run a few samples and track their dimensions.

        Args:
            x: samples `(B, ...)`; two or more, so that no size is 1 by chance.

        Returns:
            The outputs of the blocks and the head. Each block's `layout` and `input_layout` are set.

        Raises:
            LayerwiseError: a block cannot take its input, mixes the samples of the batch, or returns complex numbers.
        """
        declared = self.layout
        whole = {} if declared is None or isinstance(declared, str) else declared
        common = declared if isinstance(declared, str) else None
        own = getattr(self.model, "input_layout", None)
        first = whole.get("input", own if own is not None and len(own) == x.dim() else None)
        if isinstance(self.head.run, TracedPart):
            for _ in both_modes(self.model):
                self.head.run.traces.compare(x)
        layouts, seen, outputs, h = Layouts(), Layouts(), [], x
        # A declared layout is compared with the one that the layers show.
        with nullcontext() if declared is None else seen, layouts:
            layouts.begin(x, first)
            seen.begin(x, None)
            for block in [*self.blocks, self.head]:
                if block.before is not None:  # an offloaded block has no buffers until it is fetched
                    block.before()
                try:
                    with buffers_put_back([] if block.before is None else block.places()):
                        h = block(h)
                except KNOWN as reason:
                    raise LayerwiseError(
                        f"block {block.name!r} cannot take an input of shape {tuple(h.shape)} and "
                        f"type {str(h.dtype).removeprefix('torch.')}: {told_by(reason)}; "
                        "check the model against the data."
                    ) from reason
                layouts.check_mixing(block.name)
                if h.is_complex():
                    raise LayerwiseError(
                        f"block {block.name!r} passes on complex numbers, which no rule can read; take their absolute "
                        "value, or real and imaginary parts (torch.view_as_real), inside the block."
                    )
                given = whole.get(block.name, common if common is not None and len(common) == h.dim() else None)
                if given is not None:
                    _check_declared(block.name, given, seen.of(h, len(x)))
                    layouts.begin(h, given)
                block.layout = layouts.of(h, len(x))
                outputs.append(h)
            if "input" in whole:
                _check_declared("input", whole["input"], seen.of(x, len(x)))
            self.__dict__["input_layout"] = layouts.of(x, len(x))
        check_fits(declared, outputs)
        return outputs

    def describe(self) -> str:
        """One line per block: its name, its parameters, and where its output has batch, channels and positions.

        >>> net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        >>> parts = Partition(net, ["1"])
        >>> _ = parts.probe(torch.zeros(2, 2, 8))
        >>> print(parts.describe())
        1     BCL           28 parameters
        head  BC            75 parameters
        """
        rows = [
            (b.name, b.layout or "unknown", sum(p.numel() for p in b.parameters())) for b in (*self.blocks, self.head)
        ]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {layout:<7} {count:>8} parameters" for name, layout, count in rows)

    def with_layout(self, layout: Mapping[str, str] | str) -> "Partition":
        """The same cuts, with the layout declared."""
        return Partition(self.model, self.cuts, layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return Partition, (self.model, self.cuts, self.layout)


def check_fits(declared: Mapping[str, str] | str | None, outputs: Sequence[Tensor]) -> None:
    """Raise LayerwiseError if one layout is declared for all blocks, and no output has as many dimensions."""
    if isinstance(declared, str) and all(out.dim() != len(declared) for out in outputs):
        found = ", ".join(map(str, sorted({out.dim() for out in outputs})))
        raise LayerwiseError(
            f"layout {declared!r} has {len(declared)} letters, and the outputs of the blocks have {found} dimensions; "
            "give one letter for each, or leave it out."
        )


def _check_declared(name: str, declared: str, seen: str | None) -> None:
    """Raise LayerwiseError if the layers tell that batch or channels are elsewhere than was declared."""
    if seen is None or len(seen) != len(declared):
        return
    if (seen.index("B"), seen.index("C")) != (declared.index("B"), declared.index("C")):
        where = "the input is" if name == "input" else f"the output of block {name!r} is"
        raise LayerwiseError(
            f"layout {declared!r} is declared, but the layers tell that {where} {seen}; leave the declaration out, or "
            "give that."
        )


def _cut(model: nn.Module, cuts: tuple[str, ...]) -> list[Block]:
    """The blocks and the head between `cuts`, checked."""
    if not cuts:
        raise LayerwiseError(f"name at least one cut, out of {listed(possible_cuts(model))}.")
    if len(set(cuts)) < len(cuts):
        raise LayerwiseError(f"a cut is named twice in {list(cuts)}; name each once.")
    known = dict(model.named_modules(remove_duplicate=False))
    for cut in cuts:
        if cut not in known or cut == "":
            raise LayerwiseError(f"unknown cut {cut!r}; legal cuts are {listed(possible_cuts(model))}.")
    paths = {id(module): path for path, module in reversed([*known.items()])}
    held = [(paths[id(module)], module, type(module).forward) for module in opened(model, cuts)]
    check_hooks(held)
    if is_sequential(model) and set(cuts) <= {name for name, _ in expanded(model, cuts)}:
        parts = cut_sequential(model, cuts)
    else:
        parts = cut_graph(model, cuts)
    names = [*cuts, "head"]
    blocks = [Block(name, model, run, owned) for name, (run, owned) in zip(names, parts, strict=True)]
    for block in blocks:
        block._opened = held
    sort_names(model, blocks)
    _check_ownership(model, blocks)
    return blocks


def sort_names(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Put the names of the blocks' tensors in the model's order."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    place = {name: i for i, (name, _) in enumerate(every)}
    for block in blocks:
        block._order = dict.fromkeys(sorted(block._names & place.keys(), key=place.__getitem__))


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
                    f"both, out of {listed(possible_cuts(model))}."
                )
    *_, head = blocks
    if not head.parameters():
        raise LayerwiseError(
            f"nothing after the last cut {blocks[-2].name!r} has parameters, so there is no head; leave "
            f"that cut out, legal cuts are {listed(possible_cuts(model))}."
        )
