"""A running average of the weights (EMA) together with a learner, with torch's own `AveragedModel`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from layerwise import Learner


def block(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())


def main(epochs: int = 4) -> float:
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(0)
    model = nn.Sequential(block(64, 128), block(128, 128), nn.Linear(128, 10))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    learner = Learner(model, "local_ce", lr=1e-2)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            learner.step(x[batch], y[batch])
            averaged.update_parameters(model)  # the model is an ordinary module
    update_bn((x[batch] for batch in train.split(64)), averaged)
    averaged.eval()
    accuracy = [(logits.argmax(1) == y[test]).float().mean().item() for logits in (learner(x[test]), averaged(x[test]))]
    print(f"test accuracy {accuracy[0]:.2f}, of the average {accuracy[1]:.2f}")
    return accuracy[1]


if __name__ == "__main__":
    main()
