"""Runs on text: resumed to the same bits, with the tokenizer in their folder; the text that they generate."""

import json
import math
import random
from functools import cache

import pytest
import torch
from support.runs import TIMING, lines, result, split, state, weights

from layerwise import LayerwiseError, Learner
from layerwise.cli.main import main
from layerwise.runs.building import load_data, load_run, split_in_order
from layerwise.runs.folders import read_options
from layerwise.runs.generating import Sampling, generate, outputs_at, written

SHORT = split("--model.depth 3 --model.width 16 --model.heads 2 --data.window 8 --batch-size 8 --steps 12 --threads 1")
BPE = split(
    "--data.tokenizer bpe --data.vocabulary 270 --data.documents --save-every 3 --eval-every 4 --model.dropout 0.1"
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    drawn = random.Random(0)
    words = ["the", "sea", "día", "is", "blue", "and", "wide", "🌊"]
    lines = [" ".join(drawn.choices(words, k=6)) + "\n" + "\n" * (i % 5 == 4) for i in range(120)]
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(lines))
    return path


def train(folder, text, *words):
    assert main(["train", "--data", f"text:{text}", *SHORT, "--out", str(folder), *words]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """The finished run of a rule, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    return cache(lambda rule: train(folder / rule, text, "--rule", rule))


class Killed(BaseException):
    """Stands for a crash."""


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["--model.tied", pytest.param("--model.no-tied", marks=pytest.mark.slow)])
def test_a_stopped_run_ends_in_the_same_bits(text, tmp_path, monkeypatch, tied):
    words = [*BPE, tied]
    whole, real = train(tmp_path / "whole", text, *words), Learner.step

    def step(self, x, y):
        if self.steps == 7:
            raise Killed
        return real(self, x, y)

    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(Killed):
        train(tmp_path / "run", text, *words)
    monkeypatch.setattr(Learner, "step", real)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert weights(whole).keys() == weights(tmp_path / "run").keys()
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(tmp_path / "run").values(), strict=True)
    )
    assert lines(whole) == lines(tmp_path / "run")
    assert [line["step"] for line in lines(whole, "val")] == [4, 8, 12]
    left_out = {*TIMING, "command", "options"}
    of_a, of_b = ({k: v for k, v in result(run).items() if k not in left_out} for run in (whole, tmp_path / "run"))
    assert of_a == of_b and of_a["sample"]["text"]
    assert state(whole)["steps"] == 12


@pytest.mark.slow
def test_the_tokenizer_of_the_folder_is_used_and_checked(text, tmp_path, capsys, monkeypatch):
    folder = train(tmp_path / "run", text, *BPE, "--rule", "backprop")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))  # trained on the spot, it might be another
    monkeypatch.setattr("layerwise.data.tokenizer.BPE.trained", None)
    assert main(["eval", str(folder)]) == 0
    found = json.loads((folder / "tokenizer.json").read_text())
    merges = found["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    for command in (["predict", str(folder), "--prompt", "sea"], ["train", "--resume", str(folder)]):
        capsys.readouterr()
        assert main(command) == 2
        assert "is not the tokenizer that the run was trained with" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(["eval", str(folder)]) == 2
    assert "put the tokenizer of the run back" in capsys.readouterr().err


def test_another_text_is_noticed(text, tmp_path, capsys):
    copy = tmp_path / "a.txt"
    copy.write_text(text.read_text())
    folder = train(tmp_path / "run", copy, "--rule", "backprop")
    copy.write_text(text.read_text()[:-400] + text.read_text()[-400:].upper().lower() + "the sea\n")
    assert main(["eval", str(folder)]) == 2
    assert "has changed since the run began: its" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_are_those_of_the_probabilities(runs):
    """Bits per byte, perplexity and accuracy, from the logits of every window, written out."""
    folder = runs("local_ce")
    run = load_run(folder, "cpu")
    dataset = load_data(read_options(folder), folder)
    bits = nats = hits = tokens = size = 0.0
    for x, y in split_in_order(run, "test", 7, folder).epoch(0):
        p = run.learner(x).double().softmax(-1)
        for place in [(i, t) for i in range(len(y)) for t in range(y.shape[1])]:
            own = float(p[place][y[place]])
            bits, nats, tokens = bits - math.log2(own), nats - math.log(own), tokens + 1
            hits += int(p[place].argmax()) == int(y[place])
            size += len(dataset.tokenizer.decode([int(y[place])]).encode())
    test = result(folder)["test"]
    assert test["head/bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert test["head/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert test["head/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert test["head/accuracy"] == pytest.approx(hits / tokens)
    assert result(folder)["test_bits_per_byte"] == test["head/bits_per_byte"]
    assert result(folder)["metric"] == "bits_per_byte" and set(result(folder)["blocks"]) == {"block1", "block2", "head"}


@pytest.mark.parametrize(
    ("rule", "block"), [("local_ce", None), ("local_ce", 2), ("sll", 1), ("sid", None), ("sid", 2)]
)
def test_tokens_that_are_drawn_do_not_depend_on_what_is_kept(runs, rule, block):
    learner = load_run(runs(rule), "cpu").learner
    for sampling in (Sampling(0), Sampling(0.7, top_k=5, seed=3)):
        kept, fresh = (list(generate(learner, [3, 1, 2], 14, sampling, block, keep)) for keep in (True, False))
        assert kept == fresh and len(kept) == 14
    assert kept != list(generate(learner, [3, 1, 2], 14, Sampling(0.7, top_k=5, seed=4), block))


def test_what_is_drawn_has_the_probabilities_of_the_logits(runs):
    learner = load_run(runs("backprop"), "cpu").learner
    logits = learner(torch.tensor([[3, 1]]))[0, -1]
    first = [next(generate(learner, [3, 1], 1, Sampling(2.0, top_k=3, seed=seed))) for seed in range(150)]
    top = logits.topk(3)
    wanted = dict(zip(top.indices.tolist(), (top.values / 2).softmax(-1).tolist(), strict=True))
    assert set(first) <= set(wanted)
    assert all(first.count(token) / 150 == pytest.approx(p, abs=0.14) for token, p in wanted.items())
    assert next(generate(learner, [3, 1], 1, Sampling(0))) == int(logits.argmax())


def test_a_block_predicts_without_those_after_it(runs):
    """Its outputs are those of its readout, and do not move when later blocks do."""
    learner, x = load_run(runs("local_ce"), "cpu").learner, torch.randint(12, (2, 6))
    model, readout = learner.network.model, learner.auxiliary["1"]
    expected = readout(model.block2(model.block1(model.stem(x))))
    with torch.no_grad():
        for parameter in (*model.block3.parameters(), *model.head.parameters()):
            parameter.fill_(torch.nan)
    torch.testing.assert_close(outputs_at(learner, x, 2), expected)
    beliefs = load_run(runs("sid"), "cpu").learner
    torch.testing.assert_close(outputs_at(beliefs, x, 2), beliefs.beliefs(x)[2])


def test_near_temperature_zero_the_most_likely_token_is_drawn(runs):
    """As at zero itself; a network that answers NaN has none."""
    learner = load_run(runs("backprop"), "cpu").learner
    best = list(generate(learner, [3, 1, 2], 8, Sampling(0)))
    for temperature in (1e-6, 1e-300, 5e-324):
        assert list(generate(learner, [3, 1, 2], 8, Sampling(temperature, seed=1))) == best
    with torch.no_grad():
        for parameter in learner.network.model.head.parameters():
            parameter.fill_(torch.nan)
    for temperature in (0, 1.0):
        with pytest.raises(LayerwiseError, match="is no finite number"):
            next(generate(learner, [3, 1, 2], 1, Sampling(temperature)))


def test_draws_are_among_as_many_tokens_as_asked_even_if_logits_are_equal(runs):
    learner = load_run(runs("backprop"), "cpu").learner
    with torch.no_grad():
        for parameter in learner.network.model.head.parameters():
            parameter.zero_()
    for k in (1, 3):
        drawn = {next(generate(learner, [3, 1], 1, Sampling(top_k=k, seed=seed))) for seed in range(60)}
        assert len(drawn) == k


OWN = """
import torch
from torch import nn

class Positions(nn.Module):
    "Learned positions, as many as a window of training has."
    def __init__(self, outputs):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(outputs, 8), nn.Embedding(20, 8)
    def forward(self, x):
        return self.tokens(x) + self.positions(torch.arange(x.shape[1]))

class OneLength(nn.Module):
    "Reads windows of 20 tokens only."
    def __init__(self, outputs):
        super().__init__()
        self.tokens, self.scale = nn.Embedding(outputs, 8), nn.Parameter(torch.ones(20, 8))
    def forward(self, x):
        return self.tokens(x) * self.scale

class Later(nn.Module):
    "Sees the token after each one."
    def __init__(self, outputs):
        super().__init__()
        self.tokens, self.conv = nn.Embedding(outputs, 8), nn.Conv1d(8, 8, 3, padding=1)
    def forward(self, x):
        return self.conv(self.tokens(x).transpose(1, 2)).transpose(1, 2)

def positions(outputs):
    return nn.Sequential(Positions(outputs), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))

