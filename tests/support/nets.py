"""Small nets, a small problem, and what "the same bits" means; shared by the tests.

They are on the CPU, or on the device that the environment variable LAYERWISE_TEST_DEVICE names.
"""

import copy
import os

import pytest
import torch
from torch import nn

from layerwise import Learner, Partition, models, rules
from layerwise.core import pieces
from layerwise.core.graphs import Graph

SHAPE, CLASSES = (1, 8, 8), 4
DEVICE = torch.device(os.environ.get("LAYERWISE_TEST_DEVICE", "cpu"))
KINDS = ("mlp", "vgg", "vit")
QUICK = {
    "boosted": {"updates": 1},
    "block_rota": {"period": 1, "order": "up"},
    "continual_backprop": {"replacement_rate": 0.03, "maturity": 1},
    "zeroth_order": {"directions": 16},
    "predictive_coding": {"steps": 3},
    "inference_learning": {"steps": 3},
    "equilibrium_propagation": {"free": 5, "nudged": 3},
    "forward_gradient": {"tangents": 2},
    "likelihood_ratio": {"pairs": 2},
}
FAMILIES = (
    *("sll", "sid", "local_ce", "predsim", "infopro", "interlocking", "forward_forward", "ssl_local", "boosted"),
    *("feedback_alignment", "pepita", "forward_gradient", "likelihood_ratio", "synthetic_gradient"),
    *("predictive_coding", "equilibrium_propagation", "highway_backprop", "hebbian_global"),
    *("backprop", "backprop_checkpoint", "block_rota", "zeroth_order", "last_layer"),
)
"""A rule of each way to run blocks; see `by_family`."""
MANY_PASSES = ("zeroth_order", "equilibrium_propagation", "likelihood_ratio", "forward_gradient", "noprop_dt")
"""Rules whose step runs the network so often that what all rules share is tested with them in the slow suite."""
UNDEFINED = {"pepita": ("vit",)}
"""Models for which a rule is not defined, and which it refuses."""
SIZES = {
    "mlp": {"width": 16},
    "vgg": {"width": 4},
    "resnet": {"width": 4},
    "reversible": {"width": 8, "heads": 2},
    "noprop": {"width": 2},
    "noprop_ct": {"width": 4},
    "noprop_fm": {"width": 2},
    "sid_cascade": {"width": 16},
    "vit": {"width": 8, "heads": 2},
    **{kind: {"width": 12} for kind in ("rnn", "gru", "lstm")},
    "gcn": {"width": 16, "dropout": 0.0},
    "gat": {"width": 16, "dropout": 0.0, "heads": 2},
}


def seed(number):
    """Like `torch.manual_seed`, which takes 4 ms to record the call for each kind of device that is not present."""
    torch.default_generator.manual_seed(number)
    if torch.accelerator.is_available():
        torch.manual_seed(number)


def net(kind="mlp", depth=3, **options):
    if kind in ("gcn", "gat"):
        pytest.importorskip("torch_geometric", reason="the graph extra (PyTorch Geometric) is not installed")
        options["graph"] = graph()
    seed(7)
    return models.create(kind, SHAPE, CLASSES, depth=depth, **{**SIZES[kind], **options}).to(DEVICE)


def graph(nodes=64, known=32):
    """A graph for `problem`: every node and the next one of its class, both ways; labels of the first nodes known."""
    here = torch.arange(nodes - CLASSES)
    edges = torch.stack([here, here + CLASSES])
    labels = torch.where(torch.arange(nodes) < known, torch.arange(nodes) % CLASSES, -100)
    return Graph(torch.cat([edges, edges.flip(0)], dim=1), labels, CLASSES)


def by_family(names):
    """The names of rules for a test of the engine: one of each family in the fast suite, the others in the slow one."""
    return [
        name if name in FAMILIES and name not in MANY_PASSES else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


def kinds(rule):
    """Models on which a rule is tested."""
    return rules.get(rule).models or tuple(kind for kind in KINDS if kind not in UNDEFINED.get(rule, ()))


def by_parameter(rule):
    """Whether a rule updates one parameter at a time, so that it has no replicas, no clipping and no accumulation."""
    return issubclass(rules.get(rule), pieces.StepsByParameter)


def made(rule):
    """A rule by name, with options such that every block has its turn, and learns, within a few steps."""
    return rules.create(rule, **QUICK.get(rule, {}))


def cascade(depth=4, **options):
    """SID's model in double precision."""
    torch.manual_seed(3)
    return models.create("sid_cascade", SHAPE, CLASSES, depth=depth, **{"width": 16, **options}).double().to(DEVICE)


def wide(x):
    return x.double()


def problem(samples=64, seed=0, shape=SHAPE, classes=CLASSES):
    """Noisy copies of one random image per class: separable, also by a linear map."""
    draw = torch.Generator().manual_seed(seed)
    templates = torch.randn(classes, *shape, generator=torch.Generator().manual_seed(99))
    y = torch.arange(samples) % classes
    return (templates[y] + 0.3 * torch.randn(samples, *shape, generator=draw)).to(DEVICE), y.to(DEVICE)


def batches(count, size=16):
    return [problem(size, seed=1 + i) for i in range(count)]


def tensors(module):
    """A copy of all parameters and buffers (also those that no state_dict holds)."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def same_bits(a, b):
    """Whether two modules, dictionaries of tensors, or learners hold the same bits."""
    if isinstance(a, Learner):
        return same_bits(a.network, b.network) and same_bits(a.auxiliary, b.auxiliary)
    a, b = (tensors(t) if isinstance(t, nn.Module) else t for t in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(model, rule, data, **options):
    """A learner that has taken one step per batch, on a copy of the model."""
    learner = Learner(copy.deepcopy(model), rule, **options)
    for x, y in data:
        learner.step(x, y)
    return learner


def gone_on(model, rule, data, stop, **options):
    """Like `trained`, with two learners: the second continues from the state of the first after `stop` batches."""
    state = copy.deepcopy(trained(model, rule, data[:stop], **options).state_dict())
    learner = Learner(copy.deepcopy(model), rule, **options)
    learner.load_state_dict(state)
    for x, y in data[stop:]:
        learner.step(x, y)
    return learner


def whole(model):
    """The model as one block and its head."""
    return Partition(model, [model.block_names[-1]])


PLAIN_SGD = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.0}


def linear_blocks(inputs=6, width=5, depth=3):
    """Linear blocks, in float64: what a step does to them can be written down."""
    torch.manual_seed(0)
    sizes = [inputs] + [width] * (depth - 1)
    layers = [nn.Linear(size, width, bias=False) for size in sizes]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).double().to(DEVICE)


def vectors(samples=16, inputs=6):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(samples, inputs, generator=draw, dtype=torch.float64)
    return x.to(DEVICE), torch.arange(samples, device=DEVICE) % CLASSES


def dense():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    ).to(DEVICE)


def snapshot(learner):
    return {name: p.detach().clone() for name, p in learner.network.named_parameters()}


def moved(learner, before):
    return {name for name, p in learner.network.named_parameters() if not torch.equal(p, before[name])}
