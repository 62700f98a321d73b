"""Text as windows of tokens: nothing is lost or counted twice, splits share no text, and a cache changes nothing."""

import json
import math
import os
import random

import pytest
import torch

from layerwise import LanguageModel, LayerwiseError, data
from layerwise.data import TextOptions, text, tokenizer, tokens


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prose(seed=0, lines=400, words=("día", "noche", "la", "el", "río", "🌊", "casa", "sol")):
    """Lines of random words, in which characters have 1 to 4 bytes; an empty line after every tenth."""
    drawn = random.Random(seed)
    return "".join(
        " ".join(drawn.choice(words) for _ in range(drawn.randint(2, 9))) + f" {i}\n" + "\n" * (i % 10 == 9)
        for i in range(lines)
    )


def load(path, **options):
    name = options.pop("name", f"text:{path}")
    how = {key: options.pop(key) for key in TextOptions._fields if key in options}
    return data.load(name, task="language_model", text=TextOptions(**{"window": 8, **how}), **options)


def stream(source):
    """The tokens of a split in order, out of its windows."""
    return torch.cat([source.inputs.flatten(), source.labels[-1, -1:]]).tolist()


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe"])
def test_tokens_stand_for_the_text_byte_by_byte(kind, tmp_path):
    whole = prose()
    (tmp_path / "a.txt").write_text(whole)
    found = load(tmp_path / "a.txt", tokenizer=kind, vocabulary=300)
    known = found.tokenizer
    for sample in (whole[:500], "sol\n\n  el río", "🌊"):
        encoded = known.encode(sample).tolist()
        assert known.decode(encoded) == sample
        assert sum(known.sizes[token] for token in encoded) == len(sample.encode())
    assert len(found.classes) == {"characters": len(set(whole)), "bytes": 256, "bpe": 300}[kind]
    again = tokenizer.from_json(known.to_json(), "it")
    assert again.encode(whole).tolist() == known.encode(whole).tolist() and again.digest == known.digest


def test_windows_follow_each_other_and_every_token_but_the_first_is_a_label_once():
    source = tokens.TokenSource.of(torch.arange(22), 5)
    x, y = source.batch(torch.arange(len(source)))
    assert x.tolist() == [[i, i + 1, i + 2, i + 3, i + 4] for i in (0, 5, 10, 15)]
    assert y.flatten().tolist() == list(range(1, 21)) and x.dtype == y.dtype == torch.int64
    assert len(tokens.TokenSource.of(torch.arange(21), 5)) == 4  # 20 labels
    assert len(tokens.TokenSource.of(torch.arange(20), 5)) == 3


def test_the_splits_of_one_file_are_its_beginning_its_middle_and_its_end(tmp_path):
    whole = prose()
    (tmp_path / "a.txt").write_text(whole)
    found = load(tmp_path / "a.txt", tokenizer="bytes", window=1)
    parts = [bytes(stream(part)).decode() for part in (found.train, found.val, found.test)]
    assert "".join(parts) == whole  # windows of one token leave nothing out
    sizes = [len(part.encode()) / len(whole.encode()) for part in parts]
    assert sizes == pytest.approx([0.81, 0.09, 0.1], abs=0.01)
    assert all(part.endswith("\n") for part in parts)
    assert len(found.notes) == 1 and "no test split" in found.notes[0]


def test_documents_are_in_one_split_each_and_come_in_another_order(tmp_path):
    whole = prose()
    (tmp_path / "a.txt").write_text(whole)
    wanted = [part + "\n\n" for part in whole.removesuffix("\n\n").split("\n\n")]
    found = load(tmp_path / "a.txt", tokenizer="bytes", window=1, documents=True)
    parts = [bytes(stream(part)).decode() for part in (found.train, found.val, found.test)]
    documents = [[part + "\n\n" for part in text.removesuffix("\n\n").split("\n\n")] for text in parts]
    assert sorted(documents[0] + documents[1] + documents[2]) == sorted(wanted)
    assert documents[0] != [part for part in wanted if part in documents[0]]  # shuffled
    assert documents[2] == [part for part in wanted if part in documents[2]]
    assert [len(part) / len(whole) for part in parts] == pytest.approx([0.81, 0.09, 0.1], abs=0.05)
    again = load(tmp_path / "a.txt", tokenizer="bytes", window=1, documents=True)
    assert stream(again.train) == stream(found.train)


def test_a_folder_brings_its_own_splits(tmp_path):
    for name, seed in (("train-00", 1), ("train-01", 2), ("validation", 3), ("test", 4)):
        (tmp_path / f"{name}.txt").write_text(prose(seed, lines=50))
    found = load(tmp_path, tokenizer="bytes", window=1)
    assert bytes(stream(found.train)).decode() == prose(1, lines=50) + prose(2, lines=50)
    assert bytes(stream(found.val)).decode() == prose(3, lines=50)
    assert bytes(stream(found.test)).decode() == prose(4, lines=50)
    assert load(tmp_path, tokenizer="bytes", val_fraction=0).val is None
    (tmp_path / "test.txt").unlink()
    found = load(tmp_path, tokenizer="bytes", window=1)
    assert bytes(stream(found.test)).decode() == prose(3, lines=50)
    assert (bytes(stream(found.train)) + bytes(stream(found.val))).decode() == prose(1, lines=50) + prose(2, lines=50)


