"""Hebbian learning with a direction: the size of an update is Hebbian, its sign is that of a gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.layers import CONVOLUTIONS, layer_gradients, seeing_layers
from layerwise.core.ranges import PositiveFloat
from layerwise.core.rule import ANY_TASK, BatchContext, BlockContext, Locality, Rule, Signal, loss_at_head
from layerwise.errors import LayerwiseError
from layerwise.rules.local_ce import GreedyLinear

WHOLE_BATCH = "takes the largest Hebbian update of the whole batch for its unit"


@dataclass(frozen=True)
class HebbianGlobal(Rule):
    r"""Hebbian learning with global direction (GHL): the size of a Hebbian update, the sign of the gradient.

    D is the soft winner-take-all form of Oja's rule, on the outputs $u = W x$ of a linear layer or convolution, summed
    over samples and positions:

    $$v = \mathrm{softmax}_{channels}(t\, u), \qquad D = \sum v x^\top - \big(\textstyle\sum v \odot u\big)\, W, \qquad
      D \leftarrow D / \max |D|$$

    L is the loss of the head, and its gradient comes from backpropagation; only its sign is used. The
    head, biases and norms follow their gradient.

    The update is the paper's. Ours: fully connected layers as well.

    >>> HebbianGlobal().groups(blocks=3)
    [range(0, 4)]
    """

    temperature: PositiveFloat = 1.0
    """Factor t of the outputs in the softmax over channels."""

    name: ClassVar[str] = "hebbian_global"
    locality: ClassVar[Locality] = "global"
    boundary: ClassVar[str] = "activations forward; gradients backward through every block, for their sign"
    flat_memory: ClassVar[bool] = False
    whole_batch: ClassVar[str] = WHOLE_BATCH
    tasks: ClassVar[tuple[str, ...]] = ANY_TASK
    source: ClassVar[str] = "GHL, arXiv 2601.21367 (2026), and its code; fully connected layers: our reading"
    restrictions: ClassVar[str] = (
        "It needs the whole backward pass, only for signs: compare it with the sign of the gradient. Weights outside "
        "linear layers and convolutions follow their gradient. torch.compile is refused."
    )

    def groups(self, blocks: int) -> list[range]:
        """One group: every block and the head."""
        return [range(blocks + 1)]

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message collects inputs and outputs of layers."""
        return ctx.x, []

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block and record the inputs and outputs of its layers."""
        return run_and_note(block, h, message)

    def signal(self, ctx: BlockContext) -> Signal:
        """At the head, the gradients of all blocks with their sizes replaced."""
        if not ctx.site.is_head:
            return Signal(message=ctx.message)
        signal = loss_at_head(ctx)
        return with_hebbian_sizes(ctx, signal, self.temperature) if ctx.learns else signal


@dataclass(frozen=True)
class HebbianLocal(GreedyLinear):
    r"""`hebbian_global` with the sign of a local gradient: that of the loss of the block's own linear head.

    $$\Delta W = -\eta\, |D| \odot \mathrm{sign}\Big(\frac{\partial L_i}{\partial W}\Big), \qquad
      L_i = \mathrm{CE}(A_i\, \mathrm{pool}(h_i) + a_i, y)$$

    D as there, $L_i$ as in `local_ce`. The rule is ours: the size needs no backward pass, and the sign needs one that
    ends at the block.

    >>> HebbianLocal().groups(blocks=2)
    [range(0, 1), range(1, 3)]
    """

    temperature: PositiveFloat = 1.0
    """Factor t of the outputs in the softmax over channels."""

    name: ClassVar[str] = "hebbian_local"
    begins_with_batch: ClassVar[bool] = True
    whole_batch: ClassVar[str] = WHOLE_BATCH
    source: ClassVar[str] = "ours; the size of the update: GHL, arXiv 2601.21367 (2026)"
    restrictions: ClassVar[str] = (
        "Weights of blocks outside linear layers and convolutions follow their gradient. torch.compile is refused."
    )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message collects inputs and outputs of a block's layers."""
        return ctx.x, []

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block and record the inputs and outputs of its layers."""
        return run_and_note(block, h, message)

    def signal(self, ctx: BlockContext) -> Signal:
        """The gradients of the block's own loss with their sizes replaced; the next block starts a new record."""
        signal = super().signal(ctx)
        if signal.loss is None:
            return replace(signal, message=ctx.message)
        if ctx.learns:
            signal = with_hebbian_sizes(ctx, signal, self.temperature)
        return replace(signal, message=[])


