"""Networks as other people write them: keywords, masks, tied weights, dictionaries, skips."""

import torch
import torch.nn.functional as F
from torch import nn

from support.nets import CLASSES

VOCABULARY, WIDTH = 23, 16


class Layer(nn.Module):
    """A decoder layer: positions and mask come as keywords, and the output is a tuple."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *, mask, scale):
        q, k, v = (self.qkv(self.norm(x)) * scale).chunk(3, dim=-1)
        weights = (q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        x = x + self.dropout(self.out(weights @ v))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x))))), weights


class Decoder(nn.Module):
    """Like GPT-2: learned positions, causal and padding masks, the embedding tied to the head, a dictionary out."""

    def __init__(self, depth=3, dropout=0.0, tie=True):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(12, WIDTH) * 0.1)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, attention_mask=None):
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, :].bool() | torch.eye(length, dtype=torch.bool)
        x = self.embedding(tokens) + self.positions[:length]
        maps = []
        for layer in self.layers:
            x, weights = layer(x, mask=mask, scale=1.0)
            maps.append(weights)
        return {"logits": self.head(self.norm(x)), "attention": maps}


def decoder(**options):
    torch.manual_seed(5)
    return Decoder(**options)


def text(samples=4, length=10, seed=0):
    """A batch as a mapping, with a padded sample, and its labels."""
    tokens = torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(samples, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"tokens": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


class Skips(nn.Module):
    """Like a U-Net: what the first parts give is added to the input of the last ones, past the cuts."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.side = nn.Linear(width, width)
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = first = self.side(x).tanh()  # `first` is not the output of a cut: its graph crosses all of them
        kept = []
        for part in self.down:
            x = part(x).relu()
            kept.append(x)
        for part in self.up:
            x = part(x + kept.pop()).relu() + first
        return self.head(x)


class Twists(nn.Module):
    """Layers called under contexts of the forward pass's own."""

    def __init__(self, around=None, inside=None, output=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)
        self.around, self.inside, self.output = around, inside, output

    def forward(self, x):
        if self.around is None:
            return self._run(x)
        with self.around():
            return self._run(x)

    def _run(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x).relu()
            if self.inside is not None:
                self.inside(i)
        return self.head(x)


def vectors(seed=0):
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % CLASSES


def bfloat():
    return torch.autocast("cpu", dtype=torch.bfloat16)
