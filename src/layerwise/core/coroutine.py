"""A forward pass that pauses at every cut, so that the engine can run it block by block."""

import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise.core.trees import replaced
from layerwise.errors import LayerwiseError

_saved: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class Modes:
    """The modes of torch in this thread, shared by all coroutines in it."""

    grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    functions: int
    """Modes on torch's function stack, such as `with torch.device(...)`."""
    hooks: Any
    """The innermost hooks on tensors that autograd saves, such as those of a checkpoint."""

    @classmethod
    def now(cls, devices: Sequence[str]) -> "Modes":
        """The present modes."""
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in devices)
        return cls(torch.is_grad_enabled(), autocast, torch._C._len_torch_function_stack(), _innermost_hooks())

    def set(self) -> None:
        """Set the modes that are values; `Own` handles stacks."""
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        # A cast weight that is kept would be stale after a step, and would tie the graphs of two blocks together.
        torch.clear_autocast_cache()


@dataclass
class Own:
    """Modes that a forward pass has set itself, on top of those with which it was entered."""

    grad: bool | None
    autocast: tuple[tuple[str, bool, torch.dtype], ...] | None
    functions: list[Any]
    hooks: list[Any]

    @classmethod
    def taken_off(cls, base: Modes, devices: Sequence[str]) -> "Own":
        """Remove the modes that were set since `base`, so that `base` holds again."""
        functions, hooks = [], []
        while torch._C._len_torch_function_stack() > base.functions:
            functions.append(torch._C._pop_torch_function_stack())
        while (top := _innermost_hooks()) is not None and top != base.hooks:
            hooks.append(top)
            _saved._pop_saved_tensors_default_hooks()
        now = Modes.now(devices)
        base.set()
        return cls(
            now.grad if now.grad != base.grad else None,
            now.autocast if now.autocast != base.autocast else None,
            functions,
            hooks,
        )

    def put_on(self, base: Modes) -> None:
        """Set them again, on top of the present modes."""
        grad = base.grad if self.grad is None else self.grad
        Modes(grad, base.autocast if self.autocast is None else self.autocast, 0, None).set()
        for mode in reversed(self.functions):
            torch._C._push_on_torch_function_stack(mode)
        for pack, unpack in reversed(self.hooks):
            _saved._push_saved_tensors_default_hooks(pack, unpack)


def _innermost_hooks() -> Any:
    return _saved._top_saved_tensors_default_hooks(False)


