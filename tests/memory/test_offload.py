"""Offloaded blocks: the same bits as without offloading, at most two groups on the device, and clear errors."""

import copy
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from shlex import split

import pytest
import torch
from support.nets import batches, by_family, net, problem, same_bits, trained
from support.own import Decoder, decoder, text
from support.runs import SMALL, lines, open_files, result, start, state, train, weights
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, Partition, rules
from layerwise.cli.main import main
from layerwise.memory.mmap import OnFile, ScratchFile, map_file, release_pages, tensor_at
from layerwise.runs import checkpoint

REFUSED = ("periodic_guidance", *(name for name in rules.names() if rules.get(name).locality == "global"))
TINY = split("--model.width 16 --model.depth 4 --batch-size 256 --steps 6 --model.dropout 0.2 --augment crop")


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def pair(model, rule, data, where="disk", **options):
    """Two learners that took the same steps, the second one offloaded."""
    return trained(model, rule, data, **options), trained(model, rule, data, offload=where, **options)


def assert_same(one, two):
    assert same_state(one.state_dict(), two.state_dict())
    x, y = problem(24, seed=5)
    assert same_state(one.evaluate(x, y).blocks, two.evaluate(x, y).blocks)
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("kind", ["mlp", "vgg", pytest.param("vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", ["sll", "sid", "local_ce"])
def test_streamed_blocks_have_the_same_bits(rule, kind, where):
    rule = rules.create(rule, **({"dropout": 0.2} if rule == "sll" else {}))
    model = net(kind, 4, **({} if kind == "vgg" else {"dropout": 0.2}))
    assert_same(*pair(model, rule, batches(3), where))


@pytest.mark.parametrize("name", by_family(name for name in rules.names() if not rules.get(name).models))
def test_a_rule_is_streamed_to_the_same_bits_or_refused(name):
    model, data = net("mlp", 5), batches(2)
    if name in REFUSED:
        with pytest.raises(
            LayerwiseError, match=f"{name!r} cannot be offloaded on this network, because all its blocks"
        ):
            trained(model, name, data, offload="disk")
        return
    assert_same(*pair(model, name, data))


WIDER = {
    "ahead": ("mlp", rules.create("sll", overlap=2), {}),
    "joined": ("mlp", rules.create("local_ce", group=2), {}),
    "turns": ("mlp", rules.create("boosted", updates=1), {}),
    "trunk": ("sid_cascade", "sid_cascade", {}),
    "hard negatives": ("mlp", rules.create("forward_forward", negatives="hard"), {}),
    "asks all blocks first": ("mlp", rules.create("layer_collaboration", gamma="all"), {}),
    "accumulated": ("mlp", "sll", {"accumulate": 3}),
    "skips": ("vgg", "local_ce", {"nonfinite": "skip", "clip": 0.1}),
    "fp16": ("vit", "local_ce", {"precision": "fp16"}),
    "bf16": ("vit", "sid", {"precision": "bf16"}),
    "channels last": ("vgg", "sll", {"channels_last": True}),
    "momentum": ("vgg", "sll", {"optimizer": "sgd"}),
    "state from the start": ("mlp", "sll", {"optimizer": "Adagrad"}),
}


@pytest.mark.parametrize("name", WIDER)
def test_streaming_meets_every_option(name):
    kind, rule, options = WIDER[name]
    data = batches(4)
    if name == "skips":
        data[2][0][0, 0, 0, 0] = torch.nan
    one, two = pair(net(kind, 4), rule, data, **options)
    assert one.skipped == two.skipped == (1 if name == "skips" else 0)
    assert_same(one, two)


def resident(learner):
    """Numbers of the parts whose tensors are on the device."""
    return [part.index for part in learner.offload.parts if part.attached]


def test_only_the_active_part_is_shown_and_the_next_one_fetched(monkeypatch):
    learner = Learner(net("mlp", 6), "sll", offload="disk", example=problem()[0])
    seen, real = [], learner.engine.update

    def update(group, *rest):
        slots = [slot.part.index for slot in learner.offload._slots if slot.part is not None]
        seen.append((resident(learner), sorted(slots)))
        return real(group, *rest)

    monkeypatch.setattr(learner.engine, "update", update)
    for x, y in batches(2):
        learner.step(x, y)
    once = [([i], sorted({i, (i + 1) % 6})) for i in range(6)]
    assert seen == 2 * once
    # All of it: parameters, buffers, auxiliary modules, optimizer state show nothing elsewhere.
    for name, parameter in learner.named_parameters():
        held = learner.groups[-1].units
        here = any(parameter is p for unit in held for p in unit.parameters())
        assert here == (not bool(parameter.isnan().all())), name
    states = [t for g in learner.groups[:-1] for o in g.optimizers for s in o.state.values() for t in s.values()]
    assert len(states) > 0
    assert all(bool(t.isnan().all()) for t in states)


def test_the_meter_counts_what_is_resident():
    def peak(depth):
        learner = Learner(net("mlp", depth, width=64), "sll", offload="disk", example=problem()[0])
        for x, y in batches(2):
            learner.step(x, y)
        return learner.measured_step(*batches(1)[0])[1]

    small, large = peak(4), peak(16)
    for part in ("parameters", "optimizer", "gradients"):
        assert getattr(small, part) == getattr(large, part)
    assert large.activations - small.activations < 1000  # scalars of the metrics
    # Two slots of the largest part: 65 * 64 weights, 10 * 64 of the projection at most; Adam has two more of each.
    assert 2 * 2 * 4 * 65 * 64 <= small.optimizer < 1.1 * 2 * 2 * 4 * 65 * 64
    assert small.peak == small.parameters + small.optimizer + small.gradients + small.activations


def test_storages_that_are_shared_stay_shared():
    class Twice(nn.Module):
        """Two names for one buffer, and a second view of its memory."""

        def __init__(self, table):
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("table", table)
            self.register_buffer("own", torch.zeros(4, 4).t())
            self.register_buffer("row", self.own[1])

        def forward(self, h):
            if self.training:
                self.own.add_(h.mean())
            return self.linear(h) + self.table + self.row.sum()

    torch.manual_seed(0)
    table = torch.randn(16)
    blocks = [Twice(table) for _ in range(4)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *blocks, nn.Linear(16, 4))
    one, two = pair(model, "sll", batches(3))
    assert_same(one, two)
    two.onload()
    assert same_bits(one, two)
    last = two.network.model[3]
    assert last.row.data_ptr() == last.own[1].data_ptr()
    assert last.own.stride() == (1, 4)


def test_onload_gives_an_ordinary_module_back():
    data = batches(6)
    one, two = pair(net("vgg", 4), "sll", data[:3])
    two.onload()
    assert same_bits(one, two)
    x, _ = problem(24, seed=5)
    assert torch.equal(one.network.model.eval()(x), two.network.model.eval()(x))
    for learner in (one, two):
        for batch in data[3:]:
            learner.step(*batch)
    assert same_bits(one, two)


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("kind", ["other data", "over it", "a single number"])
def test_what_is_written_to_a_block_that_is_away_is_refused_and_not_lost(kind, where):
    """It is told at the next step, or where the state is asked for; then training continues as if nothing was."""
    data = batches(6)
    one, two = pair(net("mlp", 4), "local_ce", data[:2], where)
    weight = two.network.model.block2.linear.weight
    assert weight.stride() == (0, 0)  # it is away
    for ask in (lambda: two.step(*data[2]), two.state_dict, two.onload):
        if kind == "other data":
            weight.data = torch.zeros(weight.shape)
        elif kind == "over it":
            torch.nn.init.zeros_(weight)
        else:
            two.network.model.block2.linear.bias[:1].data.copy_(torch.ones(1))
        with pytest.raises(LayerwiseError, match="was written to while its block was offloaded"):
            ask()
    for batch in data[2:]:
        for learner in (one, two):
            learner.step(*batch)
    assert_same(one, two)


def test_state_crosses_between_streamed_and_not():
    data, model = batches(6), net("vgg", 4)
    one = trained(model, "sid", data, accumulate=4)  # gradients are under way
    for first, then in (("none", "disk"), ("disk", "none"), ("disk", "host")):
        half = trained(model, "sid", data[:3], accumulate=4, offload=first)
        rest = Learner(copy.deepcopy(model), "sid", accumulate=4, offload=then)
        rest.load_state_dict(copy.deepcopy(half.state_dict()))
        for x, y in data[3:]:
            rest.step(x, y)
        assert_same(one, rest)


def unlabelled_nowhere(seed):
    batch = text(seed=seed)
    return {**batch, "labels": batch["tokens"]}


@pytest.mark.slow
def test_a_model_cut_at_its_calls_is_offloaded_to_the_same_bits():
    """With tied weights, which stay; run in one pass, and block by block where the rule asks for that."""
    given = [
        ("local_ce", {"tied": "last", "accumulate": 2}),
        ("sll", {"tied": "first", "nonfinite": "skip", "clip": 0.1}),
        (rules.create("sll", overlap=1), {"tied": "frozen"}),
        (rules.create("interlocking"), {"precision": "bf16"}),
        (rules.create("local_ce", group=2), {}),
        ("auglocal", {}),
    ]
    for i, (rule, options) in enumerate(given):
        learners = []
        for where in ("none", "disk"):
            options = {"task": LanguageModel(shift=False), "cuts": "layers.*", "lr": 0.01, **options}
            model = decoder(depth=5, dropout=0.2, tie=i < 4)
            learners.append(Learner(model, rule, offload=where, **options))
            for seed in range(3):
                learners[-1].step(unlabelled_nowhere(seed))
        one, two = learners
        batch = unlabelled_nowhere(5)
        assert same_state(one.state_dict(), two.state_dict()), rule
        assert same_state(one.evaluate(batch).blocks, two.evaluate(batch).blocks), rule
        assert torch.equal(one(batch), two(batch)), rule
        continued = Learner(decoder(depth=5, dropout=0.2, tie=i < 4), rule, offload="host", **options)
        continued.load_state_dict(copy.deepcopy(two.state_dict()))
        for learner in (one, continued):
            learner.step(batch)
        continued.onload()
        assert same_bits(one, continued), rule


@pytest.mark.slow
def test_the_total_of_a_model_cut_at_its_calls_is_flat_in_depth():
    def use(depth, where):
        learner = Learner(Stack(depth), "local_ce", cuts="layers.*", task=LanguageModel(), offload=where)
        for seed in range(2):
            learner.step(unlabelled_nowhere(seed))
        return learner.measured_step(unlabelled_nowhere(2))[1]

    shallow, deep, whole = use(4, "disk"), use(16, "disk"), use(16, "none")
    assert deep.peak <= 1.02 * shallow.peak
    assert whole.peak > 3 * deep.peak


def test_where_all_groups_find_room_their_state_is_counted_too():
    """Two groups have two slots: none leaves, and nothing is saved."""
    use = []
    for where in ("none", "disk"):
        learner = Learner(net("mlp", 2, width=64), "sll", offload=where, example=problem()[0])
        for x, y in batches(2):
            learner.step(x, y)
        use.append(learner.measured_step(*batches(1)[0])[1])
    assert use[1].optimizer == pytest.approx(use[0].optimizer, rel=0.01)


class Stack(Decoder):
    """A decoder that keeps nothing of its layers."""

    def __init__(self, depth):
        torch.manual_seed(0)
        super().__init__(depth)

    def forward(self, tokens, attention_mask):
        mask = torch.ones(len(tokens[0]), len(tokens[0]), dtype=torch.bool).tril()
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask=mask, scale=1.0)[0]
        return self.head(self.norm(x))


def test_a_failed_first_step_loses_nothing():
    model, data = net("mlp", 4), batches(2)
    one, two = trained(model, "sll", data), Learner(copy.deepcopy(model), "sll", offload="disk")
    with pytest.raises(LayerwiseError, match="cannot take an input"):
        two.step(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    for x, y in data:
        two.step(x, y)
    assert_same(one, two)


def test_a_graph_outside_of_the_learner_is_right():
    """Whatever runs with a graph stays, so that its backward pass meets its own weights."""
    model, x = net("mlp", 5), problem()[0]
    learner = Learner(copy.deepcopy(model), "sll", offload="disk", example=x)
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    learner.network(x1).square().sum().backward()
    Partition(model, model.block_names)(x2).square().sum().backward()
    assert torch.equal(x1.grad, x2.grad)


# Runs


@pytest.mark.slow
def test_a_run_has_the_same_bits_and_goes_on(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", *TINY)
    offloaded = train(tmp_path / "offloaded", *TINY, "--offload", "disk")
    real = Learner.step

    def stopping(self, x, y):
        if self.steps == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, x, y)

    monkeypatch.setattr(Learner, "step", stopping)
    assert (
        main(["train", *SMALL, *TINY, "--offload", "disk", "--save-every", "2", "--out", str(tmp_path / "run")]) == 130
    )
    monkeypatch.setattr(Learner, "step", real)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    for folder in (offloaded, tmp_path / "run"):
        assert same_state(weights(folder), weights(whole))
        assert same_state(state(folder), state(whole))
        assert lines(folder, "test") == lines(whole, "test")
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "config.json",
            "metrics.jsonl",
            "result.json",
            "model.safetensors",
            "checkpoints",
            "test_correct.npy",
        }
    for name in ("parameters", "optimizer"):
        assert result(offloaded)["memory_mib"][name] < result(whole)["memory_mib"][name]
    assert main(["eval", str(offloaded)]) == 0


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys):
    real, count = os.pwrite, []

    def full(*words):
        count.append(1)
        if len(count) > 120:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*words)

    monkeypatch.setattr(os, "pwrite", full)
    folder = tmp_path / "run"
    words = ["train", *SMALL, *TINY, "--offload", "disk", "--save-every", "1", "--steps", "50", "--out", str(folder)]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert re.search(r"^layerwise: cannot offload blocks to .*\(No space left on device\); free space", err, re.M)
    monkeypatch.setattr(os, "pwrite", real)
    found, damaged = checkpoint.load_latest(folder / "checkpoints")
    assert found["learner"]["steps"] > 0
    assert not damaged
    assert main(["train", "--resume", str(folder)]) == 0


