"""Optimizers of any kind: by dotted path, several in one group, options by parameter name, modes, own settings."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from support.nets import batches, dense, net, problem, same_bits, trained
from torch import nn
from torch.utils._pytree import tree_map

from layerwise import LayerwiseError, Learner

X, Y = problem()


class Counting(torch.optim.Optimizer):
    """Like a schedule-free optimizer: a count and a mode in its groups, no step out of training mode."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    def train(self):
        for group in self.param_groups:
            group["train_mode"] = True

    def eval(self):
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] / group["k"] * p.grad


def muon_and_adamw(groups):
    parameters = [p for group in groups for p in group["params"]]
    matrices = [p for p in parameters if p.ndim == 2]
    vectors = [p for p in parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.01)]


def same(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_muon_for_matrices_and_adamw_for_the_rest_is_the_loop_by_hand():
    model, twin = dense(), dense()
    learner = Learner(model, "backprop", optimizer=muon_and_adamw, example=X)
    by_hand = muon_and_adamw([{"params": list(twin.parameters())}])
    for x, y in batches(3):
        learner.step(x, y)
        F.cross_entropy(twin(x), y).backward()
        for optimizer in by_hand:
            optimizer.step()
            optimizer.zero_grad()
    assert same(model, twin)


@pytest.mark.parametrize("optimizer", [muon_and_adamw, Counting, {"*.bias": {"optimizer": Counting, "lr": 0.5}}])
def test_several_optimizers_continue_to_the_same_bits(optimizer):
    learner = Learner(dense(), "local_ce", optimizer=optimizer, example=X)
    for x, y in batches(3):
        learner.step(x, y)
    other = Learner(dense(), "local_ce", optimizer=optimizer, example=X)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    for x, y in batches(2):
        learner.step(x, y)
        other.step(x, y)
    assert same(learner.network.model, other.network.model)


def test_a_dotted_path_is_the_class():
    models = dense(), dense()
    for model, optimizer in zip(models, ("torch.optim.NAdam", torch.optim.NAdam), strict=True):
        learner = Learner(model, "local_ce", optimizer=optimizer, lr=0.01)
        learner.step(X, Y)
    assert same(*models)


def test_options_by_parameter_name():
    """Plain gradient descent with a rate per pattern: the first pattern that matches counts."""
    model, twin = dense(), dense()
    patterns = {"1.*": {"lr": 0.3}, "*.bias": {"lr": 0.2}, "*": {"lr": 0.1}}
    optimizer = {name: {"optimizer": "SGD", "momentum": 0.0, "weight_decay": 0.0, **o} for name, o in patterns.items()}
    learner = Learner(model, "backprop", optimizer=optimizer, lr_multipliers={"head": 10.0}, example=X)
    head = {name for name, p in model.named_parameters() if any(p is q for q in learner.network.head.parameters())}
    learner.step(X, Y)
    F.cross_entropy(twin(X), Y).backward()
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        rate = 0.3 if name.startswith("1.") else 0.2 if name.endswith(".bias") else 0.1
        torch.testing.assert_close(q, p - rate * (10 if name in head else 1) * p.grad)
    assert head


def test_readouts_have_a_rate_of_their_own():
    """Plain gradient descent: what a step moves a readout by is so many times larger, and of a block the same."""
    options = {"optimizer": "SGD", "optimizer_options": {"momentum": 0.0}, "weight_decay": 0.0, "lr": 0.1, "example": X}

    def moved(**factors):
        learner = Learner(dense(), "local_ce", lr_multipliers=factors, **options)
        before = {name: p.detach().clone() for name, p in learner.named_parameters()}
        learner.step(X, Y)
        return {name: p.detach() - before[name] for name, p in learner.named_parameters()}

    first = next(name for name in moved() if not name.startswith("auxiliary"))
    block = Learner(dense(), "local_ce", **options).network.blocks[0].name
    plain, own = moved(), moved(readouts=10.0, **{block: 0.5})
    for name in plain:
        readout, of_block = name.startswith("auxiliary"), name in (first, first.replace("weight", "bias"))
        factor = (10.0 if readout else 1.0) * (0.5 if of_block or name.startswith("auxiliary.0.") else 1.0)
        torch.testing.assert_close(own[name], factor * plain[name])


def test_a_mode_that_the_owner_sets_stays():
    learner = Learner(dense(), "local_ce", optimizer=Counting, example=X)
    modes = lambda: {group["train_mode"] for group in learner.optimizer.param_groups}  # noqa: E731
    learner.step(X, Y)
    learner(X)
    assert modes() == {True}
    learner.optimizer.eval()
    learner(X)
    assert modes() == {False}


def test_frozen_and_thawed_parameters_of_one_of_several_optimizers():
    """In fp16 a scaler refuses an optimizer without gradients, such as one whose parameters are all frozen."""
    model = dense()
    learner = Learner(model, "backprop", optimizer={"*.bias": {"optimizer": "rmsprop"}}, precision="fp16", example=X)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    for frozen in (True, False):
        before = [p.detach().clone() for p in model.parameters()]
        for p in biases:
            p.requires_grad_(not frozen)
        learner.step(X, Y)
        changed = {id(p): not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)}
        assert not any(changed[id(p)] for p in biases) if frozen else all(changed[id(p)] for p in biases)
        assert all(done for p, done in changed.items() if p not in {id(b) for b in biases})


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ("schedulfree.AdamW", "there is no module 'schedulfree'"),
        ("torch.optim.Nadam", "unknown optimizer 'torch.optim.Nadam'"),
        ("os.system", "unknown optimizer 'os.system'"),
        ("..", "unknown optimizer '..'"),
        (".torch.optim.Adam", "unknown optimizer '.torch.optim.Adam'"),
        ({"lora": {"lr": 0.1}}, "pattern 'lora' matches no parameter"),
        ({"*": 0.1}, "maps '*' to 0.1"),
        ({"*": {"optimizer": {"*": {}}}}, "is a mapping"),
        ({"*.bias": {"lr": 0.0}, "*": {}}, "in the optimizer's pattern '*.bias', lr is 0.0"),
        ({"*.bias": {"momentun": 0.9}, "*": {}}, "in the optimizer's pattern '*.bias', AdamW has no option 'momentun'"),
        ({"*.bias": {"optimizer": "Adan"}, "*": {}}, "in the optimizer's pattern '*.bias', unknown optimizer 'Adan'"),
        ({"*.bias": {"betas": (0.9, 2.0)}, "*": {}}, "in the optimizer's pattern '*.bias', AdamW refuses its options"),
        (
            {"*.bias": {"optimizer": "SGD", "momentum": math.nan}, "*": {}},
            "in the optimizer's pattern '*.bias', an optimizer was given momentum = nan",
        ),
        ({"*": {"lr": -1.0}}, "lr is -1.0"),
        (lambda groups: [torch.optim.SGD(groups, lr=0.1), torch.optim.SGD(groups, lr=0.1)], "into two optimizers"),
        (lambda groups: [torch.optim.SGD(groups, lr=0.1), 3], "gave int"),
    ],
)
def test_what_cannot_serve_is_refused(optimizer, sentence):
    with pytest.raises(LayerwiseError, match=re.escape(sentence)):
        Learner(dense(), "local_ce", optimizer=optimizer).step(X, Y)


