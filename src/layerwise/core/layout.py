"""Where the channels of an activation are: known from what made the tensor, not from its number of dimensions.

A *layout* has one letter per dimension: B the batch, C the channels (or features), any other letter a position, such
as BC, BLC (tokens), BCL (what a Conv1d gives), BCHW, BHWC, BCDHW. The *standard order* of an activation, which the
rules read, is (B, C), (B, L, C), (B, C, H, W) or (B, C, D, H, W).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from layerwise.core.torch_functions import KEEPING, REARRANGING
from layerwise.errors import LayerwiseError, suggestion

POSITIONS = {0: "", 1: "L", 2: "HW", 3: "DHW"}


def check_layout(layout: str) -> str:
    """The layout in this module's letters (N is read as B).

    Raises:
        LayerwiseError: there is not one letter per dimension, C is missing, or the batch is not first.

    >>> check_layout("nhwc")
    'BHWC'
    """
    letters = layout.upper().replace("N", "B")
    good = letters.isalpha() and len(set(letters)) == len(letters) and letters[0] == "B" and "C" in letters
    if not good or len(letters) > 5:
        raise LayerwiseError(
            f"layout {layout!r} is not understood; give one letter per dimension, the batch first: B for the batch, C "
            "for the channels, any others for positions, such as BCL, BLC, BCHW, BHWC or BCDHW."
        )
    return letters


def declared_layouts(layout: Mapping[str, str] | str | None, names: Sequence[str]) -> Mapping[str, str] | str | None:
    """The declared layouts, checked."""
    if layout is None:
        return None
    if isinstance(layout, str):
        return check_layout(layout)
    for name in layout:
        if name not in (*names, "input"):
            raise LayerwiseError(f"layout names no block {name!r}; {suggestion(name, ['input', *names])}.")
    return {name: check_layout(value) for name, value in layout.items()}


def to_standard(h: Tensor, layout: str) -> Tensor:
    """A view of `h` in the standard order: (B, C), (B, L, C), (B, C, H, W) or (B, C, D, H, W).

    >>> to_standard(torch.zeros(2, 8, 5), "BCL").shape, to_standard(torch.zeros(2, 4, 6, 3), "BHWC").shape
    (torch.Size([2, 5, 8]), torch.Size([2, 3, 4, 6]))
    """
    place, wanted = layout.index("C"), 2 if len(layout) == 3 else 1
    return h if place == wanted else h.movedim(place, wanted)


def from_standard(h: Tensor, layout: str) -> Tensor:
    """The inverse of `to_standard`.

    >>> from_standard(torch.zeros(2, 5, 8), "BCL").shape
    torch.Size([2, 8, 5])
    """
    place, wanted = layout.index("C"), 2 if len(layout) == 3 else 1
    return h if place == wanted else h.movedim(wanted, place)


class Axis:
    """One of the axes that a dimension is made of: its kind and its size.

    The kind is B, C, P (a position), None while it is unknown, or ? where it cannot be known. Tensors that are views
    of one another hold the same objects, so what a layer shows about its input is known of the model's input as well.

    A linear layer that reads a dimension of the batch other than its last shows less: it may mix channels of a batch
    that is transposed, or positions of one that is not. Such an axis has a `guess`.
    """

    __slots__ = ("guess", "inner", "kind", "size")

    def __init__(self, kind: str | None, size: int, guess: "Guess | None" = None, inner: bool = False):
        self.kind, self.size, self.guess = kind, size, guess
        self.inner = inner
        """Whether it is of the batch, and not its last."""


class Guess:
    """The assumption that an axis holds channels; refuted when a layer takes another one for them."""

    refuted = False


Axes = list[tuple[Axis, ...]]
"""Per dimension, the axes that it is made of; none for a dimension of size 1 that was inserted."""


class Unknown(Exception):
    """Nothing is known about the dimensions of a result."""


class Layouts(TorchFunctionMode):
    """Follows the dimensions of tensors through the functions of torch that run in this context.

    Convolutions, batch norms and pooling have their channels in dimension 1; linear layers, layer norms, embeddings,
    attention and recurrent layers have their features last; views and permutations carry dimensions along;
    elementwise functions keep them. Nothing is known about the result of any other function.

    Attributes:
        mixing: the function that took the batch for a sequence, if one did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._axes = WeakIdKeyDictionary()
        self.mixing: str | None = None

    def begin(self, x: Tensor, layout: str | None) -> None:
        """Follow a tensor. What is known of it is its batch dimension, or what `layout` declares."""
        kinds = ["B" if i == 0 else None for i in range(x.dim())] if layout is None else _kinds(layout, x)
        last = x.dim() - 1
        self._axes[x] = [
            (Axis(kind, size, inner=i < last),) for i, (kind, size) in enumerate(zip(kinds, x.shape, strict=True))
        ]

    def check_mixing(self, block: str) -> None:
        """Raise LayerwiseError if a layer of this block took the batch for a sequence."""
        if self.mixing is not None:
            raise LayerwiseError(
                f"block {block!r} holds a layer ({self.mixing}) that takes its first dimension for a sequence, but "
                "gets the batch there, so that it would mix samples; build it with batch_first=True, or give it "
                "(length, batch, features)."
            )

    def of(self, h: Tensor, batch: int) -> str | None:
        """The layout of a tensor; None if it is unknown."""
        axes = self._axes.get(h)
        axes = axes if axes is not None else [(Axis(None, size),) for size in h.shape]
        kinds: list[str | None] = [axis_kind(dimension) for dimension in axes]
        if kinds and kinds[0] in (None, "1") and "B" not in kinds and h.shape[0] == batch:
            kinds[0] = "B"
        first = kinds[:1] == ["B"] or (kinds[:1] == ["?"] and len(h) == batch)
        if len(kinds) == 2 and first and kinds[1] not in ("B", "M"):
            return "BC"  # also after an unknown function: no other layout has two dimensions
        if kinds.count("C") == 1:  # what is left can only be positions
            kinds = ["P" if kind in (None, "1") else kind for kind in kinds]
        places = kinds.count("P")
        if kinds.count("B") != 1 or kinds.count("C") != 1 or places != len(kinds) - 2 or places not in POSITIONS:
            return None
        letters = iter(POSITIONS[places])
        return "".join(next(letters) if kind == "P" else str(kind) for kind in kinds)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        if results:  # sizes, types and the like do not matter
            with torch._C.DisableTorchFunction():  # other modes around this one need not see these look-ups
                self._see(func, args, kwargs, results)
        return out

    def _see(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Note what the dimensions of the results are, if anything is known about the arguments."""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t in self._axes]
        if not given:
            return
        try:
            found = self._follow(_name(func), given, args, kwargs, results)
        except (Unknown, IndexError, ValueError, RuntimeError, TypeError, KeyError):
            found = [[(Axis("?", size),) for size in result.shape] for result in results]
        for result, axes in zip(results, found, strict=True):
            if not any(result is t for t in given) or len(self._axes[result]) != len(axes):
                self._axes[result] = axes

    def _follow(self, name: str, given: list[Tensor], args: Any, kwargs: Any, results: list[Tensor]) -> list[Axes]:
        """What the dimensions of the results are."""
        out = results[0]
        x = args[0] if args and isinstance(args[0], Tensor) else given[0]
        axes: Axes = list(self._axes.get(x) or [(Axis(None, size),) for size in x.shape])
        if name.startswith(("conv1d", "conv2d", "conv3d", "conv_transpose")):
            return [self._convolved(axes, int(name.rstrip("d")[-1]), args, kwargs, out)]
        if name in ("linear", "layer_norm", "rms_norm", "bilinear"):
            shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", (0,))
            if name == "linear" or not isinstance(shape, (tuple, list, torch.Size)) or len(shape) == 1:
                _features_last(axes)
            return [_resized(axes, out)]
        if name in ("batch_norm", "group_norm", "instance_norm") or "pool" in name:
            if len(axes) > 2:
                _tell(axes[1], "C")
                for dimension in axes[2:]:
                    _tell(dimension, "P")
            return [_resized(axes, result) for result in results]
        if name in ("embedding", "one_hot", "embedding_bag"):
            for dimension in axes:
                _tell(dimension, "P")
            kept = axes[:1] if name == "embedding_bag" else axes
            return [[*kept, (Axis("C", out.shape[-1]),)], *([(Axis("?", s),) for s in r.shape] for r in results[1:])]
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return self._recurrent(name, axes, args, results)
        if name == "multi_head_attention_forward":
            return self._attended(axes, results)
        if name == "scaled_dot_product_attention":
            return [[*axes[:-1], self._axes[args[2]][-1] if args[2] in self._axes else axes[-1]]]
        if name in ("matmul", "bmm", "__matmul__", "__rmatmul__", "mm"):
            return [self._product(args[::-1] if name == "__rmatmul__" else args, out)]
        if name in ("addmm", "baddbmm"):
            return [self._product(args[1:], out)]
        if name == "einsum":
            return [self._summed(args, out)]
        if name in ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "_unsafe_view"):
            return [_reshaped(axes, out.shape)]
        if name in REARRANGING:
            return [self._rearranged(name, axes, args, kwargs, result) for result in results]
        if name == "unbind":
            return [_without(axes, args[1] if len(args) > 1 else kwargs.get("dim", 0)) for _ in results]
        if name == "__getitem__":
            return [_indexed(axes, args[1], out)]
        if name in ("stack", "hstack", "vstack", "dstack"):
            at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
            axes = list(self._axes[given[0]])
            return [[*axes[:at], (Axis(None, out.shape[at]),), *axes[at:]]] if name == "stack" else [_unknown(out)]
        if name == "unfold":
            if x.dim() == out.dim():  # columns of the patches of an image
                _tell(axes[1], "C")
                return [[axes[0], (Axis("C", out.shape[1]),), (Axis("P", out.shape[2]),)]]
            return [[*_resized(axes, out[..., 0]), (Axis(None, out.shape[-1]),)]]
        if name not in KEEPING and not name.startswith("fft_"):
            raise Unknown  # it may move dimensions
        return [self._elementwise(given, result) for result in results]

    def _convolved(self, axes: Axes, spatial: int, args: Any, kwargs: Any, out: Tensor) -> Axes:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if len(axes) == spatial + 1 and axis_kind(axes[0]) == "B":
            self.mixing = f"Conv{spatial}d"
            raise Unknown
        pointwise = math.prod(weight.shape[2:]) == 1
        if pointwise and axis_kind(axes[1]) == "P" and any(axis_kind(d) == "C" for d in axes[2:]):
            return _resized(axes, out)  # it mixes positions
        _tell(axes[1], "C")
        for dimension in axes[2:]:
            _tell(dimension, "P")
        return [axes[0], (Axis("C", out.shape[1]),), *((Axis("P", size),) for size in out.shape[2:])]

    def _recurrent(self, name: str, axes: Axes, args: Any, results: list[Tensor]) -> list[Axes]:
        if len(args) != 9 or len(axes) != 3:  # a packed sequence
            raise Unknown
        time = 1 if args[8] else 0
        if axis_kind(axes[time]) == "B":
            self.mixing = name.partition("_")[0].upper()
        _tell(axes[time], "P")
        _tell(axes[2], "C")
        states = [[(Axis("P", t.shape[0]),), axes[1 - time], (Axis("C", t.shape[2]),)] for t in results[1:]]
        return [[axes[0], axes[1], (Axis("C", results[0].shape[2]),)], *states]

    def _attended(self, axes: Axes, results: list[Tensor]) -> list[Axes]:
        if axis_kind(axes[0]) == "B":
            self.mixing = "attention"
        _tell(axes[0], "P")
        _tell(axes[-1], "C")
        return [[*axes[:-1], (Axis("C", results[0].shape[-1]),)], *(_unknown(result) for result in results[1:])]

    def _product(self, args: Any, out: Tensor) -> Axes:
        left, right = (self._axes.get(t) for t in args[:2])
        if left is None and right is not None:
            return _resized(list(right), out)  # a matrix of the model: it mixes the second-to-last dimension
        if right is None:
            assert left is not None
            if args[1].dim() != 2:
                raise Unknown
            _features_last(left)
            return _resized(list(left), out)
        assert left is not None
        longer = left if len(left) >= len(right) else right
        return [*longer[:-2], left[-2], right[-1]]

    def _summed(self, args: Any, out: Tensor) -> Axes:
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        inputs, _, result = equation.replace(" ", "").partition("->")
        if "." in equation or not result:
            raise Unknown
        known: dict[str, tuple[Axis, ...]] = {}
        for letters, operand in zip(inputs.split(","), operands, strict=True):
            for letter, dimension in zip(letters, self._axes.get(operand) or [], strict=False):
                known.setdefault(letter, dimension)
        channels = any(axis_kind(known[letter]) == "C" for letter in result if letter in known)
        new = None if channels else "C"
        return [known.get(letter, (Axis(new, size),)) for letter, size in zip(result, out.shape, strict=True)]

    def _rearranged(self, name: str, axes: Axes, args: Any, kwargs: Any, out: Tensor) -> Axes:
        """Find where each dimension ends up by calling the function on a tensor whose dimensions differ in size."""
        given = [1 if len(d) == 0 or math.prod(a.size for a in d) == 1 else 3 + i for i, d in enumerate(axes)]
        blank = torch.zeros(given, device="cpu")
        func = getattr(torch.Tensor, name)
        found: Any = func(blank, *args[1:], **kwargs) if callable(func) else getattr(blank, name)
        if isinstance(found, (tuple, list)):
            found = found[0]
        ones = iter([d for d, size in zip(axes, given, strict=True) if size == 1])
        moved = [
            axes[size - 3] if size >= 3 else next(ones, ()) if found.dim() == len(axes) else () for size in found.shape
        ]
        if len(moved) != out.dim():
            raise Unknown
        return moved

    def _elementwise(self, given: Sequence[Tensor], out: Tensor) -> Axes:
        """The dimensions of all arguments, aligned at the last one."""
        found: Axes = [()] * out.dim()
        known = False
        for t in given:
            axes = self._axes[t]
            if len(axes) > out.dim():
                continue
            known = True
            for i, dimension in enumerate(axes, out.dim() - len(axes)):
                found[i] = _merged(found[i], dimension)
        if not known:
            raise Unknown
        return _resized(found, out)


def axis_kind(dimension: Sequence[Axis]) -> str | None:
    """Kind of a dimension that consists of several axes: M for the batch together with others, 1 for no axes."""
    kinds = {"?" if axis.guess is not None and axis.guess.refuted else axis.kind for axis in dimension}
    if not kinds:
        return "1"
    if "B" in kinds:
        return "B" if kinds == {"B"} else "M"
    for kind in ("?", "C"):
        if kind in kinds:
            return kind
    return None if None in kinds else "P"


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property, such as mT
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name.rstrip("_") if not name.startswith("__") else name


def _kinds(layout: str, x: Tensor) -> list[str]:
    if len(layout) != x.dim():
        raise LayerwiseError(
            f"layout {layout!r} has {len(layout)} letters and the tensor that it describes has the shape "
            f"{tuple(x.shape)}; give one letter per dimension."
        )
    return [letter if letter in "BC" else "P" for letter in layout]


def _unknown(out: Tensor) -> Axes:
    return [(Axis("?", size),) for size in out.shape]


def _tell(dimension: Sequence[Axis], kind: str) -> None:
    if len(dimension) == 1 and dimension[0].kind is None:
        dimension[0].kind = kind


def _features_last(axes: Axes) -> None:
    """Note that the last dimension holds the features, as a layer acts on it, unless they are known to be elsewhere."""
    elsewhere = [axis for dimension in axes[:-1] if axis_kind(dimension) == "C" for axis in dimension]
    if elsewhere:
        _tell(axes[-1], "P")
        for axis in elsewhere:
            if axis.guess is not None:
                axis.guess.refuted = True
        return
    if len(axes[-1]) == 1 and axes[-1][0].kind is None and axes[-1][0].inner:
        axes[-1][0].guess = Guess()
    for i, dimension in enumerate(axes):
        kind = "C" if i == len(axes) - 1 else "P"
        _tell(dimension, kind)
        if axis_kind(dimension) in (None, "?"):  # made of several axes, or of what is unknown so far
            size = math.prod(axis.size for axis in dimension)
            axes[i] = (Axis("B" if i == 0 and len(axes) > 1 and axis_kind(dimension) == "?" else kind, size),)


def _resized(axes: Axes, out: Tensor) -> Axes:
    if len(axes) != out.dim():
        raise Unknown
    return [
        dimension
        if math.prod(a.size for a in dimension) == size
        else (Axis(_single(axis_kind(dimension)), size, next((a.guess for a in dimension if a.guess), None)),)
        for dimension, size in zip(axes, out.shape, strict=True)
    ]


def _single(kind: str | None) -> str | None:
    return {"M": "?", "1": None}.get(kind or "", kind)


def _merged(a: tuple[Axis, ...], b: tuple[Axis, ...]) -> tuple[Axis, ...]:
    first, second = axis_kind(a), axis_kind(b)
    if first == "1" or second == "1":
        return b if first == "1" else a
    if "?" in (first, second) and None not in (first, second):
        return b if first == "?" else a  # what is added to a known tensor has its dimensions
    if first is None and second is not None:
        if second != "?" and math.prod(x.size for x in a) == math.prod(x.size for x in b):
            _tell(a, second if second in "BCP" else "?")
        return b
    if second is None:
        if first is not None and first in "BCP":
            _tell(b, first)
        return a
    return a if first == second else (Axis("?", max(math.prod(x.size for x in a), math.prod(x.size for x in b))),)


def _reshaped(axes: Axes, shape: Sequence[int]) -> Axes:
    """Split and join axes in their order until the sizes are those of `shape`."""
    rest = [axis for dimension in axes for axis in dimension]
    found: Axes = []
    for size in shape:
        own: list[Axis] = []
        have = 1
        if size == 1:
            found.append((rest.pop(0),) if rest and rest[0].size == 1 else ())
            continue
        while have < size:
            if not rest:
                raise Unknown
            axis, wanted = rest[0], size // have
            if size % have:
                raise Unknown
            if wanted % axis.size == 0:
                own.append(rest.pop(0))
                have *= axis.size
            elif axis.size % wanted == 0:
                own.append(Axis(axis.kind, wanted))
                rest[0] = Axis(axis.kind, axis.size // wanted)
                have = size
            else:
                raise Unknown
        found.append(tuple(own))
    if any(axis.size != 1 for axis in rest):
        raise Unknown
    return found


def _without(axes: Axes, dim: int) -> Axes:
    at = dim % len(axes)
    return [*axes[:at], *axes[at + 1 :]]


def _indexed(axes: Axes, index: Any, out: Tensor) -> Axes:
    index = list(index) if isinstance(index, tuple) else [index]
    used = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis not in [i for i in index if not isinstance(i, Tensor)]:
        index.append(Ellipsis)
    rest, found = list(axes), []
    for i in index:
        if i is Ellipsis:
            for _ in range(len(axes) - used):
                found.append(rest.pop(0))
        elif i is None:
            found.append(())
        elif isinstance(i, int):
            rest.pop(0)
        elif isinstance(i, slice) or (isinstance(i, Tensor) and i.dim() == 1) or isinstance(i, list):
            found.append(rest.pop(0))
        else:
            raise Unknown
    return _resized(found, out)
