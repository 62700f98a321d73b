"""Hidden units of a network: outputs of a layer that one other layer reads, and nothing else."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from layerwise.core.blocks import Partition
from layerwise.core.chains import Chain, is_sequential
from layerwise.core.functional import wide
from layerwise.core.layers import CONVOLUTIONS, NORMS

LAYERS = (nn.Linear, *CONVOLUTIONS)
_ACT_ON_EACH = ("activation", "pooling", "dropout", "flatten")
"""Files of torch.nn whose modules keep units apart, but for those below."""
_MIX = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU, nn.MultiheadAttention, nn.Unflatten)
_FUNCTIONS = ("relu", "relu_", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "dropout")


@dataclass(eq=False)
class HiddenUnits:
    """The outputs of a layer, and the layer that reads them; a convolution's units are its channels."""

    site: int
    """The site of the reader: the block where the units' activity is seen."""
    layer: Any
    between: list[nn.Module]
    """What is between the two: norms, activations, pooling."""
    reader: Any

    @property
    def count(self) -> int:
        """Number of units."""
        return _outputs(self.layer)

    def activity(self, x: Tensor) -> Tensor:
        """Mean of |x| for every unit, over samples and places, from the reader's input x."""
        x = wide(x.detach()).abs()
        if isinstance(self.reader, nn.Linear):
            return x.reshape(-1, self.count, x.shape[-1] // self.count).mean((0, 2))
        return x.transpose(0, 1).flatten(1).mean(1)

    def outgoing(self) -> Tensor:
        """Mean of |w| for every unit, over the reader's weights of it."""
        return wide(self._weights_of_units(self.reader.weight.detach())).abs().mean((0, 2))

    def _weights_of_units(self, weight: Tensor) -> Tensor:
        """The reader's weight, or a tensor of its shape, as `(outputs, units, ...)`."""
        return weight.reshape(weight.shape[0], self.count, -1)

    def parameters(self) -> list[nn.Parameter]:
        """What belongs to the units: incoming and outgoing weights, and what norms have of their own for each."""
        own = [module.parameters(recurse=False) for module in (self.layer, *self._norms())]
        return [*(p for parameters in own for p in parameters), self.reader.weight]

    def _norms(self) -> list[Any]:
        return [module for module in self.between if isinstance(module, NORMS)]

    @torch.no_grad()
    def renew(self, chosen: Tensor, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        r"""Give units new incoming weights, uniform in $\pm 1/\sqrt{n}$ for n inputs, and outgoing weights of zero.

        Incoming biases become 0, and what a norm has for these units is as at the start.

        Args:
            chosen: which units, `(count,)`.
            draw: gives the weights.

        Returns:
            Pairs of a parameter and the mask of its entries that are new, of its shape.
        """
        weight = self.layer.weight
        bound = weight[0].numel() ** -0.5
        fresh = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        fresh.uniform_(-bound, bound, generator=draw)
        values: list[tuple[Any, Any, Tensor]] = [(weight, fresh.to(weight.dtype), self._rows(chosen, weight))]
        if self.layer.bias is not None:
            values.append((self.layer.bias, 0, chosen))
        for norm in self._norms():
            if norm.weight is not None:
                values.append((norm.weight, 1, chosen))
            if getattr(norm, "bias", None) is not None:
                values.append((norm.bias, 0, chosen))
            if getattr(norm, "running_mean", None) is not None:
                norm.running_mean.masked_fill_(chosen, 0)
                norm.running_var.masked_fill_(chosen, 1)
        read = self.reader.weight
        of_units = chosen[None, :, None].expand_as(self._weights_of_units(read)).reshape(read.shape)
        values.append((read, 0, of_units))
        for parameter, value, mask in values:
            parameter.copy_(torch.where(mask, value, parameter))
        return [(parameter, mask) for parameter, _, mask in values]

    def _rows(self, chosen: Tensor, weight: Tensor) -> Tensor:
        return chosen.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight)


_FOUND: WeakKeyDictionary[Partition, list[HiddenUnits]] = WeakKeyDictionary()


def hidden_units(network: Partition) -> list[HiddenUnits]:
    """All hidden units of a network, in its order.

    They are found along its chain of modules, from block to block, and inside modules that `torch.fx` can trace, such
    as the perceptron of a transformer block or a residual unit; a model that is no chain is traced, or its parts are. A
    layer whose output is also read elsewhere (by a residual connection), that has shared weights or runs twice, has
    none.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(units.site, units.count) for units in hidden_units(Partition(net, ["1", "3"]))]
    [(1, 8), (2, 8)]
    """
    if network not in _FOUND:
        _FOUND[network] = _search(network)
    return _FOUND[network]


def _search(network: Partition) -> list[HiddenUnits]:
    chains = [block.run.modules for block in network.sites if isinstance(block.run, Chain)]
    if len(chains) == len(network.sites):
        chain = [(site, module) for site, modules in enumerate(chains) for module in _flat(modules)]
        found = _along(chain)
    else:
        chain = [(0, network.model)]
        owner = {id(p): site for site, block in enumerate(network.sites) for p in block.parameters()}
        found = [replace(units, site=owner[id(units.reader.weight)]) for units in _inside(network.model, 0)]
    runs = Counter(id(m) for _, module in chain for m in module.modules())
    held = Counter(id(p) for m in network.model.modules() for p in m._parameters.values() if p is not None)
    return [
        units
        for units in found
        if _fits(units)
        and runs[id(units.layer)] == runs[id(units.reader)] == 1
        and all(held[id(p)] == 1 for p in units.parameters())
    ]


def _along(chain: list[tuple[int, nn.Module]]) -> list[HiddenUnits]:
    """Hidden units of modules that run one after the other, each with its site."""
    found: list[HiddenUnits] = []
    layer, between = None, []
    for site, module in chain:
        if type(module) in LAYERS:
            if layer is not None:
                found.append(HiddenUnits(site, layer, between, module))
            layer, between = module, []
        elif _acts_on_each(module):
            between.append(module)
        else:
            layer, between = None, []
            found += _inside(module, site)
    return found


def _flat(modules: list[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        yield from _flat(list(module.children())) if is_sequential(module) else [module]


def _acts_on_each(module: nn.Module) -> bool:
    """Whether a module leaves every unit in its place, and reads only it (a norm may read others too)."""
    if type(module) in (nn.Identity, *NORMS):
        return True
    home, _, file = type(module).__module__.rpartition(".")
    return home == "torch.nn.modules" and file in _ACT_ON_EACH and not isinstance(module, _MIX)


def _inside(module: nn.Module, site: int) -> list[HiddenUnits]:
    """Hidden units inside a module that is no chain; those inside its parts where it cannot be traced."""
    try:
        graph = _Leaves().trace(module)
    except Exception:  # a user's forward may do anything, such as look at a size
        return [units for child in module.children() for units in _inside(child, site)]
    modules = dict(module.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for start in graph.nodes:
        layer = modules[start.target] if start.op == "call_module" else None
        if type(layer) not in LAYERS or calls[start.target] > 1:
            continue
        node, between = start, []
        while len(node.users) == 1:
            (user,) = node.users
            if not user.args or user.args[0] is not node or user.all_input_nodes != [node]:
                break
            if user.op == "call_module":
                called = modules[user.target]
                if type(called) in LAYERS and calls[user.target] == 1:
                    found.append(HiddenUnits(site, layer, between, called))
                if type(called) in LAYERS or not _acts_on_each(called):
                    break
                between.append(called)
            elif getattr(user.target, "__name__", user.target) not in _FUNCTIONS:
                break
            node = user
    return found


class _Leaves(fx.Tracer):
    """Traces down to modules without children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(m.children())


def _outputs(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _fits(units: HiddenUnits) -> bool:
    """Whether every unit has its own inputs of the reader, and its own entries of the norms."""
    count, reader = units.count, units.reader
    flat = [m for m in units.between if isinstance(m, nn.Flatten)]
    whole = all((m.start_dim, m.end_dim) == (1, -1) for m in flat)
    for norm in units._norms():
        shape = getattr(norm, "normalized_shape", None)
        size = getattr(norm, "num_features", getattr(norm, "num_channels", None)) if shape is None else shape
        if size not in (count, (count,)):
            return False
    if isinstance(reader, nn.Linear):
        if isinstance(units.layer, nn.Linear):
            return whole and reader.in_features == count
        return whole and bool(flat) and reader.in_features % count == 0
    return type(units.layer) is type(reader) and not flat and reader.groups == 1 and reader.in_channels == count
