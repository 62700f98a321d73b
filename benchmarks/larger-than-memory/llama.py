"""Llama in plain torch: RMS norm, rotary positions, SwiGLU, causal attention with fewer keys than queries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """A decoder layer: attention and a gated network, each after a norm and with a skip."""

    def __init__(self, width: int, inner: int, heads: int, keys: int):
        super().__init__()
        self.heads, self.keys, self.size = heads, keys, width // heads
        self.norm, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, keys * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part(h).unflatten(-1, (count, self.size)).transpose(1, 2)
            for part, count in ((self.q, self.heads), (self.k, self.keys), (self.v, self.keys))
        )
        q, k = rotated(q, positions), rotated(k, positions)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A language model.

    Args:
        vocabulary: number of tokens.
        width, inner, heads, keys: of every layer.
        depth: number of layers.
    """

    def __init__(self, vocabulary: int, width: int, inner: int, heads: int, keys: int, depth: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads, keys) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(B, T, V)` of the next tokens."""
        x = self.embedding(tokens)
        positions = angles(tokens.shape[1], self.layers[0].size, x)
        for layer in self.layers:
            x = layer(x, positions)
        return self.head(self.norm(x))


def angles(length: int, size: int, like: Tensor, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and pair of features, `(T, size)` each."""
    rates = base ** (-torch.arange(0, size, 2, device=like.device).float() / size)
    turned = torch.arange(length, device=like.device).float()[:, None] * rates
    return torch.cat([turned, turned], -1).cos(), torch.cat([turned, turned], -1).sin()


def rotated(x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of `(B, heads, T, size)`."""
    cosine, sine = positions
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def fill(name: str, module: nn.Module) -> None:
    """Draw the weights of one module, as Llama does: normal with a standard deviation of 0.02."""
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
