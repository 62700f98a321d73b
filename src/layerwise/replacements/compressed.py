"""A linear layer that stores and learns its kept weights alone, in compressed rows."""

import warnings
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwise.core.once import once_differentiable
from layerwise.errors import LayerwiseError

with warnings.catch_warnings():  # torch says once that compressed rows are young
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0], device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu"), [])


class _Compressed(torch.autograd.Function):
    """A product with compressed rows; neither the weight nor its gradient is ever a dense matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, rows, columns)
        ctx.biased = bias is not None
        with torch.autocast(x.device.type, enabled=False):  # its kernels have no half precision
            matrix = _matrix(weight, rows, columns, x.shape[-1])
            y = torch.sparse.mm(matrix, x.reshape(-1, x.shape[-1]).to(matrix.dtype).T).T.contiguous()
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], len(rows) - 1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, rows, columns = ctx.saved_tensors
        matrix = _matrix(weight, rows, columns, x.shape[-1])
        dy = gradients[0].reshape(-1, gradients[0].shape[-1]).to(matrix.dtype)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.sparse.mm(matrix.t(), dy.T).T.reshape(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            flat = x.reshape(-1, x.shape[-1]).to(matrix.dtype)
            dw = torch.sparse.sampled_addmm(matrix, dy.T, flat, beta=0.0).values().view(weight.shape).to(weight.dtype)
        if ctx.biased and ctx.needs_input_grad[2]:
            db = dy.sum(0)
        return dx, dw, db, None, None


def _matrix(weight: Tensor, rows: Tensor, columns: Tensor, inputs: int) -> Tensor:
    values = weight.detach().view(-1)
    values = values.float() if values.element_size() < 4 else values
    return torch.sparse_csr_tensor(rows, columns, values, (len(rows) - 1, inputs))


class SparseLinear(nn.Module):
    r"""A linear layer most of whose weights are zero for good: only the others are stored and learn.

    Output and gradients are those of the dense layer with these zeros, up to rounding: $y = W x + b$, $\mathrm{d}x =
    W^\top \mathrm{d}y$, and $\mathrm{d}w_k = \sum_n \mathrm{d}y_{n, r_k} x_{n, c_k}$ of each kept weight, in row $r_k$
    and column $c_k$. A kept weight takes 8 bytes in float32 (with its column), its gradient 4, its state in AdamW 8.
    The input is kept for the backward pass as before.

    `weight` is a column of the kept weights, row by row, so that weight decay takes it for a matrix. The places are in
    the state, and do not change. Products have at least the precision of float32, under autocast too.

    Args:
        rows: `(out_features + 1,)`, where each row begins within the columns, and their number.
        columns: `(kept,)`, the column of each kept weight.
        in_features: columns of the matrix.
        bias: whether there is one.

    Source: Nikdan et al. 2023, "SparseProp", for the computation in compressed rows with exact gradients; here by
    torch's own kernels.

    >>> dense = nn.Linear(8, 4)
    >>> layer = SparseLinear.of(dense, sparsity=0.75)
    >>> layer.weight.shape
    torch.Size([8, 1])
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor, in_features: int, bias: bool = True, dtype: Any = None):
        super().__init__()
        self.in_features, self.out_features = in_features, len(rows) - 1
        self.register_buffer("rows", rows.int())
        self.register_buffer("columns", columns.int())
        self.weight = nn.Parameter(torch.empty(len(columns), 1, dtype=dtype, device=columns.device))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=columns.device)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` does for as many inputs as a row keeps on average."""
        bound = (self.out_features / max(len(self.columns), 1)) ** 0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def of(cls, linear: nn.Linear, sparsity: float = 0.9) -> Self:
        """The same layer with the largest of its weights; one that has so many zeros already computes the same.

        Args:
            linear: a dense layer.
            sparsity: share of the weights that are zero, in [0, 1).

        Raises:
            LayerwiseError: a share out of range, or one that keeps no weight; a layer on the meta device.
        """
        if not 0 <= sparsity < 1:
            raise LayerwiseError(f"sparsity is {sparsity}; the share of weights that are zero is at least 0, below 1.")
        weight = linear.weight.detach()
        if weight.is_meta:
            raise LayerwiseError(
                "a layer on the meta device has no weights yet, so that the largest of them are not known; make the "
                "model on a device, or leave this layer out."
            )
        kept = weight.flatten().abs().topk(round((1 - sparsity) * weight.numel())).indices.sort().values
        kept = kept[weight.flatten()[kept] != 0]
        if not len(kept):
            raise LayerwiseError(
                f"no weight of a layer of {linear.in_features} inputs and {linear.out_features} outputs is left at a "
                f"sparsity of {sparsity}; choose a smaller one."
            )
        per_row = torch.bincount(kept // linear.in_features, minlength=linear.out_features)
        rows = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
        made = cls(rows, kept % linear.in_features, linear.in_features, linear.bias is not None, weight.dtype)
        with torch.no_grad():
            made.weight.copy_(weight.flatten()[kept][:, None])
        made.weight.requires_grad_(linear.weight.requires_grad)
        made.bias = linear.bias
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        given = (input, self.weight, self.bias, self.rows, self.columns)
        return _Compressed.apply(*given)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        """Sizes, and how many weights are kept."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, kept={len(self.columns)}"