def test_a_folder_may_lie_in_the_folder_of_data(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.txt").write_text(prose())
    assert load(None, name="text:own", root=tmp_path).contents == load(tmp_path / "own").contents


def test_a_bpe_is_trained_on_the_training_split_alone(tmp_path):
    (tmp_path / "train.txt").write_text("ab ab ab\n" * 50)
    (tmp_path / "test.txt").write_text("xyzxyz\n" * 50)
    names = load(tmp_path, tokenizer="bpe", vocabulary=262, window=4).classes
    assert any("ab" in name for name in names) and not any("xy" in name or "yz" in name for name in names)


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_bom_and_line_ends_are_no_text(ends, tmp_path):
    whole = prose(lines=30)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + whole.replace("\n", ends).encode())
    (tmp_path / "test.txt").write_text("sol\n" * 9)
    (tmp_path / "a.txt").rename(tmp_path / "train.txt")
    found = load(tmp_path, tokenizer="bytes", window=1, val_fraction=0)
    assert bytes(stream(found.train)).decode() == whole


def test_small_blocks_give_the_same_text(tmp_path, monkeypatch):
    whole = prose() + "0123456789" * 40  # at the end a line that is longer than what is kept
    (tmp_path / "a.txt").write_text(whole)
    part = text.ByteRange(str(tmp_path / "a.txt"), 0, len(whole.encode()))
    plain, documents = list(text._blocks(part)), list(text._documents(text._blocks(part)))
    monkeypatch.setattr(text, "BLOCK", 37)
    assert "".join(text._blocks(part)) == "".join(plain) == whole
    assert list(text._documents(text._blocks(part))) == documents


