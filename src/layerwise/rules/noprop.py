"""NoProp: networks learn to denoise a label, in discrete time, in continuous time, and by flow matching."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.core.blocks import Block, Partition
from layerwise.core.functional import (
    denoising_step,
    integrate,
    medoid,
    mixture,
    prior_divergence,
    side_by_side,
    signal_share,
    squared_distances,
    wide,
)
from layerwise.core.pieces import StartsFromData
from layerwise.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from layerwise.core.rule import BatchContext, BlockContext, Locality, Rule, Signal, Site, loss_at_head
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError


def embedding(block: Block) -> Tensor:
    """Embeddings of the classes U `(K, D)`: the head's own, or a block's copy of them."""
    return block.tensor(f"{block.name}.embedding")


def embedding_at(site: Site) -> Tensor:
    """Embeddings of the classes at a site: the head's own, or a block's copy of them."""
    return embedding(site.block)


def drawn(p: Tensor, share: Tensor | float, size: int) -> tuple[Tensor, Tensor]:
    r"""Both parts of a draw of $z \sim N(\sqrt{\bar\alpha}\, p U, (1 - \bar\alpha) I)$ of length `size`, p `(B, K)`."""
    share = torch.as_tensor(share, dtype=p.dtype, device=p.device)
    return share.sqrt() * p, (1 - share).sqrt() * torch.randn(len(p), size, device=p.device)


def times(p: Tensor) -> Tensor:
    """A time from U(0, 1) for each of the samples `(B, ...)`, `(B, 1)`; together they are spread evenly."""
    places = torch.arange(len(p), device=p.device) / len(p)
    return ((torch.rand(1, device=p.device) + places) % 1)[:, None]


def divided(state: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, r and the image of a state `[p | r | x]`."""
    classes, size = u.shape
    return state[:, :classes], state[:, classes : classes + size], state[:, classes + size :]


@dataclass(frozen=True)
class Denoising(StartsFromData, Rule):
    """Base of the three rules: their own model, and embeddings that are learned in one place."""

    locality: ClassVar[Locality] = "local"
    flat_memory: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    only: ClassVar[str] = "its blocks denoise the embedding of a class"

    def auxiliary(self, site: Site, h: Tensor, task: Task) -> nn.Module | None:
        """No module; refuses a network that does not pass on a state."""
        (kind,), network = self.models, site.network
        assert network is not None
        cut = [block.name for block in network.sites]
        children = [name for name, _ in network.model.named_children()]
        first = getattr(network.model, "block1", None)
        if getattr(first, "trained_as", None) != kind or cut != children:
            raise LayerwiseError(
                f"rule {self.name!r} trains the model {kind!r}, cut and mixed as it comes (--model {kind}, no --cuts, "
                "--blocks or --model.mixing)."
            )
        return None

    def prepare(self, network: Partition, x: Tensor, y: Tensor) -> None:
        """Set prototypes: a class is embedded as the image of it whose median distance to the others is smallest.

        Raises:
            LayerwiseError: a class has no image.
        """
        if not getattr(network.model.head, "from_data", False):
            return
        u = embedding(network.head)
        for k in range(len(u)):
            images = x[y == k].flatten(1)
            if not bool(torch.isfinite(images).all()):
                raise LayerwiseError(
                    f"prototypes start as images of their classes, and one of class {k} holds NaN or infinity; begin "
                    "with other samples, or show some to Learner.prepare."
                )
            if not len(images):
                raise LayerwiseError(
                    f"prototypes start as images of their classes, and class {k} has none among the {len(x)} samples "
                    "seen before the first step; give larger batches, or more samples to Learner.prepare."
                )
            u[k] = images[medoid(images)]

    def shared(self, network: Partition) -> Tensor | None:
        """The copy of the embeddings that the blocks get at the start of a step; None if they are fixed."""
        u = embedding(network.head)
        return u.detach().clone() if u.requires_grad else None

    def run(self, block: Block, h: Tensor, message: Any) -> Tensor:
        """Run a block with the copy of the embeddings that it was given."""
        u = (message or {}).get("embedding")
        if u is not None and block.name != "head":
            embedding(block).copy_(u)
        return block(h)

    def signal_at_head(self, ctx: BlockContext, share: Tensor | float) -> Signal:
        r"""Cross-entropy; if embeddings learn, also $KL(q(z_0|y) \,\|\, N(0, I))$ with `share` $\bar\alpha_0$."""
        signal, u = loss_at_head(ctx), embedding_at(ctx.site)
        if u.requires_grad and signal.loss is not None:
            signal.loss = signal.loss + prior_divergence(u[ctx.y], share).mean()
        return signal


