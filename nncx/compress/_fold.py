"""BatchNorm folded into the layer before it, on a graph."""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from nncx.graph import Graph, Node

_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def fold_batch_norm(graph: Graph, example: Tensor) -> Graph:
    """Let each convolution or linear layer do what a BatchNorm behind it does in eval mode.

        W' = W * gamma / sqrt(var + eps)        b' = (b - mean) * gamma / sqrt(var + eps) + beta

    in float64, rounded once. A BatchNorm is folded if it alone reads the layer's value, each of the
    two is called once, and the layer's outputs are the BatchNorm's channels. A folded layer is a
    new one in the graph: what shares the old one keeps it.

    Args:
        graph: in eval mode; changed in place.
        example: an input, run once, to see the shapes between the layers.

    Returns:
        `graph`.

    Raises:
        ValueError: if the graph is in training mode.
    """
    if graph.training:
        raise ValueError(
            "fold_batch_norm: the graph must be in eval mode, got training mode; call eval()"
        )
    folds = [(graph.node(node.inputs[0]), node) for node in graph.nodes if _may_fold(graph, node)]
    flat = _flat_inputs(graph, [norm.layer for _, norm in folds], example)
    for node, norm in folds:
        layer = graph.get_submodule(node.layer)
        if not isinstance(layer, nn.Linear) or norm.layer in flat:
            graph.put_layer(node.layer, fold(layer, graph.get_submodule(norm.layer)))
            graph.remove(norm.name)
    return graph


def _may_fold(graph: Graph, norm: Node) -> bool:
    if not norm.layer or norm.inputs[0] in graph.input_names:
        return False
    node = graph.node(norm.inputs[0])
    if not node.layer or not graph.is_only_read_by(node.name, norm):
        return False
    layer, batch_norm = graph.get_submodule(node.layer), graph.get_submodule(norm.layer)
    kinds = type(layer) in _FOLDABLE and type(batch_norm) in _NORMS
    once = len(graph.calls(node.layer)) == len(graph.calls(norm.layer)) == 1
    return kinds and once and batch_norm.running_var is not None


def _flat_inputs(graph: Graph, paths: list[str], example: Tensor) -> set[str]:
    """Which of these layers read rows `[N, C]`: of `[N, L, C]` a BatchNorm takes L for channels."""
    flat: set[str] = set()

    def see(path: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].dim() == 2:
            flat.add(path)

    hooks = [
        graph.get_submodule(path).register_forward_pre_hook(partial(see, path)) for path in paths
    ]
    try:
        graph(example)
    finally:
        for hook in hooks:
            hook.remove()
    return flat


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A new layer that does what `norm(layer(x))` does in eval mode."""
    gamma = 1.0 if norm.weight is None else norm.weight.double()
    beta = 0.0 if norm.bias is None else norm.bias.double()
    before = 0.0 if layer.bias is None else layer.bias.double()
    scale = gamma / (norm.running_var.double() + norm.eps).sqrt()
    bias = (before - norm.running_mean.double()) * scale + beta
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    folded = copy.deepcopy(layer)
    folded.weight = nn.Parameter(weight.to(layer.weight.dtype))
    folded.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return folded
