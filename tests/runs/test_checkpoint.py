"""Checkpoints: whole or not at all, checked when read, no pickle."""

import errno
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from layerwise import LayerwiseError
from layerwise.runs import checkpoint
from layerwise.runs.checkpoint import CorruptCheckpoint
from layerwise.runs.writing import write_atomically

STATE = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "steps": 7}
FILES = ("state.safetensors", "state.json")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_kind_of_state_comes_back_as_it_was(tmp_path):
    shared = torch.randn(4, 6)
    state = {
        "bf16": torch.randn(3).bfloat16(),
        "fp16": torch.randn(3).half(),
        "scalar": torch.tensor(3.5),
        "whole": torch.tensor([2**40]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "twice": {"a": shared, "b": shared},
        "view": shared[1],
        "strided": shared.t()[::2],
        "expanded": torch.ones(1, 3).expand(2, 3),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]).nan_to_num(1.0),
        "plain": {"none": None, "text": "ü/\n", "int": 2**60, "float": 0.1 + 0.2, "yes": True, "list": [1, [None]]},
        "nothing": {},
        "a": {"b": torch.ones(1)},
        "a/b": torch.zeros(1),
    }
    assert same(checkpoint.load(checkpoint.save(tmp_path, 1, state)), state)


def test_saving_does_not_touch_what_is_saved(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 3))
    before = weight.detach().clone()
    checkpoint.save(tmp_path, 1, {"weight": weight})
    assert weight.requires_grad
    assert torch.equal(weight, before)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False) | st.just(torch.ones(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(tree=st.dictionaries(st.text(), TREES, max_size=3))
def test_any_tree_comes_back(tree, tmp_path_factory):
    assert same(checkpoint.load(checkpoint.save(tmp_path_factory.mktemp("any"), 1, tree)), tree)


def test_files_are_plain_safetensors_and_json(tmp_path):
    path = checkpoint.save(tmp_path, 3, STATE)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert torch.equal(load_file(path / "state.safetensors")["model/weight"], STATE["model"]["weight"])
    assert json.loads((path / "state.json").read_text())["tree"]["steps"] == 7


def test_only_the_newest_stay(tmp_path):
    for step in (9, 10, 100, 1000):
        checkpoint.save(tmp_path, step, {"steps": step})
    assert [checkpoint.load(path)["steps"] for path in checkpoint.complete(tmp_path)] == [100, 1000]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001000"


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["layerwise.runs.checkpoint.save_file", "os.fsync", "pathlib.Path.rename"])
def test_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch, broken):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {**STATE, "steps": step})
    before = contents(tmp_path)
    monkeypatch.setattr(broken, full)
    with pytest.raises(LayerwiseError, match=r"could not write .*No space left.*last complete one is .*step-000000002"):
        checkpoint.save(tmp_path, 3, STATE)
    assert contents(tmp_path) == before


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {
        "a": whole,
        "tied": whole,
        "turned": whole.t(),
        "row": whole[1],
        "scalar": whole[2, 3],
        "none": whole[:0],
    }
    checkpoint.write_tensors(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("write", "value"), [(write_atomically, "new"), (checkpoint.write_tensors, {"w": torch.ones(2)})]
)
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, write, value):
    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LayerwiseError, match=r"could not write .*No space left"):
        write(file, value)
    assert contents(tmp_path) == {"file": b"old"}


def test_a_crash_while_writing_leaves_no_checkpoint(tmp_path, monkeypatch):
    """What a killed process leaves behind is not taken for a checkpoint, and is replaced by the next one."""
    checkpoint.save(tmp_path, 1, STATE)
    with monkeypatch.context() as patch:
        patch.setattr("layerwise.runs.checkpoint.flush", lambda path: None)
        patch.setattr("pathlib.Path.rename", crash)
        with pytest.raises(Crash):
            checkpoint.save(tmp_path, 2, STATE)
    assert (tmp_path / "step-000000002.partial").exists()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000000001"
    checkpoint.save(tmp_path, 2, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]


class Crash(BaseException):
    """Stands for SIGKILL: no handler runs."""


def crash(*_):
    raise Crash


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def swap_number(file):
    """A damage that leaves valid JSON: 7 steps become 8."""
    text = file.read_text()
    assert text.count('"steps": 7') == 1
    file.write_text(text.replace('"steps": 7', '"steps": 8'))


def empty(file):
    file.write_bytes(b"")


DAMAGES = [(name, damage) for name in FILES for damage in (cut, flip, empty, os.remove)] + [("state.json", swap_number)]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_every_damage_is_noticed(tmp_path, name, damage):
    path = checkpoint.save(tmp_path, 7, STATE)
    damage(path / name)
    with pytest.raises(CorruptCheckpoint, match=r"step-000000007 is damaged"):
        checkpoint.load(path)


def test_every_byte_counts(tmp_path):
    path = checkpoint.save(tmp_path, 7, {"w": torch.arange(3.0), "n": 1})
    for name in FILES:
        whole = (path / name).read_bytes()
        for place in range(len(whole)):
            (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
            with pytest.raises(CorruptCheckpoint):
                checkpoint.load(path)
        (path / name).write_bytes(whole)
    assert checkpoint.load(path)["n"] == 1


def test_a_damaged_one_is_passed_over_and_named(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"steps": step})
    cut(tmp_path / "step-000000002" / "state.safetensors")
    state, notes = checkpoint.load_latest(tmp_path)
    assert state == {"steps": 1}
    assert ["step-000000002 is damaged" in note and "step-000000001 is read" in note for note in notes] == [True]


def test_all_damaged_is_an_error(tmp_path):
    for step in (1, 2):
        cut(checkpoint.save(tmp_path, step, STATE) / "state.json")
    with pytest.raises(CorruptCheckpoint, match=r"every checkpoint in .* is damaged .*; start the run again"):
        checkpoint.load_latest(tmp_path)


def test_no_checkpoint_yet(tmp_path):
    assert checkpoint.load_latest(tmp_path / "absent") == (None, [])
