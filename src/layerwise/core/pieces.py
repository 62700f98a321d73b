"""Optional pieces of a rule's contract: each serves the few rules that need it.

An ordinary rule needs `Rule` alone. A rule that needs more inherits the piece too:

    @dataclass(frozen=True)
    class Boosted(TakesTurns, PredictsBySite, Rule): ...
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.rule import Rule, Site
from layerwise.core.tasks import Classification


class JoinsGroups:
    """A rule that joins groups in some updates, so that one backward pass goes through all their blocks.

    The optimizers of the joined groups step one after the other. Evaluation keeps to `Rule.groups`.
    """

    def groups_at(self, update: int, blocks: int) -> list[range]:
        """The groups of one update: those of `Rule.groups`, or neighbours of them joined.

        Args:
            update: number of the update, from 0; with `accumulate` batches for each.
            blocks: number of blocks L.
        """
        raise NotImplementedError


class TakesTurns:
    """A rule whose groups take turns: one that rests in an update runs without a graph and without its optimizer."""

    def learns_at(self, update: int, site: Site) -> bool:
        """Whether the group that begins at the site learns in one update.

        Args:
            update: number of the update, from 0; with `accumulate` batches for each.
            site: the first site of a group, as `Rule.groups` has them.
        """
        raise NotImplementedError


class HasTrunk:
    """A rule whose first group is a trunk: it learns last, from the gradients that the later groups send back.

    The trunk's graph is kept while the later groups learn, one after the other, each with a graph of its own.
    """

    def has_trunk(self) -> bool:
        """Whether the first group is a trunk under the rule's options."""
        return True

    def to_trunk(self, site: Site, gradient: Tensor, task: Classification) -> Tensor | None:
        """What a group sends back to the trunk; nothing for None. The engine sums it over the groups.

        Args:
            site: the group's first site.
            gradient: of the group's loss on its input `(B, ...)`.
            task: the task.

        Returns:
            A share of the gradient on the trunk's output, of its shape.
        """
        return gradient


class StartsFromData:
    """A rule that sets tensors of the network from training data before the first step."""

    def prepare(self, network: Partition, x: Tensor, y: Tensor) -> None:
        """Look at training data once.

        Args:
            network: the blocks and the head.
            x: samples `(N, ...)`: a few thousand in a run, the first batch in a loop of one's own.
            y: their labels.
        """
        raise NotImplementedError


class PredictsBySite:
    """A rule whose prediction adds something at every site, such as a vote; a pipeline predicts in the same way."""

    def ask(self, x: Tensor, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Input of the first block and first message of a forward pass of prediction: `Rule.begin` without labels.

        Args:
            x: inputs `(B, ...)`.
            auxiliary: the rule's module at the first site.
        """
        return x, None

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """What a site makes of its block's output in a forward pass of prediction.

        Args:
            site: the place.
            h: the block's output; the network's logits at the head.
            message: what the site before, or `ask`, has sent.
            auxiliary: the rule's module here.

        Returns:
            Input of the next block (the rule's logits `(B, ..., K)` at the head), and the next message.
        """
        return h, message

    def predict(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Logits `(B, ..., K)` for `x`: a forward pass with `ask` and `answer`."""
        h, message = self.ask(x, auxiliary.get(0))
        for index, block in enumerate([*network.blocks, network.head]):
            site = Site(index, len(network.blocks), block.name, layouts=network.layouts)
            h, message = self.answer(site, block(h), message, auxiliary.get(index))
        return h


class PassesBeliefs:
    """A rule that passes beliefs about the label from site to site."""

    def beliefs(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Iterator[Tensor]:
        """Log-probabilities `(B, ..., K)`, the first message included, as they arise."""
        raise NotImplementedError


def has_trunk(rule: Rule) -> bool:
    """Whether the rule trains the first group as a trunk."""
    return isinstance(rule, HasTrunk) and rule.has_trunk()


def ask(rule: Rule, x: Tensor, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
    """Input of the first block and first message of a forward pass of prediction."""
    return rule.ask(x, auxiliary) if isinstance(rule, PredictsBySite) else (x, None)


def answer(rule: Rule, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
    """What a site makes of its block's output in a forward pass of prediction."""
    return rule.answer(site, h, message, auxiliary) if isinstance(rule, PredictsBySite) else (h, message)