def one_length(outputs):
    return nn.Sequential(OneLength(outputs), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))

def later(outputs):
    return nn.Sequential(Later(outputs), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))
"""


def train_own(tmp_path, text, name):
    (tmp_path / "own.py").write_text(OWN)
    words = ["--data", f"text:{text}", "--data.window", "20", "--batch-size", "8", "--steps", "2", "--rule", "backprop"]
    return main(["train", *words, "--model", f"{tmp_path / 'own.py'}:{name}", "--out", str(tmp_path / name)])


@pytest.mark.slow
def test_a_network_with_as_many_positions_as_a_window_writes_a_longer_text(text, tmp_path, capsys):
    """It reads the last window for each next token; a run of one that cannot write at all still has its result."""
    assert train_own(tmp_path, text, "positions") == 0
    folder = tmp_path / "positions"
    tokens = [3, 1, 2]
    learner = load_run(folder, "cpu").learner
    with torch.no_grad():
        for _ in range(30):
            tokens.append(int(learner.network.model(torch.tensor([tokens[-20:]]))[0, -1].argmax()))
    prompt = "".join(sorted(set(text.read_text()))[token] for token in tokens[:3])
    found, notes = written(folder, prompt, 30, Sampling(0))
    assert found == "".join(sorted(set(text.read_text()))[token] for token in tokens)
    assert any("reads the last 20 tokens" in note for note in notes)
    assert len(result(folder)["sample"]["text"]) == 100
    assert train_own(tmp_path, text, "one_length") == 0
    assert any("there is no sample of text" in note for note in result(tmp_path / "one_length")["notes"])


def test_a_network_that_sees_later_tokens_is_refused(text, tmp_path, capsys):
    assert train_own(tmp_path, text, "later") == 2
    assert "the network sees later tokens" in capsys.readouterr().err
    assert not (tmp_path / "later").exists()


def test_predict_writes_on_from_the_prompt(runs, tmp_path, capsys):
    words = ["predict", str(runs("sll")), "--prompt", "the sea", "--tokens", "12", "--seed", "5"]
    capsys.readouterr()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("the sea") and len(out) == len("the sea") + 12 + 1
    assert main([*words, "--out", str(tmp_path / "out.txt")]) == 0
    assert (tmp_path / "out.txt").read_text() == out
    assert written(runs("sll"), "the sea", 12, Sampling(seed=5))[0] + "\n" == out


WRONG = [
    (["--prompt", ""], "the prompt is empty"),
    (["--prompt", "zzz"], "the character 'z' is none of the"),
    (["--prompt", "None"], "the character 'N' is none of the"),
    (["--prompt", "-the"], "one that begins with - is given as --prompt=VALUE"),
    (["--prompt", "the", "--out", ""], "--out is empty; give a path"),
    (["--prompt", "the", "--tokens", "1023"], "beyond the context of the model, 1024"),
    (["--prompt", "the", "--tokens", "0"], "tokens is 0"),
    (["--prompt", "the", "--temperature", "-1"], "temperature is -1.0; it must be"),
    (["--prompt", "the", "--top-k", "0"], "top_k is 0; it must be"),
    (["--prompt", "the", "--seed", f"{10**20}"], "it must be 2^63 - 1 at most"),
    (["--prompt", "the", "--block", "4"], "there is no block 4; the network has the blocks 1 to 3"),
    (["--prompt", "the", "--block", "3"], "blocks with a readout: 1, 2"),
    (["a.txt"], "give --prompt instead of INPUT"),
    (["a.txt", "--tokens", "3"], "--tokens applies to text, so give --prompt too"),
    ([], "needs INPUT, or --prompt TEXT,"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_a_prompt_that_cannot_be_continued_is_refused(runs, words, sentence, capsys):
    folder = runs("local_ce")
    capsys.readouterr()  # what its training prints
    assert main(["predict", str(folder), *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


MISMATCHES = [
    (["--model", "mlp"], "the model 'mlp' takes no tokens"),
    (["--data", "digits", "--model", "gpt"], "the model 'gpt' takes tokens, and digits is not text"),
    (["--model", "gru"], "choose --model.sequence tokens"),
    (["--data", "digits", "--model", "lstm", "--model.sequence", "tokens"], "choose --model.sequence rows"),
    (["--data", "digits", "--model", "mlp", "--data.window", "8"], "window is about language_model"),
    (["--data.vocabulary", "300"], "vocabulary is that of a bpe"),
    (["--data.tokenizer", "bpe", "--data.vocabulary", "10"], "has no room beside the 256 bytes"),
    (["--model.context", "4"], "a window of 8 tokens is longer than the context of the model, 4"),
    (["--augment", "flip"], "windows of a text are not images to augment"),
    (["--task", "regression"], "window is about language_model"),
    (["--rule", "predsim"], "cannot learn from a label per token"),
    (["--rule", "forward_forward"], "a label per token"),
]


@pytest.mark.parametrize(("words", "sentence"), MISMATCHES, ids=[sentence for _, sentence in MISMATCHES])
def test_what_does_not_go_together_is_refused(text, words, sentence, tmp_path, capsys):
    base = [] if "digits" in words else ["--data", f"text:{text}"]
    if "--data.window" not in words:
        base += ["--data.window", "8"] if base else []
    assert main(["train", *base, *words, "--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "x")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_recurrent_network_learns_a_text_and_continues_it(text, tmp_path, capsys):
    """Without keys and values to keep, every token is predicted from the whole text."""
    small = split("--model.depth 2 --model.width 16 --data.window 8 --batch-size 8 --steps 12 --threads 1")
    words = ["--model", "gru", "--model.sequence", "tokens", "--rule", "local_ce", *small]
    assert main(["train", "--data", f"text:{text}", *words, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "--prompt", "the sea ", "--tokens", "12"]) == 0
    assert "the sea " in capsys.readouterr().out
    learner = load_run(tmp_path / "run", "cpu").learner
    sampling, prompt = Sampling(temperature=0.0), [1, 2, 3]
    found = list(generate(learner, prompt, 4, sampling))
    for token in found:
        with torch.no_grad():
            assert token == int(learner.network.model(torch.tensor([prompt]))[0, -1].argmax())
        prompt.append(token)


@pytest.mark.slow
def test_a_text_alone_and_the_recipe_train_out_of_the_box(text, tmp_path, monkeypatch):
    (tmp_path / "data" / "tinyshakespeare").mkdir(parents=True)
    (tmp_path / "data" / "tinyshakespeare" / "input.txt").write_text(text.read_text() * 40)
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path / "data"))
    small = ["--model.width", "16", "--model.depth", "2", "--steps", "2", "--batch-size", "2"]
    assert main(["train", "--recipe", "shakespeare", *small, "--out", str(tmp_path / "a")]) == 0
    assert main(["train", "--data", "tinyshakespeare", *small, "--out", str(tmp_path / "b")]) == 0
    found = result(tmp_path / "a"), result(tmp_path / "b")
    assert found[0]["test"] == found[1]["test"] and found[0]["model"] == "gpt" and found[0]["rule"] == "local_ce"
