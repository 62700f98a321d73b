"""Batches whose order and augmentation are a pure function of (seed, epoch, batch index)."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from layerwise.core.augment import AUGMENTATIONS, WHOLE, Share, check_augmentations
from layerwise.core.randomness import derive_seed
from layerwise.data.mixing import Mix, Mixing
from layerwise.data.sources import Source
from layerwise.errors import LayerwiseError
from layerwise.parsing import check_largest


class Batches:
    """The batches of a source, shuffled, augmented and normalised.

    Args:
        source: where the samples come from; an in-memory source is moved to `device` once, here.
        batch_size: samples per batch, at least 1.
        seed: seed of order and augmentation; both depend only on (seed, epoch, batch index).
        augment: names from `flip`, `crop`, `cutout`, applied in this order to the uint8 pixels; for pictures only.
        mixing: mixup or CutMix of each batch, whose labels are then probabilities (B, K); default none.
        mean, std: per channel, on the pixel scale [0, 1] (of a table, the columns' own), C values each.
        device: where the batches live; default "cpu".
        shuffle: a new order each epoch; default True. False keeps the order of the source.
        drop_last: leave out the last batch of an epoch if it is not full; default True.
        channels_last: give x in the channels-last memory format; default False.

    A source whose samples belong together (the nodes of a graph) gives one batch, whatever `batch_size` and `shuffle`.

    For evaluation use `shuffle=False, drop_last=False` and no augmentation.

    Raises:
        LayerwiseError: a batch size below 1 or, with `drop_last`, larger than the source; an unknown augmentation;
            `mean` or `std` without one value per channel; augmentation of samples that are not images; mixing of
            samples that are not images or rows, of which some have no class, or, with CutMix, that are not images.

    >>> from layerwise.data import InMemorySource
    >>> source = InMemorySource(torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10))
    >>> batches = Batches(source, 4, seed=0, mean=(0.5,), std=(0.5,))
    >>> len(batches)
    2
    >>> [(x.shape, x.min().item(), y.shape) for x, y in batches.epoch(0, start=1)]
    [(torch.Size([4, 1, 4, 4]), -1.0, torch.Size([4]))]
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int,
        augment: Sequence[str] = (),
        mixing: Mixing | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        drop_last: bool = True,
        channels_last: bool = False,
    ):
        check_largest("batch_size", batch_size)
        if batch_size < 1:
            raise LayerwiseError(f"batch size {batch_size} is not positive; use --batch-size 1 or more")
        if drop_last and batch_size > len(source) and not source.whole:
            raise LayerwiseError(
                f"batch size {batch_size} is larger than the {len(source)} training samples; "
                f"use --batch-size {len(source)} or less"
            )
        check_augmentations(augment)
        if augment and not source.pictures:
            raise LayerwiseError(f"the {_kind(source)} are not images to augment; leave --augment out")
        if mixing is not None:
            _check_can_mix(mixing, source)
        if source.whole:
            batch_size, shuffle = len(source), False
        channels = source.shape[0]
        if len(mean) != channels or len(std) != channels:
            raise LayerwiseError(
                f"{len(mean)} means and {len(std)} standard deviations do not fit images of {channels} channels; "
                "give one value of each per channel"
            )
        self.device = torch.device(device)
        self.source = source.to(self.device)
        self.batch_size = batch_size
        self.seed = seed
        self.augment = tuple(augment)
        self.mixing = mixing
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.channels_last = channels_last
        self.labels_only = False
        self.part = WHOLE
        # (pixel / 255 - mean) / std as one multiplication and one addition; in float64 for a table, where a mean may be
        # many times the spread.
        unit, self._type = (255, torch.float32) if source.dtype == torch.uint8 else (1, torch.float64)
        spread = torch.tensor(std, dtype=torch.float64, device="cpu")
        scale, shift = 1 / (unit * spread), -torch.tensor(mean, dtype=torch.float64, device="cpu") / spread
        self._scale, self._shift = (f.to(self._type).view(-1, 1, 1).to(self.device) for f in (scale, shift))

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def without_images(self) -> "Batches":
        """The same batches with only the labels: x is empty (B, 0), no image is kept, read, augmented or moved."""
        other = copy.copy(self)
        other.source = self.source.without_images()
        other.labels_only = True
        return other

    def share(self, index: int, count: int) -> "Batches":
        """Part `index` of `count` of the same batches, with exactly the images that the whole batches hold there.

        Parts of a batch that `count` does not divide differ by one sample; empty ones are left out.
        """
        other = copy.copy(self)
        other.part = Share(index, count)
        return other

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, from batch `start` on: the same bits as when read from batch 0.

        Args:
            epoch: number of the epoch, from 0.
            start: index of the first batch to give, 0 to `len(self)`; default 0.

        Yields:
            x: float32 (B, C, H, W), normalised, or tokens int64 (B, T); y: labels as the source has
                them, class numbers as int64, or probabilities float32 (B, K) of mixed samples; both on `device`.

        Raises:
            LayerwiseError: `start` is outside 0 to `len(self)`.
        """
        if not 0 <= start <= len(self):
            raise LayerwiseError(f"batch {start} is not in an epoch of {len(self)} batches; start at 0 to {len(self)}")
        order = torch.arange(len(self.source), device="cpu")
        if self.shuffle:
            order = torch.randperm(len(self.source), generator=self._generator("order", epoch), device="cpu")
        order = order.to(self.source.labels.device)
        # With the partner of every sample behind them, if they are mixed.
        parts = [self.part] if self.mixing is None else [self.part, replace(self.part, mirrored=True)]
        batches = order.split(self.batch_size)[start : len(self)]
        wanted = [torch.cat([part.of(batch) for part in parts]) for batch in batches]
        wanted = [batch for batch in wanted if len(batch)]
        if self.labels_only:
            for index, indices in enumerate(wanted, start):
                labels = moved(self._labels(self.source.labels[indices], self._mix(epoch, index)), self.device)
                yield torch.empty(len(labels), 0, device=self.device), labels
            return
        for index, (images, labels) in enumerate(self.source.batches(wanted), start):
            mix = self._mix(epoch, index)
            halves = moved(images, self.device).chunk(len(parts))
            augmented = [self._augmented(half, epoch, index, part) for half, part in zip(halves, parts, strict=True)]
            images = augmented[0] if mix is None else mix.images(*(half.to(self._type) for half in augmented))
            if self.source.dtype == torch.int64:  # tokens
                yield images, moved(labels, self.device)
                continue
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            x = images.to(self._type, copy=True, memory_format=layout).mul_(self._scale).add_(self._shift)
            yield x.to(torch.float32), moved(self._labels(labels, mix), self.device)

    def _augmented(self, images: Tensor, epoch: int, index: int, part: Share) -> Tensor:
        if self.augment:
            generator = self._generator("augment", epoch, index)
            for name in self.augment:
                images = AUGMENTATIONS[name](images, generator, part)
        return images

    def _mix(self, epoch: int, index: int) -> Mix | None:
        if self.mixing is None:
            return None
        return self.mixing.draw(derive_seed(self.seed, "mixing", epoch, index), *self.source.shape[1:])

    def _labels(self, labels: Tensor, mix: Mix | None) -> Tensor:
        if mix is None or self.mixing is None:
            return _usable(labels)
        own, partner = labels.chunk(2)
        return mix.labels(own, partner, self.mixing.classes)

    def _generator(self, *use: int | str) -> Generator:
        return Generator().manual_seed(derive_seed(self.seed, *use))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, asynchronously to a GPU, which copies from page-locked memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _kind(source: Source) -> str:
    """What the samples are, if they are no pictures."""
    return "nodes of a graph" if source.whole else KINDS[source.dtype]


KINDS = {torch.int64: "windows of a text", torch.float64: "rows of a table"}


def _check_can_mix(mixing: Mixing, source: Source) -> None:
    if not source.pictures and (mixing.cutmix or source.whole or source.dtype == torch.int64):
        name = "cutmix" if mixing.cutmix else "mixup"
        raise LayerwiseError(f"the {_kind(source)} cannot be mixed; leave --{name} out")
    if bool((source.labels < 0).any()):
        raise LayerwiseError(
            "some training samples have no label, and a mixed label needs the classes of both; leave --mixup and "
            "--cutmix out, or such samples"
        )


def _usable(labels: Tensor) -> Tensor:
    """Class numbers as int64; pixels of masks are held as bytes, tokens as short numbers."""
    return labels if labels.is_floating_point() else labels.long()
