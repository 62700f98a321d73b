"""PEPITA: two forward passes, the second with the error in its input, and no backward pass."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.layers import CONVOLUTIONS, NORMS, has_gradients, is_plain_chain, layer_gradients, seeing_layers
from layerwise.core.perturbed_layers import add_all, error_without_graph
from layerwise.core.ranges import Fraction, PositiveFloat
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError


class ErrorProjection(nn.Module):
    """The matrix F that projects an error `(B, K)` onto the input `(B, ...)`."""

    def __init__(self, matrix: Tensor, learns: bool):
        super().__init__()
        self.name = "running_matrix" if learns else "matrix"
        self.register_buffer(self.name, matrix)

    def current(self) -> Tensor:
        """F as it is now, `(K, ...)`."""
        return self.get_buffer(self.name)


@dataclass
class Passed:
    """A layer in one pass: its input, and its activity, the last output of its shape before the next such layer."""

    layer: nn.Module
    x: Tensor
    out: Tensor
    activity: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.activity = self.out


@dataclass(frozen=True)
class Pepita(Rule):
    r"""PEPITA: layers learn from how their activities change when the error is added to the input.

    A first pass gives activities h and the error $e = \mathrm{softmax}(z) - y$, a second one starts from $x' = x + F e$
    with a fixed random F and gives h', with the same draws of dropout:

    $$\nabla_{W_l} = \frac1B \sum_n (h_l - h'_l)\, h'^\top_{l-1}, \qquad
      \nabla_{W_{out}} = \frac1B \sum_n e'\, h'^\top_{L-1}$$

    with $h'_0 = x'$. No derivative appears; the difference of activities, after the activation function, contains it.
    With `time_local` the presynaptic activity is that of the first pass, so that a layer needs no second look at its
    input. Since $h_1 - h'_1 \approx -f' W_1 F e$, the rule is feedback alignment with matrices
    $-W_l \dots W_1 F$ that change as the network learns.

    With `mirror` F learns from noise: a pass of noise $\xi$ gives outputs z, and F moves towards
    $-E[\xi\, (z - \bar z)^\top]$, scaled to its own norm, which is minus the product of the weights, transposed.

    >>> Pepita().groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    scale: PositiveFloat = 0.05
    """Factor of F, whose numbers are uniform in plus or minus sqrt(6 / inputs) times this."""
    time_local: bool = False
    """Whether a layer's input is that of the first pass."""
    mirror: Fraction = 0.0
    """Fraction by which F moves towards the mirrored weights in each step; 0 for a fixed F."""

    name: ClassVar[str] = "pepita"
    locality: ClassVar[Locality] = "broadcast"
    boundary: ClassVar[str] = "detached activations of two passes; the error, sent only to the input"
    flat_memory: ClassVar[bool] = True
    builds_graph: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    whole_batch: ClassVar[str] = "begins with two passes of the whole batch"
    tasks: ClassVar[tuple[str, ...]] = ("classification", "soft_labels")
    only: ClassVar[str] = "it adds the error of a sample's classes to its input"
    reads_input: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Dellaferrera & Kreiman, arXiv 2201.11665 (2022); Srinivasan et al., arXiv 2302.05440 (2023): mirror, "
        "time_local; blocks that pool before the activation, the scaling of mirror: our reading"
    )
    restrictions: ClassVar[str] = (
        "Chains of linear layers, convolutions, norms and activations; no transformer, no skip connection. Learns "
        "little beyond three layers, and diverges with a large scale. Inputs must be real numbers."
    )

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """F, at the first block; refuses blocks that are not chains of layers."""
        if not is_plain_chain(site.block):
            raise LayerwiseError(
                f"pepita is defined for chains of linear layers, convolutions and norms, and block {site.name!r} is "
                "none; choose a rule such as feedback_alignment."
            )
        if site.index > 0:
            return None
        inputs = torch.Size(site.inputs)
        bound = self.scale * (6 / inputs.numel()) ** 0.5
        return ErrorProjection(
            bound * (2 * torch.rand(task.outputs, *inputs, dtype=h.dtype) - 1), learns=self.mirror > 0
        )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch with the projected error; the message is the batch itself, and the target of F."""
        if ctx.y.dim() > (2 if ctx.y.is_floating_point() else 1):
            raise LayerwiseError("pepita adds a sample's error to its input: one label per sample, not per position.")
        error = ctx.task.counted(ctx.y, False) * error_without_graph(ctx.task, ctx.forward(ctx.x), ctx.y)
        projection, first = ctx.auxiliary[0], ctx.network.blocks[0]
        assert isinstance(projection, ErrorProjection)
        if first.before is not None:
            first.before()  # an offloaded block has to be fetched, and F with it
        matrix = projection.current()
        towards = self._mirrored(ctx, matrix) if self.mirror and ctx.training else None
        return ctx.x + torch.tensordot(error.to(matrix.dtype), matrix, dims=1).to(ctx.x.dtype), (ctx.x, towards)

    @staticmethod
    def _mirrored(ctx: BatchContext, matrix: Tensor) -> Tensor:
        """Minus the correlation of noise and the resulting output, with the norm of F."""
        noise = torch.randn_like(ctx.x)
        z = ctx.forward(noise)
        if ctx.network.blocks[0].before is not None:
            ctx.network.blocks[0].before()
        found = -torch.tensordot((z - z.mean(0)).to(matrix.dtype).T, noise.to(matrix.dtype), dims=1)
        return found * (matrix.norm() / found.norm().clamp_min(1e-12))

    def signal(self, ctx: BlockContext) -> Signal:
        """The differences of activities, times the inputs of the layers."""
        assert ctx.run is not None
        block = ctx.site.block
        x, towards = ctx.message
        clean, clean_out = self._passed(block, ctx, x)
        signal = loss_at_head(replace(ctx, h=clean_out)) if ctx.site.is_head else Signal()
        signal = replace(signal, message=(clean_out, None))
        if not ctx.learns:
            return signal
        if towards is not None:  # here and not in `begin`: a skipped update restores the block's buffers
            assert isinstance(ctx.auxiliary, ErrorProjection)
            ctx.auxiliary.current().lerp_(towards, self.mirror)
        modulated, _ = self._passed(block, ctx, ctx.h_in)
        for before, after in zip(clean, modulated, strict=True):
            if ctx.site.is_head and after is modulated[-1] and after.out.shape == ctx.h.shape:
                change = error_without_graph(ctx.task, ctx.h, ctx.y).to(after.out.dtype)
            else:
                places = after.out.shape[2:].numel()
                change = (before.activity - after.activity) / (len(after.out) * places)
            if isinstance(after.layer, NORMS):
                change = torch.zeros_like(change)  # scale and shift stay, as in the paper's code
            got = before.x if self.time_local else after.x
            add_all(signal.gradients, layer_gradients(after.layer, got, change))
        return signal

    @staticmethod
    def _passed(block: Block, ctx: BlockContext, h: Tensor) -> tuple[list[Passed], Tensor]:
        """Inputs and activities of a block's layers in a pass, and the block's output."""
        found: list[Passed] = []

        def see(layer: nn.Module, x: Tensor, out: Tensor) -> None:
            connects = isinstance(layer, (nn.Linear, *CONVOLUTIONS))
            for call in reversed(found) if not connects else ():
                if out.shape == call.out.shape:
                    call.activity = out
                if isinstance(call.layer, (nn.Linear, *CONVOLUTIONS)):
                    break
            if has_gradients(layer) and any(True for _ in layer.parameters()):
                found.append(Passed(layer, x, out))

        with seeing_layers(block, see):
            out = ctx.run(h, None)  # pyright: ignore[reportOptionalCall]
        return found, out
