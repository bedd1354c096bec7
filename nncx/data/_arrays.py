"""A file of NumPy arrays: x_train, y_train, x_test, y_test, as Keras names them, or the like."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nncx.data._splits import Parts, Pixels, channels_first

_PARTS = ("train", "test", "val")
# Keras's names, MedMNIST's, and those between.
_IMAGES = ("x_{}", "{}_images", "{}_x")
_LABELS = ("y_{}", "{}_labels", "{}_y")
_KNOWN = {name.format(part) for name in _IMAGES + _LABELS for part in _PARTS}


def read_arrays(path: Path) -> Parts:
    """The data set in `path`, an .npz file: images uint8, and labels that count from 0."""
    arrays = _read(path)
    try:
        train, test, validation = (_part(arrays, name) for name in _PARTS)
        if train is None:
            names = ", ".join(arrays) or "neither"
            raise ValueError(f"it must hold the arrays x_train and y_train, got {names}")
        num_classes = int(train.labels.max()) + 1
        for part in (test, validation):
            if part is not None and part.shape != train.shape:
                raise ValueError(
                    f"all images must have one shape, got {part.shape} after {train.shape}"
                )
            if part is not None and part.labels.max() >= num_classes:
                raise ValueError(
                    f"a label must be one of the {num_classes} of the training images, got "
                    f"{int(part.labels.max())}"
                )
    except ValueError as error:
        raise ValueError(f"{path} holds no data set: {error}") from error
    return Parts(tuple(map(str, range(num_classes))), train, test, validation)


def _read(path: Path) -> dict[str, Tensor]:
    import numpy as np

    errors = (OSError, ValueError, TypeError, EOFError, AttributeError)  # AttributeError: an .npy
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files if name in _KNOWN}
    except (*errors, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not an .npz file of numbers that can be read: {error}"
        ) from error


def _part(arrays: Mapping[str, Tensor], part: str) -> Pixels | None:
    """The arrays of `part`, if there are any."""
    images, labels = (_find(arrays, part, names) for names in (_IMAGES, _LABELS))
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        raise ValueError(f"it must hold images and labels of {part}, got one of them")
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {_name(images)}")
    if labels.is_floating_point() or labels.numel() != len(images) or not len(images):
        raise ValueError(
            f"labels must be one integer for each of the {len(images)} images of {part}, got "
            f"{_name(labels)} {list(labels.shape)}"
        )
    labels = labels.flatten().long()
    if labels.min() < 0:
        raise ValueError(f"labels must count from 0, got {int(labels.min())}")
    return Pixels(channels_first(images), labels)


def _find(arrays: Mapping[str, Tensor], part: str, names: tuple[str, ...]) -> Tensor | None:
    return next((arrays[n.format(part)] for n in names if n.format(part) in arrays), None)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
