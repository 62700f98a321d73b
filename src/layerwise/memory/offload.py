"""Keeps blocks in host memory or on disk, and on the device only while they are needed."""

import contextlib
import functools
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from layerwise.core.blocks import Block
from layerwise.core.groups import Group, Unit
from layerwise.core.pieces import JoinsGroups, has_trunk
from layerwise.core.ranges import Where
from layerwise.core.rule import Rule
from layerwise.errors import LayerwiseError
from layerwise.memory.blanks import Blanks
from layerwise.memory.meter import MemoryUse, optimizer_tensors, tensor_bytes
from layerwise.memory.mmap import release_pages
from layerwise.memory.stores import DiskStore, HostStore, Store

ALIGNMENT = 64  # bytes, as in torch's allocator; with another alignment some kernels give different bits


@dataclass
class Entry:
    """One tensor of an offloaded group, and its place in the group's bytes."""

    tensor: Tensor
    start: int
    """First byte of its storage; tensors that share a storage keep sharing it."""
    length: int
    """Bytes of its storage."""
    offset: int
    """Its storage offset, in elements."""
    size: torch.Size
    stride: tuple[int, ...]

    def of(self, part: Tensor) -> Tensor:
        """The tensor as a view of the group's bytes."""
        first = self.start // self.tensor.element_size() + self.offset
        return part.view(self.tensor.dtype).as_strided(self.size, self.stride, first)


@dataclass(eq=False)
class DeviceSlot:
    """Bytes on the device that hold one group after the other."""

    bytes: Tensor
    part: "OffloadedGroup | None" = None
    arrival: Future[Any] | None = None
    """Done when the group's bytes have arrived."""


