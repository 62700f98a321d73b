"""Optional base classes of rules, each for the few rules that need it.

Most rules inherit only from `Rule`. A rule that needs more also inherits one of these:

    @dataclass(frozen=True)
    class Boosted(TakesTurns, PredictsBySite, Rule): ...
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from layerwise.core.abstract import Abstract
from layerwise.core.blocks import Partition
from layerwise.core.rule import BatchContext, Rule, Site
from layerwise.core.tasks import Task
from layerwise.errors import LayerwiseError


class JoinsGroups(Abstract):
    """A rule that joins groups in some updates, so that one backward pass goes through all their blocks.

    The optimizers of the joined groups step one after the other. Evaluation uses `Rule.groups`.
    """

    @abstractmethod
    def groups_at(self, update: int, blocks: int) -> list[range]:
        """The groups of one update: those of `Rule.groups`, or neighbours of them joined.

        Args:
            update: number of the update, from 0; each takes `accumulate` batches.
            blocks: number of blocks L.
        """


class TakesTurns(Abstract):
    """A rule whose groups take turns: one that rests in an update runs without a graph and without its optimizer."""

    @abstractmethod
    def learns_at(self, update: int, site: Site) -> bool:
        """Whether the group that begins at the site learns in one update.

        Args:
            update: number of the update, from 0; each takes `accumulate` batches.
            site: the first site of a group, as `Rule.groups` has them.
        """


class ReadsOutputMatrix:
    """A rule whose readouts may read the matrix of the network's output layer (`Partition.output_layer`)."""

    readout: Any

    def matrix_refresh(self) -> int | None:
        """Steps between two refreshes of the matrix; None if the rule does not read it."""
        return 1 if self.readout == "shared" else None


class FollowsNextBlock(Abstract):
    """A rule whose module at a site follows the block after it, such as an average of what that block has learned.

    The engine calls `follow` once per update, after the turn of the site's group and before that of the next one. So
    the next block's tensors are those of the previous update.
    """

    @abstractmethod
    def begins_as_next(self, site: Site) -> bool:
        """Whether the module at a site starts with the next block's weights, under the rule's options."""

    @abstractmethod
    def followed(self, site: Site) -> list[str]:
        """Names in the model of those tensors of the next block that the module at a site follows, if it does.

        Args:
            site: the place; `Site.network` holds the next block.
        """

    @abstractmethod
    def follow(self, auxiliary: nn.Module, tensors: list[Tensor]) -> None:
        """Update a module so that it follows the next block; runs without gradient.

        Args:
            auxiliary: the rule's module at a site.
            tensors: those that `followed` names.
        """


class LearnsInPart(Abstract):
    """A rule that trains some sites of its one group in each update: the others rest, and keep no optimizer state.

    Each site has its own optimizer. Sites before the first one that learns run without a graph. The graph of the later
    sites keeps what their inputs' gradients need, and nothing for parameters at rest. When a site rests, its
    optimizer's state is dropped; it is created again in the site's next turn.
    """

    @abstractmethod
    def sites_at(self, update: int, blocks: int) -> Collection[int]:
        """The sites that learn in one update, at least one; the head is site L.

        Args:
            update: number of the update, from 0; each takes `accumulate` batches.
            blocks: number of blocks L.
        """


