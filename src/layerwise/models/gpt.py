"""Decoder-only transformer: a language model on windows of tokens."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.models.base import BlockSequential, ModelOptions, check_sizes, named, require

EPS = 1e-6  # of the norms
BASE = 10_000.0  # of the rotary angles
DEVIATION = 0.02  # of the first weights


@dataclass(frozen=True)
class GPT(ModelOptions):
    r"""Decoder-only transformer: block i is a pre-norm block of causal attention and MLP, on tokens (B, T).

    A token embedding `stem` comes first; it is part of the first block. Positions are rotary: queries and keys of
    position t are turned by the angles $t \cdot 10000^{-2j/d}$ for the pairs j of a head of size d. Norms are RMSNorm,
    no layer has a bias. The head is a norm and a linear layer to the V logits of the next token, (B, T, V). Weights
    start as normals of deviation 0.02; those that write to the residual stream are divided by $\sqrt{2 \cdot depth}$.
    With `tied`, embedding and head are one matrix, and the model is cut at its calls: the block that uses it last
    trains it, unless `tied=` of the learner says otherwise.

    Source: Radford et al. 2019 (GPT-2), with the rotary positions, RMSNorm and SwiGLU of Touvron et al. 2023,
    https://arxiv.org/abs/2302.13971.

    Example:
        >>> model = GPT(depth=2, width=48, heads=3).build((1, 1, 16), 65)
        >>> model(torch.zeros(4, 16, dtype=torch.int64)).shape
        torch.Size([4, 16, 65])
        >>> model.block_names
        ('block1', 'block2')
    """

    depth: int = 6
    """Number of transformer blocks; each is a block."""
    width: int = 192
    """Size of a token's vector; a multiple of twice `heads`."""
    heads: int = 6
    """Attention heads."""
    context: int = 1024
    """Maximum number of tokens of the context."""
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    """Activation of the MLP; both have about 8 width² weights."""
    tied: bool = False
    """Use the embedding as the matrix of the head, too."""
    dropout: float = 0.0
    """Probability of zeroing an element of the embedding or of a unit's output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.tied, bool), f"tied must be true or false, not {self.tied!r}.")
        require(
            self.width % (2 * self.heads) == 0,
            f"width must be a multiple of twice the heads ({2 * self.heads}), not {self.width}.",
        )

    @property
    def tokens(self) -> bool:
        """Whether the model takes tokens: it does."""
        return True

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for windows of tokens, `shape` (1, 1, T), and a vocabulary of `classes`.

        Raises:
            LayerwiseError: a size is less than 1, the samples are not windows, or they are longer than `context`.
        """
        check_sizes(shape, classes)
        check_windows("the model gpt takes", shape)
        require(
            shape[2] <= self.context,
            f"a window of {shape[2]} tokens is longer than the context of the model, {self.context}; give a shorter "
            "window, or a longer context.",
        )
        children: dict[str, nn.Module] = {"stem": TokenEmbedding(classes, self.width, self.context, self.dropout)}
        children |= {f"block{number}": self._block() for number in range(1, self.depth + 1)}
        linear = nn.Linear(self.width, classes, bias=False)
        children["head"] = named(norm=nn.RMSNorm(self.width, eps=EPS), linear=linear)
        model = TokenSequential(OrderedDict(children))
        model.apply(_initialise)
        for name, weight in model.named_parameters():
            if name.endswith("project.weight"):
                nn.init.normal_(weight, std=DEVIATION / math.sqrt(2 * self.depth))
        if self.tied:
            linear.weight = model.stem.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
        return model

    def _block(self) -> nn.Sequential:
        return named(
            attn=CausalAttention(self.width, self.heads, self.dropout),
            mlp=(GELU if self.mlp == "gelu" else SwiGLU)(self.width, self.dropout),
        )


def check_windows(who: str, shape: tuple[int, int, int]) -> None:
    """Raise LayerwiseError unless samples are windows of tokens; `who` takes them is the beginning of the sentence."""
    require(
        shape[:2] == (1, 1),
        f"{who} tokens, in windows of shape (1, 1, T), not {tuple(shape)}; give text, or another model.",
    )