@dataclass(frozen=True)
class NoPropDT(Denoising):
    r"""NoProp, discrete time: block t gets a noisy label and the image, and learns to denoise the label.

    With $u_y$ the embedding of the label, $z_{t-1} \sim N(\sqrt{\bar\alpha_{t-1}}\, u_y, 1 - \bar\alpha_{t-1})$ drawn
    again for every block, and $\hat u_t(z_{t-1}, x)$ a mean of the embeddings under a softmax, block t of T minimises

    $$L_t = \tfrac{T}{2}\, \eta\, (SNR(t) - SNR(t-1))\, \| \hat u_t(z_{t-1}, x) - u_y \|^2, \qquad
      SNR(t) = \bar\alpha_t / (1 - \bar\alpha_t)$$

    and the head the cross-entropy on a draw of $z_T$ and $KL(q(z_0|y) \,\|\, N(0, I))$. What a block gets depends on
    sample, label and its own draw, but on no other block: blocks may be trained in any order. Prediction starts from
    $z_0 \sim N(0, I)$ and runs $z_t = A_t \hat u_t + B_t z_{t-1} + \sqrt{C_t}\, \epsilon$ through all blocks.

    The objective, the weights, the sampler and $\eta = 0.1$ are the paper's. Ours: the end points of the cosine
    schedule; blocks learn side by side, batch by batch (the paper: one block after the other within an epoch); sizes of
    the model; and who trains embeddings that are learned. In the paper every loss moves them. Here they belong to the
    head, and only its loss moves them; a block reads the copy that it was given at the start of the step.

    It trains the model `noprop`.

    >>> NoPropDT().groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    eta: PositiveFloat = 0.1
    """Factor eta of every block's loss."""

    name: ClassVar[str] = "noprop_dt"
    models: ClassVar[tuple[str, ...]] = ("noprop",)
    whole_batch: ClassVar[str] = "sends embeddings of the classes from block to block"
    boundary: ClassVar[str] = (
        "the input; in prediction a noisy label too; learned embeddings, from the head to the blocks"
    )
    source: ClassVar[str] = (
        "Li, Teh & Pascanu, arXiv 2503.24322 (2025); end points of the schedule, order of training, who trains the "
        "embeddings, sizes: our reading"
    )
    predicts_at_head: ClassVar[bool] = True
    restrictions: ClassVar[str] = (
        "Trains the model noprop only; every block embeds the image again. The accuracy of the head in training is "
        "that of a noisy label, not of a prediction."
    )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """The state of the first block: a draw of z_0 and the image."""
        (classes, size), network = embedding(ctx.network.head).shape, ctx.network
        hot = F.one_hot(ctx.y, classes).float()
        if ctx.training:
            return side_by_side(*drawn(hot, signal_share(0, len(network.blocks)), size), ctx.x), {
                "embedding": self.shared(network)
            }
        return side_by_side(*drawn(0 * hot, 0.0, size), ctx.x), None

    def loss_weight(self, site: Site) -> float:
        """Factor of the squared distance at the block of step t = site.index + 1."""
        shares = (signal_share(site.index + more, site.blocks) for more in (0, 1))
        before, after = (share / (1 - share) for share in shares)
        return site.blocks / 2 * self.eta * (after - before)

    def signal(self, ctx: BlockContext) -> Signal:
        """Squared distance of the block's label from the true one; passes on another draw, or the sampler's next z."""
        t, steps, u = ctx.site.index + 1, ctx.site.blocks, embedding_at(ctx.site)
        if ctx.site.is_head:
            return self.signal_at_head(ctx, signal_share(0, steps))
        a, _, c = denoising_step(t, steps)
        p, r, x = divided(ctx.h, u)
        distance = mixture(p / a - ctx.task.distribution(ctx.y), u).square().sum(1)
        if ctx.training:
            p_next, r_next = drawn(F.one_hot(ctx.y, len(u)).to(p), signal_share(t, steps), u.shape[1])
        else:
            p_next, r_next = p, r + c**0.5 * torch.randn_like(r)
        return Signal(
            loss=self.loss_weight(ctx.site) * distance.mean(),
            message=ctx.message,
            output=side_by_side(p_next, r_next, x),
            metrics={"accuracy": ctx.task.accuracy(p, ctx.y)},
        )

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logits `(B, K)` after a run of the sampler."""
        steps, u = len(network.blocks), embedding(network.head)
        h = side_by_side(*drawn(x.new_zeros(len(x), len(u)).float(), 0.0, u.shape[1]), x)
        for t, block in enumerate(network.blocks, 1):
            p, r, image = divided(block(h), u)
            h = side_by_side(p, r + denoising_step(t, steps)[2] ** 0.5 * torch.randn_like(r), image)
        return network.head(h)


@dataclass(frozen=True)
class _AnyTime(Denoising):
    """One network, which gets the time as an input."""

    steps: PositiveInt | None = None
    """Steps of the sampler; the model's depth if not given. The paper takes 1000."""
    solver: Literal["euler", "heun"] = "euler"
    """Solver of the sampler; `heun` runs the network twice per step."""

    whole_batch: ClassVar[str] = "sends embeddings of the classes from block to block"
    boundary: ClassVar[str] = "the input and a noisy label; learned embeddings, from the head to the block"

    def sampled(self, network: Partition, velocity: Any, u: Tensor, x: Tensor) -> Tensor:
        """z_1 `(B, D)`, from z_0 ~ N(0, I) along a velocity of (z, t)."""
        steps = self.steps or vars(network.model.get_submodule("block1"))["steps"]
        z = torch.randn(len(x), u.shape[1], dtype=wide(x[:0]).dtype, device=x.device)
        return integrate(velocity, z, steps, self.solver)


