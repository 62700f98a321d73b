"""Optimizers of other libraries with a local rule and with backpropagation: they train, their state is counted."""

import pytest
import torch
from torch import nn

from layerwise import Learner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the libraries warn of what they load
]

RANK = 8
STEP = 4
"""Bytes of a step counter."""


def split(groups):
    """Parameters of matrices, and the others, as groups with the options of theirs."""
    for group in groups:
        options = {name: value for name, value in group.items() if name not in ("params", "names")}
        matrices = [p for p in group["params"] if p.ndim == 2]
        yield options, matrices, [p for p in group["params"] if p.ndim != 2]


def low_rank(name):
    """GaLore or APOLLO for matrices, plain AdamW inside of them for the rest."""

    def make(groups):
        library = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
        found = []
        for options, matrices, others in split(groups):
            own = {"rank": RANK, "update_proj_gap": 50, "scale": 1.0, "projection_type": "std"}
            found += [{**options, "params": matrices, **own}] if matrices else []
            found += [{**options, "params": others}] if others else []
        return library.load_optimizer(name)(found, lr=1e-2)

    return make


def muon(groups):
    made = []
    for options, matrices, others in split(groups):
        made += [torch.optim.Muon([{**options, "params": matrices}])] if matrices else []
        made += [torch.optim.AdamW([{**options, "params": others}])] if others else []
    return made


def adamw(p):
    return 8 * p.numel() + STEP


def eight_bit(p):
    """Two moments: a byte per number, a scale per 256 numbers, and the 256 values that codes stand for."""
    return 2 * (p.numel() + 4 * p.numel() // 256 + 4 * 256) + STEP if p.numel() >= 4096 else adamw(p)


def adafactor(p):
    return 4 * (sum(p.shape) if p.ndim == 2 else p.numel()) + STEP


def galore(p):
    """Two moments of the gradient in r dimensions of its smaller side, and the r singular vectors that span them."""
    if p.ndim != 2:
        return 8 * p.numel()
    small, large = sorted(p.shape)
    rank = min(RANK, small)
    return 4 * (rank * small + 2 * rank * large)


def apollo(p):
    """As GaLore, but random vectors need not be independent; and the norm that limits the next one's growth."""
    if p.ndim != 2:
        return 8 * p.numel()
    small, large = sorted(p.shape)
    return 4 * (RANK * small + 2 * RANK * large) + 4


ROWS = {
    "schedule-free AdamW": ("schedulefree", "schedulefree.AdamWScheduleFree", lambda p: 8 * p.numel()),
    "Muon": ("torch", muon, lambda p: 4 * p.numel() if p.ndim == 2 else adamw(p)),
    "Adafactor": ("torch", "torch.optim.Adafactor", adafactor),
    "8-bit AdamW": ("torchao", "torchao.optim.AdamW8bit", eight_bit),
    "GaLore": ("pytorch_optimizer", low_rank("galore"), galore),
    "APOLLO": ("pytorch_optimizer", low_rank("apollo"), apollo),
}


@pytest.mark.parametrize("rule", ["local_ce", "backprop"])
@pytest.mark.parametrize("name", list(ROWS))
def test_it_trains_and_its_state_is_counted_to_the_byte(name, rule):
    package, optimizer, size = ROWS[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    x = torch.randn(64, 64)
    y = x[:, :4].argmax(1)
    layers = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.ReLU())]
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute, and changes no state
        learner = Learner(nn.Sequential(*layers, nn.Linear(64, 4)), rule, optimizer=optimizer, lr=1e-2)
        losses = [learner.step(x, y).read()["head/loss"] for _ in range(30)]
        _, use = learner.measured_step(x, y)
    assert losses[-1] < losses[0] - 0.02
    assert use.optimizer == sum(size(p) for _, p in learner.named_parameters())
