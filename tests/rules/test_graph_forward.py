"""Graph networks and ForwardGNN: which nodes are linked, closed forms, and which labels are known where."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.nets import CLASSES, SHAPE, graph, net, problem, same_bits, trained
from torch import nn

from layerwise import LayerwiseError, Learner, create_rule, data, models, rule_names, rules
from layerwise.cli.main import main
from layerwise.core.graphs import Graph, extended, wired
from layerwise.core.tasks import UNLABELLED, Classification

GRAPH_MODELS = ("gcn", "gat")
X, Y = problem(64)
NONE = torch.empty(2, 0, dtype=torch.int64)


def gcn_matrix(edges, nodes):
    """Kipf & Welling's propagation: the adjacency with loops, divided by the roots of both in-degrees."""
    adjacency = torch.eye(nodes, dtype=torch.float64)
    adjacency[edges[1], edges[0]] += 1  # row: receiver
    root = adjacency.sum(1).rsqrt()
    return root[:, None] * adjacency * root


# --- Labels that do not count


def test_what_is_unlabelled_counts_in_no_loss_and_no_accuracy():
    task = Classification(CLASSES, label_smoothing=0.1)
    logits, y = torch.randn(6, CLASSES), torch.tensor([1, -100, 0, -100, 3, 2])
    assert torch.equal(task.loss(logits, y), task.loss(logits[y >= 0], y[y >= 0]))
    logits[0, 1] = 9  # right
    logits[2, 1] = 9  # wrong
    assert 0 < task.accuracy(logits, y) == task.accuracy(logits[y >= 0], y[y >= 0])


DRAW_BY_ROW = ("forward_gradient", "likelihood_ratio")
"""Rules whose noise at a sample depends on which row of the batch it is."""


@pytest.mark.parametrize(
    "rule",
    [r for r in rule_names() if rules.get(r).unlabelled and not rules.get(r).models and r not in DRAW_BY_ROW],
)
def test_an_unlabelled_sample_teaches_nothing(rule):
    """The same step as without it: the mean of the loss is over the labelled samples."""
    x, y = problem(12)
    hidden = torch.where(torch.arange(12) % 3 == 0, UNLABELLED, y)
    model = net("mlp").double()
    a = trained(model, rule, [(x.double(), hidden)])
    b = trained(model, rule, [(x.double()[hidden >= 0], y[hidden >= 0])])
    assert all(torch.allclose(p, q) for p, q in zip(a.network.parameters(), b.network.parameters(), strict=True))
    assert not same_bits(a.network, model)
    told, wanted = (m.evaluate(x.double()[k], hidden[k]).read() for m, k in ((a, hidden > -101), (a, hidden >= 0)))
    assert told == pytest.approx(wanted)


def test_other_rules_refuse_an_unlabelled_sample():
    with pytest.raises(LayerwiseError, match="needs a label for every sample, and 1 of 3 have none"):
        Learner(net("mlp"), "boosted").step(X[:3], torch.tensor([0, 1, -100]))
    with pytest.raises(LayerwiseError, match="all are -100"):
        Learner(net("mlp"), "backprop").step(X[:2], torch.tensor([-100, -100]))


# --- The graph


def test_copies_of_a_graph_with_class_nodes():
    edges = torch.tensor([[0], [1]])
    labels = [torch.tensor([1, -100, 0]), torch.tensor([-100, -100, 1])]
    found = {tuple(edge) for edge in extended(edges, 3, labels, classes=2, back=False).T.tolist()}
    # Copy 0: nodes 0, 1, 2 and classes 3, 4; copy 1: nodes 5, 6, 7 and classes 8, 9.
    assert found == {(0, 1), (0, 4), (2, 3), (5, 6), (7, 9)}
    both = {tuple(edge) for edge in extended(edges, 3, labels, classes=2, back=True).T.tolist()}
    assert both == found | {(4, 0), (3, 2), (9, 7)}
    assert extended(edges, 3, labels, classes=0, back=True).tolist() == [[0, 3], [1, 4]]


