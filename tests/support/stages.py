"""Stages of a pipeline inside one process; shared by the tests."""

import copy
from collections import deque

from torch import nn

from layerwise import Learner
from layerwise.parallel.stage import Stage


class Pipe:
    """A link inside one process."""

    def __init__(self, before, after, matrices, rank):
        self.before, self.after, self.matrices, self.rank = before, after, matrices, rank

    def receive(self):
        return self.before.popleft()

    def send(self, tree):
        self.after.append(tree)

    def receive_matrix(self):
        return self.matrices[self.rank].popleft()

    def send_matrix(self, matrix):
        for waiting in self.matrices:
            waiting.append(matrix.clone())

    def send_back(self, tensors):
        """Nothing is sent: the previous rank reads this rank's tensors at the time when they would have arrived."""

    def receive_back(self):
        return self.later().engine.next_block.followed_here()


def stages(model, rule, ranks, example, counts=None, **options):
    """Learners of all stages; `model` is copied, or called if it is a function."""
    ways = [deque() for _ in range(ranks + 1)]
    matrices = [deque() for _ in range(ranks - 1)]
    learners: list[Learner] = []
    for rank in range(ranks):
        stage = Stage(rank, ranks, counts)
        stage.link = Pipe(ways[rank], ways[rank + 1], matrices, rank)
        stage.link.later = lambda rank=rank: learners[rank + 1]
        own = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        learners.append(Learner(own, rule, stage=stage, example=example, **options))
    return learners


def through(learners, method, x, y):
    """One batch through all stages; the later ones get only labels."""
    found = [getattr(learner, method)(x if i == 0 else x[:, :0], y) for i, learner in enumerate(learners)]
    return {block: scalars for metrics in found for block, scalars in metrics.blocks.items()}