@pytest.mark.parametrize("options", [{"foreach": 1}, {"foreach": True}])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "Adagrad"])
def test_a_loop_over_tensors_that_somebody_asked_for_takes_the_place_of_the_fused_kernel(optimizer, options):
    a, b = (Learner(dense(), "backprop", optimizer=optimizer, optimizer_options=o) for o in (options, {}))
    for x, y in batches(2):
        a.step(x, y)
        b.step(x, y)
    assert a.optimizer.param_groups[0]["foreach"]
    assert all(
        torch.allclose(p, q, atol=1e-6) for p, q in zip(a.network.parameters(), b.network.parameters(), strict=True)
    )


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_a_step_that_an_optimizer_cannot_take_is_one_sentence(option):
    if option == "capturable" and X.is_cuda:
        pytest.skip("this device can capture")
    learner = Learner(dense(), "local_ce", optimizer="RAdam", optimizer_options={option: True})
    with pytest.raises(LayerwiseError, match=r"RAdam fails at the update of '2' .*; correct its options"):
        learner.step(X, Y)


@pytest.mark.parametrize("line", ["1 / 0", "raise SystemExit(0)", "def"])
def test_a_module_that_cannot_be_imported_is_one_sentence(line, tmp_path, monkeypatch):
    (tmp_path / "broken_optimizer.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LayerwiseError, match=r"'broken_optimizer\.Adam' cannot be imported"):
        Learner(dense(), optimizer="broken_optimizer.Adam")


class Growing(torch.optim.SGD):
    """Like Prodigy: infinity is the usual value of an option, and a setting comes with the first step."""

    def __init__(self, params, lr=0.1, growth=math.inf, momentum=0.9):
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["growth"] = growth

    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)


