"""The first layer of a block: which modules it is, the names of what it learns, a copy of it."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from layerwise.core.blocks import Block
from layerwise.core.call_blocks import CallBlock
from layerwise.core.chains import Chain, is_sequential
from layerwise.errors import LayerwiseError

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(eq=False)
class FirstLayer:
    """What a block runs first.

    Of a chain of modules that is the first module with weights other than a norm's, with what is before it, and what
    follows it up to the next such module: norm, activation, pooling. A residual unit is one module, and so is an
    `nn.Sequential` of modules of several kinds. A block that is no chain is one layer.
    """

    block: Block
    modules: list[nn.Module]
    whole: bool
    """Whether the block has no other layer."""

    def parameter_names(self) -> list[str]:
        """Names in the model of its parameters, in the order of those of a copy."""
        paths = {id(module): path for path, module in self.block._model.named_modules(remove_duplicate=False)}
        found = []
        for name, _ in nn.Sequential(*self.modules).named_parameters():
            place, _, rest = name.partition(".")
            path = paths[id(self.modules[int(place)])]
            found.append(f"{path}.{rest}" if path else rest)
        return found

    def copied(self, device: torch.device) -> nn.Module:
        """A copy that starts from its weights.

        Args:
            device: where the copy lives.

        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> from layerwise.core.blocks import Partition
        >>> first_layer(Partition(net, ["1", "3"]).blocks[1]).copied(torch.device("cpu"))
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
        )
        """
        if self.block.before is not None:
            self.block.before()  # an offloaded block has to be fetched
        own = nn.Sequential(*self.modules)
        made = copy.deepcopy(own).to_empty(device=device)  # a plain copy of an offloaded block's buffer takes its slot
        with torch.no_grad():
            for new, old in zip(
                [*made.parameters(), *made.buffers()], [*own.parameters(), *own.buffers()], strict=True
            ):
                new.copy_(old)
        return self.block.called(made[0]) if isinstance(self.block, CallBlock) else made


def first_layer(block: Block) -> FirstLayer:
    """The first layer of a block.

    Raises:
        LayerwiseError: the block was traced out of a model, so that there is no chain of modules to look at.
    """
    if isinstance(block, CallBlock):
        return FirstLayer(block, [block._model.get_submodule(block.name)], whole=True)
    if not isinstance(block.run, Chain):
        raise LayerwiseError(
            f"block {block.name!r} was traced out of {type(block._model).__name__}, so its first layer cannot be "
            "copied; wrap the model as nn.Sequential of its parts, or leave ahead out."
        )
    modules = opened_chain(block.run.modules)
    layers = [i for i, module in enumerate(modules) if has_weights(module) and not isinstance(module, NORMS)]
    if len(layers) < 2:
        return FirstLayer(block, modules, whole=True)
    second = layers[1]
    return FirstLayer(block, modules[:second], whole=False)


def opened_chain(modules: list[nn.Module]) -> list[nn.Module]:
    """The modules, with each `nn.Sequential` of modules of one kind opened, such as a stage of residual units.

    One of several kinds is a layer itself: a convolution with norm and activation, attention and a perceptron.
    """
    found: list[nn.Module] = []
    for module in modules:
        plain = is_sequential(module) and not module._forward_hooks and not module._forward_pre_hooks
        alike = plain and len({type(child) for child in module.children()}) == 1
        found += opened_chain(list(module.children())) if alike else [module]
    return found


def has_weights(module: nn.Module) -> bool:
    """Whether a module holds parameters."""
    return next(module.parameters(), None) is not None