def test_what_is_kept_is_what_is_made(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(prose())
    first = load(tmp_path / "a.txt", tokenizer="bpe", vocabulary=300, documents=True)
    train, test = stream(first.train), stream(first.test)
    monkeypatch.setattr(tokenizer.BPE, "trained", None)  # not needed a second time
    again = load(tmp_path / "a.txt", tokenizer="bpe", vocabulary=300, documents=True)
    assert again.contents == first.contents and stream(again.train) == train
    files = sorted((tmp_path / "cache" / "layerwise" / "tokens").glob("*.bin"))
    assert len(files) == 3
    for file in files:  # damaged: made anew
        content = bytearray(file.read_bytes())
        content[3] ^= 1
        file.write_bytes(content)
    again = load(tmp_path / "a.txt", tokenizer="bpe", vocabulary=300, documents=True)
    assert again.contents == first.contents and stream(again.test) == test


def test_without_a_cache_it_works_too(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(prose())
    first = load(tmp_path / "a.txt")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(tmp_path / "a.txt").contents == first.contents


def test_another_text_in_the_same_file_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text(prose())
    first = load(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(prose().replace("sol", "los", 1))
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert load(tmp_path / "a.txt").contents != first.contents


def test_the_windows_that_are_kept_are_the_same_in_every_run(tmp_path):
    (tmp_path / "a.txt").write_text(prose())
    found = [load(tmp_path / "a.txt", train_samples=20).train for _ in range(2)]
    assert len(found[0]) == 20 and torch.equal(found[0].inputs, found[1].inputs)


def test_batches_depend_on_their_number_only(tmp_path):
    (tmp_path / "a.txt").write_text(prose())
    found = load(tmp_path / "a.txt")
    batches = data.Batches(found.train, 4, seed=3, mean=found.mean, std=found.std)
    whole, later = list(batches.epoch(1)), list(batches.epoch(1, start=5))
    assert all(
        torch.equal(a, b) for one, two in zip(whole[5:], later, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert whole[0][0].shape == (4, 8) and whole[0][0].dtype == torch.int64
    empty, y = next(batches.without_images().epoch(1))
    assert empty.shape == (4, 0) and torch.equal(y, whole[0][1])
    assert not torch.equal(whole[0][0], next(batches.epoch(2))[0])


def test_bits_per_byte_count_the_bytes_of_the_labels():
    """A uniform guess of V tokens costs ln V nats per token, whatever they stand for."""
    sizes = (1, 2, 4)
    task = LanguageModel(shift=False, token_bytes=sizes).with_classes(3)
    y = torch.tensor([[0, 1, 2], [2, -100, -100]])
    found = task.metrics(torch.zeros(2, 3, 3), y)
    assert float(found["perplexity"]) == pytest.approx(3)
    assert float(found["bits_per_byte"]) == pytest.approx(4 * math.log2(3) / (1 + 2 + 4 + 4))
    loss = task.loss(torch.zeros(2, 3, 3), y)
    beside = task.statistics_beside(torch.zeros(2, 3, 3), y, loss)
    assert {k: float(v) for k, v in task.measures(beside).items()} == pytest.approx(
        {k: float(v) for k, v in found.items()}
    )
    halves = [task.statistics(torch.zeros(1, 3, 3), part) for part in y.split(1)]  # of any batches: the sums add up
    joined = task.measures({name: halves[0][name] + halves[1][name] for name in halves[0]})
    assert {name: float(value) for name, value in joined.items()} == pytest.approx(
        {name: float(value) for name, value in found.items()}
    )


def test_the_hub_gives_rows_as_documents(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {
        split: datasets.Dataset.from_dict({"text": [f"row {split} {i}" for i in range(40)]})
        for split in ("train", "test")
    }
    monkeypatch.setattr(text, "load_splits", lambda name: rows)
    found = load(None, name="hf:owner/name", tokenizer="bytes", window=1)
    train, val = (bytes(stream(part)).decode().split("\n\n")[:-1] for part in (found.train, found.val))
    assert sorted(train + val) == sorted(f"row train {i}" for i in range(40)) and len(val) == 4
    assert bytes(stream(found.test)).decode() == "".join(f"row test {i}\n\n" for i in range(40))


WRONG = [
    ("text:nowhere.txt", {}, "there is no file or folder nowhere.txt"),
    ("text:", {}, "there is no file or folder"),
    ("text:empty.txt", {}, "the train split of text:empty.txt is empty"),
    ("text:latin.txt", {}, "latin.txt is not UTF-8 text"),
    ("text:short.txt", {}, "tokens, and a window takes 9; give more text, or a smaller --data.window"),
    ("text:folder", {}, "has no train.txt, only test.txt"),
    ("text:one.txt", {"documents": True}, "holds 1 documents, parted by empty lines"),
    ("text:one.txt", {"tokenizer": "bpe", "vocabulary": 256}, "has no room beside the 256 bytes"),
    ("text:one.txt", {"train_samples": 10**6}, "give a number of windows from 1 to"),
    ("text:one.txt", {"size": 8}, "leave --image-size out"),
    ("text:one.txt", {"targets": ("a",)}, "leave --data.label-column out"),
    ("text:one.txt", {"label_noise": 0.1}, "leave it out under this task"),
    ("tinyshakespeare", {}, "put https://"),
    ("digits", {}, "use --task classification"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), WRONG, ids=[sentence for *_, sentence in WRONG])
def test_a_text_that_cannot_be_used_is_refused_in_one_sentence(name, options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("río\n".encode("latin-1") * 100)
    (tmp_path / "short.txt").write_text("abc\n" * 12)
    (tmp_path / "one.txt").write_text("a line of a text\n" * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "test.txt").write_text("a\n" * 100)
    with pytest.raises(LayerwiseError) as caught:
        load(None, name=name, **options)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", json.dumps({"kind": "words"}), json.dumps({"model": 3})])
def test_a_damaged_tokenizer_is_refused(content):
    with pytest.raises(LayerwiseError, match=r"tokenizer.json"):
        tokenizer.from_json(content, "tokenizer.json")


def test_what_no_token_stands_for_is_refused():
    with pytest.raises(LayerwiseError, match="'z' is none of the 3"):
        tokenizer.Characters("abc").encode("abz")
    for known in (tokenizer.Characters("abc"), tokenizer.Bytes()):
        with pytest.raises(LayerwiseError, match="not UTF-8"):
            known.encode("a\udcff")


def _edited_bpe(edit):
    pytest.importorskip("tokenizers", reason="the text extra (tokenizers) is not installed")
    values = json.loads(tokenizer.BPE.trained(270, [prose(lines=20)]).to_json())
    edit(values)
    return tokenizer.from_json(json.dumps(values), "tokenizer.json")


def test_a_tokenizer_with_a_gap_in_its_numbers_is_refused():
    with pytest.raises(LayerwiseError, match="not numbered from 0 without a gap"):
        _edited_bpe(lambda values: values["model"]["vocab"].update({next(iter(values["model"]["vocab"])): 5000}))


def test_a_tokenizer_that_would_cut_the_text_encodes_all_of_it():
    """Its library panics where the stride is larger than what is left; a cut text would go unnoticed."""
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 9}
    found = _edited_bpe(lambda values: values.update(truncation=cut))
    assert found.decode(found.encode("la casa y el sol").tolist()) == "la casa y el sol"


def test_what_the_library_raises_while_it_encodes_is_one_sentence():
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    found = _edited_bpe(lambda values: values.update(model=words))
    for encode in (found.encode, lambda text: list(found.encode_all([text]))):
        with pytest.raises(LayerwiseError, match=r"the tokenizer cannot read the text \(WordLevel"):
            encode("la casa")


def test_a_panic_of_the_library_is_one_sentence_and_ctrl_c_is_not():
    class PanicException(BaseException):
        """As pyo3 makes it."""

    with pytest.raises(LayerwiseError, match="cannot read the text"), tokenizer.in_the_library():
        raise PanicException("no entry found")
    with pytest.raises(KeyboardInterrupt), tokenizer.in_the_library():
        raise KeyboardInterrupt
