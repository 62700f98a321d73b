"""Tensors of the next block that modules follow (`FollowsNextBlock`)."""

from torch import Tensor

from layerwise.core.blocks import Block
from layerwise.core.rule import Site


class NextBlock:
    """Tensors of the next block, which is in this process."""

    def tensors(self, site: Site, names: list[str]) -> list[Tensor]:
        """The tensors of these names, of the block after a site, on the device."""
        assert site.network is not None
        return self.read(site.network.blocks[site.index + 1], names)

    def read(self, block: Block, names: list[str]) -> list[Tensor]:
        """A block's tensors of these names, on the device."""
        if block.before is not None:
            block.before()  # an offloaded block has to be fetched
        return [registry[name] for registry, name in map(block.place, names)]

    def tell(self) -> None:
        """Before an update: let others have what they follow of the blocks here; nobody else does."""
