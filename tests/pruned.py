"""What a network with fewer channels must compute, found without knowing how they were chosen."""

import copy

import torch
from graphs import with_statistics
from torch import nn

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def randomized(model):
    """In float64 and eval mode, with random statistics: no two weights are the same number."""
    model = with_statistics(model).double().eval()
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    return model


def without_what_reads(model, smaller):
    """`model` with weights of 0 where `smaller` has none: those of the maps that are gone.

    The filters of those maps stay, so whoever still reads one would show it. Which weights are left
    is seen from their values.
    """
    model = copy.deepcopy(model)
    for name, layer in smaller.named_modules():
        if isinstance(layer, WEIGHTED):
            before = model.get_submodule(name)
            there = torch.isin(before.weight, layer.weight)
            assert int(there.sum()) == layer.weight.numel(), f"{name} has weights of its own"
            rows = there.flatten(1).any(1).view(-1, *[1] * (there.dim() - 1))
            if getattr(layer, "transposed", False):
                rows = there.any(0, keepdim=True).any(3, keepdim=True).any(2, keepdim=True)
            before.weight.data *= there | ~rows
    return model


def check_smaller(model, smaller, x):
    """That `smaller` computes what `model` does without what reads the maps that are gone."""
    with torch.no_grad():
        wanted, got = without_what_reads(model, smaller)(x), smaller(x)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def sizes(model):
    """Outputs of each convolution and linear layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, WEIGHTED)}
    return {name: getattr(m, "out_channels", None) or m.out_features for name, m in layers.items()}
