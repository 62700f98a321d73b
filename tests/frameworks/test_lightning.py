"""A `LightningModule` with a learner: counting, schedulers, logs and checkpoints are Lightning's."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.nets import dense, problem
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning.pytorch as L
except ImportError:
    L = pytest.importorskip("pytorch_lightning", reason="the lightning extra is not installed")

from layerwise import LayerwiseError, Learner
from layerwise.lightning import LearnerMixin

pytestmark = pytest.mark.filterwarnings("ignore")
X, Y = problem()


def loader():
    return DataLoader(TensorDataset(X.repeat(5, *[1] * (X.dim() - 1)), Y.repeat(5)), len(X))


class Module(LearnerMixin, L.LightningModule):
    def __init__(self, rule="backprop", interval="step", **options):
        super().__init__()
        self.model, self.rule, self.interval, self.options = dense(), rule, interval, options

    def configure_learner(self):
        return Learner(self.model, self.rule, lr=0.1, optimizer="sgd", example=X, **self.options)

    def configure_optimizers(self):
        schedule = torch.optim.lr_scheduler.StepLR(self.learner.optimizer, step_size=2, gamma=0.5)
        return {"optimizer": self.learner.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class Plain(L.LightningModule):
    """The same by Lightning's own optimisation."""

    def __init__(self, interval):
        super().__init__()
        self.model, self.interval = dense(), interval

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.dim() > 1]
        rest = [{"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0}]
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
        optimizer = torch.optim.SGD([{"params": weights}, *rest], **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


def trainer(folder, epochs=2, **options):
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(max_epochs=epochs, default_root_dir=folder, **{**plain, "enable_checkpointing": False, **options})


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_backprop_is_lightnings_own_optimisation(tmp_path, interval):
    own, plain, trainers = Module(interval=interval), Plain(interval), [trainer(tmp_path), trainer(tmp_path)]
    trainers[0].fit(own, loader())
    trainers[1].fit(plain, loader())
    assert trainers[0].global_step == trainers[1].global_step == 10
    for p, q in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert set(trainers[0].callback_metrics) >= {"train/head/loss", "train/head/accuracy"}


def test_it_continues_from_a_checkpoint_to_the_same_bits(tmp_path):
    """With two batches per update: five batches make three updates an epoch, the last of one batch."""
    whole, first, rest = (Module("local_ce", accumulate=2) for _ in range(3))
    runs = [trainer(tmp_path, 2), trainer(tmp_path, 1), trainer(tmp_path, 2)]
    runs[0].fit(whole, loader())
    runs[1].fit(first, loader())
    runs[1].save_checkpoint(tmp_path / "half.ckpt")
    runs[2].fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert runs[0].global_step == runs[2].global_step == 6
    assert same(whole, rest) and not same(whole, first)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"world_size": 2}, "wraps the whole model for several processes"), ({"precision": "16-mixed"}, "one per block")],
)
def test_what_would_break_is_refused(options, sentence):
    module = Module()
    module._trainer = SimpleNamespace(**{"world_size": 1, "precision": "32-true", **options})
    with pytest.raises(LayerwiseError, match=sentence):
        module.setup("fit")


def test_a_module_without_a_learner_is_told_so(tmp_path):
    class Empty(LearnerMixin, L.LightningModule):
        pass

    with pytest.raises(LayerwiseError, match="defines no configure_learner"):
        trainer(tmp_path).fit(Empty(), loader())
