"""What a loss sees of a network: logits, features, and the outputs of the layers that it names."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nncx._modes import evaluated


class Outputs(NamedTuple):
    """What a loss sees of a network.

    ``logits``, ``[N, classes]``, is what the network returned; ``features``, ``[N, F]``, the vector
    that feeds the layer which computes the logits; ``maps`` what the layers returned that a loss
    asked for, by their name in this network: mostly feature maps ``[N, C, H, W]``.
    """

    logits: Tensor
    features: Tensor
    maps: Mapping[str, Tensor] = MappingProxyType({})

    def float(self) -> "Outputs":
        """All of it in float32."""
        maps = {name: output.float() for name, output in self.maps.items()}
        return Outputs(self.logits.float(), self.features.float(), maps)


def observe(model: nn.Module, features: str, layers: Iterable[str], inputs: Tensor) -> Outputs:
    """Run ``model`` once, under hooks that live for this call: no model is edited.

    Args:
        features: Name of the layer whose input is the feature vector; a map is averaged.
        layers: Names of the layers whose outputs are wanted. Where the next layer works in place,
            as ``nn.ReLU(inplace=True)``, its result is what is seen.

    Raises:
        ValueError: If the network or a layer returns no tensor, or a layer is not called exactly
            once.
    """
    head: list[Tensor] = []
    outputs: dict[str, list[Tensor]] = defaultdict(list)

    def take_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
        head.append(next(iter((*args, *kwargs.values()))))

    def take_output(name: str, _: nn.Module, __: tuple, output: Tensor) -> None:
        outputs[name].append(output)

    with ExitStack() as hooks:
        feature_layer = model.get_submodule(features)
        hooks.enter_context(feature_layer.register_forward_pre_hook(take_input, with_kwargs=True))
        for name in layers:
            hook = partial(take_output, name)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        logits = model(inputs)

    owner = type(model).__name__
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{owner} must return its logits as one tensor, got {type(logits).__name__}: wrap it "
            "in a module that returns the logits alone"
        )
    vector = _only(head, f"the feature layer {features!r} of {owner}")
    maps = {name: _only(outputs[name], f"the layer {name!r} of {owner}") for name in layers}
    return Outputs(logits, vector.mean((2, 3)) if vector.dim() == 4 else vector, maps)


def probe(model: nn.Module, features: str, layers: Iterable[str], example: Tensor) -> Outputs:
    """:func:`observe` in eval mode and without gradients: for the shapes."""
    with evaluated(model), torch.no_grad():
        return observe(model, features, layers, example)


def child_maps(model: nn.Module, features: str, example: Tensor) -> dict[str, torch.Size]:
    """Children of ``model`` that return feature maps, in the order in which they run.

    Those of one pixel and those from the feature layer on are left out.

    Returns:
        Shape ``[C, H, W]`` by name.
    """
    shapes: dict[str, torch.Size] = {}

    def note(name: str, _: nn.Module, __: tuple, output: object) -> None:
        shapes[name] = output.shape[1:] if isinstance(output, Tensor) else torch.Size()

    with ExitStack() as hooks, evaluated(model), torch.no_grad():
        for name, child in model.named_children():
            hooks.enter_context(child.register_forward_hook(partial(note, name)))
        model(example)
    head, _, _ = features.partition(".")
    before = takewhile(lambda item: item[0] != head, shapes.items())
    return {name: shape for name, shape in before if len(shape) == 3 and shape[1:].numel() > 1}


def check_layer(model: nn.Module, name: str, role: str) -> None:
    """Raise ValueError unless ``model`` has a module ``name``, which is to be its ``role``."""
    if name not in dict(model.named_modules()):
        raise ValueError(
            f"{role} must be a module of {type(model).__name__}, got {name!r}: choose a name from "
            "named_modules()"
        )


def check_example(owner: str, example: Tensor | None) -> None:
    """Raise ValueError unless ``example``, from which ``owner`` takes sizes, is a tensor."""
    if not isinstance(example, Tensor):
        raise ValueError(
            f"{owner}: example must be a batch of inputs, from which the sizes of inner layers "
            f"come, got {type(example).__name__}: pass example=images[:2]"
        )


def feature_layer(model: nn.Module, name: str | None) -> str:
    """Name of the layer whose input is the feature vector, checked to exist."""
    if name is not None:
        check_layer(model, name, "the feature layer")
        return name
    layers = dict(model.named_modules())
    for kind in (nn.Linear, nn.Conv2d):
        if found := [path for path, layer in layers.items() if isinstance(layer, kind)]:
            return found[-1]
    raise ValueError(
        "the default feature layer is the last nn.Linear or nn.Conv2d, got "
        f"{type(model).__name__} with neither: name the layer"
    )


def feature_size(model: nn.Module, name: str | None = None) -> int:
    """Length of the feature vector that :class:`Distiller` takes from ``model``.

    Args:
        model: Any network.
        name: Layer whose input is the feature vector; default as in :class:`Distiller`: name it if
            the last registered layer is not the one that computes the logits.

    Raises:
        ValueError: If there is no such layer, or it does not state its input size.
    """
    name = feature_layer(model, name)
    layer = model.get_submodule(name)
    for attribute in ("in_features", "in_channels", "num_features"):
        if isinstance(size := getattr(layer, attribute, None), int):
            return size
    raise ValueError(
        "the feature layer must state its input size (linear, convolution, batch norm), got "
        f"{type(layer).__name__} {name!r}: name the layer after it"
    )


def _only(calls: list[Tensor], what: str) -> Tensor:
    if len(calls) != 1:
        raise ValueError(
            f"{what} must be called exactly once in a forward pass, got {len(calls)} calls: name "
            "another layer"
        )
    if not isinstance(calls[0], Tensor):
        raise ValueError(
            f"{what} must give one tensor, got {type(calls[0]).__name__}: name another layer"
        )
    return calls[0]