def test_a_graph_that_cannot_be_is_refused():
    with pytest.raises(LayerwiseError, match="nodes outside 0 to 2"):
        Graph(torch.tensor([[0], [3]]), torch.tensor([0, 0, 0]), 2)
    with pytest.raises(LayerwiseError, match="known labels are not in 0 to 1"):
        Graph(NONE, torch.tensor([0, 2]), 2)
    with pytest.raises(LayerwiseError, match="gcn and gat need data with a graph"):
        models.create("gcn", SHAPE, CLASSES)
    with pytest.raises(LayerwiseError, match="cannot use a graph"):
        models.create("mlp", SHAPE, CLASSES, graph=graph())
    with pytest.raises(LayerwiseError, match="choose the model gcn or gat"):
        Learner(net("mlp"), "graph_forward").step(X, Y)


def test_gcn_is_the_closed_form():
    model = net("gcn", depth=1).double()
    matrix = gcn_matrix(model.graph.edges, 64)
    conv, last = (layer.layer.conv for layer in (model.block1, model.head))
    h = (matrix @ (X.double().flatten(1) @ conv.lin.weight.T) + conv.bias).relu()
    wanted = matrix @ (h @ last.lin.weight.T) + last.bias
    assert torch.allclose(model(X.double()), wanted)
    first = gcn_matrix(model.graph.between(10), 10)  # fewer rows: the first nodes, with the edges between them
    h = (first @ (X[:10].double().flatten(1) @ conv.lin.weight.T) + conv.bias).relu()
    assert torch.allclose(model(X[:10].double()), first @ (h @ last.lin.weight.T) + last.bias)


@pytest.mark.parametrize("kind", GRAPH_MODELS)
def test_a_graph_network_has_its_blocks_and_one_graph(kind):
    model = net(kind, depth=3)
    assert model.block_names == ("block1", "block2", "block3")
    assert [name for name, _ in model.named_buffers()] == ["graph.edges", "graph.labels"]
    learner = Learner(model, "backprop", example=X)
    assert torch.equal(learner.network(X), model(X))
    with pytest.raises(LayerwiseError, match=r"64 nodes and the input 128 rows"):
        Learner(net(kind), "forward_forward").step(X, Y)
    with wired(NONE):  # without neighbours, a node depends on itself alone
        other = X.clone()
        other[1:] += 1
        assert torch.equal(model(X)[0], model(other)[0])
    assert not torch.equal(model(X)[0], model(other)[0])


# --- Single forward


def scores_by_hand(model, x, known, links):
    """Products with the class nodes, layer by layer, from the closed form of a GCN."""
    nodes = len(x)
    draw = torch.Generator().manual_seed(CLASSES)
    h = torch.cat([x.flatten(1), torch.randn(CLASSES, x[0].numel(), generator=draw).double()])
    members = (known >= 0).nonzero().flatten()
    to_class = torch.stack([members, nodes + known[members]])
    edges = torch.cat([model.graph.edges, to_class, *([to_class.flip(0)] if links == "both" else [])], dim=1)
    matrix = gcn_matrix(edges, nodes + CLASSES)
    for name in model.block_names:
        conv = model.get_submodule(name).layer.conv
        h = F.normalize(h, dim=1)
        h = (matrix @ (h @ conv.lin.weight.T) + conv.bias).relu()
        yield h[:nodes] @ h[nodes:].T


@pytest.mark.parametrize("links", ["in", "both"])
def test_single_forward_is_the_closed_form(links):
    model = net("gcn", depth=2).double()
    x, known = X.double(), model.graph.labels
    y = torch.where(known >= 0, Y, UNLABELLED)
    learner = Learner(model, create_rule("graph_forward", links=links, temperature=2.0), example=x)
    found = learner(x)
    scores = [s.detach() / 2 for s in scores_by_hand(model, x, known, links)]
    assert torch.allclose(found.double(), torch.stack([s.softmax(1) for s in scores]).mean(0).log(), atol=1e-5)
    told = learner.evaluate(x, y).read()
    for name, s in zip(model.block_names, scores, strict=True):
        assert told[f"{name}/loss"] == pytest.approx(float(F.cross_entropy(s[known >= 0], Y[known >= 0])), rel=1e-5)


def test_with_links_in_no_node_learns_its_label_from_its_class():
    """Another known label of one node changes the class nodes, but no node's own representation."""
    model = net("gcn", depth=2).double()
    rule = create_rule("graph_forward")
    seen = []
    for label in (0, 1):
        model.graph.labels[0] = label
        h, edges = rule._inputs(model.graph, X.double().flatten(1), [model.graph.labels])
        seen.append(list(rule._pass(Learner(model, rule).network, h, edges)))
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one[:64], other[:64])
        assert not torch.equal(one[64:], other[64:])