class Severed(TorchFunctionMode):
    """Detaches tensors of an earlier block's graph that a block uses, wherever they come from.

    Nodes of the graph are numbered as they arise. One with a number below `mark` is of an earlier block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mark = 0
        self.found = False
        """Whether anything had to be detached."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.severed((args, kwargs or {}))
        return func(*args, **kwargs)

    def severed(self, given: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
        """Arguments without the graphs of earlier blocks."""
        if not self.mark or not torch.is_grad_enabled():
            return given
        return [self._severed(value) for value in given[0]], {n: self._severed(v) for n, v in given[1].items()}

    def _severed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            node = value.grad_fn
            if node is None or node._sequence_nr() >= self.mark:
                return value
            self.found = True
            return value.detach()
        if type(value) in (list, tuple):
            return type(value)(self._severed(part) for part in value)
        return value


@dataclass
class Arrival:
    """Where a forward pass has paused: at a cut, or at its end."""

    index: int
    out: Any
    """The teaching tensor; the logits at the end."""
    whole: Any = None
    """Everything that the module returned; for a replaced call, its arguments."""


StandIn = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Maps the number of a cut and the arguments of its module's call to the result of the call."""


class Pass:
    """One forward pass of a model, as a coroutine that pauses after every cut.

    Args:
        cuts: the modules after which it pauses, in the order in which they run, and how to read their outputs.
        run: the forward pass: from the batch to the logits.
        devices: device types whose autocast is managed.
        sever: whether blocks have to be detached from the graphs of earlier ones.
        stand_in: called instead of the modules of the cuts `away`, which do not run.
        away: numbers of cuts.
    """

    def __init__(
        self,
        cuts: Sequence[tuple[str, nn.Module, Callable[[Any], Tensor]]],
        run: Callable[[Any], Tensor],
        devices: Sequence[str],
        sever: bool,
        stand_in: StandIn | None = None,
        away: range = range(0),
    ):
        self.cuts, self.run, self.devices = cuts, run, devices
        self.stand_in, self.away = stand_in, away
        self.whole: Any = None
        """Everything that the module returned after which the pass waits."""
        self.severed = Severed() if sever else None
        self._coroutine: greenlet.greenlet | None = None
        self._undo: list[Callable[[], None]] = []
        """Removes hooks and replacements from the model."""
        self._arrived: Arrival | None = None
        """Where the pass waits; what arrived there has not been asked for yet where a block was left out."""
        self._next = 0
        """The block that is to be pulled next."""
        self.skipped: set[int] = set()

    def pull(self, index: int, h: Any) -> Any:
        """Run the pass to the next cut.

        Args:
            index: number of the block.
            h: the batch for the first block; then what the cut before hands to the rest of the pass.

        Returns:
            The block's output; the logits at the end. The input if the pass skips the block.

        Raises:
            LayerwiseError: the pass comes to the cuts in another order than named, or twice to one.
        """
        first = self.away.stop
        if index == first:
            arrived = self.begin(h)
        elif self._coroutine is None or index != self._next:
            raise LayerwiseError(
                f"block {self._name(index)!r} is run out of turn, but a model that is cut at its calls runs each block "
                "once per pass and in order."
            )
        elif self._arrived is not None:
            arrived = self._arrived
        else:
            arrived = self.resume(h)
        if arrived.index < index or (arrived.index > index == first):
            how = (
                f"the first cut {self._name(first)!r} is not called before {self._name(arrived.index)!r}"
                if index == first
                else f"cut {self._name(arrived.index)!r} is called again or after {self._name(index - 1)!r}"
            )
            self.close()
            raise LayerwiseError(
                f"{how} in the forward pass; name modules that are called once in every pass, in their order."
            )
        self._next = index + 1
        if arrived.index > index:
            self._arrived = arrived
            self.skipped.add(index)
            return h.detach()
        self._arrived, self.whole = None, arrived.whole
        return arrived.out

    def begin(self, batch: Any) -> Arrival:
        """Run the pass to its first pause."""
        self.close()
        self._begin()
        return self.resume(batch)

    @property
    def waits(self) -> bool:
        """Whether the pass has begun and has not ended."""
        return self._coroutine is not None and not self._coroutine.dead

    def close(self) -> None:
        """End the pass wherever it waits, and remove all hooks from the model."""
        while self._undo:
            self._undo.pop()()
        coroutine, self._coroutine, self._arrived = self._coroutine, None, None
        self.skipped, self._next, self.whole = set(), 0, None
        if coroutine is not None and coroutine and not coroutine.dead:
            coroutine.parent = greenlet.getcurrent()
            self._base = Modes.now(self.devices)
            try:
                coroutine.throw(greenlet.GreenletExit)
            finally:
                self._base.set()

    def _name(self, index: int) -> str:
        return self.cuts[index][0] if index < len(self.cuts) else "head"

    def _begin(self) -> None:
        for i, (_, module, read) in enumerate(self.cuts):
            if i in self.away:
                self._undo.append(StandIns.put_in(self, i, module))
            else:
                self._undo.append(module.register_forward_hook(self._hook(i, read)).remove)
        if self.severed is not None:
            self.severed.mark = 0
        self._coroutine = greenlet.greenlet(self._forward)
        self._coroutine.gr_context = contextvars.copy_context()

    def _forward(self, batch: Any) -> Arrival:
        if self.severed is None:
            return Arrival(len(self.cuts), self.run(batch))
        with self.severed:
            return Arrival(len(self.cuts), self.run(batch))

    def resume(self, value: Any) -> Arrival:
        """Let the pass continue until it pauses again; it gets `value` where it waits."""
        coroutine = self._coroutine
        assert coroutine is not None
        coroutine.parent = greenlet.getcurrent()
        self._base = Modes.now(self.devices)
        # In evaluation torch's fused encoder passes nested tensors from layer to layer, which no rule can read.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            arrived = coroutine.switch(value)
            self._base.set()  # at the end of the pass, whatever its contexts have put back
            return arrived
        except BaseException:
            self._coroutine = None
            self.close()
            raise
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def pause(self, index: int, out: Any, whole: Any = None) -> Any:
        """Stop here, inside the pass; returns the value given to `resume`."""
        assert self._coroutine is not None
        own = Own.taken_off(self._base, self.devices)
        parent = self._coroutine.parent
        assert parent is not None
        try:
            h = parent.switch(Arrival(index, out, whole))
        except BaseException:  # the pass is abandoned; its contexts restore their modes as they exit
            own.put_on(self._base)
            raise
        base = self._base
        if h is not out and h.grad_fn is None and self.severed is not None:
            self.severed.mark = _saved._get_sequence_nr()
        own.put_on(base)
        return h

    @property
    def runs(self) -> bool:
        """Whether what runs now is the pass; a block may be run again, by a checkpoint for one."""
        return self._coroutine is not None and greenlet.getcurrent() is self._coroutine

    def _hook(self, index: int, read: Callable[[Any], Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
        def stop(module: nn.Module, args: Any, out: Any) -> Any:
            if not self.runs:
                return None
            teaching = read(out)
            h = self.pause(index, teaching, out)
            if h is teaching:
                return None
            # Inside a group the graph continues; between groups it ends.
            return replaced(out, teaching, h, detach=h.grad_fn is None)

        return stop


class StandIns:
    """Called in place of a module's forward while passes stand in for its calls, each pass for its own.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module):
        self.own = vars(module)
        self.before = self.own.get("forward")
        self.forward = module.forward
        self.passes: dict[Pass, int] = {}
        self.own["forward"] = self

    @classmethod
    def put_in(cls, one: Pass, index: int, module: nn.Module) -> Callable[[], None]:
        """Let a pass replace the module of cut `index`; returns a function that undoes it, in any order."""
        there = vars(module).get("forward")
        found = there if isinstance(there, StandIns) else cls(module)
        found.passes[one] = index
        return lambda: found._take_out(one)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The current pass's replacement for the call; outside passes, the module's own forward."""
        for one, index in self.passes.items():
            if one.runs:
                assert one.stand_in is not None
                return one.stand_in(index, args, kwargs)
        return self.forward(*args, **kwargs)

    def _take_out(self, one: Pass) -> None:
        del self.passes[one]
        if self.passes:
            return
        if self.before is None:
            del self.own["forward"]
        else:
            self.own["forward"] = self.before


@contextmanager
def called_instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which `forward` is called instead of the module's own; its hooks still run."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def without_severing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments severed as a whole, and its own code outside `Severed`, for a compiler."""

    def called(*args: Any, **kwargs: Any) -> Any:
        modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
        severing = [mode for mode in modes if isinstance(mode, Severed)]
        for mode in severing:
            args, kwargs = mode.severed((args, kwargs))
        try:
            with _on_stack([mode for mode in reversed(modes) if mode not in severing]):
                return forward(*args, **kwargs)
        finally:
            for mode in reversed(modes):
                torch._C._push_on_torch_function_stack(mode)

    return called


@contextmanager
def _on_stack(modes: Sequence[Any]) -> Iterator[None]:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    try:
        yield
    finally:
        for _ in modes:
            torch._C._pop_torch_function_stack()


def devices_of(found: Iterable[Tensor]) -> tuple[str, ...]:
    """The device types of tensors, those with autocast."""
    kinds = {"cpu", *(t.device.type for t in found)}
    return tuple(sorted(kind for kind in kinds if torch.amp.is_autocast_available(kind)))
