"""Generates text with a run: token by token, with cached keys and values, also from a block's own readout."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from layerwise.core.blocks import Partition
from layerwise.core.pieces import PassesBeliefs, ReadsOut
from layerwise.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, check_fields
from layerwise.data import Tokenizer
from layerwise.errors import LayerwiseError
from layerwise.learner import Learner
from layerwise.models import ModelOptions, OutsideModel
from layerwise.models.gpt import CausalAttention, remembering
from layerwise.runs.building import check_tokenizer, load_run, read_tokenizer

SAMPLE = 100  # tokens of text that a finished run generates for the report
SAMPLE_PROMPT = 16  # tokens of the test split before them
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens."""

    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: PositiveInt | None = None
    """Draw among this many of the most likely tokens (default: all)."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check_fields(self)


def written(
    folder: Path, prompt: str, tokens: int, sampling: Sampling, block: int | None = None, device: str = "auto"
) -> tuple[str, list[str]]:
    """Continue a prompt with the run in `folder`; returns prompt and text, and notes for the user.

    Args:
        folder: of a run on text.
        prompt: text to continue, at least one token.
        tokens: how many to generate.
        sampling: how to draw them.
        block: number of the block, from 1, whose readout predicts (default: the head).
        device: where to run.

    Raises:
        LayerwiseError: not a run on text; a prompt that is empty, too long or has unknown characters; a block without
            a readout.
    """
    options, facts, learner, notes = load_run(folder, device)
    tokenizer = read_tokenizer(folder, options)
    if tokenizer is None:
        raise LayerwiseError(f"the run in {folder} is not on text, so it cannot continue a prompt; give it an INPUT.")
    check_tokenizer(folder, tokenizer, facts)
    if tokens < 1:
        raise LayerwiseError(f"tokens is {tokens}; it must be a whole number, 1 or more.")
    given = tokenizer.encode(prompt)
    if not len(given):
        raise LayerwiseError("the prompt is empty; give at least one character to continue.")
    context = getattr(options.model, "context", None)
    if context is not None and len(given) + tokens - 1 > context:
        raise LayerwiseError(
            f"the prompt has {len(given)} tokens, and with {tokens} more that is beyond the context of the model, "
            f"{context}; give a shorter prompt, or fewer tokens."
        )
    window, reach = facts.shape[2], tokens_read(options.model, facts.shape[2])
    if reach is not None and len(given) + tokens - 1 > reach:
        notes.append(f"the network reads the last {reach} tokens of the text for each next one, a window of training")
    elif len(given) + tokens - 1 > window:
        notes.append(f"the run was trained on windows of {window} tokens; longer texts may be worse")
    found = list(generate(learner, given.tolist(), tokens, sampling, block, reach=reach))
    return tokenizer.decode([*given.tolist(), *found]), notes


def tokens_read(model: ModelOptions | OutsideModel, window: int) -> int | None:
    """How many tokens a network can read at once; None if any number.

    Of a network from elsewhere only the window of its training is known: its positions may end there.

    Args:
        model: options of the model.
        window: tokens of a window of training.
    """
    return window if isinstance(model, OutsideModel) else getattr(model, "context", None)


def check_causal(learner: Learner, window: int) -> None:
    """Raise LayerwiseError if what a network predicts after a token depends on later tokens, which are its labels.

    Compared are the predictions for two windows that differ in their last token.

    Args:
        learner: of the network, built.
        window: tokens of a window of training.
    """
    first = torch.zeros(1, window, dtype=torch.int64, device=learner.device)
    second = first.clone()
    second[:, -1] = 1
    a, b = (learner(x)[:, :-1].double() for x in (first, second))
    if not torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().amax() if a.numel() else 0)):
        raise LayerwiseError(
            "the network sees later tokens, which are the ones that it has to predict, so its figures would mean "
            "nothing; let the output at each token depend on that token and earlier ones only (causal attention, "
            "padding on the left)."
        )


@torch.no_grad()
def generate(
    learner: Learner,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling,
    block: int | None = None,
    keep: bool = True,
    reach: int | None = None,
) -> Iterator[int]:
    """Generate the tokens after a prompt, one by one.

    Args:
        learner: whose network predicts the next token.
        prompt: at least one token.
        count: how many to generate.
        sampling: how to draw them.
        block: number of the block, from 1, whose readout predicts (default: the head).
        keep: cache keys and values if the model can and reads the whole text, so that every token is processed once.
        reach: read only so many tokens, the last ones of the text (default: all).

    Raises:
        LayerwiseError: the block has no readout.
    """
    model = learner.network.model
    keep = keep and any(isinstance(module, CausalAttention) for module in model.modules())
    keep = keep and (reach is None or len(prompt) + count - 1 <= reach)
    generator = Generator().manual_seed(sampling.seed)
    tokens, seen = list(prompt), 0
    with remembering(model, learner.auxiliary) if keep else nullcontext():
        for _ in range(count):
            first = seen if reach is None else max(seen, len(tokens) - reach)
            x = torch.tensor([tokens[first:]], device=learner.device)
            seen = len(tokens) if keep else 0
            logits = learner(x) if block is None else outputs_at(learner, x, block)
            tokens.append(_drawn(logits[0, -1].float().cpu(), sampling, generator))
            yield tokens[-1]


def _drawn(logits: Tensor, sampling: Sampling, generator: Generator) -> int:
    if not bool(logits.isfinite().all()):
        raise LayerwiseError(
            "what the network answers to the text is no finite number; see what layerwise eval says of the run."
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    if sampling.top_k is not None and sampling.top_k < len(logits):
        likely = logits.topk(sampling.top_k).indices  # by place: tokens may have the same logit
        logits = torch.full_like(logits, -torch.inf).scatter(0, likely, logits[likely])
    below = (logits - logits.max()).double()  # so that a temperature near zero divides nothing that is not
    return int(torch.multinomial((below / sampling.temperature).softmax(-1).float(), 1, generator=generator))


@torch.no_grad()
def outputs_at(learner: Learner, x: Tensor, block: int) -> Tensor:
    """Predict with the readout of a block, `(B, ..., K)`; no later block is run.

    Args:
        learner: the learner, built.
        x: inputs `(B, ...)`.
        block: number of the block, from 1.

    Raises:
        LayerwiseError: there is no such block, or it has no readout.
    """
    network, rule, auxiliary = learner.network, learner.rule, learner.auxiliary
    blocks = len(network.blocks)
    if not 1 <= block <= blocks:
        raise LayerwiseError(f"there is no block {block}; the network has the blocks 1 to {blocks}.")
    if not isinstance(rule, (ReadsOut, PassesBeliefs)) or str(block - 1) not in auxiliary:
        able = sorted(int(i) + 1 for i in auxiliary if int(i) < blocks) if isinstance(rule, ReadsOut) else []
        advice = f"blocks with a readout: {', '.join(map(str, able))}" if able else "leave --block out"
        raise LayerwiseError(f"block {block} has no readout under the rule {rule.name!r}; {advice}.")
    with learner.evaluating(), learner.built.engine.autocast(), network.passing(x):
        if isinstance(rule, PassesBeliefs):
            return _belief(rule, network, {int(i): module for i, module in auxiliary.items()}, x, block)
        assert isinstance(rule, ReadsOut)
        site = next(unit.site for group in learner.groups for unit in group.units if unit.site.index == block - 1)
        h = x
        for own in network.blocks[:block]:
            h = own(h)
        return rule.outputs_at(site, h, auxiliary[str(block - 1)], learner.task)


def _belief(rule: PassesBeliefs, network: Partition, auxiliary: dict[int, Any], x: Tensor, block: int) -> Tensor:
    """The belief after a block; the generator stops there."""
    place = 1 + sorted(auxiliary).index(block - 1)  # the first belief precedes all blocks
    return next(belief for i, belief in enumerate(rule.beliefs(network, auxiliary, x)) if i == place)


def sample_of(learner: Learner, tokenizer: Tokenizer, window: Tensor, reach: int | None) -> dict[str, str]:
    """Generate a text with a finished run; the same weights give the same text.

    Args:
        learner: of the run.
        tokenizer: of the run.
        window: tokens of the test split; the first ones are the prompt.
        reach: number of tokens that the network reads at once, see `tokens_read`.

    Raises:
        LayerwiseError: the network cannot read a text of another length than its windows.
    """
    prompt = window[:SAMPLE_PROMPT].tolist()
    found = list(generate(learner, prompt, SAMPLE, Sampling(SAMPLE_TEMPERATURE), reach=reach))
    return {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(found)}
