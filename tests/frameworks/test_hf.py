"""`layerwise.hf.Trainer` against `transformers.Trainer`, and what it refuses."""

import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the hf extra (transformers) is not installed")
pytest.importorskip("accelerate", reason="the hf extra (accelerate) is not installed")

from layerwise import LayerwiseError  # noqa: E402
from layerwise.hf import Trainer, task_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 22

    def __getitem__(self, i):
        tokens = torch.randint(16, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": torch.where(torch.arange(8) < 2 + i % 5, -100, tokens)}


def model():
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(folder, **options):
    plain = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2, "save_steps": 3}
    plain |= {"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_grad_norm": 0, "logging_steps": 1}
    return transformers.TrainingArguments(str(folder), **{**plain, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 1}, {"bf16": True}],
    ids=["plain", "accumulation", "bf16"],
)
def test_backprop_trains_as_the_trainer_of_transformers(tmp_path, options):
    """Dropout aside, which draws otherwise: the same batches, schedule, accumulation (22 samples in batches of 4, of
    which the last update of an epoch has fewer), weight of every token, precision, and the same losses in the log.
    """
    own, theirs = model(), model()
    for module in (*own.modules(), *theirs.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainers = (
        Trainer(own, arguments(tmp_path / "own", **options), "backprop", train_dataset=Tokens()),
        transformers.Trainer(theirs, arguments(tmp_path / "theirs", **options), train_dataset=Tokens()),
    )
    for trainer in trainers:
        trainer.train()
    tolerance = 2e-3 if options.get("bf16") else 1e-5
    for p, q in zip(own.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance)
    rates = [[row["learning_rate"] for row in t.state.log_history if "learning_rate" in row] for t in trainers]
    assert rates[0] == rates[1] and len(rates[0]) == trainers[1].state.global_step
    assert "grad_norm" not in trainers[0].state.log_history[0]
    if "gradient_accumulation_steps" not in options:  # the mean of a batch's loss has no weights there
        losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in trainers]
        assert losses[0] == pytest.approx(losses[1], abs=10 * tolerance)


def test_a_local_rule_continues_from_a_checkpoint_to_the_same_bits(tmp_path):
    options = {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
    whole = Trainer(model(), arguments(tmp_path, **options), "local_ce", train_dataset=Tokens())
    whole.train()
    rest = Trainer(model(), arguments(tmp_path, **options), "local_ce", train_dataset=Tokens())
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    shutil.rmtree(tmp_path / "checkpoint-3" / "learner")
    with pytest.raises(LayerwiseError, match="was written by another Trainer"):
        Trainer(model(), arguments(tmp_path, **options), train_dataset=Tokens()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


@pytest.mark.parametrize(
    ("options", "arguments_", "sentence"),
    [
        ({"learner": {"lr": 0.1}}, {}, "'lr' is learning_rate of the TrainingArguments"),
        ({"learner": {"example": None}}, {}, "'example' is taken from the train_dataset"),
        ({"learner": {"cut": "auto"}}, {}, "no argument 'cut'; did you mean 'cuts'"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)], lr=0.1), None)}, {}, "its own optimizer"),
        ({"compute_loss_func": lambda *_: 0}, {}, "compute_loss_func cannot be used"),
        ({}, {"torch_compile": True}, "torch_compile wraps the whole model"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, options, arguments_, sentence):
    with pytest.raises(LayerwiseError, match=sentence):
        Trainer(model(), arguments(tmp_path, **arguments_), train_dataset=Tokens(), **options)


def test_batches_without_labels_are_refused(tmp_path):
    data = [{"input_ids": torch.arange(8)}] * 4
    with pytest.raises(LayerwiseError, match="hold input_ids and no labels"):
        Trainer(model(), arguments(tmp_path), train_dataset=data).train()


def test_an_overridden_loss_is_refused(tmp_path):
    class Own(Trainer):
        def compute_loss(self, *words, **options):
            return super().compute_loss(*words, **options) * 2

    with pytest.raises(LayerwiseError, match="compute_loss of Own would not be called"):
        Own(model(), arguments(tmp_path), train_dataset=Tokens())


def test_weight_decay_is_given_once_to_optimizers_that_bring_their_own(tmp_path):
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    options = {"optim": "schedule_free_adamw", "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    trainer = Trainer(model(), arguments(tmp_path, **options), train_dataset=Tokens())
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert {group["weight_decay"] for group in trainer.learner.optimizer.param_groups} <= {0.0, 0.1}
    assert not all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("labels", "problem", "kind"),
    [(1, None, "regression"), (3, "regression", "regression"), (3, "multi_label_classification", "multilabel")],
)
def test_the_task_of_a_sequence_classifier_is_its_problem_type(labels, problem, kind):
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    config.num_labels, config.problem_type = labels, problem
    assert task_of(transformers.BertForSequenceClassification(config)).kind == kind
