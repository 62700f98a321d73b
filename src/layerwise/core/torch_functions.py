"""Names of torch's functions by what they do to the dimensions of their arguments."""

REARRANGING = {
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "adjoint"),
    *("unsqueeze", "squeeze", "select"),
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "logsumexp", "prod", "median", "argmax"),
    *("argmin", "nanmean", "all", "any"),
}
"""Functions that move, add or drop dimensions; what they do shows when they are called on a small tensor."""


OPERATORS = (
    *("add", "sub", "mul", "div", "truediv", "floordiv", "pow", "mod", "and", "or", "xor", "lshift", "rshift"),
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "not"),
)
KEEPING = {
    *(f"__{prefix}{name}__" for name in OPERATORS for prefix in ("", "r", "i")),
    *OPERATORS,
    # elementwise functions
    *(
        "subtract",
        "multiply",
        "divide",
        "true_divide",
        "floor_divide",
        "remainder",
        "fmod",
        "rsub",
        "negative",
        "positive",
    ),
    *("absolute", "sign", "sgn", "signbit", "reciprocal", "square", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log"),
    *("log2", "log10", "log1p", "logaddexp", "logaddexp2", "xlogy", "sin", "cos", "tan", "sinh", "cosh", "tanh"),
    *("asin", "acos", "atan", "asinh", "acosh", "atanh", "arcsin", "arccos", "arctan", "arcsinh", "arccosh", "arctanh"),
    *("atan2", "arctan2", "sinc", "erf", "erfc", "erfinv", "lgamma", "digamma", "i0", "logit", "expit", "float_power"),
    *(
        "floor",
        "ceil",
        "round",
        "trunc",
        "fix",
        "frac",
        "clamp",
        "clip",
        "clamp_min",
        "clamp_max",
        "maximum",
        "minimum",
    ),
    *("fmax", "fmin", "lerp", "addcmul", "addcdiv", "hypot", "copysign", "heaviside", "ldexp", "nan_to_num", "where"),
    *("isnan", "isinf", "isfinite", "isclose", "logical_and", "logical_or", "logical_not", "logical_xor"),
    *("bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "greater", "greater_equal", "less", "less_equal"),
    *("not_equal", "deg2rad", "rad2deg", "masked_fill", "masked_scatter", "fill", "zero", "copy", "bernoulli"),
    *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "real", "imag", "conj", "angle", "polar"),
    *("threshold", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "elu", "selu", "celu", "leaky_relu"),
    *("prelu", "rrelu", "gelu", "silu", "mish", "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink"),
    *("logsigmoid", "sigmoid", "special_expit", "glu", "swiglu"),
    *("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_alpha_dropout"),
    # along dimensions that stay where they are
    *("softmax", "log_softmax", "softmin", "gumbel_softmax", "normalize", "local_response_norm", "renorm", "cumsum"),
    *("cumprod", "logcumsumexp", "cummax", "cummin", "diff", "sort", "argsort", "topk", "roll", "flip", "fliplr"),
    *("flipud", "tril", "triu", "pad", "cat", "concat", "concatenate", "chunk", "split", "split_with_sizes"),
    *("tensor_split", "narrow", "index_select", "gather", "take_along_dim", "index_add", "index_copy", "index_fill"),
    *("scatter", "scatter_add", "scatter_reduce", "repeat", "tile", "repeat_interleave", "expand", "expand_as"),
    *("broadcast_to", "broadcast_tensors", "interpolate", "upsample", "grid_sample", "pixel_shuffle"),
    *("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "lp_normalize"),
    # copies, types and places
    *("clone", "detach", "contiguous", "to", "type", "type_as", "cpu", "cuda", "float", "double", "half", "bfloat16"),
    *("int", "long", "short", "bool", "cfloat", "cdouble", "data", "grad", "alias", "requires_grad", "__deepcopy__"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "resolve_conj"),
    *("resolve_neg", "pin_memory", "__setitem__", "retain_grad", "_make_subclass", "as_subclass"),
}
"""Functions whose results have the dimensions of their arguments, in the same places."""
