"""A run that stays within a peak of memory: in how many parts it takes its batches."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from layerwise import data
from layerwise.core.graphs import Graph
from layerwise.errors import LayerwiseError
from layerwise.learner.fitting import check_reached, fit_micro
from layerwise.memory.fitting import Fit, read_size
from layerwise.runs.building import DataSignature, build_learner
from layerwise.runs.options import TrainOptions


def fit_run(
    options: TrainOptions,
    facts: DataSignature,
    device: torch.device,
    batches: data.Batches,
    graph: Graph | None,
    peak: int,
) -> tuple[Fit, tuple[str, ...]]:
    """Find the fewest parts whose step stays within a peak, on the first batch of a run.

    Returns:
        The fit, and what has been warned of: where parts change what is learned.
    """
    x, y = next(iter(batches.epoch(0)))
    total = 10**6  # no schedule ends while steps are measured
    with told() as words:
        fit = fit_micro(
            lambda micro: build_learner(replace(options, micro=micro), facts, device, total, graph=graph),
            x,
            y,
            peak,
            options.micro,
        )
    return fit, tuple(dict.fromkeys(words))


@contextmanager
def told() -> Iterator[list[str]]:
    """A context in which warnings are noted and not shown."""
    words: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield words
    words.extend(str(warning.message) for warning in found)


def within_peak(
    options: TrainOptions, facts: DataSignature, device: torch.device, batches: data.Batches, graph: Graph | None
) -> TrainOptions:
    """The options of a run with the fewest parts that stay within its peak.

    Raises:
        LayerwiseError: no number of parts is enough, or the peak is that of a comparison.
    """
    if options.peak is None:
        return options
    if options.peak == "auto":
        raise LayerwiseError("peak is auto, which is the lowest of several rules; give a size such as 200MiB.")
    peak = read_size(options.peak)
    fit, _ = fit_run(options, facts, device, batches, graph, peak)
    check_reached(fit, peak, options.rule.name)
    return replace(options, micro=fit.micro)


def note_of_peak(options: TrainOptions) -> list[str]:
    """A sentence on how a run stays within its peak, where it has one."""
    if options.peak is None:
        return []
    parts = "as a whole" if options.micro == 1 else f"in {options.micro} parts (--micro {options.micro})"
    return [f"each batch is run {parts}, so that activations and gradients stay within --peak {options.peak}"]


def check_alone_for_peak(alone: bool) -> None:
    """Raise LayerwiseError where several processes train the run, as the search measures steps of one."""
    if not alone:
        raise LayerwiseError(
            "peak is measured in one process, and this run has several; leave it out, or give --micro with the number "
            "of parts that a run in one process finds."
        )
