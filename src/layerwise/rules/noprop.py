"""NoProp with discrete time: every block learns to clear a noisy label, and none waits for another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.blocks import Partition
from layerwise.errors import LayerwiseError
from layerwise.functional import denoising_step, signal_share
from layerwise.rules.base import Locality, Moment, Rule, Signal, Site, Start, cross_entropy_at_head
from layerwise.tasks import Classification


def signal_to_noise(t: int, steps: int) -> float:
    r"""$SNR(t) = \bar\alpha_t / (1 - \bar\alpha_t)$ of `functional.signal_share`."""
    share = signal_share(t, steps)
    return share / (1 - share)


def noisy(u: Tensor, t: int, steps: int) -> Tensor:
    r"""A draw of $z_t \sim N(\sqrt{\bar\alpha_t}\, u, 1 - \bar\alpha_t)$, of the shape of u."""
    share = signal_share(t, steps)
    return share**0.5 * u + (1 - share) ** 0.5 * torch.randn_like(u)


def with_z(state: Tensor, z: Tensor) -> Tensor:
    """The state `[z | x]` with another z `(B, K)`."""
    return torch.cat([z, state[:, z.shape[1] :]], dim=1)


@dataclass(frozen=True)
class NoPropDT(Rule):
    r"""NoProp, discrete time: block t is given a noisy label and the image, and learns to tell the label.

    With $u_y$ the one-hot label, $z_{t-1} \sim N(\sqrt{\bar\alpha_{t-1}}\, u_y, 1 - \bar\alpha_{t-1})$ drawn anew for
    every block, and $\hat u_t(z_{t-1}, x)$ a softmax over the classes, block t of T minimises

    $$L_t = \tfrac{T}{2}\, \eta\, (SNR(t) - SNR(t-1))\, \| \hat u_t(z_{t-1}, x) - u_y \|^2, \qquad
      SNR(t) = \bar\alpha_t / (1 - \bar\alpha_t)$$

    and the head the cross-entropy on a draw of $z_T$. What a block gets depends on sample, label and its own draw, on
    no other block: they may be trained in any order. Prediction starts from $z_0 \sim N(0, I)$ and runs
    $z_t = A_t \hat u_t + B_t z_{t-1} + \sqrt{C_t}\, \epsilon$ through all blocks.

    The objective, the weights, the sampler and $\eta = 0.1$ are the paper's. Ours: the end points of the cosine
    schedule; one-hot embeddings only, for which the KL term of the paper's bound is a constant and left out; blocks
    learn side by side, batch by batch (the paper: one block after the other within an epoch); sizes of the model.

    It trains the model `noprop`.

    >>> NoPropDT().groups(blocks=2)
    [range(0, 1), range(1, 2), range(2, 3)]
    """

    eta: float = 0.1
    """Factor eta of every block's loss."""

    name: ClassVar[str] = "noprop_dt"
    models: ClassVar[tuple[str, ...]] = ("noprop",)
    locality: ClassVar[Locality] = "local"
    crosses: ClassVar[str] = "the input; in prediction a noisy label (K numbers per sample) too"
    flat_memory: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Li, Teh & Pascanu, arXiv 2503.24322 (2025); end points of the schedule, order of training, sizes: our reading"
    )
    predicts_at_head: ClassVar[bool] = True
    restrictions: ClassVar[str] = (
        "Trains the model noprop only. One-hot embeddings and discrete time; every block embeds the image anew. The "
        "accuracy of the head in training is that of a drawn label, not of a prediction."
    )

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise LayerwiseError(f"eta is {self.eta}; it must be larger than 0.")

    def auxiliary(self, site: Site, h: Tensor, task: Classification) -> nn.Module | None:
        """Nothing; refuses a network that passes on no state."""
        name = "head" if site.is_head else f"block{site.index + 1}"
        pixels = 1
        for size in site.inputs:
            pixels *= size
        fits = all(shape == (task.classes + pixels,) for shape in site.shapes[:-1])
        if site.name != name or not fits:
            raise LayerwiseError(
                "rule 'noprop_dt' trains the model 'noprop', cut as it comes (--model noprop, no --cuts or --blocks)."
            )
        return None

    def begin(self, start: Start) -> tuple[Tensor, Any]:
        """The state of the first block: a draw of z_0 and the image."""
        steps, x = len(start.network.blocks), start.x.flatten(1).float()
        u = F.one_hot(start.y, start.task.classes).to(x)
        z = noisy(u, 0, steps) if start.network.training else torch.randn_like(u)
        return torch.cat([z, x], dim=1), None

    def loss_weight(self, site: Site) -> float:
        """Factor of the squared distance at the block of step t = site.index + 1."""
        gain = signal_to_noise(site.index + 1, site.blocks) - signal_to_noise(site.index, site.blocks)
        return site.blocks / 2 * self.eta * gain

    def signal(self, at: Moment) -> Signal:
        """Squared distance of the block's label from the true one; passes on another draw, or the sampler's next z."""
        if at.site.is_head:
            return cross_entropy_at_head(at)
        classes, t, steps = at.task.classes, at.site.index + 1, at.site.blocks
        a, b, c = denoising_step(t, steps)
        step, u = at.h[:, :classes], at.task.distribution(at.y)
        found = (step - b * at.h_in[:, :classes]) / a
        loss = self.loss_weight(at.site) * (found - u).square().sum(1).mean()
        if at.training:
            z = noisy(F.one_hot(at.y, classes).to(step), t, steps)
        else:
            z = step + c**0.5 * torch.randn_like(step)
        accuracy = at.task.correct(found, at.y) / at.y.numel()
        return Signal(loss=loss, output=with_z(at.h, z), metrics={"accuracy": accuracy})

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logits `(B, K)` behind a run of the sampler."""
        steps, classes = len(network.blocks), len(network.head.parameters()[-1])
        z = torch.randn(len(x), classes, dtype=torch.float32, device=x.device)
        h = torch.cat([z, x.flatten(1).float()], dim=1)
        for t, block in enumerate(network.blocks, 1):
            h = block(h)
            z = h[:, :classes]
            h = with_z(h, z + denoising_step(t, steps)[2] ** 0.5 * torch.randn_like(z))
        return network.head(h)