NONSENSE = {
    "sgd": [
        *(("momentum", bad) for bad in (math.nan, -0.5, "0.9", None, True)),
        *(("weight_decay", bad) for bad in (math.inf, -1.0, [0.1], torch.tensor([0.1, 0.2]))),
        *(("dampening", math.nan), ("nesterov", "yes"), ("lr", math.nan), ("lr", None), ("lr", -1.0)),
    ],
    "adamw": [("betas", bad) for bad in ((0.9, math.nan), (0.9, 1.5), (0.9,), 0.9, ("a", "b"), None)]
    + [("eps", -1e-8), ("eps", math.nan), ("maximize", 3), ("weight_decay", torch.tensor(math.nan))],
    "Adafactor": [("eps", (None, math.nan)), ("d", 0.5), ("d", "1")],
    Growing: [("momentum", -1.0), ("growth", math.nan), ("steps", math.inf)],
}


def own(optimizer):
    return Learner(dense(), "local_ce", optimizer=optimizer, example=X)


@pytest.mark.parametrize("optimizer", NONSENSE)
def test_settings_that_an_optimizer_cannot_use_are_refused_wherever_they_come_from(optimizer):
    """Set between steps, in a checkpoint, in the optimizer's own state, or from the start: torch would take them."""
    learner = own(optimizer)
    learner.step(X, Y)
    state, packed = copy.deepcopy(learner.state_dict()), copy.deepcopy(learner.optimizer.state_dict())
    name = learner.groups[0].name
    for setting, bad in NONSENSE[optimizer]:
        weights = copy.deepcopy(learner.network.model.state_dict())
        group = learner.optimizer.param_groups[0]
        good, group[setting] = group[setting], bad
        with pytest.raises(LayerwiseError):
            learner.step(X, Y)
        group[setting] = good
        assert all(torch.equal(v, weights[n]) for n, v in learner.network.model.state_dict().items()), setting
        edited = copy.deepcopy(packed)
        edited["param_groups"][0][setting] = bad
        with pytest.raises(LayerwiseError):
            learner.optimizer.load_state_dict(edited)
        if setting != "lr":
            edited = copy.deepcopy(state)
            edited["settings"][name] = [
                [{setting: bad}, *({} for _ in learner.groups[0].optimizers[0].param_groups[1:])]
            ]
            with pytest.raises(LayerwiseError, match="does not fit"):
                learner.load_state_dict(edited)
        elif bad is not None:
            with pytest.raises(LayerwiseError):
                own(lambda groups, bad=bad: torch.optim.SGD([{**g, "lr": bad} for g in groups])).step(X, Y)
    learner.step(X, Y)


