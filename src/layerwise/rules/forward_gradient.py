"""Forward gradients: the slope of the loss along random directions, by forward-mode differentiation."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Block
from layerwise.core.functional import pool_features
from layerwise.core.layers import layer_gradients, seeing_layers
from layerwise.core.perturbed_layers import (
    Perturbed,
    Seen,
    add_all,
    as_tangent,
    differentiable_forward,
    error_without_graph,
    estimated,
    tangent_of,
)
from layerwise.core.ranges import PositiveInt
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head, metrics_of
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError


class Slopes:
    """The message to all blocks: the directions, each with the slope of the loss along it."""

    def __init__(self, directions: list[Perturbed]):
        self.directions = directions
        self.slopes: list[Tensor] = []


@dataclass(frozen=True)
class ForwardGradient(Rule):
    r"""Forward gradients: a random direction, times the slope of the loss along it; no backward pass.

    Forward-mode differentiation gives the slope in the forward pass itself. With `mode="weights"` and K directions v
    of all weights

    $$\hat g = \frac1K \sum_k \langle \nabla L, v_k\rangle\, v_k, \qquad v_k \sim N(0, I)$$

    whose expectation is the gradient. With `mode="activities"` outputs of layers are perturbed instead of weights,
    each sample by a direction u of its own, and the sample's own slope $s_n$ says how its outputs should have been:
    $\nabla_W = \frac1K \sum_k \sum_n s_{kn} u_{kn} x_n^\top$; the variance grows with units, not with weights. With
    `mode="local"` every block has a linear readout and a loss of its own, and slopes are those of this loss, so that
    few units are perturbed at a time. Readouts and the output layer have their true gradients.

    With `orthogonal` the K directions of the weights are orthogonal, with length sqrt(P) for P weights:
    $\hat g = \frac{P}{K} \sum_k \langle\nabla L, q_k\rangle q_k$ with orthonormal q. P of them give the gradient.

    >>> ForwardGradient().locality, ForwardGradient(mode="weights").locality
    ('local', 'perturbation')
    """

    mode: Literal["local", "activities", "weights"] = "local"
    """What is perturbed: outputs of layers, for a loss per block | the same, for the network's loss | all weights."""
    tangents: PositiveInt = 1
    """Directions K whose estimates are averaged; each takes a forward pass."""
    orthogonal: bool = False
    """Whether the directions of the weights are orthogonal; all of them are kept then."""

    name: ClassVar[str] = "forward_gradient"
    locality: ClassVar[Locality] = "local"
    boundary: ClassVar[str] = "detached activation"
    flat_memory: ClassVar[bool] = True
    builds_graph: ClassVar[bool] = False
    runs_once: ClassVar[bool] = False
    begins_with_batch: ClassVar[bool] = True
    whole_batch: ClassVar[str] = "takes slopes of the mean over the whole batch"
    tasks: ClassVar[tuple[str, ...]] = ("classification", "language_model", "soft_labels")
    only: ClassVar[str] = "it knows the error at the outputs in closed form for classes alone"
    unlabelled: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Baydin et al., arXiv 2202.08587 (2022): weights; Ren et al., arXiv 2210.03310 (2023): activities, local "
        "losses, with whole blocks in place of patches and groups; arXiv 2410.17764 (2024): orthogonal"
    )
    restrictions: ClassVar[str] = (
        "The variance grows with the number of perturbed values, so learning rates are small. Batch norm couples "
        "samples, whose slopes are taken one by one, so that estimates by activities are biased there. Operations need "
        "torch's forward mode, which compiled blocks and most fused kernels lack."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orthogonal and self.mode != "weights":
            raise LayerwiseError('orthogonal=True is for mode="weights", whose directions all samples share.')
        if self.mode != "local":
            object.__setattr__(self, "locality", "perturbation")
            object.__setattr__(self, "boundary", "activations forward; a slope per direction, sent to all")

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """The readout of a block with a loss of its own."""
        if self.mode != "local" or site.is_head:
            return None
        return nn.Linear(self._features(h, site, task).shape[-1], task.outputs, dtype=h.dtype)

    @staticmethod
    def _features(h: Tensor, site: Site, task: Task) -> Tensor:
        return pool_features(site.standard(h), "none" if task.positions == "token" else "mean")

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The batch; the message holds the slopes along the directions, measured by passes made here."""
        if self.mode == "local":
            return ctx.x, None
        blocks = ctx.network.sites
        sent = Slopes(self._directions(blocks, ctx.network.output_layer))
        for direction in sent.directions:
            with differentiable_forward():
                h = ctx.x
                for index in range(len(blocks)):
                    h = ctx.run(index, h, direction)
                rows = error_without_graph(ctx.task, _primal(h), ctx.y) * tangent_of(h)
                sent.slopes.append(rows.flatten(1).sum(1) / self.tangents)
        return ctx.x, sent

    def _directions(self, blocks: list[Block], output: nn.Module | None) -> list[Perturbed]:
        """The directions of a step."""
        first = int(torch.randint(2**62, (), device="cpu"))
        seeds = range(first, first + self.tangents)
        if self.mode != "weights":
            return [Perturbed(seed, as_tangent, exact=[output]) for seed in seeds]
        if not self.orthogonal:
            return [Perturbed(seed, as_tangent, weights=True) for seed in seeds]
        parameters: list[Tensor] = [p for block in blocks for p in block.parameters()]
        total = sum(p.numel() for p in parameters)
        if self.tangents > total:
            raise LayerwiseError(
                f"{self.tangents} orthogonal directions do not fit into {total} weights; ask for {total} at most."
            )
        drawn = torch.randn(total, self.tangents, dtype=parameters[0].dtype, device=parameters[0].device)
        basis = torch.linalg.qr(drawn)[0].T * total**0.5
        parts = basis.split([p.numel() for p in parameters], dim=1)
        given = [{p: part[k].view_as(p) for p, part in zip(parameters, parts, strict=True)} for k in range(len(basis))]
        return [Perturbed(seed, as_tangent, weights=True, given=own) for seed, own in zip(seeds, given, strict=True)]

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block, along a direction in the passes that measure slopes."""
        return message.run(block, h, block) if isinstance(message, Perturbed) else block(h)

    def signal(self, ctx: BlockContext) -> Signal:
        """The estimate: slopes times directions, and the true gradient of readouts and the output layer."""
        signal = loss_at_head(ctx) if ctx.site.is_head else Signal(message=ctx.message)
        if self.mode == "local" and not ctx.site.is_head:
            outputs = self._read(ctx, ctx.h)
            loss = ctx.task.loss(outputs, ctx.y)
            metrics, statistics = metrics_of(ctx.task, outputs, ctx.y, loss)
            signal = Signal(loss=loss, metrics=metrics, statistics=statistics)
        if ctx.learns:
            network = ctx.site.network
            assert network is not None
            assert ctx.run is not None
            block = ctx.site.block
            if self.mode == "local":
                self._own_slopes(ctx, block, network.output_layer, signal)
            else:
                self._slopes_of_all(ctx, block, signal)
            if ctx.site.is_head and self.mode != "weights":
                self._exact(ctx, block, network.output_layer, signal)
        return signal

    def _read(self, ctx: BlockContext, h: Tensor) -> Tensor:
        """Outputs of the block's readout; of the network at the head."""
        if ctx.auxiliary is None:
            return h
        return ctx.auxiliary(self._features(h, ctx.site, ctx.task))

    def _own_slopes(self, ctx: BlockContext, block: Block, output: nn.Module | None, signal: Signal) -> None:
        """Slopes of the block's own loss."""
        assert ctx.run is not None
        error = error_without_graph(ctx.task, self._read(ctx, ctx.h), ctx.y)
        for direction in self._directions([block], output):
            seen = Seen()
            with differentiable_forward():
                h = direction.run(block, ctx.h_in, lambda h: ctx.run(h, None), seen)  # pyright: ignore[reportOptionalCall]
                rows = error * tangent_of(self._read(ctx, h))
                slopes = rows.flatten(1).sum(1) / self.tangents
            estimated(_primals(seen), slopes, signal.gradients)
        if ctx.auxiliary is not None:
            features = self._features(ctx.h, ctx.site, ctx.task)
            add_all(signal.gradients, layer_gradients(ctx.auxiliary, features, error.to(features.dtype)))

    def _slopes_of_all(self, ctx: BlockContext, block: Block, signal: Signal) -> None:
        """Slopes that are sent to all blocks."""
        for direction, slopes in zip(ctx.message.directions, ctx.message.slopes, strict=True):
            if self.mode == "weights":
                seen = Seen()
                for holder, name, place in direction.parameters(block):
                    seen.weights.append((holder._parameters[name], direction.direction(block, holder, name, place)))
            else:
                seen = Seen()
                quiet = Perturbed(direction.seed, lambda value, _: value.clone(), exact=direction.exact)
                quiet.run(block, ctx.h_in, lambda h: ctx.run(h, None), seen)  # pyright: ignore[reportOptionalCall]
            estimated(seen, slopes, signal.gradients)

    @staticmethod
    def _exact(ctx: BlockContext, block: Block, output: nn.Module | None, signal: Signal) -> None:
        """The output layer's true gradient."""
        if output is None or ctx.run is None:
            return

        def see(layer: nn.Module, x: Tensor, out: Tensor) -> None:
            if layer is output:
                error = error_without_graph(ctx.task, ctx.h, ctx.y).to(out.dtype)
                add_all(signal.gradients, layer_gradients(layer, x, error))

        with seeing_layers(block, see):
            ctx.run(ctx.h_in, None)


def _primal(value: Tensor) -> Tensor:
    return torch.autograd.forward_ad.unpack_dual(value).primal


def _primals(seen: Seen) -> Seen:
    """The record of a run, without tangents."""
    calls = [
        replace(
            call, x=_primal(call.x), out=call.direction, active=None if call.active is None else _primal(call.active)
        )
        for call in seen.calls
    ]
    return Seen(calls, seen.weights)
