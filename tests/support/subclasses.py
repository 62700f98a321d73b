"""A tensor that is kept in eight bits, and an optimizer whose state and step are like those of quantised libraries."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Quantised(Tensor):
    """Codes of one byte and a scale, shown as float32."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def of(cls, x):
        scale = x.abs().amax() / 127 + 1e-12
        return cls((x / scale).round().to(torch.int8), scale)

    def plain(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            new = cls.of(args[1])
            args[0].codes.copy_(new.codes)
            args[0].scale.copy_(new.scale)
            return args[0]
        return func(*tree_map_only(cls, cls.plain, args), **tree_map_only(cls, cls.plain, kwargs or {}))


class Projector:
    """A plain object of the state that holds a tensor in a slot, a dictionary and an attribute."""

    __slots__ = ("__dict__", "inside")

    def __init__(self, size):
        self.inside, self.by_name = torch.ones(size), {"a": torch.ones(size)}
        self.itself = self


class QuantisedMomentum(torch.optim.Optimizer):
    """Momentum in eight bits, whose update is compiled as one graph."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
        self.graphs = 0
        self.compiled = torch.compile(self.update, fullgraph=True, backend=self.backend)

    def backend(self, graph, inputs):
        self.graphs += 1
        return graph

    @staticmethod
    def update(p, grad, moment, lr):
        moved = moment.plain() * 0.9 + grad
        moment.copy_(moved)
        p.sub_(moved * lr)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p] = {"moment": Quantised.of(torch.zeros_like(p)), "projector": Projector(10)}
                self.compiled(p.detach(), p.grad, self.state[p]["moment"], group["lr"])
