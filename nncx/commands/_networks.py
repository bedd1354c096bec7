"""The networks that a command line can name: nncx's own, torchvision's, and those in files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from nncx import _files, _store, data, models
from nncx.graph import trace

_TORCHVISION = "torchvision:"


def make(name: str, splits: data.Splits, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A network for the images and classes of `splits`, with random weights.

    Args:
        name: as `models.by_name`, or "torchvision:" and the name of one of torchvision's.
        options: more arguments of its constructor.

    Raises:
        ValueError: if there is no such network, or it cannot be made so; for one of torchvision's,
            if it does not take the images.
        ImportError: if torchvision is missing.
    """
    options = options or {}
    if name.startswith(_TORCHVISION):
        return checked(_torchvision(name, splits, options, weights=None).eval(), splits).train()
    try:
        return models.by_name(
            name,
            image_size=splits.image_size,
            in_channels=splits.in_channels,
            num_classes=splits.num_classes,
            **options,
        )
    except TypeError as error:  # an option that it does not have, or that the data decides
        raise ValueError(f"{name} cannot be made with {options}: {error}") from error


def trained(
    name: str,
    splits: data.Splits,
    options: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> nn.Module:
    """A network that is ready, in eval mode; it was found to fit `splits`.

    Args:
        name: a file of `nncx.save`, or as `make`.
        options: as `make`; not of a file.
        weights: a state dict: a safetensors file, one of `nncx.save`, or one of `torch.save` with
            nothing but tensors. None takes what the network's file holds, or torchvision's own.

    Raises:
        ValueError: for a network or file that cannot be, or that does not fit the data.
        FileNotFoundError, ImportError: for a file or torchvision that is missing.
    """
    options = options or {}
    if name.startswith(_TORCHVISION):
        model = _torchvision(name, splits, options, "DEFAULT" if weights is None else None)
    elif Path(name).is_file() or name.endswith(".safetensors"):
        if options:
            raise ValueError(
                f"options are those of a network by name, got {options} for {name}; leave them out"
            )
        model = _store.load(name)
    elif weights is None:
        raise ValueError(
            f"the model must be a file of nncx.save, or have weights, got {name!r}; pass its file,"
            " or a state dict as weights"
        )
    else:
        model = make(name, splits, options)
    if weights is not None:
        model = _filled(model, Path(weights))
    return checked(model.eval(), splits)


def checked(model: nn.Module, splits: data.Splits) -> nn.Module:
    """`model`, which was found to take the images and to tell the classes apart."""
    logits = outputs(model, splits.train[0][0].unsqueeze(0), f" of {splits.name}")
    got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != [1, splits.num_classes]:
        raise ValueError(
            f"the network must give a logit for each of the {splits.num_classes} classes of"
            f" {splits.name}, got {got}; pass the data set that it was trained on"
        )
    return model


def outputs(model: nn.Module, images: Tensor, origin: str = "") -> Any:
    """What `model` makes of `images`; a ValueError where it does not take them."""
    try:
        with torch.no_grad():
            return model(images)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the network must take images {list(images.shape[1:])}{origin}, got one that does"
            f" not: {reason}"
        ) from error


def storable(model: nn.Module, images: Tensor) -> nn.Module:
    """`model` in eval mode, or its graph if `nncx.load` could not do without its class.

    Args:
        images: some that it takes.
    """
    return model if type(model) in _store.TYPES.values() else trace(model, images[:1])


def _torchvision(
    name: str, splits: data.Splits, options: Mapping[str, Any], weights: str | None
) -> nn.Module:
    torchvision = data.require_torchvision(f"{name} comes with")
    options = {"num_classes": splits.num_classes, **options}
    try:
        return torchvision.models.get_model(
            name.removeprefix(_TORCHVISION), weights=weights, **options
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be made with {options}: {error}") from error


def _filled(model: nn.Module, path: Path) -> nn.Module:
    """`model` with the weights of a file."""
    try:
        if path.suffix == ".safetensors":
            if _files.is_ours(path):
                return _store.load(path, into=model)
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (OSError, ValueError):
        raise
    except Exception as error:  # the libraries raise many types for a file that is no state dict
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} must be a state dict of {type(model).__name__}, got another file: {reason}"
        ) from error
    return model
