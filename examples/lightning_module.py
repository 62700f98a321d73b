"""A `LightningModule` that is trained block by block, with a scheduler, and resumed from a checkpoint."""

import logging
import tempfile
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerwise import Learner
from layerwise.lightning import LearnerMixin

try:
    import lightning.pytorch as L
except ImportError:
    import pytorch_lightning as L

logging.getLogger(L.__name__.partition(".")[0]).setLevel(logging.ERROR)


class Digits(LearnerMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            *(nn.Linear(64, 128), nn.ReLU()), *(nn.Linear(128, 128), nn.ReLU()), nn.Linear(128, 10)
        )

    def configure_learner(self):  # instead of a training step
        return Learner(self.model, "local_ce", lr=3e-3, example=torch.zeros(2, 64))

    def configure_optimizers(self):  # optional: without it there is no scheduler
        schedule = torch.optim.lr_scheduler.StepLR(self.learner.optimizer, step_size=2, gamma=0.5)
        return {"optimizer": self.learner.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())


def trainer(folder, epochs):
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_epochs=epochs, default_root_dir=folder, accelerator="cpu", **plain)


def main() -> float:
    warnings.filterwarnings("ignore", module=L.__name__.partition(".")[0])
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(x.float() / 16, y)
    train, test = torch.utils.data.random_split(data, [1437, 360], torch.Generator().manual_seed(0))
    loaders = DataLoader(train, 64), DataLoader(test, 360)
    with tempfile.TemporaryDirectory() as folder:
        whole, module = trainer(folder, 4), Digits()
        whole.fit(module, *loaders)
        accuracy = float(whole.callback_metrics["accuracy"])
        print(f"{whole.global_step} updates, rate {module.learner.optimizer.param_groups[0]['lr']:.2e}")
        print(f"head's loss {float(whole.callback_metrics['train/head/loss']):.2f}, test accuracy {accuracy:.2f}")

        half, first = trainer(folder, 2), Digits()
        half.fit(first, *loaders)
        half.save_checkpoint(f"{folder}/half.ckpt")
        rest, second = trainer(folder, 4), Digits()
        rest.fit(second, *loaders, ckpt_path=f"{folder}/half.ckpt")
        pairs = zip(module.parameters(), second.parameters(), strict=True)
        print("the same bits after resuming:", all(torch.equal(a, b) for a, b in pairs))
    return accuracy


if __name__ == "__main__":
    main()
