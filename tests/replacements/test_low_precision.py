"""Emulated low precision: numbers against a list of all that a format has; gradients against the formula."""

import bisect
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.kept import kept_bytes
from torch import nn

from layerwise import LayerwiseError
from layerwise.replacements import LowPrecisionConv2d, LowPrecisionLinear
from layerwise.replacements.division import Packing
from layerwise.replacements.low_precision import rounded

BITS = {"fp4_e2m1": (2, 1, 6.0), "fp8_e4m3": (4, 3, 448.0), "fp8_e5m2": (5, 2, 57344.0), "fp16": (5, 10, 65504.0)}
"""Bits of exponent and mantissa, and the largest number."""


def numbers(format):
    """All that are not negative, in order, from the definition of the format."""
    exponent, mantissa, largest = BITS[format]
    bias = 2 ** (exponent - 1) - 1
    found = {0.0}
    for e in range(2**exponent):
        for m in range(2**mantissa):
            normal = (1 + m / 2**mantissa) * 2.0 ** (e - bias)
            found.add(normal if e else m / 2**mantissa * 2.0 ** (1 - bias))
    return sorted(value for value in found if value <= largest)


@pytest.mark.parametrize("format", BITS)
def test_the_nearest_number_of_the_format_is_taken(format):
    torch.manual_seed(0)
    own = numbers(format)
    x = torch.randn(600) * torch.exp(3 * torch.randn(600))
    values, factor = rounded(x, format)
    if format != "fp16":
        assert BITS[format][2] / 2 < x.abs().max() * factor <= BITS[format][2]
        assert factor.log2() == factor.log2().round()
    for number, value in zip((x * factor).tolist(), values.float().tolist(), strict=True):
        place = bisect.bisect(own, abs(number))
        near = own[max(place - 1, 0) : place + 1]
        assert abs(value) in near
        assert abs(abs(value) - abs(number)) == min(abs(n - abs(number)) for n in near)
        assert value * number >= 0
    ties = torch.tensor([own[-1], *((a + b) / 2 for a, b in itertools.pairwise(own))][:200])
    found = [own.index(value) for value in rounded(ties, format)[0].float().tolist()]
    assert all(place % 2 == 0 for place in found[1:])  # the even neighbour


@pytest.mark.parametrize("format", ["fp4_e2m1", "fp8_e4m3", "bf16"])
def test_at_random_the_mean_is_the_number(format):
    torch.manual_seed(0)
    x = torch.tensor([0.3, -0.07, 1.0, 5e-3, -2.9])
    values, factor = rounded(x.expand(20_000, 5), format, stochastic=True)
    values = values.double() / factor
    for number, column in zip(x.tolist(), values.T, strict=True):
        assert len(column.unique()) <= 2
        assert float(column.mean()) == pytest.approx(number, abs=5 * float(column.std()) / 20_000**0.5 + 1e-9)


def test_beyond_the_range_and_no_range_at_all():
    assert rounded(torch.tensor([1e9, -1e9]), "fp16")[0].tolist() == [65504.0, -65504.0]
    assert rounded(torch.zeros(3), "fp8_e4m3")[0].float().tolist() == [0.0] * 3
    assert rounded(torch.tensor([float("nan"), 1.0]), "fp8_e4m3")[0].float().isnan().tolist() == [True, False]
    assert rounded(torch.empty(0, 3), "fp8_e5m2")[0].shape == (0, 3)
    with pytest.raises(LayerwiseError, match="unknown format 'fp8'"):
        LowPrecisionLinear(4, 2, inputs="fp8")


def near(x, format):
    values, factor = rounded(x, format)
    return values.to(x.dtype) / factor


LAYERS = [
    (LowPrecisionLinear, nn.Linear(24, 6), (5, 3, 24), F.linear),
    (
        LowPrecisionConv2d,
        nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2),
        (3, 4, 8, 8),
        lambda x, w, b: F.conv2d(x, w, b, padding=1, stride=2, groups=2),
    ),
]


@pytest.mark.parametrize(("kind", "plain", "shape", "function"), LAYERS)
def test_products_are_of_rounded_numbers_and_rounding_passes_gradients_on(kind, plain, shape, function):
    torch.manual_seed(0)
    own, x = kind.of(plain), torch.randn(shape).requires_grad_()
    used = near(x.detach(), "fp8_e4m3").requires_grad_(), near(plain.weight.detach(), "fp8_e4m3").requires_grad_()
    out, wanted = own(x), function(*used, plain.bias)
    torch.testing.assert_close(out, wanted)
    dy = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, plain.weight, plain.bias], dy)
    exact = torch.autograd.grad(wanted, [*used, plain.bias], near(dy, "fp8_e5m2"))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other)
    true = torch.autograd.grad(plain(x), [x, plain.weight, plain.bias], dy)
    for one, other in zip(found, true, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    assert kept_bytes(own, x.detach()) == x.numel() + plain.weight.numel() + 2 * 4  # a byte each, and two factors


def test_the_layout_of_a_tensor_changes_no_draw():
    x = torch.randn(3, 4, 6, 6)
    for draw in (lambda x: rounded(x, "fp8_e4m3", stochastic=True)[0].float(), lambda x: Packing().pack(x)[1]):
        found = []
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.manual_seed(0)
            found.append(draw(given))
        assert torch.equal(*found)