class RenewsUnits(Abstract):
    """A rule that gives units new weights after a step; the optimizer's state of these weights is set to zero."""

    @abstractmethod
    def renew(
        self, network: Partition, auxiliary: Mapping[int, nn.Module], step: int
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """Write new weights; runs without gradient after every step of a group's optimizer.

        Args:
            network: the blocks and the head.
            auxiliary: the rule's modules at the sites of the group.
            step: number of the training step, for draws; they must be the same on all replicas.

        Returns:
            Pairs of a parameter and the mask of its entries that are new, of its shape.
        """


class RepeatsBatch(Abstract):
    """A rule that makes several updates with one batch, such as one after every step of inference.

    Schedules count them as one update, and they have the random draws of one step. Batches cannot be accumulated.
    """

    @abstractmethod
    def rounds(self) -> int:
        """How many updates a batch makes under the rule's options."""

    @abstractmethod
    def again(self, ctx: BatchContext, message: Any) -> tuple[Tensor, Any]:
        """The first block's input and the first message of the next round, as `Rule.begin` gives those of the first.

        Args:
            ctx: the batch, and the blocks as the last round has left them.
            message: the first message of that last round.
        """


class StepsByParameter:
    """A rule whose parameters are updated one by one, so that one gradient is in memory at a time.

    Each parameter has its own optimizer, which steps in the backward pass as soon as the gradient is complete.
    What needs all gradients at once (clipping by their norm, accumulation, skipped steps, averages over replicas,
    scaled fp16 gradients) is refused.
    """


class PerturbsWeights(StepsByParameter, Abstract):
    """A rule that estimates gradients by forward passes with perturbed weights: no graph and no backward pass.

    With loss L, a scale eps and K directions the engine gives every parameter the gradient
    (1/K) sum_k (L(w + eps z_k) - L(w - eps z_k)) / (2 eps) * z_k, where z_k is drawn from N(0, I) by a seed, so
    that it is never stored. Weights are perturbed in place and then restored.
    """

    @abstractmethod
    def perturbations(self) -> tuple[float, int]:
        """The scale eps, and the number of directions K."""


class MovesActivations(Abstract):
    """A rule whose saved activations are kept elsewhere between the forward and the backward pass."""

    @abstractmethod
    def activations_to(self) -> Literal["host", "disk"]:
        """Where they are kept: in host memory, or in a file in the learner's `offload_folder`."""


class HasTrunk:
    """A rule whose first group is a trunk, which learns last, from the gradients that the later groups send back.

    The trunk's graph is kept while the later groups learn, one after the other, each with its own graph.
    """

    def has_trunk(self) -> bool:
        """Whether the first group is a trunk under the rule's options."""
        return True

    def to_trunk(self, site: Site, gradient: Tensor, task: Task) -> Tensor | None:
        """The gradient that a group sends back to the trunk, or None. The engine sums it over the groups.

        Args:
            site: the group's first site.
            gradient: of the group's loss on its input `(B, ...)`; the method may write into it.
            task: the task.

        Returns:
            A share of the gradient on the trunk's output, of its shape.
        """
        return gradient


class StartsFromData(Abstract):
    """A rule that sets tensors of the network from training data before the first step."""

    @abstractmethod
    def prepare(self, network: Partition, x: Tensor, y: Tensor) -> None:
        """Use training data once.

        Args:
            network: the blocks and the head.
            x: samples `(N, ...)`: a few thousand in a run, the first batch in your own loop.
            y: their labels.
        """


@dataclass(frozen=True)
class PredictionContext(BatchContext):
    """What a rule that `UsesPrediction` can read before the first block runs."""

    predict: Callable[[Tensor], Tensor] = field(kw_only=True)
    """What the rule predicts, `(B, ..., K)` for `(B, ...)`, in evaluation mode and without gradient."""


class UsesPrediction:
    """A rule whose `begin` may use what it predicts for the batch, such as to choose probable wrong labels.

    Its `begin` and `again` get a `PredictionContext`.
    """


class PredictsBySite:
    """A rule whose prediction adds something at every site, such as a vote; a pipeline predicts in the same way."""

    def predicts_by_site(self) -> bool:
        """Whether anything is added under the rule's options; otherwise the network's own output is the prediction."""
        return True

    def ask(self, x: Tensor, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Input of the first block and first message of a forward pass of prediction: `Rule.begin` without labels.

        Args:
            x: inputs `(B, ...)`.
            auxiliary: the rule's module at the first site.
        """
        return x, None

    def answer(self, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
        """Process a block's output in a forward pass of prediction.

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
        for index, block in enumerate(network.sites):
            site = Site(index, len(network.blocks), block.name, layouts=network.layouts, network=network)
            h, message = self.answer(site, block(h), message, auxiliary.get(index))
        return h


class ReadsOut:
    """A rule whose blocks have their own readouts, so that a block can predict without the later ones."""

    def outputs_at(self, site: Site, h: Tensor, auxiliary: nn.Module, task: Task) -> Tensor:
        """What the readout of a site predicts from its block's output `h`, in the form of the task's outputs."""
        raise LayerwiseError(f"{type(self).__name__} gives no outputs of its readouts; leave --block out.")


class PassesBeliefs(Abstract):
    """A rule that passes beliefs about the label from site to site."""

    @abstractmethod
    def beliefs(self, network: Partition, auxiliary: Mapping[int, nn.Module], x: Tensor) -> Iterator[Tensor]:
        """Log-probabilities `(B, ..., K)`, the first message included, as they arise."""


def has_trunk(rule: Rule) -> bool:
    """Whether the rule trains the first group as a trunk."""
    return isinstance(rule, HasTrunk) and rule.has_trunk()


def predicts_plainly(rule: Rule) -> bool:
    """Whether the prediction is the network's own output."""
    if isinstance(rule, PredictsBySite):
        return not rule.predicts_by_site()
    return type(rule).predict is Rule.predict


def ask(rule: Rule, x: Tensor, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
    """Input of the first block and first message of a forward pass of prediction."""
    return rule.ask(x, auxiliary) if isinstance(rule, PredictsBySite) else (x, None)


def answer(rule: Rule, site: Site, h: Tensor, message: Any, auxiliary: nn.Module | None) -> tuple[Tensor, Any]:
    """Process a block's output in a forward pass of prediction."""
    return rule.answer(site, h, message, auxiliary) if isinstance(rule, PredictsBySite) else (h, message)
