"""Modules that replace torch's: they keep less for the backward pass, or compute with fewer bits.

They work with every rule, because they shrink a block's own graph. `replace` puts them into a model.
"""

from layerwise.replacements.activations import ApproxGELU, ApproxSiLU, MaskReLU
from layerwise.replacements.binary import BinaryConv2d, BinaryLinear
from layerwise.replacements.discrete import OneHot
from layerwise.replacements.norms import MSLayerNorm, MSRMSNorm
from layerwise.replacements.replacing import check_name, names, replace
from layerwise.replacements.sparse import BiMaskLinear
from layerwise.replacements.velora import VeLoRALinear

__all__ = [
    "ApproxGELU",
    "ApproxSiLU",
    "BiMaskLinear",
    "BinaryConv2d",
    "BinaryLinear",
    "MSLayerNorm",
    "MSRMSNorm",
    "MaskReLU",
    "OneHot",
    "VeLoRALinear",
    "check_name",
    "names",
    "replace",
]
