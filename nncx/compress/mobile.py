"""Factorised convolutions on kernels of their own, with what follows them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nncx.compress._counterpart import GEOMETRY
from nncx.compress._fold import fold
from nncx.nn.mobile import (
    ChannelShuffle,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    GroupedConv2d,
)

_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


@dataclass(frozen=True)
class Mobile:
    """The method of fast factorised layers for `nncx.convert`: nothing is lost, no bit is saved.

    Every `nn.Conv2d` that is depthwise becomes an `nncx.DepthwiseConv2d`, every other that has
    groups or a 1x1 kernel an `nncx.GroupedConv2d`, and every `nn.ChannelShuffle` an
    `nncx.ChannelShuffle`. They compute the same, in training too.

    In eval mode a layer also does what stands behind it, as far as it alone is read there and each
    is called once: a BatchNorm, whose statistics go into new weights and a bias; a ReLU or ReLU6;
    after a grouped convolution a shuffle; after a depthwise one a pointwise one, with a BatchNorm,
    ReLU or ReLU6 of its own: the two become an `nncx.DepthwiseSeparableConv2d`. What is done
    becomes `nn.Identity`. Other convolutions stay torch's, but take in their BatchNorm. So convert
    in eval mode to deploy, in training mode to train.
    """

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = True

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`; subclasses may mean something else."""
        return type(module) is nn.ChannelShuffle or _is_factor(module)

    def absorbs(self, layer: nn.Module, behind: tuple[nn.Module, ...], module: nn.Module) -> bool:
        """Whether the layer for `layer`, which does what is `behind` it, can do `module` too."""
        if type(layer) is not nn.Conv2d or layer.training or module.training:
            return False
        *first, (layer, behind) = _halves(layer, behind)
        kinds = [type(each) for each in behind]
        if type(module) is nn.BatchNorm2d:
            fits = module.running_var is not None and module.num_features == layer.out_channels
            return not behind and fits
        if not _is_factor(layer):
            return False
        if type(module) in _ACTIVATIONS:
            return kinds in ([], [nn.BatchNorm2d])
        if _is_pointwise(module):
            return not first and _layer_for(layer) is DepthwiseConv2d
        is_shuffle = type(module) is nn.ChannelShuffle and nn.ChannelShuffle not in kinds
        return is_shuffle and not first and _layer_for(layer) is GroupedConv2d

    def replace(self, module: nn.Module, behind: tuple[nn.Module, ...] = ()) -> nn.Module:
        """The layer, with the very Parameters of `module` unless a BatchNorm is `behind`."""
        if type(module) is nn.ChannelShuffle:
            return ChannelShuffle(module.groups).train(module.training)
        halves = [_folded(*half) for half in _halves(module, behind)]
        if len(halves) == 2:
            return _separable(*halves)
        layer, extras = halves[0]
        return _counterpart(layer, **extras) if _is_factor(layer) else layer


def may_have_made(present: nn.Module, fresh: nn.Module) -> bool:
    """Whether `Mobile` puts a layer like `fresh` where `present` is, for whatever is behind it."""
    if type(fresh) is nn.Identity:
        kinds = (*_ACTIVATIONS, nn.BatchNorm2d, nn.ChannelShuffle)
        return type(present) in kinds or _is_pointwise(present)
    if type(fresh) is DepthwiseSeparableConv2d:
        fresh = fresh.depthwise
    if type(present) is nn.ChannelShuffle:
        return type(fresh) is ChannelShuffle and fresh.groups == present.groups
    if type(present) is not nn.Conv2d or type(fresh) is not _layer_for(present):
        return False
    same = all(getattr(present, name) == getattr(fresh, name) for name in GEOMETRY[nn.Conv2d])
    return same and (present.bias is None or fresh.bias is not None)


def _is_factor(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and _layer_for(module) is not nn.Conv2d


def _layer_for(layer: nn.Conv2d) -> type[nn.Conv2d]:
    if layer.groups == layer.in_channels > 1:
        return DepthwiseConv2d
    return GroupedConv2d if layer.groups > 1 or layer.kernel_size == (1, 1) else nn.Conv2d


def _is_pointwise(module: nn.Module) -> bool:
    """Whether it can be the second half of a separable convolution."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and not any(module._reversed_padding_repeated_twice)
        and module.groups == 1
    )


_Half = tuple[nn.Conv2d, tuple[nn.Module, ...]]  # a convolution, and what is behind it


def _halves(layer: nn.Conv2d, behind: tuple[nn.Module, ...]) -> list[_Half]:
    """Two of them where a convolution is `behind` the layer."""
    for i, module in enumerate(behind):
        if type(module) is nn.Conv2d:
            return [(layer, behind[:i]), (module, behind[i + 1 :])]
    return [(layer, behind)]


def _folded(layer: nn.Conv2d, behind: tuple[nn.Module, ...]) -> tuple[nn.Conv2d, dict[str, Any]]:
    """The layer with its BatchNorm, and the extra arguments of ours for the rest."""
    extras: dict[str, Any] = {}
    for each in behind:
        if type(each) is nn.BatchNorm2d:
            layer = fold(layer, each)
        elif type(each) is nn.ChannelShuffle:
            extras["shuffle"] = each.groups
        else:
            extras["activation"] = _ACTIVATIONS[type(each)]
    return layer, extras


def _separable(
    first: tuple[nn.Conv2d, dict[str, Any]], second: tuple[nn.Conv2d, dict[str, Any]]
) -> DepthwiseSeparableConv2d:
    """Both in one layer. A half gets a bias of zeros where only the other has one."""
    (depthwise, before), (pointwise, after) = first, second
    given = {name: getattr(depthwise, name) for name in GEOMETRY[nn.Conv2d]}
    del given["groups"]
    given["out_channels"] = pointwise.out_channels
    layer = DepthwiseSeparableConv2d(
        **given,
        bias=depthwise.bias is not None or pointwise.bias is not None,
        multiplier=depthwise.out_channels // depthwise.in_channels,
        device="meta",
        depthwise_activation=before.get("activation", "none"),
        **after,
    )
    for half, each in ((layer.depthwise, depthwise), (layer.pointwise, pointwise)):
        half.weight, half.bias = each.weight, each.bias
        if layer.bias and each.bias is None:
            half.bias = nn.Parameter(each.weight.new_zeros(each.out_channels))
    return layer.train(depthwise.training)


def _counterpart(layer: nn.Conv2d, **extras: object) -> nn.Module:
    given = {name: getattr(layer, name) for name in GEOMETRY[nn.Conv2d]}
    given |= {"bias": layer.bias is not None, "device": "meta", **extras}
    cls = _layer_for(layer)
    if cls is DepthwiseConv2d:
        channels = given["channels"] = given.pop("in_channels")
        given["multiplier"] = given.pop("out_channels") // channels
        del given["groups"]
    new = cls(**given)
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)
