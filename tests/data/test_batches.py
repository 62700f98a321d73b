"""Batches and augmentations: a pure function of (seed, epoch, batch index)."""

import math

import pytest
import torch
from support.pixels import noise, numbered

from layerwise.data import Batches, InMemorySource, crop, cutout, flip
from layerwise.data.batches import moved
from layerwise.errors import LayerwiseError


def plain(source, batch_size, **options):
    return Batches(source, batch_size, **{"seed": 0, "mean": (0.0,), "std": (1.0,)} | options)


def labels_of(batches, epoch, start=0):
    return torch.cat([y for _, y in batches.epoch(epoch, start)]).tolist()


# Batches


def test_order_is_a_pure_function_of_seed_and_epoch():
    batches = plain(numbered(40), 10)
    first = labels_of(batches, 3)
    torch.rand(5)  # the global generator has no say
    labels_of(batches, 0)
    assert labels_of(batches, 3) == first == labels_of(plain(numbered(40), 10), 3)
    assert sorted(first) == list(range(40))
    assert labels_of(batches, 4) != first
    assert labels_of(plain(numbered(40), 10, seed=1), 3) != first


def test_images_stay_with_their_labels():
    for x, y in plain(numbered(40), 10).epoch(0):
        torch.testing.assert_close(x, (y / 255.0)[:, None, None, None].expand_as(x))


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_later_start_gives_the_same_bits(start):
    source = InMemorySource(noise(52), torch.arange(52))
    batches = plain(source, 10, augment=("flip", "crop", "cutout"), mean=(0.5,) * 3, std=(0.2,) * 3)
    whole, tail = list(batches.epoch(2)), list(batches.epoch(2, start))
    assert len(whole) == 5 and len(tail) == 5 - start
    for (x, y), (u, v) in zip(whole[start:], tail, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_augmentation_differs_between_epochs_and_batches():
    source = InMemorySource(noise(1).repeat(64, 1, 1, 1), torch.zeros(64, dtype=torch.int64))
    batches = plain(source, 32, augment=("crop",), mean=(0.0,) * 3, std=(1.0,) * 3)
    (a, _), (b, _) = batches.epoch(0)
    c, _ = next(batches.epoch(1))
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_evaluation_reads_everything_in_order():
    batches = plain(numbered(23), 10, shuffle=False, drop_last=False)
    assert len(batches) == 3
    assert labels_of(batches, 0) == labels_of(batches, 1) == list(range(23))
    dropping = plain(numbered(23), 10, shuffle=False)
    assert len(dropping) == 2
    assert labels_of(dropping, 0) == list(range(20))


def test_normalisation_is_the_textbook_formula():
    source = InMemorySource(noise(6), torch.arange(6))
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    x, y = next(Batches(source, 6, seed=0, mean=mean, std=std).epoch(0))
    expected = (source.images[y] / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    torch.testing.assert_close(x, expected)


def test_channels_last_changes_the_layout_only():
    source = InMemorySource(noise(6), torch.arange(6))
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    x, _ = next(plain(source, 6, **options).epoch(0))
    z, _ = next(plain(source, 6, channels_last=True, **options).epoch(0))
    assert x.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, z)


def test_only_a_gpu_gets_its_batches_from_page_locked_memory():
    class Watched:  # there is no GPU here
        device, locked = torch.device("cpu"), False

        def pin_memory(self):
            other = Watched()
            other.locked = True
            return other

        def to(self, device, non_blocking):
            return device.type, self.locked, non_blocking

    assert moved(Watched(), torch.device("cuda", 0)) == ("cuda", True, True)
    assert moved(Watched(), torch.device("cpu")) == ("cpu", False, True)
    there = Watched()
    there.device = torch.device("cuda", 0)  # images that are held there
    assert moved(there, torch.device("cuda", 0)) == ("cuda", False, True)


def test_wrong_batches_are_refused():
    with pytest.raises(LayerwiseError, match="batch size 512 is larger than the 40 training samples; use --batch-size"):
        plain(numbered(40), 512)
    with pytest.raises(LayerwiseError, match="batch size 0"):
        plain(numbered(40), 0)
    with pytest.raises(LayerwiseError, match=r"unknown augmentation 'flop'; did you mean 'flip'.*flip, crop, cutout"):
        plain(numbered(40), 4, augment=("flop",))
    with pytest.raises(LayerwiseError, match="one value of each per channel"):
        plain(numbered(40), 4, mean=(0.1, 0.2))
    for start in (-1, 11):
        with pytest.raises(LayerwiseError, match="epoch of 10 batches"):
            next(plain(numbered(40), 4).epoch(0, start))


# Augmentations


def test_flip_gives_the_image_or_its_mirror_half_the_time():
    images = noise(400, side=6)
    out = flip(images, torch.Generator().manual_seed(0))
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 200) < 5 * math.sqrt(100)  # five standard deviations of a fair coin


@pytest.mark.parametrize(("height", "width", "pad"), [(32, 32, 4), (8, 12, 1), (4, 4, 1)])
def test_crop_is_a_window_of_the_padded_image(height, width, pad):
    images = torch.randint(1, 256, (600, 2, height, width), dtype=torch.uint8)
    out = crop(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="reflect").to(torch.uint8)
    found = torch.zeros(600, dtype=torch.int64)
    used = set()
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, :, top : top + height, left : left + width]
            match = (window == out).flatten(1).all(1)
            found += match
            if match.any():
                used.add((top, left))
    assert (found == 1).all()
    assert {top for top, _ in used} == {left for _, left in used} == set(range(2 * pad + 1))


def test_cutout_zeroes_one_square_around_a_pixel():
    height, width, side = 16, 20, 8
    images = torch.full((500, 3, height, width), 7, dtype=torch.uint8)
    out = cutout(images, torch.Generator().manual_seed(0))
    # All the holes there can be, one per centre, cut off at the border.
    holes = {}
    for y in range(height):
        for x in range(width):
            hole = torch.zeros(height, width, dtype=torch.bool)
            hole[max(0, y - side // 2) : y + side // 2, max(0, x - side // 2) : x + side // 2] = True
            holes[bytes(hole.flatten().tolist())] = (y, x)
    centres = set()
    for image in out:
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        assert set(image.unique().tolist()) <= {0, 7}
        centres.add(holes[bytes((image[0] == 0).flatten().tolist())])
    assert len({y for y, _ in centres}) == height and len({x for _, x in centres}) == width