class TokenSequential(BlockSequential):
    """A token embedding `stem`, blocks and a head, one after the other."""

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks; the embedding belongs to the first."""
        return tuple(name for name in super().block_names if name != "stem")

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix, so that the model has to be cut at its calls."""
        return self.stem.embedding.weight is self.head.linear.weight  # pyright: ignore[reportAttributeAccessIssue]


class TokenEmbedding(nn.Module):
    """Token embedding: (B, T) to (B, T, width), of at most `context` tokens, if that is given."""

    def __init__(self, vocabulary: int, width: int, context: int | None, dropout: float):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Embed tokens (B, T)."""
        require(
            x.dim() == 2 and x.dtype in (torch.int64, torch.int32),
            f"the model takes tokens, int64 (B, T), not {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}.",
        )
        require(
            self.context is None or x.shape[1] <= self.context,
            f"{x.shape[1]} tokens are more than the context of the model, {self.context}; give fewer.",
        )
        return self.dropout(self.embedding(x))


class Past:
    """Keys and values `(B, heads, T, size)` of the tokens that an attention has seen."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, those of new tokens last."""
        if self.keys is not None and self.values is not None:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.keys, self.values = k, v
        return k, v


class CausalAttention(nn.Module):
    """Residual causal self-attention unit with rotary positions, pre-norm: `x + attention(norm(x))` on (B, T, width).

    Attributes:
        past: keys and values of earlier tokens, inside `remembering`; None outside.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.past: Past | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Run the unit on (B, T, width)."""
        # (B, T, 3 W) -> three of (B, heads, T, W / heads)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        earlier = 0 if self.past is None else len(self.past)
        cos, sin = _angles(earlier, q)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        if self.past is not None:
            k, v = self.past.extended(k, v)
        if earlier:  # every new token sees the earlier ones, and the new ones up to itself
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(earlier)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))


@contextmanager
def remembering(*models: nn.Module) -> Iterator[None]:
    """A context in which the attentions of models keep keys and values, and get only new tokens.

    >>> model = GPT(depth=1, width=8, heads=2).build((1, 1, 4), 5)
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> with torch.no_grad(), remembering(model):
    ...     first, rest = model(tokens[:, :2]), model(tokens[:, 2:])
    >>> torch.allclose(torch.cat([first, rest], 1), model(tokens), atol=1e-6)
    True
    """
    units = [module for model in models for module in model.modules() if isinstance(module, CausalAttention)]
    for unit in units:
        unit.past = Past()
    try:
        yield
    finally:
        for unit in units:
            unit.past = None


def _angles(first: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(T, size)` of the angles by which positions from `first` on are turned."""
    length, size = like.shape[-2:]
    speed = BASE ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float32) / size)
    angle = torch.arange(first, first + length, device=like.device, dtype=torch.float32)[:, None] * speed
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_j, x_{j + size/2}) of queries or keys."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class GELU(nn.Module):
    """Residual MLP unit, pre-norm: `x + V gelu(U norm(x))` on (B, T, width), with 4 width hidden units."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.activation = nn.GELU()
        self.project = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the unit on (B, T, width)."""
        return x + self.dropout(self.project(self.activation(self.expand(self.norm(x)))))


class SwiGLU(nn.Module):
    """Residual MLP unit, pre-norm: `x + V (silu(G norm(x)) * U norm(x))` on (B, T, width).

    Its hidden units are 8/3 of the width, rounded up to a multiple of 16: about as many weights as the GELU unit has.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        hidden = 16 * math.ceil(width / 6)
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.activation = nn.SiLU()
        self.expand = nn.Linear(width, hidden, bias=False)
        self.project = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the unit on (B, T, width)."""
        h = self.norm(x)
        return x + self.dropout(self.project(self.activation(self.gate(h)) * self.expand(h)))


def _initialise(module: nn.Module) -> None:
    """Draw the weights of a module."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=DEVIATION)
