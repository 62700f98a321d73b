"""Vision transformer."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.models.base import (
    BlockSequential,
    ModelOptions,
    assemble,
    check_sizes,
    named,
    require,
)


@dataclass(frozen=True)
class PatchTransformer(ModelOptions):
    """Base of networks that read an image as tokens, one per square patch: embedding, blocks, and a head that pools."""

    depth: int = 12
    """Number of blocks after the embedding, which belongs to the first one."""
    width: int = 192
    """Size of a token; a multiple of `heads`."""
    heads: int = 3
    """Attention heads."""
    patch: int = 4
    """Side of a square patch in pixels; it must divide the image's height and width."""
    mlp_ratio: float = 4.0
    """Hidden units of the MLP, as a multiple of `width`."""
    pool: Literal["cls", "mean"] = "cls"
    """What the head reads: a class token, or the mean of the patch tokens."""
    streams: ClassVar[int] = 1
    """Tokens of `width` per position."""
    dropout = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.width % self.heads == 0,
            f"width must be a multiple of heads ({self.heads}), not {self.width}.",
        )
        require(
            isinstance(self.mlp_ratio, int | float) and self.mlp_ratio * self.width >= 1,
            f"mlp_ratio must leave the MLP at least one hidden unit, not {self.mlp_ratio!r}.",
        )

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width) and `classes` logits.

        Raises:
            LayerwiseError: a size is less than 1, or `patch` does not divide the image.
        """
        check_sizes(shape, classes)
        channels, height, width = shape
        require(
            height % self.patch == 0 and width % self.patch == 0,
            f"patch must divide the image ({height}x{width}), and {self.patch} does not; choose another patch.",
        )
        tokens = (height // self.patch) * (width // self.patch)
        stem = Embedding(channels, self.width, self.patch, tokens, self.pool == "cls", self.dropout)
        blocks = self._blocks(stem)
        read = self.streams * self.width
        head = named(norm=nn.LayerNorm(read), pool=TokenPool(self.pool), linear=nn.Linear(read, classes))
        model = assemble(blocks, head)
        model.apply(initialise)
        return model

    @abstractmethod
    def _blocks(self, stem: nn.Module) -> Sequence[nn.Module]:
        """The blocks, the first of which begins with the stem."""

    def _units(self) -> dict[str, Any]:
        """Attention and MLP of one block."""
        hidden = int(self.mlp_ratio * self.width)
        return {
            "attn": Attention(self.width, self.heads, self.dropout),
            "mlp": FeedForward(self.width, hidden, self.dropout),
        }


@dataclass(frozen=True)
class ViT(PatchTransformer):
    """Vision transformer: block i is a pre-norm encoder block of attention and MLP.

    The first block begins with the stem: patch embedding, class token (with `pool="cls"` only) and
    learned position embedding. Hidden activations are (B, tokens, width); a 32x32 image in patches
    of 4 gives 65 tokens, the class token first. A block is a Sequential of `attn` and `mlp`, so the
    network can also be cut between the two. The head is layer norm, pooling and a linear layer.
    Dropout acts on the embedding and on what each unit adds, not on the attention weights. Linear
    weights, class token and positions start as truncated normals of deviation 0.02 and linear
    biases at zero, which is the usual choice for vision transformers (DeiT, timm). The patch
    embedding keeps torch's draw.

    Source: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929.

    Example:
        >>> model = ViT(depth=2, width=48).build((3, 32, 32), 10)
        >>> model.block1(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 65, 48])
    """

    dropout: float = 0.0
    """Probability of zeroing an element of the embedding or of a unit's output."""

    def _blocks(self, stem: nn.Module) -> list[nn.Sequential]:
        return [named(stem=stem, **self._units())] + [named(**self._units()) for _ in range(self.depth - 1)]


class Embedding(nn.Module):
    """Patch embedding, class token, learned positions: (B, C, H, W) to (B, tokens, width)."""

    def __init__(self, channels: int, width: int, patch: int, patches: int, cls: bool, dropout: float):
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.empty(1, 1, width)) if cls else None
        self.position = nn.Parameter(torch.empty(1, patches + cls, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, C, H, W)."""
        tokens = self.project(x).flatten(2).transpose(1, 2)
        if self.cls is not None:
            tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.dropout(tokens + self.position)


class Attention(nn.Module):
    """Residual self-attention unit, pre-norm: `x + attention(norm(x))` on (B, tokens, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the unit on (B, tokens, width)."""
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """The unit's output, which is added to `x`."""
        # (B, T, 3 W) -> three of (B, heads, T, W / heads)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.dropout(self.project(mixed))


class FeedForward(nn.Module):
    """Residual MLP unit, pre-norm: `x + mlp(norm(x))` on (B, tokens, width)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.project = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the unit on (B, tokens, width)."""
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """The unit's output, which is added to `x`."""
        return self.dropout(self.project(self.activation(self.expand(self.norm(x)))))


class TokenPool(nn.Module):
    """Tokens (B, tokens, width) to one vector (B, width): the first (`"cls"`) or the `"mean"`."""

    def __init__(self, pool: Literal["cls", "mean"]):
        super().__init__()
        self.pool = pool

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool (B, tokens, width)."""
        return tokens[:, 0] if self.pool == "cls" else tokens.mean(dim=1)


def initialise(module: nn.Module) -> None:
    """Draw the weights of a vision transformer's module."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Embedding):
        nn.init.trunc_normal_(module.position, std=0.02)
        if module.cls is not None:
            nn.init.trunc_normal_(module.cls, std=0.02)
