"""Finds the number of parts per batch with which a run stays within a peak of memory."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from layerwise import data
from layerwise.core.graphs import Graph
from layerwise.errors import LayerwiseError
from layerwise.learner.fitting import check_peak_reached, fit_micro
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
    """Find the smallest number of parts whose step stays within a peak, on the first batch of a run.

    Returns:
        The fit, and the warnings about effects of the parts on learning.
    """
    x, y = next(iter(batches.epoch(0)))
    total = 10**6  # long enough that no schedule ends while steps are measured
    with warnings_collected() as words:
        fit = fit_micro(
            lambda micro: build_learner(replace(options, micro=micro), facts, device, total, graph=graph),
            x,
            y,
            peak,
            options.micro,
        )
    return fit, tuple(dict.fromkeys(words))


@contextmanager
def warnings_collected() -> Iterator[list[str]]:
    """A context that collects warnings instead of showing them."""
    words: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield words
    words.extend(str(warning.message) for warning in found)


def within_peak(
    options: TrainOptions, facts: DataSignature, device: torch.device, batches: data.Batches, graph: Graph | None
) -> TrainOptions:
    """Set the options of a run to the smallest number of parts that stays within its peak.

    Raises:
        LayerwiseError: no number of parts is enough, or the peak is one for comparisons.
    """
    if options.peak is None:
        return options
    if options.peak == "auto":
        raise LayerwiseError("peak is auto, which is the lowest of several rules; give a size such as 200MiB.")
    peak = read_size(options.peak)
    fit, _ = fit_run(options, facts, device, batches, graph, peak)
    check_peak_reached(fit, peak, options.rule.name)
    return replace(options, micro=fit.micro)


def note_of_peak(options: TrainOptions) -> list[str]:
    """Explain how a run stays within its peak, if it has one."""
    if options.peak is None:
        return []
    parts = "as a whole" if options.micro == 1 else f"in {options.micro} parts (--micro {options.micro})"
    return [f"each batch is run {parts}, so that activations and gradients stay within --peak {options.peak}"]


def check_alone_for_peak(alone: bool) -> None:
    """Raise LayerwiseError if several processes train the run, because the search measures steps of one."""
    if not alone:
        raise LayerwiseError(
            "peak is measured in one process, and this run has several; leave it out, or give --micro with the number "
            "of parts that a run in one process finds."
        )
