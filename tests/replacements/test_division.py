"""DIVISION: what is restored against the paper's formula, number by number; gradients at it; what is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.kept import kept_bytes
from torch import nn

from layerwise import LayerwiseError, Learner, replace
from layerwise.replacements import DivisionBatchNorm2d, DivisionConv2d
from layerwise.replacements.division import Packing

CONVOLUTIONS = [
    {},
    {"padding": 1, "stride": 2, "groups": 2, "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": 2, "padding_mode": "circular"},
]


def images(*shape):
    """Smooth ones with some noise."""
    return F.interpolate(torch.randn(*shape[:2], 3, 3), shape[2:], mode="bilinear") + 0.1 * torch.randn(shape)


def restored(x, window, bits):
    """Squares of a map one after the other: their averages, and the rest rounded to one of 2^b values."""
    low, out = torch.empty_like(x), torch.empty_like(x)
    for top in range(0, x.shape[2], window):
        for left in range(0, x.shape[3], window):
            square = x[:, :, top : top + window, left : left + window]
            low[:, :, top : top + window, left : left + window] = square.mean((2, 3), keepdim=True).bfloat16().float()
    for sample in range(x.shape[0]):
        for channel in range(x.shape[1]):
            rest = x[sample, channel] - low[sample, channel]
            least, most = rest.min().bfloat16(), rest.max().bfloat16()
            step = ((most - least) / (2**bits - 1)).float()
            code = torch.round((rest - least.float()) / step).clamp(0, 2**bits - 1)
            out[sample, channel] = low[sample, channel] + least.float() + code * step
    return out


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize(("window", "bits"), [(8, 2), (3, 4)])
def test_the_weight_learns_from_the_restored_input_and_all_else_is_exact(options, window, bits):
    torch.manual_seed(0)
    plain, x = nn.Conv2d(4, 6, 3, **options), images(5, 4, 13, 18).requires_grad_()
    own = DivisionConv2d.of(plain, window, bits, stochastic=False)
    padded = x
    if "padding_mode" in options:
        padded = F.pad(x, (2, 2, 2, 2), "circular")
    elif options.get("padding") == "same":
        padded = F.pad(x, (2, 2, 2, 2))
    out, dy = own(x), torch.randn_like(plain(x))
    assert torch.equal(out, plain(x))
    parameters = list(plain.parameters())
    found = torch.autograd.grad(out, [x, *parameters], dy)
    exact = torch.autograd.grad(plain(x), [x, *parameters], dy)
    for one, other in zip(found[:1] + found[2:], exact[:1] + exact[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    seen = restored(padded.detach(), window, bits)
    how = {name: options[name] for name in ("stride", "groups", "dilation") if name in options}
    padding = options.get("padding", 0) if padded is x else 0
    again = F.conv2d(seen, plain.weight, plain.bias, padding=padding, **how)
    torch.testing.assert_close(found[1], torch.autograd.grad(again, plain.weight, dy)[0], rtol=1e-3, atol=1e-3)


def test_drawn_codes_have_the_input_as_their_mean():
    torch.manual_seed(0)
    packing, x = Packing(4, 2), torch.randn(1, 3, 9, 10)
    x = x.expand(8000, -1, -1, -1)
    total = sum(part.double().sum(0) for _, part in packing.parts(packing.pack(x), x.shape, x.dtype))
    step = 2 * x.abs().max() / 3
    assert (total / len(x) - x[0]).abs().max() < 4 * step / 2 / 8000**0.5 + 2**-7  # a draw's deviation; bfloat16


def test_what_is_kept_and_how_near_the_gradient_is():
    torch.manual_seed(0)
    x, plain = images(16, 8, 20, 20), nn.Conv2d(8, 8, 3, padding=1)
    own = DivisionConv2d.of(plain)
    assert kept_bytes(own, x) == 16 * 8 * (3 * 3 * 2 + 4) + 16 * 8 * 20 * 20 // 4
    assert kept_bytes(plain, x) == x.nbytes
    dy = torch.randn_like(plain(x))
    cosines = [
        F.cosine_similarity(*(torch.autograd.grad(m(x), plain.weight, dy)[0].flatten() for m in (made, plain)), dim=0)
        for made in (DivisionConv2d.of(plain, bits=8), own, DivisionConv2d.of(plain, bits=1))
    ]
    assert cosines[0] > 0.9999
    assert 0.9 < cosines[1] < cosines[0]
    assert cosines[2] < cosines[1]


def test_a_norm_has_the_gradients_of_its_formula_at_the_restored_input():
    torch.manual_seed(0)
    plain, x = nn.BatchNorm2d(4, momentum=None), images(6, 4, 9, 7).requires_grad_()
    nn.init.normal_(plain.weight)
    own, dy = DivisionBatchNorm2d.of(copy.deepcopy(plain), window=4, stochastic=False), torch.randn(6, 4, 9, 7)
    for _ in range(2):
        out = own(x)
        assert torch.equal(out, plain(x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, own.get_buffer(name))
    dx, dw, db = torch.autograd.grad(out, [x, own.weight, own.bias], dy)
    scale = (x.var((0, 2, 3), unbiased=False) + plain.eps).rsqrt().view(1, 4, 1, 1).detach()
    n = (restored(x.detach(), 4, 2) - x.detach().mean((0, 2, 3), keepdim=True)) * scale
    mean = lambda t: t.mean((0, 2, 3), keepdim=True)  # noqa: E731
    torch.testing.assert_close(db, dy.sum((0, 2, 3)))
    torch.testing.assert_close(dw, (dy * n).sum((0, 2, 3)), rtol=1e-3, atol=1e-3)
    wanted = plain.weight.view(1, 4, 1, 1) * scale * (dy - mean(dy) - n * mean(dy * n))
    torch.testing.assert_close(dx, wanted, rtol=1e-3, atol=1e-3)
    own.eval()
    plain.eval()
    assert torch.equal(*(torch.autograd.grad(m(x).sum(), x)[0] for m in (own, plain)))


def test_inputs_that_are_not_packed_and_options_that_do_not_exist():
    conv, x = DivisionConv2d.of(nn.Conv2d(2, 3, 1)), torch.randn(4, 2, 1, 6)
    assert kept_bytes(conv, x) == x.nbytes
    assert conv(torch.zeros(2, 5, 5)).shape == (3, 5, 5)
    constant = torch.full((2, 2, 5, 5), 3.0)
    (dw,) = torch.autograd.grad(conv(constant).sum(), conv.weight)
    assert torch.equal(dw, torch.full((3, 2, 1, 1), 150.0))
    for wrong, match in (({"bits": 3}, "choose 1, 2, 4 or 8"), ({"window": 0}, "1 or more")):
        with pytest.raises(LayerwiseError, match=match):
            DivisionConv2d.of(nn.Conv2d(2, 3, 1), **wrong)


@pytest.mark.slow
def test_a_network_of_them_learns_and_needs_less():
    """Per convolution, norm and ReLU 8 bytes per number are kept as it is, and 2 x 2 bits and 1 bit, replaced."""
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    x, y, peaks = torch.randn(16, 3, 12, 12), torch.arange(16) % 4, {}
    for name, what in (("plain", None), ("packed", ["division_conv", "division_norm", "mask_relu"])):
        model = copy.deepcopy(plain)
        learner = Learner(replace(model, what) if what else model, "backprop", lr=0.05)
        losses = [float(learner.step(x, y).loss) for _ in range(10)]
        assert losses[-1] < 0.8 * losses[0]
        peaks[name] = learner.measured_step(x, y)[1].activations
    whole = 16 * 8 * 12 * 12 * 4  # a map; beside what is packed, a few exist at a time
    assert peaks["plain"] > 12 * whole
    assert peaks["packed"] < 6 * whole
