"""Fine-tuning of a network of transformers on a table of sentences, from local weights, also through adapters."""

import csv
from shlex import split

import pytest
import torch
from safetensors.torch import load_file
from support.runs import result

from layerwise import LayerwiseError, models
from layerwise.cli.main import main
from layerwise.models.outside import WithoutPadding

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
COMMON = split("--batch-size 16 --threads 1 --device cpu")
WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of two layers with weights and tokenizer, and sentences whose class is that of their words."""
    here = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **sizes)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(here)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(here / "tokenizer.json"))
    draw = torch.Generator().manual_seed(0)
    for name, count in (("train", 96), ("validation", 16), ("test", 32)):
        rows = []
        for _ in range(count):
            label = int(torch.randint(2, (), generator=draw))
            words = torch.randint(15, (5,), generator=draw) + 15 * label
            rows.append((" ".join(f"w{i}" for i in words.tolist()), label))
        with (here / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return here


@pytest.mark.parametrize("rule", ["backprop", "freeze_lower", "lopt", "local_ce", "sll", "sid"])
def test_every_way_starts_from_the_weights_of_the_folder(rule, folder, tmp_path):
    words = split(f"--data {folder}/train.csv --data.window 8 --model hf:{folder} --rule {rule} --epochs 8 --lr 1e-2")
    assert main(["train", *words, *COMMON, "--out", str(tmp_path / "run")]) == 0
    # The lower half of `lopt` reconstructs, and random weights have nothing in them that would be worth it.
    assert result(tmp_path / "run")["test_accuracy"] > (0.5 if rule == "lopt" else 0.8)


def test_sentences_are_predicted_as_they_were_trained(folder, tmp_path, capsys):
    """The classes that `predict` prints are right as often as the run's own test accuracy says."""
    words = split(f"--data {folder}/train.csv --data.window 8 --model hf:{folder} --rule local_ce --epochs 2 --lr 1e-2")
    assert main(["train", *words, *COMMON, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(folder / "test.csv")]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    with (folder / "test.csv").open() as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert [row["input"] for row in rows] == [str(i) for i in range(len(labels))]
    right = sum(row["class"] == label for row, label in zip(rows, labels, strict=True))
    assert right / len(labels) == pytest.approx(result(tmp_path / "run")["test_accuracy"])
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "numbers.csv")]) == 2
    assert "has no column of text among a, b; call it 'text'" in capsys.readouterr().err


def test_adapters_leave_the_network_as_it_is(folder, tmp_path):
    pytest.importorskip("peft")
    model = models.options(f"hf:{folder}")(lora=2).build((1, 1, 8), 2)
    learn = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learn and all("lora_" in name or name.startswith("classifier.") for name in learn)
    plain = dict(models.options(f"hf:{folder}")().build((1, 1, 8), 2).named_parameters())
    words = split(f"--data {folder}/train.csv --data.window 8 --model hf:{folder} --model.lora 2 --steps 3")
    for rule in ("backprop", "local_ce"):
        assert main(["train", *words, *COMMON, "--rule", rule, "--out", str(tmp_path / rule)]) == 0
        trained = load_file(tmp_path / rule / "model.safetensors")
        key = "bert.encoder.layer.0.attention.self.query"
        assert torch.equal(trained[f"{key}.base_layer.weight"], plain[f"{key}.weight"])
        assert trained[f"{key}.lora_B.default.weight"].abs().sum() > 0


def test_padding_is_not_looked_at(folder):
    model = models.options(f"hf:{folder}")().build((1, 1, 8), 2).eval()
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model(long).logits, model(short).logits)
        given = {"attention_mask": torch.ones_like(long)}
        assert not torch.equal(model(long, **given).logits, model(short).logits)  # who gives a mask, is obeyed
    assert WithoutPadding(0)(model, (long, None), {}) is None


def test_a_window_has_to_fit_the_positions_of_the_model(folder):
    with pytest.raises(LayerwiseError, match="a window of 13 tokens is longer than the 12 positions"):
        models.options(f"hf:{folder}")().build((1, 1, 13), 2)
