"""Models on the meta device: blocks created one by one from draws, files or a function; weights written one by one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.nets import same_bits
from support.own import VOCABULARY, Decoder, decoder, text
from support.stages import stages
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner

OPTIONS = {"cuts": "layers.*", "task": LanguageModel(), "lr": 0.01}


class Drawn(Decoder):
    """A decoder that can draw its positions."""

    def reset_parameters(self):
        nn.init.normal_(self.positions, std=0.1)


def meta(kind=Drawn, **options):
    with torch.device("meta"):
        return kind(**{"depth": 5, **options})


def batch(seed=0):
    found = text(seed=seed)
    return {**found, "labels": found["tokens"]}


def files(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.slow
def test_the_bits_depend_on_the_seed_and_the_names_alone():
    """Not on where blocks are kept, how many there are, or how they are cut."""
    given = [
        {},
        {"offload": "disk"},
        {"cuts": ["layers.1", "layers.3"], "tied": "last"},
        {"rule": "interlocking", "offload": "host"},
        {"depth": 7},
        {"seed": 1},
    ]
    found = []
    for options in given:
        depth, rule = options.pop("depth", 5), options.pop("rule", "local_ce")
        learner = Learner(meta(depth=depth), rule, example=batch(), **{**OPTIONS, **options})
        learner.onload()
        found.append({name: p.detach().clone() for name, p in learner.network.named_parameters()})
    first = found[0]
    assert all(torch.isfinite(tensor).all() for tensor in first.values())
    assert all(torch.equal(other[name], tensor) for other in found[1:5] for name, tensor in first.items())
    assert not torch.equal(found[5]["embedding.weight"], first["embedding.weight"])


@pytest.mark.slow
def test_no_more_than_one_block_is_in_memory_beside_what_lies_between_them():
    """Where blocks are offloaded, or are those of other ranks."""
    models, most = [], []

    def fill(name, module):
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in models[-1].parameters()}
        most.append(sum(held.values()))
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.1)

    def make():
        models.append(meta(depth=6, tie=False))
        return models[-1]

    options = {"weights": fill, **OPTIONS}
    for begin, own in (
        (lambda: Learner(make(), "local_ce", offload="disk", example=batch(), **options), 0),
        (lambda: stages(make, "local_ce", 3, batch(), **options), 2),
    ):
        most.clear()
        begin()
        block = sum(p.nbytes for p in models[-1].layers[0].parameters())
        between = sum(p.nbytes for p in models[-1].parameters()) - 6 * block
        numbers = 4 * len([*models[-1].parameters()])  # one for each parameter that shows nothing
        assert block + between <= max(most) <= (1 + own) * block + between + numbers


def test_weights_are_written_block_by_block_and_read_again(tmp_path):
    learner = Learner(meta(), "local_ce", offload="disk", **OPTIONS)
    learner.step(batch())
    learner.save_weights(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    stored = files(tmp_path / "saved")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == 6
    assert "head.weight" not in stored  # it is the embedding
    plain = decoder(depth=5)
    plain.load_state_dict({**stored, "head.weight": stored["embedding.weight"]})
    learner.onload()
    assert same_bits(plain, learner.network.model)
    save_file({name: tensor.clone() for name, tensor in stored.items()}, tmp_path / "one.safetensors")
    again = []
    for weights in (tmp_path / "saved", tmp_path / "one.safetensors"):
        again.append(Learner(meta(), "local_ce", weights=weights, **OPTIONS))
    again.append(Learner(plain, "local_ce", **OPTIONS))
    for each in again:
        each.step(batch(1))
    assert same_bits(again[0], again[1])
    assert same_bits(again[0], again[2])


class Table(nn.Module):
    """A table that no file holds, which is written by the module that has it."""

    def __init__(self, fills=True):
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("numbers", torch.arange(4))
        self.fills, self.weight = fills, nn.Parameter(torch.randn(4))

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if self.fills:
            self.table.copy_(torch.arange(4.0))
        self.numbers.copy_(torch.arange(4))

    def forward(self, x):
        return x * self.weight + self.table[self.numbers]


def test_sequentials_are_made_late_too_and_buffers_are_drawn_beside_files(tmp_path):
    def made():
        return nn.Sequential(nn.Linear(4, 4), Table(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    plain, x, y = made(), torch.randn(6, 4), torch.arange(6) % 3
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    one = Learner(plain, "sll", seed=3)
    with torch.device("meta"):
        late = [made() for _ in range(2)]
    two = Learner(late[0], "sll", weights=tmp_path / "plain.safetensors", seed=3, offload="disk")
    for learner in (one, two):
        learner.step(x, y)
    two.onload()
    assert same_bits(one, two)
    drawn = Learner(late[1], "sll", example=x)
    assert torch.equal(drawn.network.model[1].table, torch.arange(4.0))


def test_what_cannot_be_made_is_refused(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    save_file({"embedding.weight": torch.zeros(2, 2)}, tmp_path / "small.safetensors")
    full = dict(decoder(depth=5, tie=False).state_dict())
    save_file({**full, "layers.1.up.weight": torch.zeros(3, 3)}, tmp_path / "wrong.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("[]")
    for model, weights, match in (
        (meta(Decoder), None, "'positions' of a model on the meta device was not written by its Decoder"),
        (decoder(), tmp_path / "small.safetensors", "is for a model that was made under"),
        (meta(), tmp_path / "small.safetensors", "holds no tensor 'positions'"),
        (meta(tie=False), tmp_path / "wrong.safetensors", r"'layers.1.up.weight' has shape \(3, 3\)"),
        (meta(), broken, "cannot be read"),
        (meta(), tmp_path / "missing", "there is no file"),
        (meta(), tmp_path / "empty", "holds no safetensors file"),
        (meta(), tmp_path / "index", "is not an index"),
        (meta(), 3, "weights is of type int"),
        (meta(), lambda name, module: None, "was not written"),
    ):
        with pytest.raises(LayerwiseError, match=match):
            Learner(model, "local_ce", weights=weights, example=batch(), **OPTIONS)
    with torch.device("meta"):
        idle = nn.Sequential(nn.Linear(4, 4), Table(fills=False), nn.Linear(4, 3))
    with pytest.raises(LayerwiseError, match=r"'1\.table' of a model on the meta device"):
        Learner(idle, "sll", example=torch.randn(2, 4))
    learner = Learner(decoder(), "local_ce", example=batch(), **OPTIONS)
    with pytest.raises(LayerwiseError, match="cannot be written"):
        learner.save_weights(broken)


def test_a_mistake_leaves_the_model_to_the_next_learner():
    model = meta()
    for wrong in ({"cuts": "blocks.*"}, {"lr": 0.0}, {"example": {"tokens": torch.zeros(2, 3)}}):
        with pytest.raises(LayerwiseError):
            Learner(model, "local_ce", **{**OPTIONS, **wrong})
    learner = Learner(model, "local_ce", example=batch(), **OPTIONS)
    assert same_bits(learner.network, Learner(meta(), "local_ce", example=batch(), **OPTIONS).network)


def test_a_llama_of_transformers_is_made_trained_and_written_block_by_block(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )

    def llama():
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(config)

    tokens = text()["tokens"]
    given = {"input_ids": tokens, "attention_mask": text()["attention_mask"], "labels": tokens}
    options = {"cuts": "model.layers.*", "task": LanguageModel()}
    one = Learner(llama(), "local_ce", offload="disk", **options)
    learners = stages(llama, "local_ce", 2, given, offload="disk", **options)
    for _ in range(2):
        for learner in (one, *learners):
            learner.step(given)
    for learner in learners:
        learner.save_weights(tmp_path)
    config.save_pretrained(tmp_path)
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    one.onload()
    assert same_bits(dict(read.state_dict()), dict(one.network.model.state_dict()))
