"""Recurrent networks, on images read as sequences or on tokens."""

from abc import abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from layerwise.models.base import BlockSequential, ModelOptions, check_sizes, named, require
from layerwise.models.gpt import TokenEmbedding, TokenSequential, check_windows


@dataclass(frozen=True)
class Recurrent(ModelOptions):
    """Base of the recurrent models; each says which layer of torch its blocks are."""

    depth: int = 2
    """Number of recurrent layers; each is a block."""
    width: int = 128
    """Units of a layer, and size of a token's vector."""
    sequence: Literal["rows", "pixels", "tokens"] = "rows"
    """What a step of the sequence is: a row of the image, a pixel, or a token of a text."""
    dropout = 0.0

    @property
    def tokens(self) -> bool:
        """Whether the model takes tokens (B, T) and has logits of the next one at every position."""
        return self.sequence == "tokens"

    def build(self, shape: tuple[int, int, int], classes: int) -> BlockSequential:
        """Build the model for images of `shape` (channels, height, width), or for windows of tokens (1, 1, T).

        Args:
            shape: of a sample.
            classes: number of logits; the vocabulary, of a text.

        Raises:
            LayerwiseError: a size is less than 1, or the samples are no windows although `sequence` is `tokens`.
        """
        check_sizes(shape, classes)
        children: dict[str, nn.Module] = {}
        if self.tokens:
            check_windows("recurrent networks with sequence=tokens take", shape)
            children["stem"] = TokenEmbedding(classes, self.width, None, self.dropout)
            inputs = self.width
        else:
            channels, _, across = shape
            inputs = channels if self.sequence == "pixels" else channels * across
        for number in range(1, self.depth + 1):
            first = number == 1 and not self.tokens
            parts: dict[str, nn.Module] = {"steps": Steps(self.sequence == "pixels")} if first else {}
            parts["states"] = States(self._layer(inputs))
            if self.dropout:
                parts["dropout"] = nn.Dropout(self.dropout)
            children[f"block{number}"] = named(**parts)
            inputs = self.width
        linear = nn.Linear(self.width, classes)
        children["head"] = named(linear=linear) if self.tokens else named(last=Last(), linear=linear)
        return (TokenSequential if self.tokens else BlockSequential)(OrderedDict(children))

    @abstractmethod
    def _layer(self, inputs: int) -> nn.RNNBase:
        """One layer of `width` units, for a sequence (B, T, inputs)."""


@dataclass(frozen=True)
class RNN(Recurrent):
    r"""Simple recurrent network (Elman): block i is one layer over the sequence, $h_t = f(W x_t + U h_{t-1} + b)$.

    An image is read row by row from above, a step being the C W numbers of a row, or pixel by pixel in the order of
    reading. Activations are (B, T, width). The head is a linear layer on the last state. With `sequence="tokens"` a
    token embedding `stem`, part of the first block, comes first, and the head reads every state: logits (B, T, V) of
    the next token. States start at zero. Weights start as torch draws them, uniform in $\pm 1/\sqrt{width}$.

    Source: Elman, Cognitive Science 14 (1990). Images as sequences: Le, Jaitly & Hinton 2015,
    https://arxiv.org/abs/1504.00941.

    Example:
        >>> import torch
        >>> model = RNN(depth=2, width=16).build((1, 28, 28), 10)
        >>> model.block1(torch.zeros(4, 1, 28, 28)).shape, model(torch.zeros(4, 1, 28, 28)).shape
        (torch.Size([4, 28, 16]), torch.Size([4, 10]))
    """

    activation: Literal["tanh", "relu"] = "tanh"
    """Nonlinearity f."""
    dropout: float = 0.0
    """Probability of zeroing an element of the embedding or of a layer's output."""

    def _layer(self, inputs: int) -> nn.RNNBase:
        return nn.RNN(inputs, self.width, nonlinearity=self.activation, batch_first=True)


@dataclass(frozen=True)
class GRU(Recurrent):
    r"""Gated recurrent units: block i is one layer over the sequence, with a reset and an update gate.

    With $r_t, z_t = \sigma(\ldots)$ of $x_t$ and $h_{t-1}$,

    $$n_t = \tanh(W x_t + b + r_t \odot (U h_{t-1} + c)), \qquad h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}$$

    Sequences, head and first weights as in `rnn`.

    Source: Cho et al. 2014, https://arxiv.org/abs/1406.1078, in the form of `nn.GRU`.

    Example:
        >>> import torch
        >>> model = GRU(depth=1, width=16, sequence="tokens").build((1, 1, 32), 65)
        >>> model(torch.zeros(4, 32, dtype=torch.int64)).shape, model.block_names
        (torch.Size([4, 32, 65]), ('block1',))
    """

    dropout: float = 0.0
    """Probability of zeroing an element of the embedding or of a layer's output."""

    def _layer(self, inputs: int) -> nn.RNNBase:
        return nn.GRU(inputs, self.width, batch_first=True)


@dataclass(frozen=True)
class LSTM(Recurrent):
    r"""Long short-term memory: block i is one layer over the sequence, with a cell behind gates.

    With $i_t, f_t, o_t = \sigma(\ldots)$ and $g_t = \tanh(\ldots)$ of $x_t$ and $h_{t-1}$,

    $$c_t = f_t \odot c_{t-1} + i_t \odot g_t, \qquad h_t = o_t \odot \tanh(c_t)$$

    Sequences, head and first weights as in `rnn`; only $h_t$ passes to the next block.

    Source: Hochreiter & Schmidhuber, Neural Computation 9 (1997), with the forget gate of Gers et al. (2000).

    Example:
        >>> import torch
        >>> model = LSTM(depth=2, width=16, sequence="pixels").build((3, 4, 4), 10)
        >>> model.block1(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 16, 16])
    """

    dropout: float = 0.0
    """Probability of zeroing an element of the embedding or of a layer's output."""

    def _layer(self, inputs: int) -> nn.RNNBase:
        return nn.LSTM(inputs, self.width, batch_first=True)


class Steps(nn.Module):
    """Images (B, C, H, W) to sequences of rows (B, H, C W), or of pixels (B, H W, C)."""

    def __init__(self, pixels: bool):
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        """Read images (B, C, H, W)."""
        require(
            x.dim() == 4 and x.is_floating_point(),
            f"the model takes images, (B, C, H, W), not {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}; for "
            "tokens set sequence=tokens.",
        )
        return x.flatten(2).transpose(1, 2) if self.pixels else x.transpose(1, 2).flatten(2)


class States(nn.Module):
    """The states (B, T, width) of a recurrent layer, without those that it returns beside them."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on (B, T, D)."""
        return self.layer(x)[0]


class Last(nn.Module):
    """The last state (B, width) of a sequence (B, T, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the last of (B, T, width)."""
        return x[:, -1]
