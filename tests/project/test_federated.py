"""The federated example: shards, a client's round, and FedAvg by Flower (skipped where `flwr` is not installed)."""

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from support.pages import ROOT

from layerwise import LayerwiseError

EXAMPLE = ROOT / "examples" / "federated"
sys.path.insert(0, str(EXAMPLE))

from fedfwd.learning import (  # noqa: E402
    Options,
    arrays_of,
    batches,
    client_seed,
    load_arrays,
    make_learner,
    train,
)
from fedfwd.shards import shards  # noqa: E402

try:
    with warnings.catch_warnings(action="ignore"):  # what flwr's own imports warn of
        from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
        from flwr.serverapp import Grid
        from flwr.supercore.task_identity import TaskIdentity
except ImportError:
    Grid = object


def needs_flower(test):
    reason = "flwr is not installed: it needs an environment of its own, see examples/federated/README.md"
    return pytest.mark.skipif(Grid is object, reason=reason)(pytest.mark.filterwarnings("ignore")(test))


LABELS = torch.arange(600) % 10
TINY = Options(data="digits", clients=2, rounds=2, width=32, batch_size=32, optimizer="SGD", lr=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 100.0])
@pytest.mark.parametrize("clients", [1, 2, 7])
def test_every_sample_is_in_one_shard_and_the_seed_decides(alpha, clients):
    found = shards(LABELS, clients, alpha, seed=3, least=4)
    assert len(found) == clients
    assert torch.cat(found).sort().values.tolist() == list(range(600))
    assert min(map(len, found)) >= 4
    again, other = shards(LABELS, clients, alpha, seed=3, least=4), shards(LABELS, clients, alpha, seed=4, least=4)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert clients == 1 or not all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


def largest_share(found):
    """Mean over shards of the share of the most frequent class; 0.1 where all classes are alike."""
    return sum(float(LABELS[part].bincount(minlength=10).max()) / len(part) for part in found) / len(found)


def test_shards_are_alike_without_alpha_and_skewed_with_a_small_one():
    assert sorted(map(len, shards(LABELS, 7, 0.0, seed=0))) == [85] * 2 + [86] * 5
    # A Dirichlet distribution concentrates at equal shares: each class then gives 60 / 6 samples to every client.
    even = shards(LABELS, 6, 1e6, seed=0)
    assert all(abs(int(count) - 10) <= 1 for part in even for count in LABELS[part].bincount(minlength=10))
    skewed = [sum(largest_share(shards(LABELS, 6, alpha, seed)) for seed in range(5)) for alpha in (0.1, 1.0, 100.0)]
    assert skewed[0] > skewed[1] > skewed[2]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"clients": 601}, "601 clients cannot have 1 of 600 samples each"),
        ({"clients": 2, "least": 301}, "2 clients cannot have 301 of 600"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"clients": 20, "alpha": 0.01, "least": 25}, "some client had fewer than 25 samples"),
    ],
)
def test_shards_that_cannot_be_are_refused(wrong, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        shards(LABELS, **{"clients": 3, "alpha": 0.0, "seed": 0} | wrong)


def plainly(options, epochs):
    """What one learner has after so many epochs in a row on the first client's shard, from the server's weights on."""
    learner = make_learner(options, client_seed(options, 0))
    load_arrays(learner, arrays_of(make_learner(options, options.seed)), steps=0)
    for epoch in range(epochs):
        for x, y in batches(options, 0).epoch(epoch):
            learner.step(x, y)
    return arrays_of(learner)


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", ["mono_forward", "forward_forward", "backprop"])
def test_rounds_of_one_client_are_plain_training_bit_for_bit(rule):
    # Plain SGD has no state that a round would begin anew; forward_forward draws negatives in every step.
    options = replace(TINY, clients=1, rule=rule, train_samples=200, local_epochs=2)
    arrays = arrays_of(make_learner(options, options.seed))
    for number in (1, 2):
        before, found = arrays, train(options, 0, number, arrays)
        arrays = found.arrays
        assert not same_bits(before, arrays)
        assert found.samples == 200
    assert same_bits(arrays, plainly(options, epochs=4))


def test_optimizers_stay_at_home_and_counters_stay_whole():
    options = replace(TINY, rule="dgl", optimizer="adamw", train_samples=100)
    learner = make_learner(options, 0)
    arrays = arrays_of(learner)
    counters = {name for name in arrays if name.endswith("num_batches_tracked")}
    parameters = {name for name, _ in learner.named_parameters()}
    assert {re.sub(r"^model\.", "", name) for name in arrays} >= parameters
    assert counters
    found = train(options, 0, 1, arrays)
    assert found.arrays.keys() == arrays.keys()  # nothing of AdamW
    assert found.memory >= 4 * sum(tensor.nbytes for tensor in learner.network.parameters())  # two moments, a gradient
    averaged = {name: tensor.double() + (2.75 if name in counters else 0.0) for name, tensor in arrays.items()}
    load_arrays(learner, averaged, steps=0)
    back = arrays_of(learner)
    assert {back[name].item() for name in counters} == {3}
    assert all(back[name].dtype == arrays[name].dtype for name in arrays)


class Interconnect(Grid):
    """Clients in this process, in place of a network."""

    def __init__(self, options, late_first=False):
        from fedfwd.client import app

        self.app, self.late_first, self.sent, self.replies = app, late_first, [], []
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as Flower's runners do
        config = {name.replace("_", "-"): value for name, value in vars(options).items()}
        self.contexts = {
            i + 1: Context(1, i + 1, {"partition-id": i, "num-partitions": options.clients}, RecordDict(), config)
            for i in range(options.clients)
        }

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id, reverse=self.late_first)
        if messages:
            self.sent.append(messages[0].content["arrays"].to_torch_state_dict())
        replies = [self.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]
        self.replies.append([reply.content for reply in replies])
        return replies

    def create_message(self, *arguments, **named):
        raise NotImplementedError

    run = set_run = get_nodes = push_messages = pull_messages = create_message