@pytest.mark.parametrize("momentum", [math.nan, math.inf])
def test_an_optimizer_is_not_made_with_them_either(momentum):
    """torch compares with 0 alone, which NaN passes."""
    made = [
        {"optimizer": "sgd", "optimizer_options": {"momentum": momentum}},
        {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=momentum)},
        {"optimizer": {"*": {"optimizer": "rmsprop", "momentum": momentum}}},
    ]
    for options in made:
        with pytest.raises(LayerwiseError, match="momentum"):
            Learner(dense(), "local_ce", example=X, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", Growing])
def test_settings_that_are_set_between_steps_continue_from_every_state(optimizer):
    setting, value = ("betas", (0.5, 0.6)) if optimizer == "adamw" else ("momentum", 0.0)
    learner = own(optimizer)
    learner.step(X, Y)
    for group in learner.optimizer.param_groups:
        group[setting], group["nesterov"] = value, False
    learner.step(X, Y)
    other = own(optimizer)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    third = Learner(copy.deepcopy(learner.network.model), "local_ce", optimizer=optimizer, example=X)
    third.auxiliary.load_state_dict(learner.auxiliary.state_dict())
    third.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
    for one in (learner, other, third):
        one.step(X, Y)
        assert {group[setting] for group in one.optimizer.param_groups} == {value}
    assert same(learner.network.model, other.network.model) and same(learner.network.model, third.network.model)
    plain = own(optimizer)
    plain.step(X, Y)
    learner.load_state_dict(plain.state_dict())  # the state decides: what was set since is not part of it
    assert {group[setting] for group in learner.optimizer.param_groups} != {value}


@pytest.mark.parametrize(("optimizer", "switch"), [("adam", "amsgrad"), ("rmsprop", "centered")])
def test_a_switch_that_comes_too_late_is_one_sentence(optimizer, switch):
    learner = own(optimizer)
    learner.step(X, Y)
    learner.optimizer.param_groups[0][switch] = True
    with pytest.raises(LayerwiseError, match="is set when the optimizer is made"):
        learner.step(X, Y)


def test_no_parameter_loses_its_state_unseen():
    """A frozen parameter has none, and says so; any other one that is missing was taken out."""
    model = dense()
    frozen = next(name for name, p in model.named_parameters() if p.dim() == 1)
    model.get_parameter(frozen).requires_grad_(False)
    learner = Learner(model, "local_ce", optimizer="adam", example=X)
    learner.step(X, Y)
    state, packed = copy.deepcopy(learner.state_dict()), copy.deepcopy(learner.optimizer.state_dict())
    assert state["stateless"] == [frozen]
    learner.load_state_dict(state)
    learner.optimizer.load_state_dict(packed)
    for name in state["optimizer"]:
        kept = {other: found for other, found in state["optimizer"].items() if other != name}
        with pytest.raises(LayerwiseError, match=f"the optimizer's state of '{name}' is missing"):
            learner.load_state_dict({**state, "optimizer": kept})
    with pytest.raises(LayerwiseError, match="the state of parameter"):
        learner.optimizer.load_state_dict({**packed, "state": dict(list(packed["state"].items())[1:-1])})
    older = {name: part for name, part in state.items() if name != "stateless"}
    learner.load_state_dict(older)


@pytest.mark.parametrize(
    "edit",
    [
        lambda packed: 3,
        lambda packed: {},
        lambda packed: {**packed, "state": []},
        lambda packed: {**packed, "param_groups": [{}]},
        lambda packed: {**packed, "param_groups": packed["param_groups"][1:]},
        lambda packed: {
            **packed,
            "param_groups": [{**g, "params": [0] * len(g["params"])} for g in packed["param_groups"]],
        },
        lambda packed: {**packed, "param_groups": [{**g, "scheduled": (math.nan, 1)} for g in packed["param_groups"]]},
        lambda packed: {**packed, "state": {n: {**s, "exp_avg": torch.zeros(0)} for n, s in packed["state"].items()}},
        lambda packed: {**packed, "state": {n: {**s, "step": torch.tensor(-1.0)} for n, s in packed["state"].items()}},
        lambda packed: {**packed, "state": dict.fromkeys(packed["state"], 7)},
    ],
)
def test_a_damaged_state_of_all_optimizers_is_refused(edit):
    """torch looks at none of it; a state of another shape ends its fused kernel in a SIGSEGV."""
    learner = own("adamw")
    learner.step(X, Y)
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(LayerwiseError):
        learner.optimizer.load_state_dict(edit(copy.deepcopy(learner.optimizer.state_dict())))
    other = own("adamw")
    other.load_state_dict(before)
    other.step(X, Y)
    learner.step(X, Y)
    assert same(learner.network.model, other.network.model)


def test_blocks_with_other_multipliers_stay_in_groups_of_their_own():
    joined = lambda groups: torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)  # noqa: E731
    with pytest.raises(LayerwiseError, match="keep the groups that it is called with apart"):
        Learner(dense(), "backprop", optimizer=joined, lr_multipliers={"head": 2.0}, example=X)


