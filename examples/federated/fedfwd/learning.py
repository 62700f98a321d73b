"""What one client does in one round, and what it sends and receives; this module is independent of Flower."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise import Learner, data, models, rules
from layerwise.core.randomness import derive_seed, preserved_generators, seed_generators
from layerwise.data.machine import find_local

from .shards import shards


@dataclass(frozen=True)
class Options:
    """A run; with dashes instead of underscores, these are the keys of `flwr run --run-config`."""

    data: str = "auto"
    """A data set of layerwise; auto: mnist where LAYERWISE_DATA holds it, else scikit-learn's embedded digits."""
    train_samples: int = 0
    """Training samples of all clients together; 0 for all there are."""
    clients: int = 10
    """Clients; the federation must have as many SuperNodes."""
    alpha: float = 0.0
    """0: every client has a random share; otherwise the concentration of a Dirichlet distribution over clients."""
    rule: str = "mono_forward"
    """Any rule of layerwise that trains an MLP."""
    rule_options: str = ""
    """The rule's options as words `name=value`."""
    depth: int = 3
    """Hidden layers of the MLP."""
    width: int = 500
    """Units in each."""
    optimizer: str = "adamw"
    """Of every block, at every client."""
    lr: float = 1e-3
    """Learning rate."""
    batch_size: int = 64
    """Samples per batch, at every client."""
    precision: str = "fp32"
    """fp32 | bf16."""
    rounds: int = 5
    """Rounds of federated averaging."""
    local_epochs: int = 1
    """Epochs of a client on its shard, per round."""
    seed: int = 0
    """Of weights, shards, batches and every draw."""
    threads: int = 1
    """Threads of each process."""
    out: str = ""
    """File for the table as JSON; it is printed in any case."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Options":
        """The options in a run's configuration."""
        return cls(**{name.replace("-", "_"): value for name, value in config.items()})


@functools.lru_cache(maxsize=1)
def dataset(name: str, train_samples: int) -> data.Dataset:
    """The data set; a process that runs several clients reads it once."""
    if name == "auto":
        name = "mnist" if find_local("mnist", None) is not None else "digits"
    return data.load(name, val_fraction=0.0, train_samples=train_samples or None)


def batches(options: Options, client: int | None) -> data.Batches:
    """The batches of a client's shard, or of the test split."""
    found = dataset(options.data, options.train_samples)
    scale = {"mean": found.mean, "std": found.std}
    if client is None:
        return data.Batches(found.test, 500, seed=0, shuffle=False, drop_last=False, **scale)
    mine = shards(found.train.labels, options.clients, options.alpha, options.seed, options.batch_size)[client]
    return data.Batches(found.train.subset(mine), options.batch_size, seed=client_seed(options, client), **scale)


def client_seed(options: Options, client: int) -> int:
    """Seed of what one client draws."""
    return derive_seed(options.seed, "client", client)


def make_learner(options: Options, seed: int) -> Learner:
    """The network with the run's initial weights, and a learner with its own random draws."""
    torch.set_num_threads(options.threads)
    found = dataset(options.data, options.train_samples)
    device = torch.device("cpu")
    with preserved_generators(device):
        seed_generators(derive_seed(options.seed, "model"), device)
        model = models.create("mlp", found.shape, len(found.classes), depth=options.depth, width=options.width)
    return Learner(
        model,
        rules.create(options.rule, **dict(map(_option, options.rule_options.split()))),
        optimizer=options.optimizer,
        lr=options.lr,
        precision=options.precision,  # pyright: ignore[reportArgumentType]
        seed=seed,
        example=torch.zeros(1, *found.shape),
    )


def _option(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def arrays_of(learner: Learner) -> dict[str, Tensor]:
    """What is sent: the model's and the rule's parameters and buffers, but no optimizer state."""
    state = learner.state_dict()
    return {f"{part}.{name}": tensor for part in ("model", "auxiliary") for name, tensor in state[part].items()}


def load_arrays(learner: Learner, arrays: Mapping[str, Tensor], steps: int) -> None:
    """Continue at a step's number from arrays that the server has averaged, with new optimizers without state."""
    state = learner.state_dict()
    for part in ("model", "auxiliary"):
        # The average of counters is a fraction.
        state[part] = {
            name: arrays[f"{part}.{name}"].to(own.dtype)
            if own.is_floating_point()
            else arrays[f"{part}.{name}"].round().to(own.dtype)
            for name, own in state[part].items()
        }
    learner.load_state_dict(state | {"optimizer": {}, "gradients": {}, "steps": steps})


@dataclass(frozen=True)
class Trained:
    """What a client sends back."""

    arrays: dict[str, Tensor]
    samples: int
    """Size of its shard: its weight in the average."""
    memory: int
    """Peak bytes of a training step: parameters, optimizer state, gradients and activations."""
    work: int
    """Of these, gradients and activations."""


def train(options: Options, client: int, number: int, arrays: Mapping[str, Tensor]) -> Trained:
    """One client's round: `local_epochs` epochs on its shard.

    Optimizers begin anew in every round, as the client keeps nothing between two of them; order of the batches and
    draws continue where the round before has ended. So a client is a function of options, round and arrays.

    Args:
        options: of the run.
        client: its number.
        number: of the round, from 1.
        arrays: the server's.
    """
    mine = batches(options, client)
    learner = make_learner(options, client_seed(options, client))
    first = (number - 1) * options.local_epochs
    load_arrays(learner, arrays, steps=first * len(mine))
    # From the second step on, the optimizers have state.
    measured = learner.steps + (options.local_epochs * len(mine) > 1)
    use = None
    for epoch in range(first, first + options.local_epochs):
        for x, y in mine.epoch(epoch):
            if learner.steps == measured:
                _, use = learner.measured_step(x, y)
            else:
                learner.step(x, y)
    assert use is not None
    return Trained(arrays_of(learner), len(mine.source), use.peak, use.gradients + use.activations)


def accuracy(options: Options, arrays: Mapping[str, Tensor]) -> float:
    """Share of the test split that the averaged network gets right, by the rule's own predictor."""
    learner = make_learner(options, options.seed)
    load_arrays(learner, arrays, steps=0)
    right, count = 0, 0
    for x, y in batches(options, None).epoch(0):
        right += int((learner(x).argmax(1) == y).sum())
        count += len(y)
    return right / count