@pytest.mark.parametrize("variant", ["single", "labels", "nodes"])
def test_labels_to_be_predicted_are_never_looked_at(variant):
    learner = trained(net("gcn", labels=True), create_rule("graph_forward", variant=variant), [(X, Y)])
    before = learner(X)
    told = [learner.evaluate(X, y).read()["block1/loss"] for y in (Y, (Y + 1) % CLASSES)]
    assert torch.equal(learner(X), before)
    assert told[0] != told[1]


def test_above_states_are_averaged_into_the_loss_and_reach_no_other_layer():
    model = net("gcn", depth=3)
    learner = Learner(model, create_rule("graph_forward", top_down=True), example=X)
    assert learner.rule.locality == "broadcast"
    h, edges = learner.rule._inputs(model.graph, X.flatten(1), [model.graph.labels])
    with torch.no_grad():
        outs = list(learner.rule._pass(learner.network, h, edges))
    told = learner.evaluate(X, Y).read()
    for i, name in enumerate(model.block_names):
        z = torch.stack([outs[i], *(F.normalize(out, dim=1) for out in outs[i + 1 :])]).mean(0)
        wanted = F.cross_entropy(z[:64] @ z[64:].T, Y)
        assert told[f"{name}/loss"] == pytest.approx(wanted.item(), rel=1e-4)
    plain = Learner(net("gcn", depth=3), "graph_forward", example=X)
    assert plain.evaluate(X, Y).read()["block3/loss"] == pytest.approx(told["block3/loss"])
    assert plain.evaluate(X, Y).read()["block1/loss"] != pytest.approx(told["block1/loss"], rel=1e-3)


# --- Forward-forward


