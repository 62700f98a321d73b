"""Shards: each rank keeps a share of parameters, gradients and optimizer state, and learns what replicas learn."""

import shutil
from shlex import split

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import LONG, TINY, check_hangs, check_killed, check_refused, run
from support.nets import PLAIN_SGD, batches, by_parameter, kinds, net, same_bits
from support.ranks import close, learned, normed, same_state, similar, spread
from support.runs import lines, result, state, weights
from torch import nn

from layerwise import LayerwiseError, Learner, models, rules
from layerwise.cli.main import main
from layerwise.memory.meter import optimizer_tensors, tensor_bytes
from layerwise.parallel.replicas import Replicas
from layerwise.parallel.shards import Shards
from layerwise.runs import checkpoint

SHARDED = split("train --parallel sharded --timeout 30")
EXACT = {**PLAIN_SGD, "lr": 2**-7}
"""The step has no rounding but that of the difference: kernels may round otherwise at the end of a tensor."""


def both(shards, model, rule, data, **options):
    """Whole states after the same steps, of a learner with shares and of one with all of every parameter."""
    found = learned(shards, model, rule, data, **options)
    return found, learned(Replicas(shards.ranks), model, rule, data, **options)


@pytest.mark.slow
def test_every_rule_has_the_bits_of_replicas(tmp_path):
    names = [name for name in rules.names() if "mlp" in kinds(name) and not by_parameter(name)]
    names.remove("continual_backprop")  # refused
    shared = [rules.create("local_ce", readout="shared"), rules.create("sid", readout="shared")]
    cases = [*((rule, "mlp") for rule in [*names, *shared]), ("sid", "vit"), ("sll", "vgg")]
    data = batches(2, size=24)

    def work(shards):
        return [both(shards, net(kind, 3), name, data, **EXACT) for name, kind in cases]

    for case, first, second in zip(cases, *spread(2, tmp_path, work, Shards), strict=True):
        # The sum of two gradients has no order.
        assert same_state(first[0], first[1]), case
        assert same_state(first[0], second[0]), case


@pytest.mark.slow
def test_more_ranks_and_other_options(tmp_path):
    """Three ranks, some without a row of a parameter; clipping, accumulation, skipped steps, batch norm, a trunk."""
    data = batches(3, size=24)
    flat = [(x.flatten(1), y) for x, y in data[:2]]
    broken = [(x.clone(), y) for x, y in flat]
    broken[1][0][-1, 0] = torch.nan  # in the last share
    cases = {
        "adamw": (net("mlp", 3), "sid", data, {}),
        "clipped": (net("vit", 2), "sid", data[:2], {"clip": 0.1, **PLAIN_SGD}),
        "accumulated": (net("mlp", 3), "local_ce", data[:2], {"accumulate": 2, "clip": 0.1, **PLAIN_SGD}),
        "half": (net("mlp", 3), "local_ce", data, {"accumulate": 2, **PLAIN_SGD}),
        "skipped": (normed(), "local_ce", broken, {"nonfinite": "skip", **PLAIN_SGD}),
        "normed": (normed(), "local_ce", flat, PLAIN_SGD),
        "trunk": (net("sid_cascade", 3), "sid_cascade", data[:2], {"clip": 0.5, **PLAIN_SGD}),
        "frozen": (net("mlp", 3), "last_layer", data[:2], PLAIN_SGD),
        "bf16": (net("mlp", 3), "sll", data[:2], {"precision": "bf16", **PLAIN_SGD}),
    }

    def work(shards):
        return {name: both(shards, model, rule, x, **how) for name, (model, rule, x, how) in cases.items()}

    first, *others = spread(3, tmp_path, work, Shards)
    for name, (own, plain) in first.items():
        assert close(own, plain), name
        assert own["skipped"] == plain["skipped"] == (name == "skipped")
        assert all(same_state(own, other[name][0]) for other in others), name
    # Gradients are averaged after every batch, so that shares alone live on; a replica's are its own so far.
    half = first["half"][0]["gradients"]
    replicas = [found["half"][1]["gradients"] for found in (first, *others)]
    assert half.keys() == replicas[0].keys() != set()
    assert all(torch.allclose(half[n], sum(own[n] for own in replicas) / 3, atol=1e-6) for n in half)