def run_and_note(block: Block, h: Tensor, message: Any) -> Tensor:
    """Run a block; if a graph is recorded, inputs and outputs of linear layers and convolutions join the message."""
    if message is None or not torch.is_grad_enabled():
        return block(h)

    def see(layer: nn.Module, x: Tensor, out: Tensor) -> None:
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            message.append((layer, x.detach(), out.detach(), x._version, out._version))

    with seeing_layers(block, see):
        return block(h)


def with_hebbian_sizes(ctx: BlockContext, signal: Signal, temperature: float) -> Signal:
    """The signal with gradients instead of its loss: those of the loss, with Hebbian sizes in the blocks' layers."""
    assert signal.loss is not None
    assert ctx.site.network is not None
    sites = ctx.site.network.sites
    modules = [sites[index] for index in ctx.view] + ([] if ctx.auxiliary is None else [ctx.auxiliary])
    own = [p for module in modules for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(signal.loss, own, allow_unused=True)
    gradients: dict[Tensor, Tensor] = {p: g for p, g in zip(own, found, strict=True) if g is not None}
    head = {id(p) for p in ctx.site.network.head.parameters()}
    sizes = hebbian_updates(as_they_were(ctx.message), temperature)
    for weight, size in sizes.items():
        if weight in gradients and id(weight) not in head:
            gradients[weight] = size.abs() / size.abs().amax().clamp_min(1e-30) * gradients[weight].sign()
    loss = signal.metrics.get("loss", signal.loss)
    return replace(signal, loss=None, gradients=gradients, metrics={**signal.metrics, "loss": loss})


@torch.no_grad()
def as_they_were(noted: Sequence[tuple[nn.Module, Tensor, Tensor, int, int]]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Layers with their inputs and outputs; an output that a later layer has overwritten is computed again.

    Args:
        noted: the same, with the version of both tensors at that time.

    Raises:
        LayerwiseError: an input was overwritten too.
    """
    found = []
    for layer, x, out, version_in, version_out in noted:
        if x._version != version_in:
            raise LayerwiseError(
                f"the input of a {type(layer).__name__} is overwritten by an operation after it, and the rule needs "
                "it; give the network an operation that is not in-place."
            )
        found.append((layer, x, out if out._version == version_out else type(layer).forward(layer, x)))
    return found


@torch.no_grad()
def hebbian_updates(calls: Sequence[tuple[nn.Module, Tensor, Tensor]], temperature: float) -> dict[Tensor, Tensor]:
    """Soft winner-take-all Oja updates of weights, by weight, summed over the calls of a layer.

    Args:
        calls: layers with their inputs and outputs.
        temperature: factor of the outputs in the softmax.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.eye(2))
    >>> x = torch.tensor([[1.0, 1.0]])
    >>> hebbian_updates([(layer, x, layer(x))], 1.0)[layer.weight]
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    """
    found: dict[Tensor, Tensor] = {}
    for layer, x, out in calls:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        linear = isinstance(layer, nn.Linear)
        bias = layer.bias
        channels = -1 if linear else 1
        shape = (-1,) if linear else (-1, *(1,) * (out.dim() - 2))
        u = out if not isinstance(bias, Tensor) else out - bias.view(shape).to(out.dtype)
        v = torch.softmax(temperature * u, channels)
        grown = layer_gradients(layer, x.to(v.dtype), v)[weight]
        others = [d for d in range(out.dim()) if d != channels % out.dim()]
        decay = (v * u).sum(others).view(-1, *(1,) * (weight.dim() - 1))
        update = grown - decay * weight
        found[weight] = found[weight] + update if weight in found else update
    return found