@dataclass(frozen=True)
class NoPropCT(_AnyTime):
    r"""NoProp, continuous time: one network gets a time, a noisy label and the image, and learns to denoise the label.

    With $u_y$ the embedding of the label, $t \sim U(0, 1)$ for every sample,
    $z_t \sim N(\sqrt{\bar\alpha(t)}\, u_y, 1 - \bar\alpha(t))$ and $\hat u(z_t, x, t)$ a mean of the embeddings under a
    softmax, the block minimises

    $$\tfrac12\, \eta\, SNR'(t)\, \| \hat u(z_t, x, t) - u_y \|^2, \qquad SNR = \bar\alpha / (1 - \bar\alpha)$$

    and the head the cross-entropy on a draw of $z_1$; $KL(q(z_0|y) \,\|\, N(0, I))$ is added if what it depends on
    is learned. Prediction follows the ordinary differential equation of the diffusion from $z_0 \sim N(0, I)$:

    $$\frac{dz}{dt} = \tfrac12 \frac{d \log SNR}{dt} \big( \sqrt{\bar\alpha}\, \hat u(z, x, t) - \bar\alpha z \big)$$

    Objective, weights, schedules, $\eta = 1$ are the paper's. Ours: the solver; sizes; times that are spread evenly
    over a batch; and who trains what. In the paper one loss moves everything. Here embeddings belong to the head and
    move by cross-entropy and KL; a learned schedule belongs to the block and moves by its loss and KL, with $SNR(1)$
    fixed, because its cost falls on the head.

    It trains the model `noprop_ct`, which holds the schedule.

    >>> NoPropCT(steps=1000).groups(blocks=1)
    [range(0, 1), range(1, 2)]
    """

    eta: PositiveFloat = 1.0
    """Factor eta of the block's loss."""

    name: ClassVar[str] = "noprop_ct"
    models: ClassVar[tuple[str, ...]] = ("noprop_ct",)
    source: ClassVar[str] = (
        "Li, Teh & Pascanu, arXiv 2503.24322 (2025); who trains the embeddings and the schedule, solver, sizes: "
        "our reading"
    )
    restrictions: ClassVar[str] = (
        "Trains the model noprop_ct only: one block and its head. Inside the block it is backprop; the number of "
        "denoising steps takes no memory. Predicting runs the block once per step. Accuracies in training are those of "
        "noisy labels, not of predictions."
    )

    def schedule(self, network: Partition, t: Tensor) -> tuple[Tensor, Tensor]:
        """Log SNR and its derivative at times `(B, 1)`."""
        return network.model.get_submodule("block1.schedule")(t)

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """A time, the label and noise, which the block mixes; in evaluation only noise, at t = 0."""
        (classes, size), training = embedding(ctx.network.head).shape, ctx.training
        p = F.one_hot(ctx.y, classes).float() * training
        t = times(p) * training
        message = {"embedding": self.shared(ctx.network)} if training else None
        return side_by_side(t, p, torch.randn(len(p), size, device=p.device), ctx.x), message

    def signal(self, ctx: BlockContext) -> Signal:
        """Squared distance of the block's label from the true one; passes on a draw of z_1."""
        if ctx.site.is_head:
            return self.signal_at_head(ctx, ctx.message["share"])
        assert ctx.site.network is not None
        u, t = embedding_at(ctx.site), ctx.h_in[:, :1]
        p, _, x = divided(ctx.h, u)
        log_snr, slope = self.schedule(ctx.site.network, t)
        distance = mixture(p - ctx.task.distribution(ctx.y), u).square().sum(1, keepdim=True)
        loss = self.eta / 2 * (slope * log_snr.exp() * distance).mean()
        first, last = self.schedule(ctx.site.network, torch.tensor([[0.0], [1.0]], device=t.device))[0].sigmoid()[:, 0]
        if first.requires_grad:
            loss = loss + prior_divergence(u[ctx.y], first).mean()
        draw = side_by_side(*drawn(F.one_hot(ctx.y, len(u)).to(p), last.detach(), u.shape[1]), x)
        return Signal(
            loss=loss,
            message={"share": first},
            output=draw if ctx.training else None,
            metrics={"accuracy": ctx.task.accuracy(p, ctx.y)},
        )

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logits `(B, K)` of the head at the solution of the equation."""
        u = embedding(network.head)
        none = torch.zeros(len(x), len(u), device=x.device)

        def velocity(z: Tensor, time: float) -> Tensor:
            t = torch.full_like(z[:, :1], time)
            log_snr, slope = self.schedule(network, t)
            share = log_snr.sigmoid()
            p, _, _ = divided(network.blocks[0](side_by_side(t, none, z / (1 - share).sqrt(), x)), u)
            return slope / 2 * (share.sqrt() * mixture(p, u) - share * z)

        return network.head(side_by_side(none, self.sampled(network, velocity, u, x), x))


@dataclass(frozen=True)
class NoPropFM(_AnyTime):
    r"""NoProp with flow matching: one network gets a time, a label between noise and class, the image; it learns v.

    With $u_y$ the embedding of the label, $z_0 \sim N(0, I)$, $t \sim U(0, 1)$ for every sample and
    $z_t \sim N(t\, u_y + (1 - t)\, z_0, \sigma^2)$, the block minimises

    $$\| v(z_t, x, t) - (u_y - z_0) \|^2$$

    and the head the cross-entropy on $\tilde z_1 = z_t + (1 - t)\, v$. Prediction follows $dz/dt = v(z, x, t)$ from
    $z_0 \sim N(0, I)$ to the nearest embedding.

    Objective and predictor are the paper's. Ours: $\sigma$; the solver; sizes; times that are spread evenly over a
    batch; the head learns for one-hot labels too (the paper needs none); and who trains what. In the paper both
    terms move everything. Here embeddings belong to the head and move by its cross-entropy, which does not reach v.

    It trains the model `noprop_fm`.

    >>> NoPropFM(steps=1000).groups(blocks=1)
    [range(0, 1), range(1, 2)]
    """

    sigma: NonNegativeFloat = 0.1
    """Standard deviation of the noise around the path from z_0 to the embedding."""
    predictor: Literal["nearest", "head"] = "nearest"
    """How the class is chosen at the end of the path: by the nearest embedding, or the head."""

    name: ClassVar[str] = "noprop_fm"
    models: ClassVar[tuple[str, ...]] = ("noprop_fm",)
    source: ClassVar[str] = (
        "Li, Teh & Pascanu, arXiv 2503.24322 (2025); who trains the embeddings, sigma, solver, sizes: our reading"
    )
    restrictions: ClassVar[str] = (
        "Trains the model noprop_fm only: one block and its head. Inside the block it is backprop; the number of "
        "steps takes no memory. Predicting runs the block once per step. Accuracies in training are those of noisy "
        "labels, not of predictions."
    )

    def begin(self, ctx: BatchContext) -> tuple[Tensor, Any]:
        """A time, the label's share of z_t and the rest of it; in evaluation only z_0, at t = 0."""
        (classes, size), training = embedding(ctx.network.head).shape, ctx.training
        hot = F.one_hot(ctx.y, classes).float()
        t, origin = times(hot) * training, torch.randn(len(hot), size, device=hot.device)
        r = (1 - t) * origin + self.sigma * training * torch.randn_like(origin)
        message = {"origin": origin, "embedding": self.shared(ctx.network) if training else None}
        return side_by_side(t, t * hot, r, ctx.x), message

    def signal(self, ctx: BlockContext) -> Signal:
        """Squared distance of the velocity from the direction to the label; passes on its end point at t = 1."""
        if ctx.site.is_head:
            return loss_at_head(ctx)
        u, t = embedding_at(ctx.site), ctx.h_in[:, :1]
        v, _, x = divided(ctx.h, u)
        p, r, _ = divided(ctx.h_in[:, 1:], u)
        p = p + (1 - t) * v
        wanted = mixture(ctx.task.distribution(ctx.y), u) - ctx.message["origin"]
        loss = (mixture(v, u) - wanted).square().sum(1).mean()
        accuracy = ctx.task.accuracy(self.nearest(mixture(p, u) + r, u), ctx.y)
        return Signal(loss=loss, output=side_by_side(p, r, x), metrics={"accuracy": accuracy})

    @staticmethod
    def nearest(z: Tensor, u: Tensor) -> Tensor:
        """Logits `(B, K)` of labels `(B, D)`: minus half the squared distances to the embeddings."""
        return -squared_distances(z, u) / 2

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logits `(B, K)` at the end of the path."""
        u = embedding(network.head)
        none = torch.zeros(len(x), len(u), device=x.device)

        def velocity(z: Tensor, time: float) -> Tensor:
            v, _, _ = divided(network.blocks[0](side_by_side(torch.full_like(z[:, :1], time), none, z, x)), u)
            return mixture(v, u)

        z = self.sampled(network, velocity, u, x)
        return self.nearest(z, u) if self.predictor == "nearest" else network.head(side_by_side(none, z, x))
