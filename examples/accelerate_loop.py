"""accelerate in a plain loop: it handles loaders, device and checkpoints, and the learner makes the update."""

import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerwise import Learner


def setting(accelerator):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 128), nn.ReLU()), *(nn.Linear(128, 128), nn.ReLU()), nn.Linear(128, 10))
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(x.float() / 16, y), 64)
    model, loader = accelerator.prepare(model, loader)  # no optimizer: every block has its own
    learner = Learner(model, "local_ce", lr=3e-3, example=torch.zeros(2, 64))
    accelerator.register_for_checkpointing(learner)
    return learner, loader


def main() -> float:
    accelerator = Accelerator(cpu=True)
    learner, loader = setting(accelerator)
    for _ in range(3):
        for x, y in loader:
            metrics = learner.step(x, y)  # instead of accelerator.backward(loss); optimizer.step()
    accelerator.print(f"loss {metrics.loss:.2f} after {learner.updates} updates")

    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        other = Accelerator(cpu=True)
        twin, _ = setting(other)
        other.load_state(folder)
    learner.step(x, y)
    twin.step(x, y)
    pairs = zip(learner.network.parameters(), twin.network.parameters(), strict=True)
    accelerator.print("the same bits after loading:", all(torch.equal(a, b) for a, b in pairs))
    return float(metrics.loss)


if __name__ == "__main__":
    main()