@dataclass(eq=False)
class OffloadedGroup:
    """A unit of moving: a group's parameters, buffers, auxiliary modules and optimizer state."""

    index: int
    places: list[tuple[dict[str, Any], str]]
    """Registries of modules, and the names there of the blocks' parameters and buffers."""
    group: Group | None = None
    """Set once the auxiliary modules and the optimizer are created."""
    entries: list[Entry] = field(default_factory=list)
    length: int = 0
    """Bytes."""
    slot: DeviceSlot | None = None
    attached: bool = False
    """Whether the tensors view the slot's bytes (or, before the first move, their own)."""
    changed: bool = True
    """Whether the tensors may differ from their copy off the device."""

    def state(self, device: torch.device) -> list[Tensor]:
        """Tensors of the optimizer; a step counter may stay on the host."""
        if self.group is None:
            return []
        return [t for t in optimizer_tensors(self.group.optimizers) if t.device == device]

    def tensors(self, device: torch.device) -> list[Tensor]:
        """All tensors; gradients and other temporary ones come last."""
        found: list[Tensor] = [registry[name] for registry, name in self.places]
        if self.group is not None:
            for unit in self.group.units:
                if unit.auxiliary is not None:
                    found += [*unit.auxiliary.parameters(), *unit.auxiliary.buffers()]
        gradients = [t.grad for t in found if t.is_leaf and t.grad is not None]
        found += [*self.state(device), *gradients]
        if self.group is not None:
            found += [before for _, before in self.group.buffers]
        return [t for t in found if t.numel() and t.layout is torch.strided]

    def is_laid_out(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are the entries, at their places in the slot."""
        if self.slot is None or len(tensors) != len(self.entries):
            return False
        base = self.slot.bytes.data_ptr()
        return all(
            t is e.tensor
            and t.data_ptr() == base + e.start + e.offset * t.element_size()
            and t.size() == e.size
            and t.stride() == e.stride
            for t, e in zip(tensors, self.entries, strict=True)
        )

    def lay_out(self, tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Give every storage of these tensors a place.

        Returns:
            The places and the bytes that belong there.
        """
        home = None if self.slot is None else self.slot.bytes.data_ptr()
        before = {entry.start: entry.length for entry in self.entries}
        starts: dict[int, int] = {}
        chunks, entries, end = [], [], 0
        for tensor in tensors:
            storage, width = tensor.untyped_storage(), tensor.element_size()
            address, length, offset = storage.data_ptr(), storage.nbytes(), int(tensor.storage_offset())
            if self.slot is not None and address == home:  # the slot's storage: which of the old ones was it?
                old = max(start for start in before if start <= offset * width)
                address, length, offset = address + old, before[old], offset - old // width
                source = self.slot.bytes[old : old + length]
            else:
                source = tensor.detach().as_strided((length // width,), (1,), 0).view(torch.uint8)
            if address not in starts:
                starts[address] = end
                chunks.append((end, source))
                end += -(-length // ALIGNMENT) * ALIGNMENT
            entries.append(Entry(tensor, starts[address], length, offset, tensor.size(), tensor.stride()))
        self.entries, self.length = entries, end
        return chunks

    def sizes(self) -> Iterator[tuple[Tensor, torch.Size]]:
        """The tensors, and their sizes."""
        return ((entry.tensor, entry.size) for entry in self.entries)

    def show(self, found: Tensor) -> None:
        """Make the tensors views of these bytes."""
        for entry in self.entries:
            entry.tensor.data = entry.of(found)


class Offload:
    """Moves the parts of a network: the active group is on the device, and the next one is being fetched.

    A part's bytes are in a slot on the device, and its tensors are views of them. Without a slot, the tensors show a
    placeholder (NaN, or zero). While a group learns, a thread writes the previous part back and reads the next one into
    the same slot. Rules and engine do not know of this: the engine opens `resident` around a group, and anything else
    that runs (a block, an auxiliary module) requests its part by a hook. A part that runs with a graph outside its
    group stays until the next group begins, so that its graph remains valid.

    Args:
        kind: host or disk.
        folder: for the file, if `kind` is disk.
        device: where blocks run; the parameters may still be on the host.
        rule: decides whether offloading saves anything.
        blocks: per group that is here, the blocks that learn there.
        site: number of the first of them.
        total: number of all blocks of the network, its head included.
        make: creates the tensors of blocks, if they do not exist yet.

    Raises:
        LayerwiseError: all blocks would be on the device at once, the folder cannot be written to, the disk is full.
    """

    active = True

    def __init__(
        self,
        kind: Where,
        folder: Path,
        device: torch.device,
        rule: Rule,
        blocks: Sequence[Sequence[Block]],
        site: int,
        total: int,
        make: Callable[[Sequence[Block]], None],
    ):
        owners = [i for i, group in enumerate(blocks) for _ in group]
        window = window_of(rule, total - 1)
        self.device = device
        self.store: Store = HostStore(device) if kind == "host" else DiskStore(folder, device)
        self.changing = True
        """Whether running blocks may change their tensors; not in evaluation."""
        places, shared = _places(blocks, site)
        self._fixed = [*shared.values()]
        for tensor in self._fixed:
            tensor.data = tensor.data.to(device)
        self.parts = [OffloadedGroup(i, found) for i, found in enumerate(places)]
        self._of_site = {site + i: self.parts[owner] for i, owner in enumerate(owners)}
        self._pinned = {self.parts[0]} if has_trunk(rule) else set()
        self._capacity = min(window + 1, len(self.parts))
        self._slots: list[DeviceSlot] = []
        self._open: list[list[OffloadedGroup]] = []
        self._kept: set[OffloadedGroup] = set()
        self._moves: deque[Future[Any]] = deque()
        self._mover = ThreadPoolExecutor(1, "layerwise-offload")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blanks = Blanks(device)
        self._hooks: list[Any] = []
        for part, group in zip(self.parts, blocks, strict=True):
            make(group)
            for block in group:
                block.before = functools.partial(self.need, part)
            part.attached = True
            self._leave(part)
            self._wait()
            release_pages()
        self._blocks = [block for group in blocks for block in group]

    # Requests.

    @contextlib.contextmanager
    def resident(self, units: Sequence[Unit]) -> Iterator[None]:
        """A context in which the parts of these units are on the device; the next part is fetched meanwhile."""
        parts = list(dict.fromkeys(self._of_site[unit.site.index] for unit in units))
        self._kept.clear()
        self._open.append(parts)
        try:
            self._bring(parts)
            yield
        finally:
            self._open.pop()
            self._kept.clear()

    def need(self, part: OffloadedGroup) -> None:
        """Bring a part to the device because it is about to run."""
        if torch.is_grad_enabled() and not any(part in parts for parts in self._open):
            self._kept.add(part)
        if part.attached:
            part.changed |= self.changing
        else:
            self._bring([part])

    @contextlib.contextmanager
    def unchanging(self) -> Iterator[None]:
        """A context in which blocks do not change their tensors, so nothing needs to be written back."""
        before, self.changing = self.changing, False
        try:
            yield
        finally:
            self.changing = before

    def add(self, group: Group) -> None:
        """Add a group's auxiliary modules and optimizer to its part, which is resident."""
        part = self._of_site[group.units[0].site.index]
        part.group = group
        for unit in group.units:
            for module in unit.auxiliary.modules() if unit.auxiliary is not None else ():
                self._hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self.need(part)))

    def loading(self, groups: Sequence[Group], resident: Callable[..., Any]) -> Iterator[Sequence[Group]]:
        """The groups that can be loaded at once: one after the other, each while it is on the device."""
        for group in groups:
            with resident(group.units):
                yield [group]
            release_pages()

    def check(self) -> None:
        """Raise LayerwiseError if a tensor that is not on the device was written to."""
        for part in self.parts:
            if not part.attached:
                self._blanks.check(part.sizes())

    def away(self) -> set[int]:
        """`id` of every tensor that is not on the device."""
        return {id(entry.tensor) for part in self.parts if not part.attached for entry in part.entries}

    def to_full(self, tree: Any) -> Any:
        """The same nested mappings with views of the stored bytes on the host, valid until the next step."""
        self._flush()
        found = {id(entry.tensor): (part, entry) for part in self.parts for entry in part.entries}

        def held(tensor: Tensor) -> Tensor:
            if id(tensor) not in found:
                return tensor.detach()
            part, entry = found[id(tensor)]
            return entry.of(self.store.view(part, part.length))

        return tree_map_only(Tensor, held, tree)

    def end(self) -> None:
        """Bring everything back to the device for good."""
        self.check()
        for part in self.parts:
            self._bring([part])
            assert part.slot is not None
            part.show(part.slot.bytes[: part.length].clone())
            part.slot.part = part.slot = None
        self._flush()
        self._slots.clear()
        self._mover.shutdown()
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            block.before = None

    def counted(self, use: MemoryUse) -> MemoryUse:
        """A measured step in which the slots, at their fullest, count as parameters and optimizer state."""
        held = [{id(tensor): tensor for tensor in part.state(self.device)} for part in self.parts]
        laid_out = {id(e.tensor): e.length for part in self.parts for e in part.entries}
        own = [sum(laid_out.get(i, 0) for i in tensors) for tensors in held]
        count = len(own)
        state = max(sum(own[(i + k) % count] for k in range(self._capacity)) for i in range(count))
        slots = sum(len(slot.bytes) for slot in self._slots)
        parameters = slots - state + tensor_bytes(self._fixed)
        # If all groups fit, none has left the device. What their optimizers have created since is outside the slots.
        state += tensor_bytes([t for tensors in held for i, t in tensors.items() if i not in laid_out])
        work = use.gradients + use.activations
        return replace(use, parameters=parameters, optimizer=state, peak=parameters + state + work)

    # Moving.

    def _bring(self, parts: Sequence[OffloadedGroup]) -> None:
        """Put parts on the device, move away those that are not needed soon, and fetch the next ones."""
        first = (self._open[-1] if self._open else parts)[0].index
        coming = [self.parts[(first + k) % len(self.parts)] for k in range(self._capacity)]
        stay = {*parts, *coming, *self._pinned, *self._kept, *(part for group in self._open for part in group)}
        for slot in self._slots:
            if slot.part is not None and slot.part not in stay:
                self._leave(slot.part)
        for part in [*parts, *coming]:
            if part.slot is None and not part.attached:
                self._fetch(part)
        for part in parts:
            if not part.attached:
                assert part.slot is not None
                self._wait(part.slot.arrival)
                self._blanks.check(part.sizes())
                part.show(part.slot.bytes)
                part.attached = True
            part.changed |= self.changing
        idle = [slot for slot in self._slots if slot.part is None]
        for slot in idle[: max(len(self._slots) - self._capacity - len(self._pinned), 0)]:
            self._slots.remove(slot)

    def _fetch(self, part: OffloadedGroup) -> None:
        slot = next((slot for slot in self._slots if slot.part is None), None)
        if slot is None:
            slot = DeviceSlot(torch.empty(0, dtype=torch.uint8, device="cpu"))
            self._slots.append(slot)
        if len(slot.bytes) < part.length or slot.bytes.device != self.device:
            slot.bytes = self._room(part.length)
        slot.part, part.slot = part, slot
        slot.arrival = self._start(functools.partial(self.store.read, part, part.length, slot.bytes))

    def _leave(self, part: OffloadedGroup) -> None:
        """Take a part off the device; it is written back if anything in it may have changed."""
        if part.attached:
            tensors = part.tensors(self.device)
            same = part.is_laid_out(tensors)
            if part.changed or not same:
                chunks = [(0, part.slot.bytes[: part.length])] if same and part.slot else part.lay_out(tensors)
                self._start(functools.partial(self.store.write, part, part.length, chunks))
            for entry in part.entries:
                self._blanks.put(entry.tensor, entry.size)
            part.attached = part.changed = False
            torch.clear_autocast_cache()  # the cache identifies a parameter by its address
        if part.slot is not None:
            part.slot.part = part.slot = None

    def _flush(self) -> None:
        """Move all parts off the device, and finish all writes."""
        self._kept.clear()
        for part in self.parts:
            if part.slot is not None:
                self._leave(part)
        self._wait()
        if self._side is not None:
            self._side.synchronize()

    def _start(self, move: Callable[[], None]) -> Future[Any]:
        """Queue a move after the current ones; on CUDA also after the work queued on the device."""
        ready = None if self._side is None else torch.cuda.current_stream(self.device).record_event()

        def moved() -> Any:
            if self._side is None:
                return move()
            with torch.cuda.stream(self._side):
                if ready is not None:
                    self._side.wait_event(ready)
                move()
                return self._side.record_event()

        self._moves.append(self._mover.submit(moved))
        return self._moves[-1]

    def _wait(self, until: Future[Any] | None = None) -> None:
        """Wait for a move and those before it, or for all; errors are raised here."""
        while self._moves if until is None else until in self._moves:
            arrived = self._moves.popleft().result()
            if arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(arrived)

    def _room(self, length: int) -> Tensor:
        length = max(length, ALIGNMENT)
        if self.device.type == "cpu":  # separate pages, which go back to the system
            return torch.frombuffer(mmap.mmap(-1, length), dtype=torch.uint8)
        return torch.empty(length, dtype=torch.uint8, device=self.device)


class NotOffloaded:
    """Replaces `Offload` if all blocks are on the device."""

    active = False

    def resident(self, units: Sequence[Unit]) -> contextlib.AbstractContextManager[None]:
        """A context in which units can run: always."""
        return contextlib.nullcontext()

    def unchanging(self) -> contextlib.AbstractContextManager[None]:
        """A context in which nothing needs to be written back."""
        return contextlib.nullcontext()

    def add(self, group: Group) -> None:
        """Leave the group where it is."""

    def check(self) -> None:
        """Nothing is away."""

    def away(self) -> set[int]:
        """`id` of every tensor that is not on the device: none."""
        return set()

    def loading(self, groups: Sequence[Group], resident: Callable[..., Any]) -> Iterator[Sequence[Group]]:
        """The groups that can be loaded at once: all."""
        yield groups

    def to_full(self, tree: Any) -> Any:
        """The tensors as they are."""
        return tree

    def counted(self, use: MemoryUse) -> MemoryUse:
        """A measured step as it is."""
        return use

    def end(self) -> None:
        """Nothing is away."""


def window_of(rule: Rule, blocks: int) -> int:
    """The largest number of groups that run as one graph, in a network with this number of blocks.

    Raises:
        LayerwiseError: all groups run as one graph, so that offloading would save nothing.
    """
    views = rule.groups(blocks)
    starts = [view.start for view in views]
    window = max(sum(start in view for start in starts) for view in views)
    if window == len(views) or isinstance(rule, JoinsGroups):
        raise LayerwiseError(
            f"rule {rule.name!r} cannot be offloaded on this network, because all its blocks are needed at once; "
            "leave --offload out, or choose a rule such as 'sll', 'sid' or 'local_ce' and a deeper network."
        )
    return window


def check_offload(offload: str, replicas: bool, compile: bool | str) -> None:
    """Raise LayerwiseError unless blocks can be offloaded with these options."""
    if offload not in get_args(Where):
        raise LayerwiseError(f"offload is {offload!r}; choose none, host or disk.")
    if offload != "none" and replicas:
        raise LayerwiseError(
            "the blocks of replicas cannot be offloaded; leave --offload out, or train in one process or a pipeline."
        )
    if offload != "none" and compile:
        raise LayerwiseError(
            "offloaded blocks share memory, which torch.compile refuses; leave --offload or --compile out."
        )


def _places(
    blocks: Sequence[Sequence[Block]], first: int
) -> tuple[list[list[tuple[dict[str, Any], str]]], dict[int, Tensor]]:
    """Per group, where its blocks' tensors are held; and the tensors that several groups use, which stay in place."""
    found = [[place for block in group for place in block.places()] for group in blocks]
    owner: dict[int, int] = {}
    shared: dict[int, Tensor] = {}
    for i, group in enumerate(found):
        for registry, name in group:
            storage = registry[name].untyped_storage()._cdata
            if owner.setdefault(storage, i) != i:
                shared[storage] = registry[name]
    for group in blocks:
        last = first + len(group) - 1
        for block in group:
            beside = [name for name, users in block.users.items() if min(users) < first or max(users) > last]
            for registry, name in map(block.place, beside):
                shared[registry[name].untyped_storage()._cdata] = registry[name]
        first = last + 1
    own = [[(r, n) for r, n in group if r[n].untyped_storage()._cdata not in shared] for group in found]
    return own, shared
