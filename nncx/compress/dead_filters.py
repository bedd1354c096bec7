"""Channels that carry nothing taken out of a network, which computes the same."""

import torch
from torch import Tensor, nn

from nncx._modes import evaluated
from nncx.compress._network import Example, network_of
from nncx.graph import Graph
from nncx.graph._channels import FOLLOWERS, PRODUCERS
from nncx.graph._narrow import filters, mask, narrow, with_one_left


@torch.no_grad()
def remove_dead_filters(model: nn.Module, example: Example) -> Graph:
    """The same network without the channels that are constant, or that nobody reads.

    A filter of zeros gives its bias everywhere; a BatchNorm makes another constant of that, and a
    ReLU a third. What a layer with the weights w makes of a constant c, `sum(w) c`, goes into its
    bias. Where a convolution pads with zeros that is only so for c = 0: other constants stay. A
    channel that all its readers multiply with 0 goes, too. So what the pruning of single weights
    left of a network becomes small: filters, and neurons of linear layers.

    Args:
        model: any network that can be traced, or its graph; not changed.
        example: an input of floats, or a tuple of several, as for `nncx.graph.trace`.

    Returns:
        A new graph in the mode of `model`, which in eval mode computes the same to the rounding of
        sums. Every layer keeps at least one channel.

    Raises:
        ValueError: if the model cannot be traced, an input is not of floats, or a layer has hooks
            or a reparametrised weight.
        TypeError: if the arguments are no module and tensors.
    """
    network = network_of(model, example, "remove_dead_filters")
    graph, channels = network.graph, network.channels
    makers = {layer: found for layer, found in channels.layers.items() if found.makes}
    constants = _constants(graph, network.inputs)
    units = {unit for found in makers.values() for unit in found.outputs.tolist()}
    units -= channels.kept.keys()
    for layer, found in makers.items():
        alive = found.inputs[constants[layer].isnan() & _reads(layer)]
        units.difference_update(alive.tolist())
    dead = with_one_left(channels, units)
    stays = mask(channels, dead)
    result = narrow(graph, channels, dead)
    for layer, found in makers.items():
        shift = _response(layer, constants[layer].masked_fill(stays[found.inputs], 0))
        _add_to_bias(result.get_submodule(network.paths[layer]), shift[stays[found.outputs]])
    return result


def _constants(graph: Graph, inputs: tuple[Tensor, ...]) -> dict[nn.Module, Tensor]:
    """For each layer with weights, `[in]`: the constants among its inputs, NaN for the others.

    The graph is run on NaN. What is a number then, does not depend on the input. As 0 times NaN is
    NaN, layers with weights are replaced by `_response`, and norms are helped.
    """
    for each in inputs:
        if not each.is_floating_point():
            raise ValueError(
                "remove_dead_filters: inputs must be of floats, whose channels can be told from"
                f" constants, got {each.dtype}; prune the part of the model behind"
            )
    found: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if type(layer) in FOLLOWERS:
            return output if type(layer) is nn.PReLU else _normalised(layer, output)
        if type(layer) not in PRODUCERS:
            return torch.full_like(output, torch.nan)
        read = _constants_of(layer, args[0])
        found[layer] = torch.where(found.get(layer, read) == read, read, torch.nan)
        made = _response(layer, read)
        made = made if layer.bias is None else made + layer.bias.cpu()
        dim = -1 if isinstance(layer, nn.Linear) else 1
        view = [1 for _ in output.shape]
        view[dim] = -1
        return made.to(output).view(view).expand_as(output).clone()

    layers = dict.fromkeys(graph.named_layers().values())
    hooks = [layer.register_forward_hook(see) for layer in layers]
    try:
        with evaluated(graph):
            graph(*(torch.full_like(each[:1], torch.nan) for each in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _normalised(layer: nn.Module, output: Tensor) -> Tensor:
    """What a norm gives: its beta where gamma is 0."""
    if layer.weight is None:
        return output
    view = [1, -1, *(1 for _ in output.shape[2:])]
    return torch.where(layer.weight.view(view) == 0, layer.bias.view(view), output)


def _constants_of(layer: nn.Module, value: Tensor) -> Tensor:
    """Of the channels of `value`: the number that the layer reads everywhere, else NaN."""
    linear = isinstance(layer, nn.Linear)
    rows = value.movedim(-1 if linear else 1, 0).flatten(1).cpu().double()
    first = rows[:, 0]
    constant = (rows == rows[:, :1]).all(1)
    if not linear and _sees_border(layer):
        constant &= first == 0
    return first.masked_fill(~constant, torch.nan)


def _sees_border(layer: nn.modules.conv._ConvNd) -> bool:
    """Whether not every output is a sum over the whole kernel."""
    if layer.transposed:
        return True
    return layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)


def _response(layer: nn.Module, constants: Tensor) -> Tensor:
    """What the layer, without its bias, makes of constant inputs; NaN if it reads one."""
    weight = filters(layer).cpu().double()
    inputs = constants.view(getattr(layer, "groups", 1), 1, -1)
    per_group = weight.unflatten(0, (len(inputs), -1))
    products = per_group.sum(3) * inputs
    return products.masked_fill((per_group == 0).all(3), 0).sum(2).flatten()


def _reads(layer: nn.Module) -> Tensor:
    """Which of its inputs the layer does not multiply with 0 throughout."""
    per_group = filters(layer).cpu().unflatten(0, (getattr(layer, "groups", 1), -1))
    return (per_group != 0).any(3).any(1).flatten()


def _add_to_bias(layer: nn.Module, shift: Tensor) -> None:
    if shift.any():
        before = 0 if layer.bias is None else layer.bias.detach().cpu().double()
        layer.bias = nn.Parameter((before + shift).to(layer.weight), layer.weight.requires_grad)
