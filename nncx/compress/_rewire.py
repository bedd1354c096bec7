"""Which activations stand before binary layers, and can they go?

A binary layer reads signs, and the sign of what a ReLU gives is +1 everywhere. XNOR-Net therefore
puts the sign right behind the BatchNorm, where the ReLU was.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from nncx.nn import PackedLayer

# Activations that are never negative, where removal leaves the sign of what they were given.
NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
_NON_NEGATIVE_FUNCTIONS = {
    *(F.relu, F.relu_, F.relu6, F.sigmoid, F.hardsigmoid, F.softplus),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.sigmoid_),
}
_NON_NEGATIVE_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_"}

# What gives only non-negative values where it is given only such.
_TRANSPARENT_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d),
)
_TRANSPARENT_FUNCTIONS = {
    *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *(F.dropout, F.dropout2d, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle),
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute),
    *(torch.transpose, torch.cat, torch.concat, torch.mean),
}
_TRANSPARENT_METHODS = {
    *("flatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose"),
    *("contiguous", "mean", "to", "float", "half", "bfloat16"),
}
_SHAPE_METHODS = {"size", "dim", "numel"}


class _Tracer(fx.Tracer):
    """Sees through every module but torch's and our own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PackedLayer) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The calls of `model` in order of execution.

    Raises:
        ValueError: if torch.fx cannot trace it.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # the model's own code runs here and may raise anything
        raise ValueError(
            f"convert: torch.fx must be able to trace {type(model).__name__}, got"
            f" {type(error).__name__} ({error}); pass rewire=False, which removes no ReLU before"
            " a binary layer and takes layers in order of registration"
        ) from error
    for node in graph.nodes:
        if node.op == "call_module":
            node.meta["module"] = model.get_submodule(node.target)
    return graph


def called_module(node: fx.Node) -> nn.Module | None:
    """The module that a node of `trace` calls, None if it calls a function."""
    return node.meta.get("module")


def activations_to_remove(
    graph: fx.Graph, targets: set[nn.Module], kept: list[str]
) -> set[nn.Module]:
    """Activations to replace by `nn.Identity` once `targets` are binary.

    Args:
        graph: from `trace`.
        targets: the layers that will be binary, besides those that are.
        kept: names of the layers that will not be: what the error says to skip includes them.

    Raises:
        ValueError: if a binary layer is fed by one that cannot be removed.
    """
    binary = [node for node in graph.nodes if _is_binary(called_module(node), targets)]
    fed: dict[fx.Node, list[fx.Node]] = {}  # activation -> binary layers behind it
    for layer in binary:
        for activation in _non_negative_sources(layer.all_input_nodes[0]):
            fed.setdefault(activation, []).append(layer)
    obstacles = {node: _obstacle(node, graph, set(binary)) for node in fed}
    stuck = {node: reason for node, reason in obstacles.items() if reason}
    if stuck:
        activation, reason = next(iter(stuck.items()))
        skip = list(dict.fromkeys([*kept, *(layer.target for n in stuck for layer in fed[n])]))
        raise ValueError(
            f"convert: the binary layer '{fed[activation][0].target}' would see +1 everywhere,"
            f" because '{_label(activation)}' before it is never negative, and that cannot be"
            f" removed, because it {reason}; pass skip={skip}, or order the block as"
            " BatchNorm -> nn.ReLU -> layer (pre-activation), with a ReLU of its own"
        )
    return {called_module(node) for node in fed}


def _is_binary(module: nn.Module | None, targets: set[nn.Module]) -> bool:
    return module in targets or getattr(module, "precision", None) == "binary"


def _calls(node: fx.Node, modules: tuple[type, ...], functions: set, methods: set[str]) -> bool:
    return (
        isinstance(called_module(node), modules)
        or (node.op == "call_function" and node.target in functions)
        or (node.op == "call_method" and node.target in methods)
    )


def _is_transparent(node: fx.Node) -> bool:
    return _calls(node, _TRANSPARENT_MODULES, _TRANSPARENT_FUNCTIONS, _TRANSPARENT_METHODS)


def _non_negative_sources(node: fx.Node) -> Iterator[fx.Node]:
    """The activations that make `node`, or some channels of it, non-negative."""
    if _calls(node, NON_NEGATIVE_MODULES, _NON_NEGATIVE_FUNCTIONS, _NON_NEGATIVE_METHODS):
        yield node
    elif _is_transparent(node):
        for source in node.all_input_nodes:
            yield from _non_negative_sources(source)


def _obstacle(activation: fx.Node, graph: fx.Graph, binary: set[fx.Node]) -> str | None:
    """Why `activation` cannot be removed, as the end of a sentence."""
    module = called_module(activation)
    if module is None:
        return "is a function call, not a module"
    for call in graph.nodes:
        if called_module(call) is not module:
            continue
        other = _other_reader(call, binary)
        if other is not None:
            return f"also feeds '{_label(other)}'"
        if getattr(module, "inplace", False) and len(call.all_input_nodes[0].users) > 1:
            return "changes in place what others read"
    return None


def _other_reader(node: fx.Node, binary: set[fx.Node]) -> fx.Node | None:
    """Who reads the values of `node` and is not a binary layer."""
    for user in node.users:
        if user in binary or _reads_only_shape(user):
            continue
        if not _is_transparent(user):
            return user
        other = _other_reader(user, binary)
        if other is not None:
            return other
    return None


def _reads_only_shape(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in _SHAPE_METHODS) or (
        node.op == "call_function" and node.target is getattr and node.args[1] in {"shape", "ndim"}
    )


def _label(node: fx.Node) -> str:
    return node.target if node.op == "call_module" else node.name
