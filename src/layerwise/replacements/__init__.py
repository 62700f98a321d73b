"""Modules that replace torch's: they keep less for the backward pass, or compute with fewer bits.

They work with every rule, because they shrink a block's own graph. `replace` puts them into a model.
"""

from layerwise.replacements.activations import ApproxGELU, ApproxSiLU, MaskReLU
from layerwise.replacements.binary import BinaryConv2d, BinaryLinear
from layerwise.replacements.biper import BiPerConv2d, BiPerLinear
from layerwise.replacements.compressed import SparseLinear
from layerwise.replacements.discrete import OneHot
from layerwise.replacements.division import DivisionBatchNorm2d, DivisionConv2d
from layerwise.replacements.low_precision import LowPrecisionConv2d, LowPrecisionLinear
from layerwise.replacements.norms import MSLayerNorm, MSRMSNorm
from layerwise.replacements.replacing import check_name, names, replace
from layerwise.replacements.shared_bits import SharedBitsConv2d, SharedBitsLinear, set_bits
from layerwise.replacements.sparse import BiMaskLinear
from layerwise.replacements.velora import VeLoRALinear

__all__ = [
    "ApproxGELU",
    "ApproxSiLU",
    "BiMaskLinear",
    "BiPerConv2d",
    "BiPerLinear",
    "BinaryConv2d",
    "BinaryLinear",
    "DivisionBatchNorm2d",
    "DivisionConv2d",
    "LowPrecisionConv2d",
    "LowPrecisionLinear",
    "MSLayerNorm",
    "MSRMSNorm",
    "MaskReLU",
    "OneHot",
    "SharedBitsConv2d",
    "SharedBitsLinear",
    "SparseLinear",
    "VeLoRALinear",
    "check_name",
    "names",
    "replace",
    "set_bits",
]
