"""How samples are split: shares of the classes, splits that no option changes, statistics of the training part."""

import pytest
import torch
from support.images import write_parquet, write_split_parquet
from support.pixels import numbered

from layerwise.data import load, stratified_split
from layerwise.data.splitting import stratified_sample
from layerwise.errors import LayerwiseError


def test_stratified_split_keeps_the_proportions():
    labels = torch.tensor([0] * 101 + [1] * 53 + [2] * 7 + [3])[torch.randperm(162)]
    for fraction in (0.1, 0.25, 0.9):
        rest, part = stratified_split(labels, fraction, seed=0)
        assert sorted(rest.tolist() + part.tolist()) == list(range(162))
        for label, count in enumerate((101, 53, 7, 1)):
            taken = int((labels[part] == label).sum())
            assert abs(taken - fraction * count) < 1 or count == 1
            assert taken < count
    assert len(stratified_split(labels, 0.25, seed=0)[1]) == round(0.25 * 162)
    assert torch.equal(stratified_split(labels, 0.25, 5)[1], stratified_split(labels, 0.25, 5)[1])
    assert not torch.equal(stratified_split(labels, 0.25, 5)[1], stratified_split(labels, 0.25, 6)[1])


@pytest.mark.parametrize(
    ("counts", "size"), [((3, 2, 10, 1), 12), ((1, 50, 10), 36), ((5, 1), 5), ((1, 1, 1), 3), ((200, 0, 1, 1), 3)]
)
def test_a_sample_has_the_size_that_was_asked_and_every_class(counts, size):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    chosen = stratified_sample(labels, size, seed=0)
    taken = torch.bincount(labels[chosen], minlength=len(counts)).tolist()
    assert sum(taken) == size == len(set(chosen.tolist()))
    for own, count in zip(taken, counts, strict=True):
        assert min(1, count) <= own <= count
        assert abs(own - size * count / sum(counts)) < 1 or 1 in counts


def test_splits_are_disjoint_and_test_depends_on_no_option(tmp_path):
    """The pixel of each image is its number, so that we can see where each image went."""
    write_parquet(tmp_path / "all.parquet", numbered(100).images, [i % 4 for i in range(100)])

    def members(source):
        return set(source.images[:, 0, 0, 0].tolist())

    data = load(f"parquet:{tmp_path}", val_fraction=0.25)
    parts = [members(source) for source in (data.train, data.val, data.test)]
    assert [len(part) for part in parts] == [60, 20, 20]
    assert set.union(*parts) == set(range(100))
    assert torch.bincount(data.val.labels).tolist() == torch.bincount(data.test.labels).tolist() == [5] * 4
    assert any("no test split" in note for note in data.notes)

    other = load(f"parquet:{tmp_path}", val_fraction=0.5, seed=9)
    assert torch.equal(other.test.images, data.test.images)
    same = load(f"parquet:{tmp_path}", val_fraction=0.25)
    assert torch.equal(same.val.images, data.val.images)
    reseeded = load(f"parquet:{tmp_path}", val_fraction=0.25, seed=1)
    assert members(reseeded.val) != parts[1]
    whole = load(f"parquet:{tmp_path}", val_fraction=0)
    assert whole.val is None and members(whole.train) == parts[0] | parts[1]


def test_mean_and_std_come_from_the_training_part_only(tmp_path):
    write_split_parquet(tmp_path)
    data = load(f"parquet:{tmp_path}", val_fraction=0.5)
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_a_constant_channel_has_std_one(tmp_path):
    write_parquet(tmp_path / "a.parquet", torch.full((10, 1, 4, 4), 51, dtype=torch.uint8), [0, 1] * 5)
    data = load(f"parquet:{tmp_path}")
    assert data.mean == pytest.approx((0.2,)) and data.std == (1.0,)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan"), "0.1"])
def test_validation_fraction_out_of_range(fraction):
    with pytest.raises(LayerwiseError, match="not in \\[0, 1\\)"):
        load("digits", val_fraction=fraction)


def test_fewer_training_samples_leave_the_other_splits_and_the_shares_of_the_classes_alone():
    whole, few = load("digits"), load("digits", train_samples=200)
    assert len(few.train) == 200
    assert torch.equal(few.val.images, whole.val.images)
    assert torch.equal(few.test.images, whole.test.images)
    known = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(*whole.train.batch(torch.arange(1294)), strict=True)
    }
    assert all((i.numpy().tobytes(), int(y)) in known for i, y in zip(*few.train.batch(torch.arange(200)), strict=True))
    expected = 200 * torch.bincount(whole.train.labels) / len(whole.train)
    assert (torch.bincount(few.train.labels) - expected).abs().max() <= 1
    again, other = load("digits", train_samples=200), load("digits", train_samples=200, seed=1)
    assert torch.equal(few.train.images, again.train.images)
    assert not torch.equal(few.train.images, other.train.images)
    assert torch.equal(load("digits", train_samples=1294).train.images, whole.train.images)


@pytest.mark.parametrize("count", [0, 9, 1295, 20.5])
def test_a_number_of_training_samples_that_is_not_there_is_refused(count):
    with pytest.raises(LayerwiseError, match=f"train_samples is {count}; give a number from 10"):
        load("digits", train_samples=count)


def test_validation_fraction_of_no_sample(tmp_path):
    write_split_parquet(tmp_path)
    with pytest.raises(LayerwiseError, match="is no sample; raise it or use 0"):
        load(f"parquet:{tmp_path}", val_fraction=0.01)
