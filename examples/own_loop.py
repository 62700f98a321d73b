"""Your own conv net in your own training loop, trained block by block on scikit-learn's 8x8 digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from layerwise import Learner


def block(inputs: int, outputs: int, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), *more
    )


def main(epochs: int = 3) -> float:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]

    torch.manual_seed(0)
    model = nn.Sequential(  # every child with weights becomes a block, the last one the head
        block(1, 32),
        block(32, 64, nn.MaxPool2d(2)),
        block(64, 64),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    learner = Learner(model, "local_ce", optimizer="adamw", lr=3e-3)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            metrics = learner.step(x[batch], y[batch])
        accuracy = (learner(x[test]).argmax(1) == y[test]).float().mean().item()
        print(f"epoch {epoch + 1}: loss {metrics.loss.item():.3f}, test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
