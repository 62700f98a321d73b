"""Edited checkpoints with a corrected digest: each is refused in one sentence, or is read to the same bits."""

import copy
import json
import math
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import contents, split, train

from layerwise import LayerwiseError, Learner
from layerwise.runs import checkpoint
from layerwise.runs.training import Run

WORDS = split("--steps 7 --save-every 7 --accumulate 4 --precision fp16 --rule sll --optimizer adam")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in the middle of an accumulation: its checkpoint has every kind of entry."""
    return train(tmp_path_factory.mktemp("edited") / "run", *WORDS)


def parts_of(folder):
    """Path, tree and tensors of the run's only checkpoint."""
    (path,) = checkpoint.complete(folder / "checkpoints")
    return path, json.loads((path / "state.json").read_text())["tree"], load_file(path / "state.safetensors")


def write(path, tree, tensors):
    """The checkpoint with this content and the digest that belongs to it."""
    if isinstance(tensors, bytes):
        (path / "state.safetensors").write_bytes(tensors)
    else:
        save_file(tensors, path / "state.safetensors")
    about = {"tree": tree, "digest": checkpoint.digest(tree, path / "state.safetensors")}
    (path / "state.json").write_text(json.dumps(about))


def leaves(tree, where=()):
    """Places of everything in the tree that is no tensor, tables included."""
    if where:
        yield where
    if isinstance(tree, dict) and "$tensor" not in tree:
        for key, value in tree.items():
            yield from leaves(value, (*where, key))


def at(tree, where):
    for key in where:
        tree = tree[key]
    return tree


VALUES = [None, -1, True, 10**400, 1e308, math.nan, math.inf, "x", [], {}, [[[[]]]], {"$tensor": "no such"}, 0.5, -7.25]


def edit_tree(pick, tree, tensors):
    """Put a wrong value somewhere, or take something out."""
    where = pick.choice([w for w in leaves(tree) if w[:1] not in (("options",), ("val",))])
    above, key = at(tree, where[:-1]), where[-1]
    before = above[key]
    if pick.random() < 0.3:
        del above[key]
        return f"without {where}"
    above[key] = pick.choice([v for v in VALUES if type(v) is not type(before) or v != before])
    return f"{where} = {str(above[key])[:20]} instead of {str(before)[:20]}"


def reshape(pick, tree, tensors):
    name = pick.choice(sorted(tensors))
    tensors[name] = pick.choice([tensors[name][None], tensors[name].flatten()[:1].clone(), torch.zeros(0)])
    return f"{name} of shape {tuple(tensors[name].shape)}"


def retype(pick, tree, tensors):
    name = pick.choice(sorted(tensors))
    kinds = [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
    tensors[name] = tensors[name].to(pick.choice([kind for kind in kinds if kind != tensors[name].dtype]))
    return f"{name} of type {tensors[name].dtype}"


def swap(pick, tree, tensors):
    while True:
        a, b = pick.sample(sorted(tensors), 2)
        if tensors[a].shape != tensors[b].shape:
            tensors[a], tensors[b] = tensors[b], tensors[a]
            return f"{a} and {b} swapped"


def rename(pick, tree, tensors):
    name = pick.choice(sorted(tensors))
    tensors[name + "x"] = tensors.pop(name)
    return f"{name} renamed"


def add(pick, tree, tensors):
    place = pick.choice(["optimizer", "gradients", "model", "auxiliary"])
    tensors["added"] = torch.ones(3)
    tree["learner"][place]["added"] = {"$tensor": "added"}
    return f"{place} has one more"


def refer_twice(pick, tree, tensors):
    model = tree["learner"]["model"]
    a, b = pick.sample(sorted(model), 2)
    model[a] = model[b]
    return f"{a} is {b}"


HARMLESS = ("flops", "threads", "samples", "seconds", "measured", "memory", "skipped", "machines", "stateless")
"""What is told and decides no bit: a value of the right kind cannot be told from the true one.

Without `stateless` a checkpoint is one of an older version.
"""
EDITS = [edit_tree] * 6 + [reshape, retype, swap, rename, add, refer_twice]


@pytest.mark.parametrize("seed", [*range(24), *(pytest.param(i, marks=pytest.mark.slow) for i in range(24, 48))])
def test_an_edited_state_is_refused_before_anything_is_loaded(run, tmp_path, seed, resumable):
    pick = random.Random(seed)
    folder = shutil.copytree(run, tmp_path / "run")
    path, tree, tensors = parts_of(folder)
    said = pick.choice(EDITS)(pick, tree, tensors)
    write(path, tree, tensors)
    before = contents(folder)
    sentence = None
    try:
        resumable(folder)
    except LayerwiseError as reason:
        sentence = str(reason)
    assert sentence is None or ("\n" not in sentence and len(sentence) < 700), sentence
    harmless = any(f"'{name}'" in said for name in HARMLESS)
    assert sentence or harmless, said
    assert contents(folder) == before


@pytest.fixture
def resumable(run):
    """A function that resumes a run without training; the learner of a refused one is as it was."""
    built = {}

    def resume(folder):
        if not built:
            built["run"] = Run.resumed(run)
            built["run"].release()
        found = built["run"]
        found.folder = folder
        before = copy.deepcopy(found.learner.state_dict())
        try:
            found._restore()
        except LayerwiseError:
            assert same(found.learner.state_dict(), before)
            raise
        finally:
            found.notes = []

    return resume


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Files that are no checkpoints any more


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def edited_header(change):
    def edit(content):
        header, rest = header_of(content)
        change(header, header[min(header)], header[max(header)])
        return with_header(header, rest)

    return edit


def move(by):
    def change(header, first, last):
        last["data_offsets"] = [place + by for place in last["data_offsets"]]

    return change


def overlap(header, first, last):
    last["data_offsets"] = first["data_offsets"]


def negative(header, first, last):
    first["shape"] = [-side for side in first["shape"]]


def unknown_type(header, first, last):
    first["dtype"] = "F7"


def twice(content):
    """Two entries of the same name, which readers take differently."""
    header, rest = header_of(content)
    name = min(header)
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[max(header)])}}}"
    text += " " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text.encode() + rest


