"""Which values in a graph are never negative, and which operations pass signs on."""

from numbers import Real
from typing import Any

import torch
from torch import fx, nn

from nncx.compress._trace import called_module, read_value

# Activations that are never negative, where removal leaves the sign of what they were given.
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
_ACTIVATION_OPERATIONS = {"relu", "relu6", "sigmoid", "hardsigmoid", "softplus"}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUT_OPERATIONS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}

# Never negative, whatever they are given. Operations are functions and methods alike.
_NON_NEGATIVE_MODULES = (*ACTIVATIONS, nn.Softmax, nn.Softmax2d, nn.Softmin)
_NON_NEGATIVE_OPERATIONS = {
    *(*_ACTIVATION_OPERATIONS, "softmax", "softmin"),
    *("abs", "absolute", "square", "sqrt", "exp", "norm", "var", "std"),
    *("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"),
}

# Their values are those of their first input, moved, repeated, averaged or scaled: never negative
# where it is not, and a sign taken behind them tells as much as one taken before them.
# Bicubic interpolation may overshoot below zero, too rarely to be of use to a sign.
_POOLS = nn.modules.pooling
_PASSING_MODULES = (
    *(_POOLS._MaxPoolNd, _POOLS._AvgPoolNd, _POOLS._AdaptiveMaxPoolNd, _POOLS._AdaptiveAvgPoolNd),
    *(*DROPOUTS, nn.Identity, nn.Flatten, nn.Unflatten, nn.Unfold, nn.Fold, nn.Upsample),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.LocalResponseNorm),
    *(nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd),
    *(nn.modules.padding._CircularPadNd, nn.modules.padding._ConstantPadNd),
)
_PASSING_OPERATIONS = {
    *_DROPOUT_OPERATIONS,
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)),
    *(f"adaptive_max_pool{n}d" for n in (1, 2, 3)),
    *("mean", "sum", "amax", "amin", "local_response_norm", "normalize"),
    *("interpolate", "pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("native_channel_shuffle", "unfold", "fold"),
    *("getitem", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select"),
    *("slice", "split_with_sizes", "upsample_nearest2d", "upsample_bilinear2d"),
    *("flatten", "unflatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose"),
    *("t", "movedim", "moveaxis", "swapaxes", "swapdims", "flip", "roll", "contiguous"),
    *("expand", "expand_as", "repeat", "repeat_interleave", "tile", "reshape_as", "view_as"),
    *("clone", "detach", "to", "type", "type_as", "float", "half", "bfloat16", "double"),
}
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}  # pass on all inputs

# Never negative if no operand is.
_ARITHMETIC = {
    *("add", "iadd", "mul", "imul", "multiply"),
    *("div", "divide", "true_divide", "truediv", "itruediv"),
}
_COMBINATIONS = {"minimum", "min", "matmul", "bmm", "lp_pool1d", "lp_pool2d", "lp_pool3d"}
_BOUNDS = {"clamp": "min", "clip": "min", "clamp_min": "min", "hardtanh": "min_val"}


def never_negative(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of `graph` whose values are never negative, in one pass."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        passed = passed_inputs(node)
        if found.issuperset(passed) if passed else _is_never_negative(node, found):
            found.add(node)
    return found


def passed_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose signs are those of the values of `node`; none if it computes its own."""
    if operation(node) in _JOINS:
        return node.all_input_nodes
    if isinstance(called_module(node), _PASSING_MODULES) or operation(node) in _PASSING_OPERATIONS:
        return [] if _pads_with_negative(node) else node.all_input_nodes[:1]
    return []


def drops(node: fx.Node) -> bool:
    """Whether `node` is a dropout, which sets values to zero."""
    return isinstance(called_module(node), DROPOUTS) or operation(node) in _DROPOUT_OPERATIONS


def activates(node: fx.Node) -> bool:
    """Whether `node` is a ReLU or another activation whose removal would help."""
    return isinstance(called_module(node), ACTIVATIONS) or operation(node) in _ACTIVATION_OPERATIONS


def operation(node: fx.Node) -> str | None:
    """The name of the torch function, operator or tensor method that `node` calls.

    The underscores of a variant in place are dropped, and what follows the point in the name of an
    overload, which a `nncx.graph.Graph` calls.
    """
    if node.op == "call_method":
        return node.target.strip("_")
    if node.op == "call_function":
        module = getattr(node.target, "__module__", None) or "torch"
        if module.split(".")[0] in {"torch", "_operator"}:
            return node.target.__name__.partition(".")[0].strip("_")
    return None


def _is_never_negative(node: fx.Node, found: set[fx.Node]) -> bool:
    if node.op == "call_module":
        return _is_never_negative_module(called_module(node), node, found)
    if node.op == "get_attr":
        return _is_never_negative_constant(read_value(node))
    name = operation(node)
    first, second = _argument(node, 0, "input"), _argument(node, 1, "other")
    if name in _NON_NEGATIVE_OPERATIONS:
        return True
    if name in _BOUNDS:
        return first in found or _at_least_zero(_argument(node, 1, _BOUNDS[name]), found)
    if name in {"maximum", "max"}:
        return any(source in found for source in node.all_input_nodes)
    if name == "threshold":
        return all(_at_least_zero(value, found) for value in node.args[1:3])
    if name in _ARITHMETIC:
        alpha = node.kwargs.get("alpha", 1)
        square = name in {"mul", "imul", "multiply"} and first is second
        return square or all(_at_least_zero(value, found) for value in (first, second, alpha))
    if name in {"pow", "ipow"}:
        exponent = _argument(node, 1, "exponent")
        return first in found or (isinstance(exponent, Real) and exponent % 2 == 0)
    return name in _COMBINATIONS and found.issuperset(node.all_input_nodes)


def _is_never_negative_module(module: nn.Module, node: fx.Node, found: set[fx.Node]) -> bool:
    if isinstance(module, nn.Hardtanh):
        return module.min_val >= 0 or node.all_input_nodes[0] in found
    if isinstance(module, nn.Threshold):
        return module.threshold >= 0 and module.value >= 0
    if isinstance(module, _POOLS._LPPoolNd):
        return node.all_input_nodes[0] in found
    return isinstance(module, _NON_NEGATIVE_MODULES)


def _is_never_negative_constant(value: Any) -> bool:
    """A parameter may change, other tensors that a forward reads hardly do."""
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter) or value.is_meta:
        return False
    return not value.is_complex() and bool((value >= 0).all())


def _at_least_zero(value: Any, found: set[fx.Node]) -> bool:
    return value in found if isinstance(value, fx.Node) else isinstance(value, Real) and value >= 0


def _pads_with_negative(node: fx.Node) -> bool:
    value = getattr(called_module(node), "value", None)
    if operation(node) == "pad":
        value = _argument(node, 3, "value")
    return isinstance(value, Real) and value < 0


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