@pytest.mark.parametrize("kind", ["gcn", pytest.param("gat", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["labels", "nodes"])
def test_forward_forward_parts_true_from_wrong_labels(kind, variant):
    rule = create_rule("graph_forward", variant=variant, negatives=2)
    learner = Learner(net(kind, labels=True), rule, lr=0.01)
    y = torch.where(torch.arange(64) < 32, Y, UNLABELLED)
    told = [learner.step(X, y).read() for _ in range(40)]
    assert told[-1]["block1/loss"] < 0.8 * told[0]["block1/loss"]
    assert told[-1]["block1/accuracy"] > 0.8
    assert (learner(X).argmax(1) == Y)[32:].float().mean() > 2 / CLASSES


def test_the_loss_with_labels_is_the_closed_form():
    model = net("gcn", depth=1, labels=True).double()
    rule = create_rule("graph_forward", variant="labels", threshold=0.3)
    y = torch.where(torch.arange(64) < 32, Y, UNLABELLED)
    learner, seen = Learner(model, rule, example=X.double()), []
    conv = model.block1.layer.conv

    def spy(module, arguments):
        seen.append(arguments[0])

    with conv.register_forward_pre_hook(spy):
        told = learner.evaluate(X.double(), y).read()
    true, wrong = seen[0][:64], seen[0][64:128]
    assert (true[:32, -CLASSES:].argmax(1) == Y[:32]).all()
    assert (wrong[:32, -CLASSES:].argmax(1) != Y[:32]).all()
    assert torch.equal(true[32:], wrong[32:])  # evenly spread labels
    assert torch.allclose(true[40, -CLASSES:] / true[40, -1], torch.ones(CLASSES).double())
    assert torch.allclose(true.norm(dim=1), torch.ones(64).double())
    matrix = gcn_matrix(model.graph.edges, 64)
    g = [((matrix @ (h @ conv.lin.weight.T) + conv.bias).relu()[:32] ** 2).sum(1) for h in (true, wrong)]
    loss = (1 + (0.3 - g[0]).exp()).log().mean() + (1 + (g[1] - 0.3).exp()).log().mean()
    assert told["block1/loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"negatives": 0}, "negatives is 0"),
        ({"variant": "nodes", "top_down": True}, "top_down belongs to"),
        ({"variant": "virtual"}, "option variant is 'virtual'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(LayerwiseError, match=words):
        Learner(nn.Linear(1, 1), create_rule("graph_forward", **options))


def test_labels_need_their_inputs():
    with pytest.raises(LayerwiseError, match=r"--model\.labels"):
        Learner(net("gcn"), create_rule("graph_forward", variant="labels")).step(X, Y)
    with pytest.raises(LayerwiseError, match="3 heads do not share 16 units"):
        net("gat", heads=3)


# --- Cora, from a small file of its form


@pytest.fixture
def cora(tmp_path, monkeypatch):
    """A citation graph of 70 nodes that has the form of Cora's file: two words per class, edges within classes."""
    y = np.arange(70) % 7
    words = np.zeros((70, 20), dtype=np.float32)
    words[np.arange(70), 2 * y + np.arange(70) // 7 % 2] = 1
    rows, columns = words.nonzero()
    here = np.arange(63)
    edges = np.stack([np.concatenate([here, here + 7]), np.concatenate([here + 7, here])])
    masks = {f"{split}_mask": np.arange(70) // 7 % 3 == i for i, split in enumerate(("train", "val", "test"))}
    (tmp_path / "cora").mkdir()
    np.savez(
        tmp_path / "cora" / "cora.npz",
        indptr=np.searchsorted(rows, np.arange(71)),
        indices=columns,
        data=np.ones(len(rows), dtype=np.float32),
        shape=np.array([70, 20]),
        label=y,
        edge_index=edges,
        **masks,
    )
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return y, words, masks


def test_cora_is_one_batch_whose_splits_are_masks(cora):
    y, words, masks = cora
    found = data.load("cora")
    for split in ("train", "val", "test"):
        (batch,) = data.Batches(getattr(found, split), 8, seed=1, mean=found.mean, std=found.std).epoch(3)
        assert np.array_equal(batch[0].flatten(1).numpy(), words)
        assert np.array_equal(batch[1].numpy(), np.where(masks[f"{split}_mask"], y, UNLABELLED))
    assert torch.equal(found.graph.labels, found.train.labels)  # no other label is known to the network
    assert len(found.classes) == 7
    for wrong in ({"size": 8}, {"label_noise": 0.1}):
        with pytest.raises(LayerwiseError, match="leave both options out"):
            data.load("cora", **wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "model"),
    [
        pytest.param(rule, model, marks=[] if (rule, model) == ("graph_forward", "gcn") else [pytest.mark.slow])
        for rule in ("graph_forward", "backprop", "local_ce")
        for model in GRAPH_MODELS
    ],
)
def test_a_run_on_cora_is_trained_resumed_and_evaluated(cora, rule, model, capsys):
    pytest.importorskip("torch_geometric", reason="the graph extra (PyTorch Geometric) is not installed")
    words = f"train --data cora --rule {rule} --model {model} --model.width 16 --epochs 30 --lr 0.02 --out run"
    assert main([*words.split(), "--save-every", "15", "--model.dropout", "0"]) == 0, capsys.readouterr().err
    result = json.loads(Path("run/result.json").read_text())
    assert result["steps"] == 30
    assert result["test_accuracy"] > 0.8
    capsys.readouterr()
    assert main(["eval", "run"]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(told["head/accuracy"]) == pytest.approx(result["test_accuracy"], abs=1e-4)
    assert main(["predict", "run", "."]) == 2
    assert "nodes of its own graph" in capsys.readouterr().err


def test_wrong_use_of_cora_is_one_sentence(cora, tmp_path, capsys):
    for words, sentence in (
        ("--data cora --augment flip", "not images to augment"),
        ("--data digits --model gcn", "need data with a graph"),
        ("--data cora --rule graph_forward --model mlp", "choose the model gcn or gat"),
        ("--data cora --model mlp --rule dgl", "rule 'dgl' needs a label for every sample"),
        ("--data cora --rule boosted", "choose a rule that ignores such samples: sll, svp, sid, local_ce"),
    ):
        assert main(["train", *words.split(), "--out", "none"]) == 2
        assert sentence in capsys.readouterr().err
        assert not Path("none").exists()
    (tmp_path / "cora" / "cora.npz").write_bytes(b"PK\x03\x04")
    assert main(["train", "--data", "cora"]) == 2
    assert "not a readable file of Cora" in capsys.readouterr().err