HEADERS = {
    "moved": edited_header(move(8)),
    "before the file": edited_header(move(-(10**6))),
    "behind the file": edited_header(move(10**12)),
    "overlapping": edited_header(overlap),
    "negative shape": edited_header(negative),
    "unknown type": edited_header(unknown_type),
    "name twice": twice,
    "no header": lambda content: b"\xff" * 16 + content,
    "long header": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "short": lambda content: content[:5],
    "longer": lambda content: content + bytes(64),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", HEADERS)
def test_tensors_lie_where_the_library_lets_them(tmp_path, name, mapped):
    """The digest is right, so that the header alone has to be refused, read by the library or mapped."""
    path = checkpoint.save(tmp_path, 1, {"a": torch.arange(4.0), "b": torch.arange(4.0), "c": torch.ones(2, 3)})
    tree = json.loads((path / "state.json").read_text())["tree"]
    write(path, tree, HEADERS[name]((path / "state.safetensors").read_bytes()))
    with pytest.raises(checkpoint.CorruptCheckpoint, match="step-000000001 is damaged"):
        checkpoint.load(path, mapped)


TEXTS = {
    "nothing": "",
    "a list": "[1, 2]",
    "a word": '"tree"',
    "deep": "[" * 50_000,
    "deep tree": '{"digest": "", "tree": ' + '{"a": ' * 20_000 + "1" + "}" * 20_001,
    "name twice": '{"digest": "", "tree": {}, "tree": {}}',
    "no tree": '{"digest": ""}',
    "digits": '{"digest": ' + "9" * 5000 + ', "tree": {}}',
    "no text": b"\xff\xfe{}",
    "files outside": '{"digest": "", "tree": {}, "parts": {"../../x.safetensors": ""}}',
    "no such file": '{"digest": "", "tree": {}, "parts": {"rank-9.safetensors": ""}}',
    "parts of another type": '{"digest": "", "tree": {}, "parts": 3}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_other_texts_are_refused(tmp_path, name):
    path, text = checkpoint.save(tmp_path, 1, {"a": torch.ones(2)}), TEXTS[name]
    (path / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(checkpoint.CorruptCheckpoint, match="step-000000001 is damaged"):
        checkpoint.load(path)


SHARDS = {
    "negative": {"w@0": [0, 0], "w@1": [-1, 0]},
    "overlapping": {"w@0": [0, 0], "w@1": [1, 0]},
    "outside": {"w@0": [0, 0], "w@1": [3, 0]},
    "missing": {"w@0": [0, 0]},
    "unknown": {"w@0": [0, 0], "w@2": [2, 0]},
    "of other dimensions": {"w@0": [0], "w@1": [2, 0]},
}


@pytest.mark.parametrize("name", ["right", *SHARDS])
def test_shards_fill_their_tensor(tmp_path, name):
    whole = torch.arange(8.0).view(4, 2)
    path = tmp_path / "step-000000001"
    path.mkdir()
    save_file({"w@0": whole[:2].clone(), "w@1": whole[2:].clone()}, path / "rank-0.safetensors")
    about = {"tree": {"w": {"$tensor": "w"}}, "parts": {}, "shards": {"w": {"shape": [4, 2], "offsets": {}}}}
    about["parts"]["rank-0.safetensors"] = checkpoint.digest("rank-0.safetensors", path / "rank-0.safetensors")
    about["shards"]["w"]["offsets"] = SHARDS.get(name, {"w@0": [0, 0], "w@1": [2, 0]})
    (path / "state.json").write_text(json.dumps({**about, "digest": checkpoint.digest(about)}))
    if name == "right":
        assert torch.equal(checkpoint.load(path)["w"], whole)
    else:
        with pytest.raises(checkpoint.CorruptCheckpoint, match="is damaged"):
            checkpoint.load(path)


# Learners of one's own


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop", "Adafactor", "NAdam", "ASGD", "Adagrad", "Rprop"])
def test_the_state_of_every_optimizer_is_known(optimizer, offload):
    """A learner's own state is taken, and one whose optimizer state has another shape is not."""

    def make():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 6) for _ in range(4)]
        model = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.ReLU())))
        return Learner(model, "local_ce", optimizer=optimizer, lr=0.01, offload=offload)

    x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 6
    one, two = make(), make()
    one.step(x, y)
    state = copy.deepcopy(one.state_dict())
    two.build(x)
    two.load_state_dict(state)
    for learner in (one, two):
        learner.step(x, y)
    assert same(one.state_dict(), two.state_dict())
    before = copy.deepcopy(two.state_dict())
    name = next(name for name, found in state["optimizer"].items() if any(t.dim() for t in found.values()))
    part = next(part for part, tensor in state["optimizer"][name].items() if tensor.dim())
    state["optimizer"][name][part] = torch.zeros(1, 2, 3)
    with pytest.raises(LayerwiseError, match="does not fit this learner"):
        two.load_state_dict(state)
    assert same(two.state_dict(), before)


