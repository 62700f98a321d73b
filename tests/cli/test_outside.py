"""Networks and rules from other packages and files on the command line: `hf:`, `timm:`, `FILE.py:NAME`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.vision import timm

from layerwise import LayerwiseError, models
from layerwise.cli.main import main
from layerwise.compare.grid import RIVALS, CompareOptions, Grid
from layerwise.runs import building
from layerwise.runs.options import from_mapping, to_mapping, to_words

NETWORK = '''
"""A network of somebody's."""
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, scale):
        return x + self.linear(self.norm(x) * scale).relu(), scale

class Network(nn.Module):
    def __init__(self, inputs, width, depth, classes):
        super().__init__()
        self.inputs = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.inputs(x.flatten(1))
        for layer in self.layers:
            x, _ = layer(x, scale=torch.ones(()))
        return {"logits": self.head(x)}

def make(shape, classes, width: int = 16, depth: int = 3):
    """Residual layers."""
    c, h, w = shape
    return Network(c * h * w, width, depth, classes)

def needs(shape, secret):
    ...

def nothing(classes):
    return classes

def reserved(classes, name: str = "x"):
    ...

def wider(classes):
    return Network(64, 16, 2, classes + 3)

SHARED = Network(64, 16, 2, 10)

def shared(classes):
    return SHARED

def leaves(classes):
    raise SystemExit(0)
'''
RULE = '''
from dataclasses import dataclass
from layerwise.rules import LocalCE

@dataclass(frozen=True)
class Mine(LocalCE):
    """Cross-entropy at every block."""

    name = "mine"
    factor: float = 1.0

@dataclass(frozen=True)
class Bare(LocalCE):
    def __post_init__(self):
        raise ValueError("no weight")

@dataclass(frozen=True)
class Typo(LocalCE):
    factor: "flaot" = 1.0

@dataclass(frozen=True)
class Leaves(LocalCE):
    def signal(self, ctx):
        raise SystemExit(0)
