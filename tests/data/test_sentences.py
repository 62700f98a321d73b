"""A table's column of text as windows of a pretrained model's tokens."""

import csv
import json

import pytest
import torch

from layerwise import LayerwiseError
from layerwise.data import Batches, Words, load
from layerwise.data.sentences import read_sentences

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "very"]


@pytest.fixture
def words(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return Words(tmp_path / "tokenizer.json", padding=0, window=4)


def table(path, rows, names=("text", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return str(path)


ROWS = [("good film", "yes"), ("bad, very bad film", "no"), ("film of fire", "yes"), ("very bad", "no")] * 5


def test_sentences_are_cut_and_filled_up_and_keep_their_labels(words, tmp_path):
    data = load(table(tmp_path / "reviews.csv", ROWS), words=words, val_fraction=0)
    assert (data.shape, data.classes, len(data.train) + len(data.test)) == ((1, 1, 4), ("no", "yes"), len(ROWS))
    x, y = data.train.batch(torch.arange(len(data.train)))
    assert x.dtype == y.dtype == torch.int64
    # The comma is no word of the tokenizer, and the fifth word is cut off.
    wanted = {(2, 4, 0, 0): 1, (3, 1, 5, 3): 0, (4, 1, 1, 0): 1, (5, 3, 0, 0): 0}
    assert {(*tokens,): label for tokens, label in zip(x.tolist(), y.tolist(), strict=True)} == wanted
    (told,) = [note for note in data.notes if "window" in note]
    assert told.startswith("5 of 20 texts of ") and "longer than a window of 4 tokens" in told
    predicted, notes = read_sentences(tmp_path / "reviews.csv", words, data.contents)
    assert len(predicted) == 20 and notes == [told]
    batch, labels = next(Batches(data.train, 8, seed=0, mean=data.mean, std=data.std).epoch(0))
    assert all(wanted[tuple(tokens)] == label for tokens, label in zip(batch.tolist(), labels.tolist(), strict=True))
    again = load(str(tmp_path / "reviews.csv"), words=words, val_fraction=0)
    changed = load(table(tmp_path / "reviews.csv", [("good good", "no"), *ROWS[1:]]), words=words, val_fraction=0)
    assert again.contents == data.contents != changed.contents


def test_files_beside_a_training_file_are_its_splits(words, tmp_path):
    for name, rows in (("train", ROWS), ("validation", ROWS[:6]), ("test", ROWS[1:3]), ("other", ROWS[:1])):
        table(tmp_path / f"{name}.csv", rows)
    data = load(str(tmp_path / "train.csv"), words=words)
    assert data.val is not None and [len(data.train), len(data.val), len(data.test)] == [20, 6, 2]
    assert data.test.labels.tolist() == [0, 1]  # numbers of the training file's classes
    table(tmp_path / "test.csv", ROWS[:1] + ROWS[2:3] + [("bad", "no")])
    assert load(str(tmp_path / "train.csv"), words=words).test.labels.tolist() == [1, 1, 0]
    assert load(str(tmp_path / "train.csv"), words=words, val_fraction=0).val is None
    assert any("test.csv" in note for note in data.notes)


def test_mistakes_are_one_sentence(words, tmp_path):
    numbers = table(tmp_path / "numbers.csv", [(1, 0), (2, 1)] * 4, ("width", "label"))
    with pytest.raises(LayerwiseError, match=r"no column of text among .*width.*; call it 'text'"):
        load(numbers, words=words)
    table(tmp_path / "train.csv", ROWS)
    table(tmp_path / "test.csv", [("good", "maybe"), ("bad", "no")])
    with pytest.raises(LayerwiseError, match="has the class 'maybe', which the training data do not have"):
        load(str(tmp_path / "train.csv"), words=words)
    words.file.write_text(json.dumps({"model": 1}))
    with pytest.raises(LayerwiseError, match="is not a tokenizer of the library tokenizers"):
        load(str(tmp_path / "train.csv"), words=words)
