"""Models cut at the calls of their own modules, in use: batches, state, refusals, names, other people's models."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.coroutines import hooks
from support.nets import CLASSES, batches, net, same_bits, tensors
from support.own import VOCABULARY, WIDTH, Decoder, Skips, Twists, decoder, text, vectors
from torch import nn

from layerwise import LanguageModel, LayerwiseError, Learner, cut_at_calls, partition
from layerwise.core.cut_names import automatic_cuts, matching

DATA = batches(3)
PLAIN = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.0}


# --- Batches


def test_tuples_are_arguments_and_mappings_are_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, left, right=None):
            return self.head(self.b(self.a(left).relu() + right))

    x, y = vectors()
    learners = []
    for batch in ((x, x + 1), {"left": x, "right": x + 1}, {"left": x, "right": x + 1, "labels": y}):
        torch.manual_seed(0)
        learner = Learner(Two(), "sll", cuts=["a", "b"], example=batch)
        step = learner.step(batch) if "labels" in batch else learner.step(batch, y)
        assert step.samples == len(y)
        learners.append(learner)
    assert same_bits(learners[0], learners[1])
    assert same_bits(learners[0], learners[2])
    with pytest.raises(LayerwiseError, match="labels"):
        learners[0].step((x, x))
    with pytest.raises(LayerwiseError, match="cut_at_calls"):
        Learner(net(), "sll").step((x, x), y)


def test_the_loss_of_a_language_model_is_that_of_the_next_token():
    torch.manual_seed(0)
    logits, y = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    y[0, 3:] = 7  # ignored below
    task = LanguageModel(ignore=7).with_classes(11)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=7)
    torch.testing.assert_close(task.loss(logits, y), wanted)
    counts = y[:, 1:] != 7
    right = ((logits[:, :-1].argmax(-1) == y[:, 1:]) & counts).sum() / counts.sum()
    torch.testing.assert_close(task.accuracy(logits, y), right)
    assert task.counted(y, False) == float(counts.sum())
    for wrong in (y[:, :1], y[0], torch.full_like(y, 7), y.float(), y + 11):
        with pytest.raises(LayerwiseError):
            task.check(wrong)


def test_accumulated_batches_weigh_by_the_tokens_that_count():
    """Two halves of unequal padding give the update of the whole batch."""
    whole = text(samples=4, seed=3)
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    whole["labels"][0, 2:] = -100
    halves = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    models = []
    for given in ([whole], halves):
        model = decoder().double()
        learner = Learner(model, "local_ce", cuts="auto", task=LanguageModel(), accumulate=len(given), **PLAIN)
        for batch in given:
            learner.step(batch)
        models.append(tensors(model))
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], msg=name)


# --- State


def test_learners_are_copied_pickled_and_continued():
    batch, options = text(), {"cuts": "layers.*", "output": "logits", "task": LanguageModel()}
    learner = Learner(decoder(dropout=0.3), "local_ce", **options)
    for _ in range(2):
        learner.step(batch)
    others = [
        copy.deepcopy(learner),
        pickle.loads(pickle.dumps(learner)),
        Learner(decoder(dropout=0.3), "local_ce", **options),
    ]
    others[2].load_state_dict(copy.deepcopy(learner.state_dict()))
    for each in (learner, *others):
        each.step(batch)
    assert all(same_bits(learner, other) for other in others)
    assert learner.state_dict()["model"].keys() == decoder().state_dict().keys()


# --- What is refused


def test_rules_that_train_their_own_models_are_refused_by_name():
    x, y = DATA[0]
    for name in ("sid_cascade", "noprop_dt", "graph_forward"):
        with pytest.raises(LayerwiseError, match=name):
            Learner(cut_at_calls(net(), net().block_names), name).step(x, y)


@pytest.mark.parametrize("rule", ["infopro", "gradient_reconciliation", "forward_forward", "ssl_local"])
def test_rules_that_look_at_the_input_need_one_tensor(rule):
    with pytest.raises(LayerwiseError, match=rule):
        Learner(decoder(), rule, cuts="auto", example=text())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cuts": "blocks.*"}, "no module is called"),
        ({"cuts": ["layers"], "tied": "last"}, "never called"),
        ({"cuts": ["layers.1", "layers.0"], "tied": "last"}, "in their order"),
        ({"cuts": "layers.*", "tied": "both"}, "last, first or frozen"),
        ({"cuts": "layers.*", "blocks": 9}, "not possible"),
        ({"cuts": "layers.*", "read": {"layers.7": len}}, "no cut"),
        ({"cuts": ["layers.0"], "tied": "last", "offload": "host"}, "offload"),
        ({"cuts": "layers.*", "output": lambda out: out["attention"]}, "output="),
        ({"cuts": ["embedding", "layers.0", "head", "norm"], "tied": "last"}, "order"),
    ],
)
def test_wrong_cuts_and_options_are_refused_in_a_sentence(options, match):
    with pytest.raises(LayerwiseError, match=match):
        Learner(decoder(), "local_ce", task=LanguageModel(), example=text(), **options)


def test_modules_that_are_called_twice_or_compiled_are_refused():
    class Again(Twists):
        def _run(self, x):
            return self.head(self.layers[1](self.layers[0](self.layers[0](x))))

    x, _ = vectors()
    with pytest.raises(LayerwiseError, match="again"):
        Learner(Again(), "local_ce", cuts="layers.[01]", example=x)
    model = Twists()
    model.layers[1].compile(backend="eager")
    with pytest.raises(LayerwiseError, match="compiled"):
        Learner(model, "local_ce", cuts="layers.*")


def test_blocks_cannot_be_run_on_their_own():
    network = cut_at_calls(Twists(), "layers.*")
    x, _ = vectors()
    with pytest.raises(LayerwiseError, match="one forward pass"):
        network.blocks[0](x)
    with network.passing():
        h = network.blocks[0](x)
        with pytest.raises(LayerwiseError, match="out of turn"):
            network.blocks[2](h)
    assert hooks(network.model) == 0


def test_a_parameter_that_nothing_uses_is_named():
    class Spare(Twists):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(2, 2)

    x, _ = vectors()
    with pytest.warns(UserWarning, match=r"spare\.weight"):
        Learner(Spare(), "local_ce", cuts="layers.*", example=x)


# --- Names


def test_names_of_before_wrapping_are_told_with_those_of_the_wrapper():
    model = nn.ModuleDict({"base": nn.ModuleDict({"model": decoder()})})
    for cuts in ("layers.*", ["layers.0", "layers.*"]):
        with pytest.raises(LayerwiseError, match=r"mean 'base\.model\.layers\.[0*]'\? The model is inside a wrapper\."):
            Learner(model, "local_ce", cuts=cuts)


def test_names_that_no_trace_can_follow_point_to_the_models_own_pass():
    with pytest.raises(LayerwiseError, match=r"cut_at_calls\(model, \['down.0', 'up.0'\]\)"):
        Learner(Skips(), "local_ce", cuts=["down.0", "up.0"])
    with pytest.raises(LayerwiseError, match=r"cut_at_calls\(model, \['down\.\*', 'up\.0'\]\)"):
        Learner(Skips(), "local_ce", cuts=["down", "up.0"])


def test_patterns_and_automatic_cuts():
    model = decoder(depth=3)
    assert matching(model, "layers.*") == automatic_cuts(model) == ["layers.0", "layers.1", "layers.2"]
    assert matching(model, "layers.[02], norm") == ["layers.0", "layers.2", "norm"]
    assert [block.name for block in cut_at_calls(model, blocks=2).blocks] == ["layers.0", "layers.2"]
    nested = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(8)), "gate": nn.Linear(2, 2)})
        for _ in range(3)
    )
    assert automatic_cuts(nn.ModuleDict({"layers": nested})) == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(LayerwiseError, match="no list"):
        automatic_cuts(nn.Linear(2, 2))


# --- Other people's models


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_models_of_transformers(family):
    """The update of backprop is the plain loop's with the library's own loss; local losses fall."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": VOCABULARY, "use_cache": False}
    common = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    tokens = text()["tokens"]
    batch, task = {"input_ids": tokens, "attention_mask": text()["attention_mask"], "labels": tokens}, LanguageModel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of configurations
        if family == "gpt2":
            config = transformers.GPT2Config(
                n_embd=WIDTH, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **small
            )
            model = transformers.GPT2LMHeadModel(config)
        elif family == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **common, **small))
        elif family == "bert":
            config = transformers.BertConfig(
                hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=5, **common, **small
            )
            model, task = transformers.BertForSequenceClassification(config), None
            batch["labels"] = torch.arange(4)
        else:
            config = transformers.T5Config(
                d_model=WIDTH, d_ff=32, d_kv=8, num_layers=3, num_heads=2, dropout_rate=0, **small
            )
            model, task = transformers.T5ForConditionalGeneration(config), LanguageModel(shift=False)
            batch["decoder_input_ids"] = tokens.roll(1, 1)
    model.train()
    plain, local = copy.deepcopy(model), copy.deepcopy(model)
    learner = Learner(model, "backprop", cuts="auto", task=task, **PLAIN)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        learner.step(batch)
        plain(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(model, plain)
    learner = Learner(local, "local_ce", cuts="auto", task=task, lr=1e-2)
    losses = [learner.step(batch).read() for _ in range(15)]
    assert all(losses[-1][name] < losses[0][name] for name in losses[0] if name.endswith("loss"))
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(learner(given), copy.deepcopy(local).eval()(**given).logits)


def test_the_decoder_of_the_tests_is_no_model_of_ours():
    with pytest.raises(LayerwiseError):
        partition(Decoder())


def test_keys_and_values_for_generation_are_not_kept_while_a_step_runs():
    class Config:
        __module__ = "transformers.models.own"
        use_cache = True

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.head = Config(), nn.Linear(8, CLASSES)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.seen, self.fails = [], False

        def forward(self, x):
            if self.fails:
                raise ValueError("no")
            self.seen.append(self.config.use_cache)
            for layer in self.layers:
                x = layer(x).relu()
            return self.head(x)

    model, (x, y) = Caching(), vectors()
    learner = Learner(model, "local_ce", cuts="layers.*", example=x)
    model.seen.clear()
    learner.step(x, y)
    assert set(model.seen) == {False} and model.config.use_cache
    model.fails = True
    with pytest.raises(LayerwiseError, match="cannot run its input"):
        learner.step(x, y)
    assert model.config.use_cache
    model.fails = False
    model(x)
    assert model.seen[-1]  # the user's own call


def test_a_layer_that_is_compiled_alone_is_refused_as_such():
    model, (x, _) = Skips(), vectors()
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    model.set_submodule(name, torch.compile(model.get_submodule(name), backend="eager"))
    with pytest.raises(LayerwiseError, match=r"is compiled by torch.compile.*compile=True"):
        Learner(model, "local_ce", cuts=[name], example={"x": x})