def test_a_readout_larger_than_the_adapters_of_a_frozen_block_is_warned_of():
    def adapted(frozen):
        block = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 1, bias=False), nn.Linear(1, 64, bias=False))
        block[0].requires_grad_(not frozen)
        return nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 8), block, nn.Linear(64, 64), nn.Linear(64, 4))

    with pytest.warns(UserWarning, match=r"more parameters than what the blocks train: 2 \(260 against 128\)"):
        Learner(adapted(True), "local_ce", example=X)
    Learner(adapted(True), "sll", example=X)  # its projections are fixed
    Learner(adapted(False), "local_ce", example=X)  # nothing is frozen: warnings are errors here


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", ["backprop", "local_ce"])
def test_a_state_goes_on_in_channels_last_order_whatever_order_it_was_kept_in(rule, accumulate):
    """As in a checkpoint, whose tensors are contiguous; fused optimizers pair elements by their place in memory."""
    model, data = net("vgg", 3), batches(5)
    options = {"channels_last": True, "lr": 0.01, "accumulate": accumulate}
    whole, state = trained(model, rule, data, **options), trained(model, rule, data[:3], **options).state_dict()
    state = tree_map(lambda t: t.contiguous().clone() if isinstance(t, torch.Tensor) else t, state)
    learner = Learner(copy.deepcopy(model), rule, **options)
    learner.load_state_dict(state)
    for x, y in data[3:]:
        learner.step(x, y)
    assert same_bits(whole, learner)


def test_the_optimizers_own_way_keeps_the_order_too():
    model, data = net("vgg", 3), batches(4)
    options = {"channels_last": True, "lr": 0.01}
    whole, first = trained(model, "backprop", data, **options), trained(model, "backprop", data[:2], **options)
    packed = tree_map(
        lambda t: t.contiguous().clone() if isinstance(t, torch.Tensor) else t, first.optimizer.state_dict()
    )
    first.optimizer.load_state_dict(packed)
    for x, y in data[2:]:
        first.step(x, y)
    assert same_bits(whole, first)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("sgd", "SGD", "adam", "adamw", "Adagrad")),
        *((name, torch.float64) for name in ("sgd", "adamw")),
        ("sgd", torch.float16),
    ],
)
def test_in_every_type_of_weights_an_optimizer_moves_them_as_without_its_kernel(name, dtype):
    """torch's fused SGD on the host leaves all numbers of 16 bits as they are, but for a few at the end."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x, y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(12) % 4
    moved = []
    for options in ({}, {"foreach": True}):  # asking for a loop over tensors excludes the kernel
        own = copy.deepcopy(model)
        learner = Learner(own, "backprop", optimizer=name, lr=0.05, optimizer_options=options)
        for _ in range(3):
            learner.step(x, y)
        moved.append([(p - q).detach().float() for p, q in zip(own.parameters(), model.parameters(), strict=True)])
    for fused, single in zip(*moved, strict=True):
        assert single.norm() > 0
        assert (fused - single).norm() < 0.1 * single.norm()
