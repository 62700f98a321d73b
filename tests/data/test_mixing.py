"""Mixup and CutMix: convex pairs within a batch, drawn by (seed, epoch, batch index) alone."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from support.pixels import noise

from layerwise.compare.rules_asked import read_rules
from layerwise.data import Batches, InMemorySource, Mixing
from layerwise.errors import LayerwiseError
from layerwise.rules import get
from layerwise.runs.options import TrainOptions

SCALE = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
LABELS = torch.arange(24) % 5


def batches(labels=LABELS, augment=("flip", "crop", "cutout"), **options):
    return Batches(InMemorySource(noise(24), labels), 12, seed=3, augment=augment, **SCALE, **options)


def test_mixup_is_a_convex_pair_of_samples_and_labels():
    for (x, y), (mixed, soft) in zip(batches().epoch(1), batches(mixing=Mixing(5, mixup=0.7)).epoch(1), strict=True):
        hot = F.one_hot(y, 5).double()
        # A sample whose partner has another class tells lambda.
        other = (y != y.flip(0)).nonzero()[0, 0]
        share = soft[other, y[other]].double()
        assert 0 < share < 1
        torch.testing.assert_close(soft.double(), share * hot + (1 - share) * hot.flip(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            mixed.double(), share * x.double() + (1 - share) * x.flip(0).double(), rtol=0, atol=1e-5
        )


def test_cutmix_takes_a_box_and_its_share_of_the_label():
    cut = batches(augment=(), mixing=Mixing(5, cutmix=1.0))
    for epoch in range(10):
        for (x, y), (mixed, soft) in zip(batches(augment=()).epoch(epoch), cut.epoch(epoch), strict=True):
            own = (mixed == x).all(1)
            torch.testing.assert_close(mixed, torch.where(own[:, None], x, x.flip(0)), rtol=0, atol=0)
            taken = ~own[0]
            rows, columns = taken.any(1).nonzero().flatten(), taken.any(0).nonzero().flatten()
            assert len(rows) * len(columns) == taken.sum()  # a box
            if len(rows):
                assert len(rows) == rows[-1] - rows[0] + 1 and len(columns) == columns[-1] - columns[0] + 1
            other = (y != y.flip(0)).nonzero()[0, 0]
            assert soft[other, y.flip(0)[other]].item() == pytest.approx(taken.float().mean().item(), abs=1e-6)
            assert torch.allclose(soft.sum(1), torch.ones(len(soft)))


def test_shares_have_the_distribution_of_the_papers():
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1))."""
    both = [Mixing(5, mixup=0.5, cutmix=1.0).draw(seed, 32, 32) for seed in range(4000)]
    assert sum(mix.box is None for mix in both) / 4000 == pytest.approx(0.5, abs=0.04)
    for alpha in (0.2, 1.0, 4.0):
        found = [Mixing(5, mixup=alpha).draw(seed, 32, 32).share for seed in range(4000)]
        variance = 1 / (4 * (2 * alpha + 1))
        assert statistics.fmean(found) == pytest.approx(0.5, abs=5 * (variance / 4000) ** 0.5)
        assert statistics.variance(found) == pytest.approx(variance, rel=0.1)


def test_draws_are_those_of_the_batch_wherever_it_is_read():
    whole = batches(mixing=Mixing(5, mixup=0.7, cutmix=1.0))
    first, second = whole.epoch(2)
    (x, y), (again, same) = next(whole.epoch(2, 1)), second
    assert torch.equal(x, again) and torch.equal(y, same)
    assert not torch.equal(next(whole.epoch(3))[1], first[1])
    for count in (2, 3):
        parts = [list(whole.share(index, count).epoch(2)) for index in range(count)]
        for place, (x, y) in enumerate((first, second)):
            assert torch.equal(torch.cat([part[place][0] for part in parts]), x)
            assert torch.equal(torch.cat([part[place][1] for part in parts]), y)
    assert all(
        torch.equal(labels, y)
        for (_, labels), (_, y) in zip(whole.without_images().epoch(2), whole.epoch(2), strict=True)
    )


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(LayerwiseError, match="some training samples have no label"):
        batches(labels=torch.where(LABELS == 1, -1, LABELS), mixing=Mixing(5, mixup=0.2))
    with pytest.raises(LayerwiseError, match=r"'noprop_dt' cannot learn from soft labels, which mixup and CutMix make"):
        read_rules(["noprop_dt"], TrainOptions(mixup=0.2))
    every = read_rules(["all"], TrainOptions(mixup=0.2))
    assert {"sll", "sid", "backprop"} <= every.keys()
    assert all("soft_labels" in get(name).tasks for name in every)
    with pytest.raises(LayerwiseError, match="cutmix is about classification"):
        TrainOptions(task="multilabel", cutmix=1.0)
