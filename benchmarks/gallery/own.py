"""Networks of the gallery that the libraries do not have: each is a function that takes a depth."""

import torch
import torch.nn.functional as F
from entry import CLASSES, VOCABULARY, Entry, ids, images, labels, pixels, text
from torch import Tensor, nn

from layerwise import LanguageModel, Loss, Regression


class Residual(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, width)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same."""
        return h + self.two(self.one(self.norm(h)).relu())


class UNet(nn.Module):
    """Down and up again, with a skip from every level to its counterpart."""

    def __init__(self, blocks: int):
        super().__init__()
        widths = (8, 16)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)
        self.down, self.up = (
            nn.ModuleList(nn.Sequential(*(Residual(w) for _ in range(blocks))) for w in widths) for _ in "du"
        )
        self.smaller = nn.Conv2d(8, 16, 2, stride=2)
        self.larger = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.joined = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, H, W)`."""
        fine = self.down[0](self.stem(x))
        h = self.up[1](self.down[1](self.smaller(fine)))
        return self.head(self.up[0](self.joined(torch.cat([fine, self.larger(h)], 1))))


def unet(depth: int) -> Entry:
    """A class per pixel."""
    return pixels(UNet(depth // 4), images(), cuts=["down.*.*", "up.*.*"])


class Feedforward(nn.Module):
    """A layer with a skip connection."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """`(..., C)` to the same."""
        return h + self.down(self.up(self.norm(h)).relu())


class Autoencoder(nn.Module):
    """Layers, a bottleneck, layers."""

    def __init__(self, depth: int):
        super().__init__()
        self.inside, self.outside = nn.Linear(64, 32), nn.Linear(32, 64)
        self.encoder = nn.ModuleList(Feedforward(32) for _ in range(depth // 2))
        self.decoder = nn.ModuleList(Feedforward(32) for _ in range(depth // 2))
        self.narrow, self.wide = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        """The input again."""
        h = self.inside(x)
        for layer in self.encoder:
            h = layer(h)
        h = self.wide(self.narrow(h))
        for layer in self.decoder:
            h = layer(h)
        return self.outside(h)


def autoencoder(depth: int) -> Entry:
    """Regression on the input itself."""
    x = torch.randn(32, 4) @ torch.randn(4, 64)
    return Entry(Autoencoder(depth), (x, x), task=Regression(), plain=lambda m, b: F.mse_loss(m(b[0]), b[1]))


class Pair(nn.Module):
    """A layer of each of two towers, over two views `(B, 2, C)`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Feedforward(32), Feedforward(32)

    def forward(self, h: Tensor) -> Tensor:
        """The two views again."""
        return torch.stack([self.one(h[:, 0]), self.two(h[:, 1])], 1)


class Towers(nn.Module):
    """Two towers side by side."""

    def __init__(self, depth: int):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(24, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.layers = nn.ModuleList(Pair() for _ in range(depth))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Embeddings `(B, 2, D)`."""
        h = torch.stack([self.left(left), self.right(right)], 1)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def contrast(z: Tensor, y: Tensor) -> Tensor:
    """InfoNCE of the two views `(B, 2, D)`: each finds its counterpart in the batch, whose number is y."""
    z = F.normalize(z, dim=-1)
    return F.cross_entropy(z[:, 0] @ z[:, 1].T / 0.2, y)


def towers(depth: int) -> Entry:
    """A custom contrastive loss, at the head and at every block."""
    source = torch.randn(32, 8)
    views = {"left": source @ torch.randn(8, 24), "right": source @ torch.randn(8, 16)}
    task = Loss(contrast, positions="token")
    y = torch.arange(32)

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return contrast(model(batch["left"], batch["right"]), batch["labels"])

    return Entry(Towers(depth), views | {"labels": y}, task=task, plain=plain)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` under a padding mask."""

    def __init__(self, depth: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, CLASSES)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of the texts."""
        h = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None].float()
        return self.head((h * mask).sum(1) / mask.sum(1))


def encoder(depth: int) -> Entry:
    """`nn.TransformerEncoder` with mask and dropout."""

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    return Entry(Encoder(depth), text() | {"labels": labels()}, plain=plain)


class Recurrent(nn.Module):
    """Stacked LSTMs; each returns its outputs and its states."""

    def __init__(self, depth: int):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.ModuleList(nn.LSTM(32, 32, batch_first=True) for _ in range(depth))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next tokens."""
        h = self.embedding(input_ids)
        for layer in self.layers:
            h = layer(h)[0]
        return self.head(h)


def lstm(depth: int) -> Entry:
    """A stack of LSTMs for the next token."""

    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), following.flatten())

    tokens = ids()
    batch = {"input_ids": tokens, "labels": tokens}
    return Entry(Recurrent(depth), batch, task=LanguageModel(), plain=plain)


class Experts(nn.Module):
    """The best of four experts per sample, in a loop with branches that depend on the data."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.norm = nn.Linear(width, 4), nn.LayerNorm(width)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The samples, and the load of the experts."""
        weights = self.gate(x).softmax(-1)
        chosen, out = weights.argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                out[mine] = expert(x[mine]) * weights[mine, i : i + 1]
        return self.norm(x + out), weights.mean(0)


class Mixture(nn.Module):
    """Layers of experts, and classes."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Experts(16) for _ in range(depth))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits, and the last load."""
        load = torch.zeros(4)
        for layer in self.layers:
            x, load = layer(x)
        return {"load": load, "logits": self.head(x)}


def experts(depth: int) -> Entry:
    """A mixture of experts by hand."""
    x = torch.randn(32, 16)
    y = torch.arange(32) % CLASSES
    return Entry(Mixture(depth), (x, y), plain=lambda m, b: F.cross_entropy(m(b[0])["logits"], b[1]))
