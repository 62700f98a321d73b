"""Models that are cut at their calls, on several ranks: the bits of one process, and what cannot be distributed."""

import copy

import pytest
import torch
from support.jobs import ended, job
from support.nets import same_bits
from support.own import Decoder, Skips, decoder, text
from support.ranks import close, same_state, spread, whole
from support.stages import stages
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, cut_at_calls
from layerwise.learner.state import joined
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.shards import Shards
from layerwise.parallel.stage import Stage
from layerwise.parallel.transport import PipelineLink
from layerwise.rules import create

OPTIONS = {"cuts": "layers.*", "task": LanguageModel(shift=False), "lr": 0.01}


def batch(seed, rows=slice(None)):
    """A batch without missing labels, though with padding."""
    found = text(seed=seed)
    return {name: value[rows] for name, value in {**found, "labels": found["tokens"]}.items()}


class Meta(Decoder):
    """A decoder that can draw its positions."""

    def reset_parameters(self):
        nn.init.normal_(self.positions, std=0.1)


def meta(**options):
    with torch.device("meta"):
        return Meta(depth=5, tie=False, dropout=0.2, **options)


@pytest.mark.slow
def test_stages_have_the_bits_of_one_process():
    """Masks are computed on every rank, from the batch; offloaded or not."""
    for rule, ranks, options in (
        ("local_ce", 2, {}),
        ("sll", 3, {"offload": "disk"}),
        (create("local_ce", group=2), 3, {}),
        ("mono_forward", 2, {"offload": "disk", "accumulate": 2}),
    ):
        model = decoder(depth=5, dropout=0.2, tie=False)
        one = Learner(copy.deepcopy(model), rule, **OPTIONS, **{**options, "offload": "none"})
        learners = stages(model, rule, ranks, batch(0), **OPTIONS, **options)
        for seed in range(2):
            metrics = [learner.step(batch(seed)).blocks for learner in learners]
            assert same_state({k: v for found in metrics for k, v in found.items()}, one.step(batch(seed)).blocks)
        metrics = [learner.evaluate(batch(7)).blocks for learner in learners]
        assert same_state({k: v for found in metrics for k, v in found.items()}, one.evaluate(batch(7)).blocks)
        states = [copy.deepcopy(learner.state_dict()) for learner in learners]
        assert same_state(joined(states), one.state_dict()), rule
        held = [{n for n, p in learner.named_parameters() if not p.is_meta} for learner in learners]
        assert sum(map(len, held)) == len(set.union(*held)) == len(dict(one.named_parameters()))


def test_a_frozen_embedding_is_on_all_ranks_that_use_it():
    model = decoder(depth=4)
    one = Learner(copy.deepcopy(model), "local_ce", tied="frozen", **OPTIONS)
    learners = stages(model, "local_ce", 2, batch(0), tied="frozen", **OPTIONS)
    for seed in range(2):
        one.step(batch(seed))
        for learner in learners:
            learner.step(batch(seed))
    assert same_state(joined([learner.state_dict() for learner in learners]), one.state_dict())


class Flat(nn.Module):
    """Blocks of different widths that are called under a table of the model's own."""

    def __init__(self, learns=False, inside=False):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("table", torch.randn(6))
        self.scale = nn.Parameter(torch.ones(6), requires_grad=learns)
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head, self.inside = nn.Linear(6, 4), inside

    def forward(self, x):
        shift = (self.table * self.scale).tanh() * x.mean(1, keepdim=True)
        for i, layer in enumerate(self.layers):
            x = layer(x).relu()
            if i > 1:
                x = x + shift
            if i == 0 and self.inside:
                shift = x[:, :6]
        return self.head(x)


def test_what_the_forward_pass_computes_from_the_batch_and_fixed_tensors_is_there_on_every_rank():
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    one = Learner(Flat(), "local_ce", cuts="layers.*", example=x)
    learners = stages(Flat(), "local_ce", 2, x, cuts="layers.*")
    for _ in range(2):
        one.step(x, y)
        for learner in learners:
            learner.step(x, y)
    assert same_state(joined([learner.state_dict() for learner in learners]), one.state_dict())


