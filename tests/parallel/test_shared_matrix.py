"""The output matrix that all blocks read, on several ranks: the bits of one process, and which rank holds it."""

import copy
from shlex import split

import pytest
import torch
from support.jobs import PIPELINE, ended, job, run
from support.nets import same_bits
from support.ranks import same_state
from support.runs import lines, result, state, weights
from support.stages import stages, through

from layerwise import LanguageModel, Learner, models, rules
from layerwise.cli.main import main
from layerwise.learner.state import joined
from layerwise.parallel.ranks import Ranks
from layerwise.parallel.stage import Stage
from layerwise.parallel.transport import PipelineLink

V, T, WIDTH, DEPTH = 40, 6, 12, 4
TASK = LanguageModel(shift=False)
FEW = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
RULES = [
    ("solo", {"group": 1, "depth": 1}),
    pytest.param("solo", {"group": 1, "depth": 1, "refresh": 2}, marks=pytest.mark.slow),
    ("local_ce", {"readout": "shared"}),
    pytest.param("mono_forward", {"readout": "shared"}, marks=pytest.mark.slow),
    ("sll", {"readout": "shared"}),
    pytest.param("sid", {"readout": "shared"}, marks=pytest.mark.slow),
]


def decoder():
    torch.manual_seed(0)
    return models.create("gpt", (1, 1, T), V, depth=DEPTH, width=WIDTH, heads=2)


def tokens(step=0):
    draw = torch.Generator().manual_seed(step)
    return tuple(torch.randint(V, (4, T), generator=draw) for _ in range(2))


def state_of(learners):
    return joined([learner.state_dict() for learner in learners])


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "options"), RULES)
def test_stages_have_the_bits_of_one_process(name, options, ranks):
    rule, about = rules.create(name, **options), {"task": TASK, "lr": 0.02}
    one = Learner(decoder(), rule, example=tokens()[0], **about)
    learners = stages(decoder(), rule, ranks, tokens()[0], **about)
    for step in range(5):
        metrics = one.step(*tokens(step)).blocks
        found = through(learners, "step", *tokens(step))
        assert same_state(found, metrics), step
        if step in (0, 3):
            assert same_state(through(learners, "evaluate", *tokens(9)), one.evaluate(*tokens(9)).blocks)
    assert same_state(state_of(learners), one.state_dict())
    # A block moves with the matrix of the step before, not with the one that its rank has begun with.
    assert not torch.equal(learners[0].network.output_copy, decoder().head.linear.weight)
    assert learners[0].network.output_layer.weight.is_meta


@pytest.mark.parametrize(
    "refresh", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_stages_go_on_from_a_state(refresh, stop):
    rule, about = rules.create("solo", group=1, depth=0, refresh=refresh), {"task": TASK, "lr": 0.02}
    one = Learner(decoder(), rule, example=tokens()[0], **about)
    before, after = (stages(decoder(), rule, ranks, tokens()[0], **about) for ranks in (2, 3))
    for step in range(stop):
        one.step(*tokens(step))
        through(before, "step", *tokens(step))
    state = copy.deepcopy(state_of(before))
    for learner in after:
        learner.load_state_dict(state)
    for step in range(stop, 5):
        one.step(*tokens(step))
        through(after, "step", *tokens(step))
    assert same_state(state_of(after), one.state_dict())


def test_only_who_needs_a_copy_has_one():
    """In one process none of refresh 1; in a pipeline every rank but the last, and no more for other readouts."""
    x, shared = tokens()[0], rules.create("local_ce", readout="shared")
    assert Learner(decoder(), shared, task=TASK, example=x).network.output_copy is None
    held = [learner.network.output_copy for learner in stages(decoder(), shared, 3, x, task=TASK)]
    assert [None if copy is None else tuple(copy.shape) for copy in held] == [(V, WIDTH), (V, WIDTH), None]
    others = stages(decoder(), "local_ce", 3, x, task=TASK)
    assert [learner.network.output_copy for learner in others] == [None] * 3
    assert not Stage(0, 2).shares_matrix


GPT = split("--model gpt --model.depth 4 --model.width 8 --model.heads 2 --data.window 8 --batch-size 4 --lr 1e-2")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "refresh", "told"), [(2, 1, 832), pytest.param(4, 1, 2496, marks=pytest.mark.slow)])
def test_a_run_on_several_ranks_is_the_run_in_one_process_and_tells_the_bytes(ranks, refresh, told, tmp_path):
    """26 letters and a width of 8: 832 bytes for each rank but the last, after every `refresh` steps."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(2000)) + "abcdefghijklmnopqrstuvwxyz")
    rule = split(f"--rule solo --rule.group 1 --rule.depth 1 --rule.refresh {refresh}")
    words = [*GPT, *rule, *split("--steps 5 --eval-every 2 --threads 1 --device cpu --data"), f"text:{text}"]
    one, many = tmp_path / "one", tmp_path / "many"
    codes, errors = run(ranks, tmp_path / "job", [*PIPELINE, *words, "--out", str(many)])
    assert codes == [0] * ranks, errors
    assert main(["train", *words, "--out", str(one)]) == 0
    assert same_bits(weights(one), weights(many)) and same_state(state(one), state(many))
    assert lines(one) == lines(many)
    assert f": {told:,} bytes per step" in " ".join(result(many)["notes"])


def test_in_a_loop_of_ones_own_what_nobody_needs_any_more_is_dropped(tmp_path):
    def child():
        ranks = Ranks(30, torch.device("cpu"))
        stage = Stage(ranks.rank, ranks.count)
        rule = rules.create("local_ce", readout="shared")
        learner = Learner(decoder(), rule, stage=stage, example=tokens()[0], task=TASK, lr=0.02)
        with PipelineLink(ranks, stage, stage.blocks):
            for step in range(3):
                learner.step(*tokens(step))
        torch.save(learner.state_dict(), tmp_path / f"state{ranks.rank}")

    with job(2, tmp_path / "job", child) as processes:
        codes, errors = ended(processes, tmp_path / "job")
    assert codes == [0, 0], errors
    one = Learner(decoder(), rules.create("local_ce", readout="shared"), task=TASK, lr=0.02)
    for step in range(3):
        one.step(*tokens(step))
    found = [torch.load(tmp_path / f"state{rank}", weights_only=False) for rank in range(2)]
    assert same_state(joined(found), one.state_dict())
