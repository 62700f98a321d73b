"""Exact peak memory of a training step, split by content."""

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from layerwise.core.devices import allocator, usable_device
from layerwise.errors import LayerwiseError
from layerwise.memory.watching import WatchingMode, plain_tensors, tensors_of


@dataclass(frozen=True)
class MemoryUse:
    """Bytes at the moment when gradients and activations together were largest.

    Example:
        >>> MemoryUse(2**20, 2**21, gradients=0, activations=0, peak=3 * 2**20).mib()
        {'parameters': 1.0, 'optimizer': 2.0, 'gradients': 0.0, 'activations': 0.0, 'peak': 3.0}
    """

    parameters: int
    """Parameters and buffers, of the model and of auxiliary modules."""
    optimizer: int
    """State of the optimizers."""
    gradients: int
    """Gradients of the parameters (`.grad`)."""
    activations: int
    """Everything else: activations, saved tensors, messages, temporaries."""
    peak: int
    """Sum of the four."""

    def mib(self) -> dict[str, float]:
        """The same figures in MiB (2**20 bytes), by name."""
        return {field.name: getattr(self, field.name) / 2**20 for field in fields(self)}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`; a storage shared by several tensors counts once.

    The whole storage counts, even if a tensor views only a part of it. A tensor subclass that is
    made of other tensors (quantised, sharded) counts as these. A sparse tensor counts as 0.

    Example:
        >>> x = torch.zeros(10)
        >>> tensor_bytes([x, x[:3], torch.zeros(2)])
        48
    """
    return sum({s._cdata: s.nbytes() for s in _storages(tensors)}.values())


def optimizer_tensors(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """The tensors in the state of `optimizers`, as `MemoryMeter` wants them.

    Tensors that plain objects in the state hold (a projector, a quantiser) are included. A tensor
    subclass that is made of other tensors is replaced by these.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(5))
        >>> parameter.grad = torch.ones(5)
        >>> adam = torch.optim.Adam([parameter])
        >>> adam.step()
        >>> tensor_bytes(optimizer_tensors([adam]))  # two moments of five floats, a step counter
        44
    """
    state = [list(optimizer.state.values()) for optimizer in optimizers]
    return list(plain_tensors(_held_by(state, set())))


def _held_by(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in containers and in the attributes of objects; each object is visited once."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, (type, FunctionType, ModuleType)):
            seen.add(id(leaf))
            slots = [name for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ())]
            parts = [*getattr(leaf, "__dict__", {}).values(), *(getattr(leaf, name, None) for name in slots)]
            if isinstance(leaf, (Mapping, Set)):  # a container that torch does not know as a tree
                parts += leaf.values() if isinstance(leaf, Mapping) else leaf
            yield from _held_by(parts, seen)


def measure_memory(
    step: Callable[[], object],
    *,
    parameters: Iterable[Tensor] = (),
    optimizer_state: Callable[[], Iterable[Tensor]] = tuple,
    inputs: Iterable[Tensor] = (),
    device: torch.device | str = "cpu",
) -> MemoryUse:
    """Run `step()` once under a `MemoryMeter` and return its memory use.

    Arguments, definitions and errors are those of `MemoryMeter`.

    Example:
        >>> x = torch.zeros(256)
        >>> measure_memory(lambda: (x * 2).sum())  # 256 floats and the sum
        MemoryUse(parameters=0, optimizer=0, gradients=0, activations=1028, peak=1028)
    """
    with MemoryMeter(parameters=parameters, optimizer_state=optimizer_state, inputs=inputs, device=device) as meter:
        step()
    return meter.peak


def resident_peak() -> int | None:
    """The largest resident memory of this process so far in bytes, as Linux counts it (VmHWM); None elsewhere.

    Python, torch's code and pages of mapped files count, even if other processes use them too.

    >>> (resident_peak() or 2**30) > 2**20
    True
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class MemoryMeter:
    """Context manager that measures the peak memory of the code inside; read `meter.peak` afterwards.

    **CPU**: every storage that an operation creates is followed from its creation until it is freed,
    however many views it has, in forward, backward and optimizer alike. The figures are exact to the
    byte. Two things are not seen: the workspace that a kernel takes and returns within one operation,
    and tensors that no operation creates, such as the generator state (5 kB) that
    `torch.utils.checkpoint` keeps per call. Functions from `torch.compile` run uncompiled here (torch
    compiles nothing under a dispatch mode), so their figures are those of the plain code; afterwards
    they are compiled again.

    - `parameters` and `optimizer` are the sizes of the given tensors. Optimizer state is read at the
      end and counts as if it had existed from the start. So run one step beforehand, which creates
      it.
    - `gradients`: a storage that is the `.grad` of a given parameter at any time counts as gradient
      for its whole life, including the moment between its creation and its arrival in `.grad`. It is
      noticed when autograd has accumulated it or, if it was set by hand, when a `torch.optim`
      optimizer steps. Gradients that exist at the start count.
    - `activations`: everything else that is created inside. Memory that was allocated before is not
      counted, unless it is given as `inputs`.

    **CUDA, XPU**: from the allocator. Gradients and activations together are the peak of the allocated
    bytes above those at the start; `gradients` is the largest sum of gradients alive at one time
    (no more than the whole), `activations` the rest. Figures include the allocator's rounding to
    512 bytes and the workspaces of libraries, so again run one step beforehand. An accelerator whose
    allocator reports no peak (MPS) is measured like the CPU.

    Args:
        parameters: parameters and buffers, of the model and of auxiliary modules.
        optimizer_state: called at the end for the optimizers' tensors; see `optimizer_tensors`.
        inputs: tensors created beforehand that count as activations, such as the batch.
        device: `"cpu"` or an accelerator; tensors elsewhere are not counted.

    Raises:
        LayerwiseError: the device is neither the CPU nor one that is there, or `peak` is read before
            the end.

    Example:
        >>> layer = torch.nn.Linear(100, 10)
        >>> with MemoryMeter(parameters=layer.parameters()) as meter:
        ...     layer(torch.ones(1, 100)).sum().backward()
        >>> meter.peak.parameters, meter.peak.gradients
        (4040, 4040)
    """

    def __init__(
        self,
        *,
        parameters: Iterable[Tensor] = (),
        optimizer_state: Callable[[], Iterable[Tensor]] = tuple,
        inputs: Iterable[Tensor] = (),
        device: torch.device | str = "cpu",
    ):
        self._device = usable_device(device)
        self._allocator = allocator(self._device)
        self._parameters = list(parameters)
        self._optimizer_state = optimizer_state
        self._inputs = list(inputs)
        self._ledger = _Ledger(self._device.type)
        self._mode = _Watch(self._ledger)
        self._peak: MemoryUse | None = None

    @property
    def peak(self) -> MemoryUse:
        """The memory use of the code inside the `with` block."""
        if self._peak is None:
            raise LayerwiseError("the meter is still running; read `peak` after its `with` block.")
        return self._peak

    def __enter__(self) -> "MemoryMeter":
        for parameter in self._parameters:
            self._note_gradient(parameter)
        for storage in _storages(self._inputs):
            self._ledger.see(storage)
        trained = [p for p in self._parameters if p.is_leaf and p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(self._note_gradient) for p in trained]
        self._hooks.append(register_optimizer_step_pre_hook(self._note_gradients))
        if self._allocator is None:
            self._mode.__enter__()
        else:
            self._allocator.reset_peak_memory_stats(self._device)
            self._before = self._allocator.memory_allocated(self._device) - self._ledger.peak(set())[0]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._allocator is None:
            self._mode.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        held = [p for p in self._parameters if p.device.type == self._device.type]
        state = [t for t in self._optimizer_state() if t.device.type == self._device.type]
        parameters = tensor_bytes(held)
        optimizer = tensor_bytes([*held, *state]) - parameters
        total, gradients = self._ledger.peak({s._cdata for s in _storages([*held, *state])})
        if self._allocator is not None:
            total = self._allocator.max_memory_allocated(self._device) - self._before
            gradients = min(gradients, total)
        self._ledger.close()
        self._peak = MemoryUse(parameters, optimizer, gradients, total - gradients, parameters + optimizer + total)

    def _note_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._note_gradient(parameter)

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            for storage in _storages([parameter.grad]):
                self._ledger.see(storage, gradient=True)


class _Entry:
    """A live storage: its number, its last known size, and the finalizer that notices when it is freed."""

    def __init__(self, number: int, nbytes: int, death: weakref.ref):
        self.number = number
        self.nbytes = nbytes
        self.death = death


class _Ledger:
    """What was allocated and freed, in order: (number of the storage, change in bytes).

    The split is made afterwards, when it is known which storages are gradients or optimizer state.
    """

    def __init__(self, device: str):
        self._device = device
        self._log: list[tuple[int, int]] = []
        self._gradients: set[int] = set()
        self._alive: dict[int, _Entry] = {}
        self._count = 0

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._alive

    def see(self, storage: torch.UntypedStorage, gradient: bool = False) -> None:
        """Record a storage that is new, has changed its size, or turns out to be a gradient."""
        if storage.device.type != self._device:
            return
        key, nbytes = storage._cdata, storage.nbytes()
        entry = self._alive.get(key)
        if entry is None:
            # torch keeps one Python object per storage for as long as the storage lives, also while
            # only C++ (a view, the autograd graph) holds it, so this reference dies with the
            # storage itself.
            death = weakref.ref(storage, lambda _: self._free(key))
            entry = self._alive[key] = _Entry(self._count, 0, death)
            self._count += 1
        if entry.nbytes != nbytes:
            self._log.append((entry.number, nbytes - entry.nbytes))
            entry.nbytes = nbytes
        if gradient:
            self._gradients.add(entry.number)

    def peak(self, excluded: set[int]) -> tuple[int, int]:
        """The largest total and the gradients in it, without the storages at these addresses."""
        numbers = {entry.number for key, entry in self._alive.items() if key in excluded}
        total = gradients = largest = gradients_then = 0
        for number, change in self._log:
            if number in numbers:
                continue
            total += change
            if number in self._gradients:
                gradients += change
            if total > largest:
                largest, gradients_then = total, gradients
        return largest, gradients_then

    def close(self) -> None:
        """Forget everything; freed storages are no longer noticed."""
        self._alive.clear()

    def _free(self, key: int) -> None:
        entry = self._alive.pop(key)
        self._log.append((entry.number, -entry.nbytes))


class _Watch(WatchingMode):
    """Shows the ledger each storage that an operation returns, in backward and optimizer too."""

    def __init__(self, ledger: _Ledger):
        super().__init__()
        self._ledger = ledger

    def watch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, and record its results."""
        given = {s._cdata: s for s in _storages(tensors_of([args, list(kwargs.values())]))}
        result = func(*args, **kwargs)
        for storage in given.values():
            if storage in self._ledger:  # it may have been resized
                self._ledger.see(storage)
        for storage in _storages(tensors_of(result)):
            # An input that is not in the ledger existed before the meter. The exception is a tensor
            # made from Python numbers: an operation on the tensor itself makes it visible.
            if storage._cdata not in given or func is torch.ops.aten.lift_fresh.default:
                self._ledger.see(storage)
        return result


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """Storages of strided tensors; of a sharded one, that of its shard. Sparse tensors' are seen when created."""
    return (t.untyped_storage() for t in plain_tensors(tensors) if t.layout is torch.strided)
