"""A stage: the groups that one rank of a pipeline runs, its input and its output."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerwise.core.blocks import Partition
from layerwise.core.cost import balanced_ends, operations
from layerwise.core.devices import synchronize
from layerwise.core.following import NextBlock
from layerwise.core.keeping import put_back
from layerwise.core.modes import evaluation_mode
from layerwise.core.pieces import (
    FollowsNextBlock,
    PredictsBySite,
    ReadsOutputMatrix,
    StartsFromData,
    has_trunk,
    predicts_plainly,
)
from layerwise.core.rule import Rule, Site
from layerwise.core.trees import detach
from layerwise.errors import LayerwiseError
from layerwise.parallel.following import NextBlockOnRank, bytes_followed


class StageLink(Protocol):
    """The connections of a stage: from the previous rank, and to the next one."""

    def receive(self) -> Any:
        """The next tree of tensors from the previous rank, in the order in which it sent them."""
        ...

    def send(self, tree: Any) -> None:
        """Send a tree of tensors to the next rank; returns before it has arrived."""
        ...

    def receive_matrix(self) -> Tensor:
        """The next output matrix from the last rank."""
        ...

    def send_matrix(self, matrix: Tensor) -> None:
        """Send the output matrix to all other ranks; returns before it has arrived."""
        ...

    def receive_back(self) -> Any:
        """The next list of tensors from the next rank, if modules follow the next block."""
        ...

    def send_back(self, tensors: list[Tensor]) -> None:
        """Send a list of tensors to the previous rank."""
        ...


class Stage:
    """Which groups this rank runs, and how a batch enters and leaves them.

    Args:
        rank: number of this rank, from 0.
        ranks: how many there are.
        counts: groups per rank; balanced by the blocks' costs if not given.
        agree: returns the first rank's list of numbers on all ranks. If given, the cost of a block is the time that it
            takes on the first rank. Otherwise, and if a model is cut at its calls, it is the number of floating-point
            operations, which is the same everywhere.
        samples: of the batch that is timed.

    Attributes:
        link: set before the first batch.
        blocks: per rank, names of the first and the last block; known when the learner is built.
        shares_matrix: whether the blocks read the output matrix, which the last rank sends to the others.
        borrowed: names of tensors of the next rank's first block that are kept until the rule's modules are created.
        sent_back: bytes that all ranks together send back per update, if modules follow the next block.
        stop: number of the signal by which the first rank stops the run after this batch; 0 to continue.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        counts: Sequence[int] | None = None,
        agree: Callable[[list[float]], list[float]] | None = None,
        samples: int = 1,
    ):
        self.rank, self.ranks, self.counts = rank, ranks, counts
        self.agree, self.samples = agree, samples
        self.blocks: list[str] = []
        self.shares_matrix = False
        self.borrowed: tuple[str, ...] = ()
        self.sent_back = 0
        self.stop = 0
        self._skipped = False

    whole = False
    """Whether all groups are surely here; see `WholeNetwork`."""
    link: StageLink

    @property
    def first(self) -> bool:
        """Whether the input enters here."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether the head is here."""
        return self.rank == self.ranks - 1

    def choose(self, rule: Rule, network: Partition, groups: Sequence[range], example: Any) -> range:
        """The groups of this rank; parameters of other ranks lose their memory.

        Args:
            rule: refused if a pipeline cannot train it.
            network: all blocks and the head.
            groups: sites of all groups.
            example: one sample, or a whole batch that is not a tensor, on which the costs are measured.

        Raises:
            LayerwiseError: the rule needs more than what is sent forward, or there are fewer groups than ranks.
        """
        check_can_pipeline(rule, groups)
        self.shares_matrix = self.ranks > 1 and shares_matrix(rule)
        if len(groups) < self.ranks:
            raise LayerwiseError(
                f"{self.ranks} ranks cannot share {len(groups)} groups of blocks, because each needs one; start at "
                f"most {len(groups)} (--nproc-per-node {len(groups)}), or cut the model finer."
            )
        bounds = [group.start for group in groups] + [groups[-1].stop]
        if self.counts is None:
            if self.agree is None or network.owns_by_use:  # its blocks run once per pass, so they cannot be timed alone
                cost = operations(network, example)
            else:
                batch = example.repeat(self.samples, *[1] * (example.dim() - 1))
                cost = self.agree(seconds(network, batch) if self.first else [])
            ends = balanced_ends([sum(cost[a:b]) for a, b in itertools.pairwise(bounds)], self.ranks)
        elif len(self.counts) != self.ranks or sum(self.counts) != len(groups) or min(self.counts) < 1:
            given = ",".join(map(str, self.counts))
            raise LayerwiseError(
                f"--stages {given} does not share {len(groups)} groups among {self.ranks} ranks; give one number per "
                f"rank, each at least 1, that add up to {len(groups)}."
            )
        else:
            ends = [sum(self.counts[: i + 1]) for i in range(self.ranks)]
        starts = [0, *ends]
        kept = network.keep_only(bounds[starts[self.rank]], bounds[ends[self.rank]])
        blocks, self.blocks = network.sites, []
        for i, (start, end) in enumerate(itertools.pairwise([0, *ends])):
            part = blocks[bounds[start] : bounds[end]]
            self.blocks.append(part[0].name if len(part) == 1 else f"{part[0].name}..{part[-1].name}")
            if i > 0:
                self.sent_back += bytes_followed(rule, network, bounds[start] - 1)
            if i == self.rank + 1 and _begins_as_next(rule, network, bounds[start] - 1):
                self.borrowed = tuple(name for name in part[0].names() if name not in kept)
                kept = kept | set(self.borrowed)
            if i != self.rank:
                held = [item for block in part for item in (*block.named_parameters(), *block.named_buffers())]
                to_meta(network.model, [tensor for name, tensor in held if name not in kept])
        return range(starts[self.rank], ends[self.rank])

    def give_back(self, model: nn.Module) -> None:
        """Release the tensors of the next rank."""
        if self.borrowed:
            known = dict([*model.named_parameters(), *model.named_buffers()])
            to_meta(model, [known[name] for name in self.borrowed])
        self.borrowed = ()

    def next_block(self, rule: Rule, network: Partition, sites: range) -> NextBlock:
        """Where modules that follow the next block get its tensors: here, or from the next rank."""
        return NextBlockOnRank(self.receive_back, self.send_back, rule, network, sites)

    def own(self, tensors: Mapping[str, Tensor], auxiliary: nn.ModuleDict) -> dict[str, Tensor]:
        """Those of all tensors that belong to the auxiliary modules of this stage."""
        return {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in auxiliary}

    def receive(self) -> tuple[Tensor, Any]:
        """Input and message of the first group here."""
        self.stop, self._skipped, h, message = detach(self.link.receive())
        return h, message

    def receive_matrix(self) -> Tensor:
        """The next output matrix from the last rank."""
        return self.link.receive_matrix()

    def send_matrix(self, matrix: Tensor) -> None:
        """Send the output matrix to all other ranks."""
        self.link.send_matrix(matrix)

    def receive_back(self) -> Any:
        """The next list of tensors from the next rank."""
        return self.link.receive_back()

    def send_back(self, tensors: list[Tensor]) -> None:
        """Send a list of tensors to the previous rank."""
        self.link.send_back(tensors)

    def pass_on(self, h: Tensor, message: Any, skipped: bool) -> bool:
        """Send output and message of the last group here to the next rank.

        Returns:
            Whether any update of this batch was skipped, here or before.
        """
        skipped = skipped or self._skipped
        if not self.last:
            self.link.send((self.stop, skipped, h, message))
        return skipped