'''
SHORT = ["--steps", "3", "--batch-size", "64", "--threads", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a network and a rule, which is the current one."""
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "rule.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def refused(capsys, *words):
    assert main([*words]) == 2
    sentence = capsys.readouterr().err
    assert "unexpected" not in sentence and "Traceback" not in sentence
    return sentence


def working_memory(file):
    """Activations and gradients by rule and depth."""
    rows = json.loads(Path(file).read_text())
    return {(row["rule"], row["depth"]): row["activations"] + row["gradients"] for row in rows}


def test_a_run_of_ones_own_network_and_rule(here, capsys):
    words = ["--model", "net.py:make", "--model.depth", "2", "--rule", "rule.py:Mine", "--rule.factor", "2"]
    assert main(["train", *words, *SHORT, "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "run"]) == 0
    assert main(["eval", "run"]) == 0
    assert capsys.readouterr().err.count("note: runs net.py, which the run in run names") == 2
    np.save("images.npy", np.zeros((2, 1, 8, 8), np.uint8))
    assert main(["predict", "run", "images.npy"]) == 0
    assert capsys.readouterr().err.count("note: runs net.py") == 1  # though it reads the options several times
    assert main(["export", "run", "weights.safetensors"]) == 0
    run = building.load_run(here / "run")
    assert [block.name for block in run.learner.network.blocks] == ["layers.0", "layers.1"]
    plain = models.options("net.py:make")(depth=2).build((1, 8, 8), 10)
    plain.load_state_dict(load_file("weights.safetensors"))
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(plain.eval()(x)["logits"], run.learner(x))


def test_options_of_the_users_survive_config_and_command_line(here):
    options = from_mapping({"model": {"name": "net.py:make", "width": 8}, "rule": {"name": "rule.py:Mine"}})
    values = json.loads(json.dumps(to_mapping(options)))
    assert from_mapping(values) == options
    assert len(values["model"]["sha256"]) == len(values["rule"]["sha256"]) == 64
    words = to_words(options)
    assert words[words.index("--model") :][:4] == ["--model", "net.py:make", "--model.width", "8"]


@pytest.mark.parametrize("file", ["net.py", "rule.py"])
def test_a_changed_file_is_noticed_before_it_is_run(here, capsys, file):
    main(["train", "--model", "net.py:make", "--rule", "rule.py:Mine", *SHORT, "--out", "run"])
    capsys.readouterr()
    (here / file).write_text("open('ran', 'w')\n")
    for command in (["eval", "run"], ["train", "--resume", "run"], ["predict", "run", "x.npy"], ["export", "run", "w"]):
        assert f"{file} has changed since the run began" in refused(capsys, *command)
    (here / file).unlink()
    assert f"there is no file {file}" in refused(capsys, "eval", "run")
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "net.py:mak"], "net.py defines no 'mak'; did you mean 'make'?"),
        (["--model", "absent.py:make"], "there is no file absent.py"),
        (["--model", "broken.py:make"], "broken.py fails in line 2 (ZeroDivisionError: division by zero)"),
        (["--model", "syntax.py:make"], "syntax.py fails in line 1 (SyntaxError"),
        (["--model", "net.py:needs"], "asks for 'secret', which nobody knows"),
        (["--model", "net.py:nothing"], "returns int; let it return a torch.nn.Module"),
        (["--model", "net.py:reserved"], "a parameter called 'name'"),
        (["--model", "net.py:make", "--model.depth", "0"], "depth must be a whole number of at least 1"),
        (["--model", "net.py:make", "--cuts", "layer.*"], "no module is called 'layer.*'"),
        (["--model", "net.py:make", "--output", "logit"], "no tensor of logits is known in it under the name 'logit'"),
        (["--rule", "rule.py:Mien"], "rule.py defines no 'Mien'; did you mean 'Mine'?"),
        (["--rule", "net.py:Layer"], "names no rule"),
        (["--model", "net.py"], "unknown model 'net.py'"),
        (["--model", "net.py:wider"], "has 13 outputs, and digits needs 10"),
        (["--model", "net.py:leaves"], "has ended the command with sys.exit(0)"),
        (["--rule", "rule.py:Leaves", "--model.width", "4"], "has ended the command with sys.exit(0)"),
        (["--rule", "rule.py:Bare"], "rule 'rule.py:Bare' cannot be made (ValueError: no weight)"),
        (["--rule", "rule.py:Typo"], "name 'flaot' is not defined"),
    ],
)
def test_a_wrong_name_is_one_sentence(here, capsys, words, sentence):
    (here / "broken.py").write_text("# a comment\n1 / 0\n")
    (here / "syntax.py").write_text("def make(:\n")
    assert sentence in refused(capsys, "train", *words, *SHORT, "--out", "run")


def test_a_function_that_gives_one_network_twice_is_refused(here):
    """Two learners would train the same weights."""
    kind = models.options("net.py:shared")
    first = kind().build((1, 8, 8), 10)
    with pytest.raises(LayerwiseError, match="returns the same network each time"):
        kind().build((1, 8, 8), 10)
    assert models.options("net.py:make")().build((1, 8, 8), 10) is not first


def test_memory_of_ones_own_network(here, capsys):
    words = ["--rule", "local_ce", "backprop", "--shape", "1", "8", "8", "--batch-size", "16", "--json", "rows.json"]
    assert main(["bench", "memory", "--model", "net.py:make", "--depths", "4,16", *words]) == 0
    rows = {
        (r["rule"], r["depth"]): r["activations"] + r["gradients"] for r in json.loads(Path("rows.json").read_text())
    }
    assert rows["local_ce", 16] <= 1.02 * rows["local_ce", 4]
    assert rows["backprop", 16] > 2 * rows["backprop", 4]


class Refusing:
    """In place of the workers: one rule is refused, the others are measured."""

    def run(self, tasks, done, jobs, begun):
        for task in tasks:
            begun(task)
            no = task["label"] == "backprop_checkpoint"
            done(task, {"kind": "mistake", "reason": "it runs twice."} if no else {"done": {"steps_per_epoch": 1}})


def test_a_rival_that_does_not_train_the_model_is_left_out_unless_it_is_named(here, capsys):
    model = models.options("net.py:make")()
    grid = Grid(CompareOptions(model=model))
    grid._measure(Refusing())
    assert list(grid.rules) == [name for name in RIVALS if name != "backprop_checkpoint"]
    assert "backprop_checkpoint is left out: it runs twice." in capsys.readouterr().err
    with pytest.raises(LayerwiseError, match="it runs twice"):
        Grid(CompareOptions(model=model, rules=("backprop_checkpoint", "backprop")))._measure(Refusing())
    assert list(Grid(CompareOptions(model=model, rules=("rule.py:Mine:factor=2",))).rules) == ["rule.py:Mine:factor=2"]


# transformers and timm


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(here, capsys, monkeypatch):
    pytest.importorskip("transformers", reason="the hf extra (transformers) is not installed")
    folder = here / "stranger"
    folder.mkdir()
    places = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Net"}
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": places}))
    (folder / "code.py").write_text("raise SystemExit('it runs')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    assert "stranger is not a configuration" in refused(capsys, "train", "--model", "hf:stranger", *SHORT)


@pytest.fixture
def configuration(here):
    transformers = pytest.importorskip("transformers", reason="the hf extra (transformers) is not installed")
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTConfig(image_size=64, num_hidden_layers=3, patch_size=4, **small).to_json_file("vit.json")
    tokens = {"vocab_size": 20, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    transformers.LlamaConfig(num_hidden_layers=2, **tokens, **small).to_json_file("llama.json")
    return here


def test_a_network_of_transformers(configuration, capsys):
    words = ["--model", "hf:vit.json", "--model.depth", "2", "--model.config", "hidden_dropout_prob", "0.1"]
    assert main(["train", *words, "--rule", "local_ce", *SHORT, "--out", "run"]) == 0
    run = building.load_run(configuration / "run")
    model = run.learner.network.model
    assert model.config.image_size == 8 and model.config.num_labels == 10 and model.config.num_channels == 1
    assert len(run.learner.network.blocks) == 2
    capsys.readouterr()
    (configuration / "vit.json").write_text((configuration / "vit.json").read_text().replace("16", "32"))
    assert "vit.json has changed since the run began" in refused(capsys, "eval", "run")
    for words, sentence in (
        (["--model", "hf:absent.json"], "there is no file absent.json"),
        (["--model", "hf:run/config.json"], "names no model_type"),
        (["--model", "hf:vit.json", "--model.config", "hiden_size", "3"], "did you mean 'hidden_size'"),
        (["--model", "hf:vit.json", "--model.config", "patch_size", "0"], "transformers cannot build vit.json"),
        (["--model", "hf:llama.json"], "LlamaForCausalLM cannot take this batch"),
    ):
        assert sentence in refused(capsys, "train", *words, *SHORT, "--out", "other")


def test_memory_of_a_language_model_of_transformers(configuration, capsys):
    words = ["--depths", "2,6", "--batch-size", "4", "--rule", "local_ce", "backprop", "--json", "rows.json"]
    assert main(["bench", "memory", "--model", "hf:llama.json", *words, "--model-options", "length", "16"]) == 0
    rows = {
        (r["rule"], r["depth"]): r["activations"] + r["gradients"] for r in json.loads(Path("rows.json").read_text())
    }
    assert rows["local_ce", 6] <= 1.02 * rows["local_ce", 2]
    assert rows["backprop", 6] > 2 * rows["backprop", 2]


def test_weights_of_a_folder_are_where_training_begins(configuration):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained("vit.json", image_size=8, num_channels=1, num_labels=10)
    saved = transformers.AutoModelForImageClassification.from_config(config)
    saved.save_pretrained("folder")
    made = models.options("hf:folder")().build((1, 8, 8), 10)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), made.parameters(), strict=True))
    other = models.options("hf:folder")().build((1, 8, 8), 3)  # a head of another size is new, the rest is as it was
    assert torch.equal(saved.vit.embeddings.cls_token, other.vit.embeddings.cls_token) and other(
        torch.zeros(1, 1, 8, 8)
    ).logits.shape == (1, 3)


def test_a_network_of_timm(here, capsys):
    timm()
    words = ["--model", "timm:vit_tiny_patch16_224", "--model.depth", "2"]
    words += ["--model.options", "embed_dim", "16", "num_heads", "2", "patch_size", "4"]
    assert main(["train", *words, "--rule", "local_ce", *SHORT, "--out", "run"]) == 0
    run = building.load_run(here / "run")
    assert [block.name for block in run.learner.network.blocks] == ["blocks.0", "blocks.1"]
    capsys.readouterr()
    assert "timm knows no network 'vit_tny'" in refused(capsys, "train", "--model", "timm:vit_tny", *SHORT)