@pytest.mark.slow
def test_a_full_disk_while_the_network_is_built_is_one_sentence(tmp_path):
    """A write to a mapped page that the full disk cannot hold is SIGBUS: the space is reserved before."""
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True)
    if probe.returncode:
        pytest.skip("this system lets nobody mount a small disk")
    code = "import sys, torch; from layerwise.memory.mmap import OnFile\nwith OnFile(sys.argv[1]): torch.ones(256, 512)"
    line = shlex.join([sys.executable, "-c", code, str(tmp_path)])
    small = f"mount -t tmpfs -o size=300k none {shlex.quote(str(tmp_path))} && {line}"
    run = subprocess.run(["unshare", "-rm", "sh", "-c", small], capture_output=True, text=True)
    assert run.returncode == 1
    assert re.search(r"LayerwiseError: cannot offload blocks to .*\(No space left on device\); free space", run.stderr)


@pytest.mark.parametrize("call", ["posix_fallocate", "ftruncate"])
def test_what_the_disk_cannot_hold_is_never_mapped(tmp_path, monkeypatch, call):
    def full(*words):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(LayerwiseError, match="No space left"), OnFile(tmp_path):
        nn.Linear(256, 256)
    model, example = net("mlp", 4), problem()[0]
    with pytest.raises(LayerwiseError, match="No space left"):
        Learner(model, "sll", offload="disk", offload_folder=tmp_path, example=example).state_dict()