def test_a_checkpoint_without_the_optimizers_state_is_refused():
    learner = Learner(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)), "sll")
    learner.step(torch.randn(6, 4), torch.arange(6) % 3)
    without = {**learner.state_dict(), "optimizer": {}}
    with pytest.raises(LayerwiseError, match=r"the optimizer's state of '0.weight' is missing"):
        learner.load_state_dict(without)
    older = {name: part for name, part in without.items() if name != "stateless"}
    with pytest.raises(LayerwiseError, match="the optimizers' state is missing"):
        learner.load_state_dict(older)


NUMBERS = {
    ("model", None): (math.nan, math.inf),
    ("auxiliary", None): (math.nan, -math.inf),
    ("gradients", None): (math.nan, math.inf),
    ("optimizer", "exp_avg"): (math.nan, -math.inf),
    ("optimizer", "exp_avg_sq"): (math.nan, -1.0),
    ("optimizer", "step"): (1e30, 2.0**31, -1.0, 0.5, math.inf),
}


@pytest.mark.parametrize(("place", "part"), NUMBERS)
def test_numbers_that_no_training_writes_are_refused(place, part):
    """Of the right shape and type, and yet the next update would make NaN of the weights, or stand still."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    learner = Learner(model, "predsim", accumulate=2)
    for _ in range(3):
        learner.step(torch.randn(6, 4), torch.arange(6) % 3)
    state = learner.state_dict()
    learner.load_state_dict(copy.deepcopy(state))
    for value in NUMBERS[place, part]:
        edited = copy.deepcopy(state)
        first = edited[place][min(edited[place])]
        (first if part is None else first[part]).view(-1)[-1] = value
        with pytest.raises(LayerwiseError, match=r"holds NaN|no optimizer counts"):
            learner.load_state_dict(edited)


def test_numbers_that_a_training_may_write_are_taken():
    """Squares that are too large for their type, and what is no parameter that learns, such as a mask of -inf."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    model[0].mask = torch.nn.Parameter(torch.full((2,), -math.inf), requires_grad=False)
    model[0].register_buffer("bias_of_mask", torch.full((2,), -math.inf))
    learner = Learner(model, "local_ce")
    learner.step(torch.randn(6, 4), torch.arange(6) % 3)
    state = copy.deepcopy(learner.state_dict())
    state["optimizer"]["0.weight"]["exp_avg_sq"][0, 0] = math.inf
    learner.load_state_dict(state)