def seconds(network: Partition, example: Tensor, repeats: int = 3) -> list[float]:
    """Seconds of each block and the head, forward and backward on a batch: the best of `repeats`, after a warm-up.

    In evaluation mode, running statistics and random generators stay as they are; no gradient is kept.
    """
    found, h = [], example
    with evaluation_mode(network), put_back(network.model):
        for block in network.sites:
            parameters = [p for p in block.parameters() if p.requires_grad]
            times, out = [], h
            for _ in range(1 + repeats):
                start = time.perf_counter()
                out = block(h)
                if out.requires_grad:
                    torch.autograd.grad(out.sum(), parameters, allow_unused=True)
                synchronize(out.device)
                times.append(time.perf_counter() - start)
            found.append(min(times[1:]))
            h = out.detach()
    return found


def shares_matrix(rule: Rule) -> bool:
    """Whether the blocks of a rule read the network's output matrix, which is then sent."""
    return isinstance(rule, ReadsOutputMatrix) and rule.matrix_refresh() is not None


def check_can_pipeline(rule: Rule, groups: Sequence[range]) -> None:
    """Raise LayerwiseError if a rule needs more than the output matrix and one forward pass of messages."""
    for i, group in enumerate(groups[1:], 1):
        if groups[i - 1].stop > group.start:
            why = "its signals pass through blocks of later groups"
            break
    else:
        local = ("local", "broadcast") if shares_matrix(rule) else ("local",)  # the matrix is all that it broadcasts
        if rule.locality not in local or has_trunk(rule):
            why = f"its locality is {rule.locality!r}, not 'local' (a boundary is crossed by: {rule.boundary})"
        elif type(rule).begin is not Rule.begin and not rule.begins_with_batch:
            why = "its first input may depend on the whole network"
        elif isinstance(rule, StartsFromData):
            why = "it sets the network up from training data"
        elif not (predicts_plainly(rule) or isinstance(rule, PredictsBySite) or rule.predicts_at_head):
            why = "it predicts from the whole network at once"
        else:
            return
    raise LayerwiseError(
        f"rule {rule.name!r} cannot be trained by a pipeline, because {why}; train it in one process, or choose a rule "
        "such as 'sll', 'sid' or 'local_ce'."
    )


def _begins_as_next(rule: Rule, network: Partition, index: int) -> bool:
    """Whether the module at a site starts with the next block's weights."""
    site = Site(index, len(network.blocks), network.blocks[index].name, network=network)
    return isinstance(rule, FollowsNextBlock) and rule.begins_as_next(site)


def to_meta(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Replace parameters and buffers by meta tensors, which have a shape but no memory."""
    dropped = {id(tensor) for tensor in tensors}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in dropped:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in dropped:
                module._buffers[name] = buffer.to("meta")
