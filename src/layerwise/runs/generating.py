"""Text that a run on text writes: token by token, with keys and values kept, also from a block's own readout."""

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
from layerwise.models.gpt import CausalAttention, remembering
from layerwise.runs.building import check_tokenizer, load_run, read_tokenizer

SAMPLE = 100  # tokens of text that a finished run writes, for the report
SAMPLE_PROMPT = 16  # tokens of the test split before them
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: PositiveInt | None = None
    """Draw among so many of the most likely tokens; all of them if not given."""
    seed: NonNegativeInt = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        check_fields(self)


def written(
    folder: Path, prompt: str, tokens: int, sampling: Sampling, block: int | None = None, device: str = "auto"
) -> tuple[str, list[str]]:
    """The prompt and the text that the run in `folder` writes after it, and what the user should know of the run.

    Args:
        folder: of a run on text.
        prompt: text to continue, one token at least.
        tokens: how many are written.
        sampling: how they are drawn.
        block: number of the block, from 1, whose readout decides; the head if not given.
        device: where to run.

    Raises:
        LayerwiseError: no run on text, a prompt that is empty, too long or of unknown characters, a block without a
            readout.
    """
    options, facts, learner, notes = load_run(folder, device)
    tokenizer = read_tokenizer(folder, options)
    if tokenizer is None:
        raise LayerwiseError(f"the run in {folder} is on no text, so it continues no prompt; give it an INPUT.")
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
    window = facts.shape[2]
    if len(given) + tokens - 1 > window:
        notes.append(f"the run was trained on windows of {window} tokens; beyond that many its text may be worse")
    found = list(generate(learner, given.tolist(), tokens, sampling, block))
    return tokenizer.decode([*given.tolist(), *found]), notes


@torch.no_grad()
def generate(
    learner: Learner,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling,
    block: int | None = None,
    keep: bool = True,
) -> Iterator[int]:
    """Tokens that follow a prompt, one by one.

    Args:
        learner: whose network predicts the next token.
        prompt: tokens, one at least.
        count: how many follow.
        sampling: how they are drawn.
        block: number of the block, from 1, whose readout decides; the head if not given.
        keep: whether keys and values are kept where the model can, so that every token is looked at once.

    Raises:
        LayerwiseError: the block has no readout.
    """
    model = learner.network.model
    keep = keep and any(isinstance(module, CausalAttention) for module in model.modules())
    generator = Generator().manual_seed(sampling.seed)
    tokens, seen = list(prompt), 0
    with remembering(model, learner.auxiliary) if keep else nullcontext():
        for _ in range(count):
            x = torch.tensor([tokens[seen:]], device=learner.device)
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
        least = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    below = (logits - logits.max()).double()  # so that a temperature near zero divides nothing that is not
    return int(torch.multinomial((below / sampling.temperature).softmax(-1).float(), 1, generator=generator))


@torch.no_grad()
def outputs_at(learner: Learner, x: Tensor, block: int) -> Tensor:
    """What the readout of a block predicts, `(B, ..., K)`; no later block is run.

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
        advice = f"its blocks with one are {', '.join(map(str, able))}" if able else "leave --block out"
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
    place = 1 + sorted(auxiliary).index(block - 1)  # the first belief is that before any block
    return next(belief for i, belief in enumerate(rule.beliefs(network, auxiliary, x)) if i == place)


def sample_of(learner: Learner, tokenizer: Tokenizer, window: Tensor) -> dict[str, str]:
    """A text that a finished run writes: the same one for the same weights.

    Args:
        learner: of the run.
        tokenizer: of the run.
        window: tokens of the test split, of which the first ones are the prompt.
    """
    prompt = window[:SAMPLE_PROMPT].tolist()
    found = list(generate(learner, prompt, SAMPLE, Sampling(SAMPLE_TEMPERATURE)))
    return {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(found)}
