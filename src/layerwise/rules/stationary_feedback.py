"""Stationary state feedback: recurrent networks without a backward pass through time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.functional import wide
from layerwise.core.layers import layers_of
from layerwise.core.ranges import Fraction, ProperFraction
from layerwise.core.rule import Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError
from layerwise.rules.backprop import Backprop

LAYERS = (nn.RNN, nn.GRU, nn.LSTM)


@dataclass(frozen=True)
class StationaryFeedback(Backprop):
    r"""Backpropagation whose gradient goes back in time through a fixed diagonal matrix (DSF), not through Jacobians.

    With the state $h_t = F(x_t, h_{t-1})$, the gradient $g_t$ that the loss and the layers above send to $h_t$, and
    $J_t = \partial h_{t+1} / \partial h_t$, backpropagation through time is $\delta_t = g_t + J_t^\top \delta_{t+1}$.
    Here

    $$\delta_t = g_t + A\, \delta_{t+1} = \sum_{k \geq 0} A^k g_{t+k}, \qquad A = \mathrm{diag}(a_1, \ldots, a_n)$$

    for all t at once, by a scan in $\log_2 T$ parallel steps. Within a step derivatives are exact: weights get
    $\sum_t (\partial F(x_t, h_{t-1}) / \partial \theta)^\top \delta_t$ with $h_{t-1}$ held fixed, that of a simple
    recurrent layer $\sum_t (f'(u_t) \odot \delta_t)\, h_{t-1}^\top$ with $u_t$ before the nonlinearity f, and the layer
    below gets $(\partial F / \partial x_t)^\top \delta_t$: between layers it is the ordinary gradient.

    A acts on the state that carries the memory: the hidden state of `nn.RNN` and `nn.GRU`, the cell of `nn.LSTM`, where
    it stands for the forget gate; what leads from a hidden state of the LSTM to the next step is cut.

    With `decay=0` this is backpropagation through time, truncated to one step. It is full backpropagation through time
    where the recurrence is linear with the matrix A.

    A fixed diagonal matrix in place of the Jacobians, and a parallel scan: the paper. Our reading: the entries of A,
    ordinary gradients between layers, and the cell of the LSTM.

    >>> StationaryFeedback().groups(blocks=3)
    [range(0, 4)]
    """

    decay: ProperFraction = 0.9
    """Largest entry of A: an error reaches k steps back with the factor decay^k."""
    spread: Fraction = 0.0
    """Share by which the smallest entry is smaller: the entries are evenly spaced from (1 - spread) decay to decay."""

    name: ClassVar[str] = "stationary_feedback"
    boundary: ClassVar[str] = "activations forward; gradients backward through every block, in time through a fixed one"
    models: ClassVar[tuple[str, ...]] = ("rnn", "gru", "lstm")
    source: ClassVar[str] = (
        "Caillon, Fagnou & Allauzen, arXiv 2503.23104 (2025); the entries of A, gradients between layers, the cell of "
        "an LSTM: our reading"
    )
    restrictions: ClassVar[str] = (
        "Recurrent networks only: layers nn.RNN, nn.GRU and nn.LSTM of one layer and one direction, in a chain of "
        "modules. Activations of all blocks and steps are kept until the backward pass. torch.compile is refused."
    )

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """No module; refuses a network that is not recurrent."""
        if site.is_head and site.network is not None:
            found = [module for module in site.network.model.modules() if isinstance(module, nn.RNNBase)]
            if not found:
                raise LayerwiseError(
                    "stationary_feedback finds no recurrent layer (nn.RNN, nn.GRU, nn.LSTM) in the network; choose the "
                    "model rnn, gru or lstm, or the rule backprop."
                )
            for layer in found:
                _check_layer(layer)
        return None

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block; where a graph is recorded, that of its recurrent layers is without a path through time."""
        layers = [layer for layer in layers_of(block) if isinstance(layer, nn.RNNBase)]
        if not layers or not torch.is_grad_enabled():
            return block(h)
        if block.compiled:
            raise LayerwiseError(
                f"block {block.name!r} is compiled, so the rule cannot access its recurrent layers; leave compile out."
            )
        with self._fed_back(layers):
            return block(h)

    @contextmanager
    def _fed_back(self, layers: list[nn.RNNBase]) -> Iterator[None]:
        """A context in which recurrent layers run without a graph, and then get one that goes back through A."""
        recording: list[bool] = []

        def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
            recording.append(torch.is_grad_enabled())
            torch.set_grad_enabled(False)

        def after(layer: Any, args: Any, kwargs: Any, out: Any) -> Any:
            recorded = recording.pop()
            torch.set_grad_enabled(recorded)
            # Without an output the layer has failed, and its error is on the way.
            return with_feedback(layer, *_arguments(*args, **kwargs), out, self.entries) if recorded and out else None

        handles = []
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def entries(self, like: Tensor) -> Tensor:
        """The diagonal of A for states `like` `(..., n)`, in float32 or wider.

        >>> StationaryFeedback(decay=0.5, spread=1.0).entries(torch.zeros(3))
        tensor([0.0000, 0.2500, 0.5000])
        """
        least = (1 - self.spread) * self.decay
        return torch.linspace(least, self.decay, like.shape[-1], device=like.device, dtype=wide(like).dtype)


def _check_layer(layer: nn.RNNBase) -> None:
    """Raise LayerwiseError unless the states of a layer are those of one recurrence, of a known kind."""
    if type(layer) not in LAYERS or layer.num_layers > 1 or layer.bidirectional or layer.proj_size:
        raise LayerwiseError(
            f"stationary_feedback cannot separate the recurrences of {layer}; build the network of nn.RNN, nn.GRU or "
            "nn.LSTM with one layer, one direction and no projection each."
        )


def _arguments(input: Any, hx: Any = None) -> tuple[Any, Any]:
    """The arguments of a recurrent layer, by the names of torch."""
    return input, hx


def with_feedback(layer: Any, x: Tensor, initial: Any, out: Any, entries: Any) -> Any:
    """What a recurrent layer has returned, with a graph whose only path through time is A.

    Args:
        layer: an `nn.RNN`, `nn.GRU` or `nn.LSTM` of one layer.
        x: its input, `(B, T, D)`, or `(T, B, D)` without `batch_first`.
        initial: the states before the first step that it was given, if any.
        out: all states and the last ones, without a graph.
        entries: from states `(..., n)` to the diagonal of A, `(n,)`.

    Raises:
        LayerwiseError: the input is no batch of sequences of one length.
    """
    states = out[0]
    if not isinstance(states, Tensor) or states.dim() != 3:
        raise LayerwiseError(
            f"stationary_feedback needs batches of sequences of one length, and {layer} gets others; pad them instead "
            "of packing them."
        )
    if not layer.batch_first:
        x, states = x.transpose(0, 1), states.transpose(0, 1)
    lstm = isinstance(layer, nn.LSTM)
    start = (initial if lstm else (initial,)) if initial is not None else (None, None)
    h0, c0 = (torch.zeros_like(states[:, :1]) if s is None else s.transpose(0, 1) for s in (start[0], start[-1]))
    given = F.linear(x, layer.weight_ih_l0, getattr(layer, "bias_ih_l0", None))
    fed = F.linear(_earlier(states, h0), layer.weight_hh_l0, getattr(layer, "bias_hh_l0", None))
    a = entries(states)
    if lstm:
        i, f, g, o = (given + fed).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        with torch.no_grad():
            cells = scan(wide(i * g), wide(f), wide(c0))
        c = _Feedback.apply(f * _earlier(cells, c0) + i * g, cells, a)
        found = _Feedback.apply(o * c.tanh(), states, torch.zeros_like(a))
        ends: Any = (found[:, -1:].transpose(0, 1), c[:, -1:].transpose(0, 1).to(states.dtype))
    else:
        if isinstance(layer, nn.GRU):
            (r, z, n), (r_fed, z_fed, n_fed) = given.chunk(3, -1), fed.chunk(3, -1)
            r, z = (r + r_fed).sigmoid(), (z + z_fed).sigmoid()
            n = (n + r * n_fed).tanh()
            new = n + z * (_earlier(states, h0) - n)
        else:
            new = (given + fed).relu() if layer.nonlinearity == "relu" else (given + fed).tanh()
        found = _Feedback.apply(new, states, a)
        ends = found[:, -1:].transpose(0, 1)
    return found if layer.batch_first else found.transpose(0, 1), ends


def _earlier(states: Tensor, first: Tensor) -> Tensor:
    """The state before every step, `(B, T, n)`, from those after them; only the first may have a history."""
    return torch.cat([first.to(states.dtype), states[:, :-1]], 1)


class _Feedback(torch.autograd.Function):
    """States as they are, with the gradient of those computed in one step each, after the scan through A."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, states: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        ctx.dtype = computed.dtype
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,), (a,) = gradients, ctx.saved_tensors
        return reverse_scan(wide(g), a).to(ctx.dtype), None, None


def reverse_scan(g: Tensor, a: Tensor) -> Tensor:
    r"""The sums $\delta_t = \sum_k a^k g_{t+k}$ along dimension 1, in $\log_2 T$ steps.

    After step m, $\delta_t$ has the terms $k < 2^m$. Only powers of a are multiplied, so nothing overflows where
    $|a| \leq 1$.

    Args:
        g: `(B, T, n)`.
        a: `(n,)`.

    >>> reverse_scan(torch.ones(1, 3, 1), torch.tensor([0.5])).flatten()
    tensor([1.7500, 1.5000, 1.0000])
    """
    delta, reach = g.clone(), 1
    while reach < g.shape[1]:
        delta[:, :-reach] += a * delta[:, reach:]
        a, reach = a * a, 2 * reach
    return delta


def scan(u: Tensor, f: Tensor, first: Tensor) -> Tensor:
    r"""The states $s_t = f_t \odot s_{t-1} + u_t$ along dimension 1, in $\log_2 T$ steps.

    Args:
        u: `(B, T, n)`.
        f: of the same shape, between 0 and 1.
        first: the state before the first step, `(B, 1, n)`.

    >>> scan(torch.ones(1, 3, 1), torch.full((1, 3, 1), 0.5), torch.zeros(1, 1, 1)).flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    s, f, reach = u.clone(), f.clone(), 1
    s[:, :1] += f[:, :1] * first
    while reach < u.shape[1]:
        s[:, reach:] += f[:, reach:] * s[:, :-reach]
        f[:, reach:] = f[:, reach:] * f[:, :-reach]
        reach *= 2
    return s
