"""Data sets by name: scikit-learn's digits, and those that torchvision downloads and reads."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nncx.data._install import install
from nncx.data._splits import Parts, Pixels, channels_first

Root = str | os.PathLike[str] | None


def _digits(root: Root) -> Parts:
    """The handwritten digits that scikit-learn ships: 1,797 images of 8x8 with 17 levels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the data set 'digits' comes with scikit-learn: {install('demo')}"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return Parts(tuple("0123456789"), Pixels(images, labels, white=16))


def _torchvision(family: str, files: str, root: Root) -> Parts:
    """A data set of torchvision's class `family`, which are `files` in the folder `root`."""
    datasets = require_torchvision(f"{family} is read by").datasets
    given = root or os.environ.get("NNCX_DATA")
    folder = Path(os.path.expanduser(given or "~/.cache/nncx"))
    try:
        train, test = (
            getattr(datasets, family)(folder, **arguments, download=not given)
            for arguments in _parts_of(family)
        )
    except ModuleNotFoundError as error:  # SVHN's files are MATLAB's
        raise ImportError(
            f"{family} is read by torchvision with {error.name}: {install('data')}"
        ) from error
    except Exception as error:  # absent or damaged: torchvision and its readers raise many types
        remedy = (
            "put it there, or give no root and unset NNCX_DATA to have it downloaded"
            if given
            else f"delete {folder / files} to have it downloaded anew, or put it there"
        )
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{folder} does not hold {family} whole, as torchvision lays it out ({files}): "
            f"{remedy} ({type(error).__name__}: {reason})"
        ) from error
    names = getattr(train, "classes", map(str, range(10)))  # SVHN's digits have none
    classes = tuple(re.sub(r"^\d - ", "", name) for name in names)  # MNIST's are "0 - zero"
    return Parts(classes, _pixels(train), _pixels(test))


def _parts_of(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that torchvision's class takes for the training and the test images."""
    if family == "SVHN":
        return {"split": "train"}, {"split": "test"}
    return {"train": True}, {"train": False}


def _pixels(dataset: Any) -> Pixels:
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    images = channels_first(torch.as_tensor(dataset.data))
    return Pixels(images, torch.as_tensor(labels, dtype=torch.int64))


NAMED: dict[str, Callable[[Root], Parts]] = {
    "cifar10": partial(_torchvision, "CIFAR10", "cifar-10-batches-py/*"),
    "cifar100": partial(_torchvision, "CIFAR100", "cifar-100-python/*"),
    "digits": _digits,
    "fashion-mnist": partial(_torchvision, "FashionMNIST", "FashionMNIST/raw/*"),
    "mnist": partial(_torchvision, "MNIST", "MNIST/raw/*"),
    "svhn": partial(_torchvision, "SVHN", "{train,test}_32x32.mat"),
}


def require_torchvision(purpose: str) -> ModuleType:
    """Raises ImportError, in one sentence that begins with `purpose`, where it cannot be used."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise ImportError(
            f"{purpose} a torchvision that fits torch {torch.__version__}: "
            f"{install('data')} ({error})"
        ) from error
    return torchvision