def federated(options, **how):
    """The averaged arrays of a run, and what went over the wire."""
    from fedfwd.server import averaging

    wire = Interconnect(options, **how)
    first = ArrayRecord(arrays_of(make_learner(options, options.seed)))
    result = averaging(options).start(wire, first, num_rounds=options.rounds)
    return result.arrays.to_torch_state_dict(), wire


@needs_flower
@pytest.mark.parametrize("rule", ["mono_forward", "forward_forward"])
def test_averaging_over_one_client_is_plain_training_bit_for_bit(rule):
    options = replace(TINY, clients=1, rule=rule, train_samples=200)
    arrays, _ = federated(options)
    assert same_bits(arrays, plainly(options, epochs=2))


@needs_flower
def test_the_average_is_weighted_by_samples_and_has_the_same_bits_in_any_order():
    options = replace(TINY, clients=3, alpha=0.5, optimizer="adamw", lr=1e-3)
    arrays, wire = federated(options)
    sizes = [len(part) for part in shards(batches_of_all(options), 3, 0.5, options.seed, options.batch_size)]
    assert len(set(sizes)) == 3
    for replies, next_sent in zip([r for r in wire.replies if r], [*wire.sent[1:], arrays], strict=True):
        for name, found in next_sent.items():
            parts = [reply["arrays"][name].numpy() for reply in replies]
            wanted = sum(size * torch.from_numpy(part).double() for size, part in zip(sizes, parts, strict=True))
            torch.testing.assert_close(found.double(), wanted / sum(sizes), rtol=1e-5, atol=1e-7)
    assert same_bits(arrays, federated(options, late_first=True)[0])


def batches_of_all(options):
    """Labels of all clients' samples."""
    from fedfwd.learning import dataset

    return dataset(options.data, options.train_samples).train.labels


@needs_flower
def test_two_clients_learn_and_the_table_tells_it(tmp_path, capsys):
    from fedfwd.server import app

    options = replace(TINY, width=128, optimizer="adamw", lr=3e-3, out=str(tmp_path / "table.json"))
    wire = Interconnect(options)
    app(wire, wire.contexts[1])
    found = json.loads((tmp_path / "table.json").read_text())
    rows = found["rounds"]
    assert Options(**found["options"]) == options
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[0]["accuracy"] < 0.3 and rows[2]["accuracy"] > 0.8  # chance is 0.1
    own = sum(tensor.nbytes for tensor in arrays_of(make_learner(options, 0)).values())
    for row in rows[1:]:
        assert own < row["bytes-down"] == row["bytes-up"] < 1.02 * own  # names and headers too
        assert 0 < row["work"] < row["memory"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == ["0", "1", "2"]


@needs_flower
def test_a_federation_of_another_size_is_refused():
    wire = Interconnect(TINY)
    wire.contexts[2].node_config["num-partitions"] = 5
    with pytest.raises(Exception, match="the federation has 5 nodes and the run 2 clients"):
        wire.send_and_receive(first_messages(wire))


def first_messages(wire):
    from fedfwd.server import averaging

    arrays = ArrayRecord(arrays_of(make_learner(TINY, 0)))
    return averaging(TINY).configure_train(1, arrays, ConfigRecord(), wire)


@needs_flower
@pytest.mark.slow
def test_flowers_own_runner_gives_the_same_table(tmp_path):
    options = replace(TINY, out=str(tmp_path / "table.json"))
    words = {name.replace("_", "-"): json.dumps(value) for name, value in vars(options).items() if name != "clients"}
    config = " ".join(f"{name}={value}" for name, value in words.items())
    done = subprocess.run(
        ["bash", EXAMPLE / "run.sh", config],
        env=os.environ | {"CLIENTS": "2", "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from fedfwd.server import app

    rows = json.loads((tmp_path / "table.json").read_text())["rounds"]
    wire = Interconnect(options)
    app(wire, wire.contexts[1])
    assert json.loads((tmp_path / "table.json").read_text())["rounds"] == rows