@pytest.mark.slow
def test_a_rank_keeps_a_share_and_gathers_one_group_once_per_batch(tmp_path):
    (x, y), again = batches(2, size=16)

    def work(shards):
        learner = Learner(net("mlp", 8, width=64), "local_ce", replicas=shards, example=x)
        alive, real = [], shards._gather

        def gather(part):
            before = len(shards._open)
            real(part)
            alive.extend([len(shards._open)] * (len(shards._open) - before))

        shards._gather = gather
        learner.step(x, y)
        gathered = list(alive)
        use = learner.measured_step(*again)[1]
        alive.clear()
        learner.evaluate(x, y), learner(x)
        held = [p.to_local() for _, p in learner.named_parameters()]
        gone = shards.full_of([p for group in learner.groups for p in group.parameters])
        optimizers = [optimizer for group in learner.groups for optimizer in group.optimizers]
        state = tensor_bytes([t for t in optimizer_tensors(optimizers) if t.dim()])
        return gathered, max(alive), tensor_bytes(held), tensor_bytes(gone), state, use

    one = Learner(net("mlp", 8, width=64), "local_ce", example=x)
    whole_bytes = tensor_bytes(p for _, p in one.named_parameters())
    largest = max(tensor_bytes(group.parameters) for group in one.groups)
    for gathered, open_at_once, held, gone, moments, use in spread(4, tmp_path, work, Shards):
        assert gathered == [1] * len(one.groups)
        assert open_at_once == 1
        assert gone == 0
        assert held == whole_bytes / 4 and moments == 2 * held  # every size is a multiple of four
        steps = use.optimizer - moments  # the step counters of AdamW, four bytes per tensor
        assert steps == 4 * len(list(one.named_parameters()))
        assert use.parameters == held + largest
        assert 0 < use.gradients <= 2 * largest


def test_what_cannot_be_shared_out_is_refused(tmp_path):
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(64, 8)
            self.scale = nn.Parameter(torch.ones(()))

    example = torch.zeros(2, 64)

    def work(shards):
        said = []
        for how in (
            {"precision": "fp16"},
            {"compile": True},
            {"channels_last": True},
            {"optimizer": "Adafactor"},
            {"model": nn.Sequential(Scaled(), nn.ReLU(), nn.Linear(8, 4))},
        ):
            model = how.pop("model", nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)))
            try:
                Learner(model, "local_ce", replicas=shards, example=example, **how)
            except LayerwiseError as error:
                said.append(str(error))
        return said

    for said in spread(1, tmp_path, work, Shards):
        for sentence, words in zip(
            said, ("precision=fp16", "compile=True", "channels_last=True", "Adafactor may look", "(1,)"), strict=True
        ):
            assert words in sentence


# Runs.


def stop_earlier(folder):
    """As if the run had been killed before its last checkpoint."""
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    (folder / "result.json").unlink()


@pytest.mark.slow
def test_a_run_with_shares_is_the_run_in_one_process_and_goes_on_anywhere(tmp_path, capsys):
    one, many, copy = tmp_path / "one", tmp_path / "many", tmp_path / "copy"
    # Of the last batch of validation, the second rank has no sample.
    words = [*TINY, *split("--batch-size 120 --val-fraction 0.1676 --save-every 3 --accumulate 2 --log-every 1")]
    assert main(["train", *words, "--out", str(one)]) == 0
    codes, errors = run(2, tmp_path / "job", [*SHARDED, *words, "--out", str(many)])
    assert codes == [0, 0], errors
    assert "test accuracy" in (tmp_path / "job" / "out0").read_text() and not errors[1]
    similar(lines(one), lines(many))
    assert result(one)["flops_per_step"] == result(many)["flops_per_step"]
    assert state(one)["optimizer"].keys() == state(many)["optimizer"].keys()
    newest = checkpoint.latest(many / "checkpoints")
    assert {file.name for file in newest.iterdir()} == {"rank-0.safetensors", "rank-1.safetensors", "state.json"}
    sizes = [(newest / f"rank-{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 0.75 * sum(sizes)

    assert main(["export", str(many), str(tmp_path / "weights.safetensors")]) == 0
    model = models.create("mlp", (1, 8, 8), 10, width=8, depth=4)
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert same_bits(model, weights(many))

    shutil.copytree(many, copy)
    for ranks in (2, 3, 1):
        stop_earlier(copy)  # between two batches of an update
        if ranks == 1:
            assert main(["train", "--resume", str(copy)]) == 0
        else:
            codes, errors = run(ranks, tmp_path / "job", [*SHARDED, "--resume", str(copy)])
            assert codes == [0] * ranks, errors
        if ranks == 2:
            assert same_state(state(copy), state(many)) and lines(copy) == lines(many)
        a, b = weights(one), weights(copy)
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(tmp_path):
    check_killed(3, 1, "rank 1", tmp_path / "out", tmp_path / "job", [*SHARDED, *LONG, "--batch-size", "129"])


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed_within_the_limit(tmp_path):
    check_hangs(3, 1, "rank 1", tmp_path / "out", tmp_path / "job", [*SHARDED, *LONG, "--batch-size", "129"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--batch-size 127", "2 replicas cannot share a batch of 127 samples equally"),
        ("--optimizer Adafactor", "Adafactor may look at whole tensors"),
        ("--offload host", "blocks of replicas"),
    ],
)
def test_a_mistake_is_one_sentence_of_one_rank(words, sentence, tmp_path):
    check_refused(2, [*SHARDED, *TINY, *split(words)], {}, sentence, tmp_path)
