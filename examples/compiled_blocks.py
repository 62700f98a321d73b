"""`torch.compile` for the parts inside the blocks, or for every block of a chain, but never for the whole model."""

import sys

import torch
import torch._dynamo
from torch import nn

import layerwise


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, scale):
        return x + scale * self.mlp(self.norm(x))


class Network(nn.Module):
    def __init__(self, width=32, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return self.head(x)


def main(backend: str = "aot_eager") -> float:
    torch.manual_seed(0)
    x, y = torch.randn(64, 32), torch.randint(5, (64,))
    plain, model = Network(), Network()
    model.load_state_dict(plain.state_dict())
    for layer in model.layers:
        layer.mlp.compile(backend=backend)  # inside a block: the pass is stopped after the layer
    losses = []
    for network in (plain, model):
        learner = layerwise.Learner(network, "local_ce", cuts="layers.*", lr=1e-2)
        for _ in range(10):
            metrics = learner.step(x, y)
        losses.append(float(metrics.loss))
    print(f"loss {losses[0]:.3f}, compiled {losses[1]:.3f}")
    try:
        layerwise.Learner(torch.compile(plain, backend=backend), "local_ce", cuts="layers.*")
    except layerwise.LayerwiseError as refused:
        print(refused)
    return losses[1] - losses[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