def test_space_is_reserved_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    file = ScratchFile(tmp_path)
    file.reserve(file.extend(10_000) + 5_000, 5_000)
    assert os.fstat(file.handle).st_blocks * 512 >= 5_000


@pytest.mark.parametrize("folder", ["no/such", "a\0b", "x" * 300])
def test_a_folder_that_cannot_hold_the_network_is_refused(folder):
    with pytest.raises(LayerwiseError, match=r"cannot offload blocks to .*choose another --offload-folder"):
        OnFile(Path(folder))


@pytest.mark.slow
def test_nothing_stays_behind_a_killed_run(tmp_path):
    folder, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    words = [*SMALL, *TINY, *split("--steps 100000 --log-every 1 --offload disk --offload-folder"), scratch]
    process = start("train", *words, "--out", folder)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    held = open_files(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert any(str(scratch) in name for name in held)
    assert list(scratch.iterdir()) == []
    assert {path.name for path in folder.iterdir()} <= {"checkpoints", "config.json", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"offload": "tape"}, "offload is 'tape'; choose none, host or disk"),
        ({"offload": "disk", "compile": True}, "leave --offload or --compile out"),
        (
            {"offload": "disk", "offload_folder": "no/such"},
            "cannot offload blocks to no/such .*choose another --offload-folder",
        ),
    ],
)
def test_wrong_use_is_refused(options, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Learner(net("mlp", 4), "sll", example=problem()[0], **options)


def test_one_group_is_refused():
    with pytest.raises(LayerwiseError, match="cannot be offloaded on this network"):
        Learner(net("mlp", 1), "sll", offload="disk", example=problem()[0])


# Files in memory


def test_a_model_made_on_a_file_has_the_same_values(tmp_path):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(200, 300), nn.LayerNorm(300), nn.Conv2d(40, 60, 7))

    plain = make()
    with OnFile(tmp_path):
        mapped = make()
    assert same_bits(plain, mapped)
    assert list(tmp_path.iterdir()) == []
    address = mapped[0].weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(word, 16) for word in line.split()[0].split("-"))
        if first <= address < last:
            assert str(tmp_path) in line
            break
    else:
        pytest.fail("the weight lies nowhere")


def test_released_pages_come_again(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 64)
    with file.open("r+b") as handle:
        found = tensor_at(map_file(handle.fileno(), 2**14), 256, (4, 64))
    assert found.flatten().tolist() == list(range(256))
    found[0, 0] = 7
    release_pages()
    assert found[0, :2].tolist() == [7, 1]


def test_checkpoints_can_be_left_in_their_file(tmp_path):
    tree = {"a": torch.randn(3, 5), "b": torch.arange(3), "c": torch.tensor([True]), "d": torch.zeros(0, 2), "n": 4}
    tree |= {"half": torch.randn(3).half(), "scalar": torch.tensor(2.5)}
    path = checkpoint.save(tmp_path, 1, tree)
    assert same_state(checkpoint.load(path, mapped=True), tree)
    assert same_state(checkpoint.load(path), tree)