@pytest.mark.filterwarnings("ignore:these parameters of block")
def test_what_needs_more_than_one_tensor_from_rank_to_rank_is_refused():
    x = torch.randn(8, 6)
    for make, rule, given, match in (
        (decoder, "local_ce", batch(0), "'embedding.weight' is used by the blocks 'layers.0' to 'head', which are on"),
        (lambda: decoder(tie=False), "auglocal", batch(0), "'auglocal' runs a block more than once, and others of"),
        (lambda: Flat(learns=True), "local_ce", x, "'layers.3' uses .* on another rank computes with 'scale'"),
        (lambda: Flat(inside=True), "local_ce", x, "'layers.3' uses .* which block 'layers.1' on another rank"),
    ):
        options = {"task": OPTIONS["task"]} if isinstance(given, dict) else {}
        with pytest.raises(LayerwiseError, match=match):
            stages(make, rule, 2, given, cuts="layers.*", **options)
    with pytest.raises(LayerwiseError, match="on another rank computes"):
        stages(lambda: cut_at_calls(Skips(), ["down.*", "up.*"]), "local_ce", 2, torch.randn(6, 8))


def test_two_processes_make_train_and_write_their_own_blocks_alone(tmp_path):
    """The model is on the meta device, and made block by block; the files are those of one process, byte for byte."""

    def child():
        ranks = Ranks(30, torch.device("cpu"))
        stage = Stage(ranks.rank, ranks.count, [2, 3])
        learner = Learner(meta(), "local_ce", stage=stage, offload="disk", example=batch(0), **OPTIONS)
        with PipelineLink(ranks, stage, stage.blocks):
            for seed in range(2):
                learner.step(batch(seed))
            learner.save_weights(tmp_path / "two")

    with job(2, tmp_path / "job", child) as processes:
        codes, errors = ended(processes, tmp_path / "job")
    assert codes == [0, 0], errors
    one = Learner(meta(), "local_ce", **OPTIONS)
    for seed in range(2):
        one.step(batch(seed))
    one.save_weights(tmp_path / "one")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 7  # five blocks, the head, the index
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)


@pytest.mark.slow
def test_shares_of_parameters_are_gathered_block_by_block(tmp_path):
    def work(replicas):
        learner = Learner(decoder(depth=3, tie=False), "sll", replicas=replicas, optimizer="sgd", **OPTIONS)
        for seed in range(2):
            learner.step(batch(seed, slice(2 * replicas.rank, 2 * replicas.rank + 2)))
        out = learner(batch(5))
        try:
            Learner(decoder(depth=3), "sll", replicas=replicas, example=batch(0), **OPTIONS)
        except LayerwiseError as reason:
            said = str(reason)
        return copy.deepcopy(whole(learner.state_dict())), out, said

    (state, out, said), (_, other, _) = spread(2, tmp_path, work, Shards)
    one = Learner(decoder(depth=3, tie=False), "sll", optimizer="sgd", **OPTIONS)
    for seed in range(2):
        one.step(batch(seed))
    assert close(state, one.state_dict())
    assert torch.equal(out, other)
    assert "'embedding.weight' is used by several groups of blocks" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of much
def test_compiled_blocks_have_the_same_bits():
    for rule in ("local_ce", "interlocking"):
        learners = [Learner(decoder(tie=False), rule, compile=how, **OPTIONS) for how in (False, "eager")]
        for seed in range(2):
            for learner in learners:
                learner.step(batch(seed))
        assert same_bits(*learners)
        assert torch.equal(learners[0](batch(5)), learners[1](batch(5)))
    options = {**OPTIONS, "cuts": ["layers.0.norm", "layers.0"], "tied": "last", "compile": "eager"}
    with pytest.raises(LayerwiseError, match=r"'layers.0' cannot be compiled, because the cut 'layers.0.norm'"):
        Learner(decoder(), "local_ce", example=batch(0), **options)
