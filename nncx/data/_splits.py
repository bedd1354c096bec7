"""What every source of data comes to: three parts, disjoint, stratified and repeatable."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from nncx.data._files import ImageFiles
from nncx.data._normalize import Normalizer, normalizer

_TEST_FRACTION = 0.2
_TEST_SEED = 0  # of data sets without a test split: it is the same whatever the user's seed


@dataclass(frozen=True)
class Splits:
    """A data set in three parts.

    Attributes:
        train, validation, test: pairs of an image, float32 [C, H, W], and a label, int64; an index
            may also be several, and gives a batch.
        classes: the name of each label.
        image_size: height and width.
        mean, std: per channel, of pixels from 0 to 1: of the training images, or ImageNet's.
        normalization: what was done with them, as `load` has it: with "channels" and "imagenet",
            `(pixel - mean) / std`.
    """

    name: str
    train: TensorDataset | ImageFiles
    validation: TensorDataset | ImageFiles
    test: TensorDataset | ImageFiles
    num_classes: int
    in_channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalization: str = "channels"


class Part(Protocol):
    """Images as they are stored."""

    labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width, which are equal."""

    def select(self, indices: Tensor) -> "Part":
        """Those at `indices`, in that order."""

    def sample(self) -> Tensor:
        """Float32 [N, C, H, W] from 0 to 1: the images, or enough of them to know their mean."""

    def dataset(self, normalize: Normalizer) -> TensorDataset | ImageFiles:
        """Pairs of a normalised image and its label."""


@dataclass(frozen=True)
class Pixels:
    """Images in memory: uint8 [N, C, H, W], of which white is `white`; labels int64 [N]."""

    images: Tensor
    labels: Tensor
    white: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def select(self, indices: Tensor) -> "Pixels":
        return Pixels(self.images[indices], self.labels[indices], self.white)

    def sample(self) -> Tensor:
        return self.images.float().div_(self.white)

    def dataset(self, normalize: Normalizer) -> TensorDataset:
        return TensorDataset(normalize(self.sample()), self.labels)


@dataclass(frozen=True)
class Parts:
    """A data set as it is stored; the parts that it lacks are made of `train`."""

    classes: tuple[str, ...]
    train: Part
    test: Part | None = None
    validation: Part | None = None


def split(name: str, parts: Parts, validation: float, seed: int, normalization: str) -> Splits:
    train, test, held_out = parts.train, parts.test, parts.validation
    counts = train.labels.bincount(minlength=len(parts.classes)).tolist()
    classes = dict(zip(parts.classes, counts, strict=True))
    if test is None:
        train, test = _stratified(train, _TEST_FRACTION, _TEST_SEED, classes)
    if held_out is None:
        train, held_out = _stratified(train, validation, seed, classes)
    in_channels, image_size, _ = train.shape
    normalize = normalizer(normalization, in_channels, train.sample)
    return Splits(
        name=name,
        train=train.dataset(normalize),
        validation=held_out.dataset(normalize),
        test=test.dataset(normalize),
        num_classes=len(parts.classes),
        in_channels=in_channels,
        image_size=image_size,
        classes=parts.classes,
        mean=normalize.mean,
        std=normalize.std,
        normalization=normalization,
    )


def _stratified(
    part: Part, fraction: float, seed: int, classes: Mapping[str, int]
) -> tuple[Part, Part]:
    """The rest and what is set apart: `fraction` of each class, at least one image of it.

    Args:
        classes: the name of each label, and how many images it had before any split.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(part.labels), dtype=torch.bool)
    for label, (name, total) in enumerate(classes.items()):
        members = (part.labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members))) if fraction > 0 else 0
        if len(members) <= count:
            raise ValueError(f"class {name!r} has too few images to split ({total})")
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[:count]]] = True
    rest, apart = (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
    return part.select(rest), part.select(apart)


def channels_first(images: Tensor) -> Tensor:
    """[N, C, H, W] of [N, H, W], [N, H, W, C] or itself, where C is 1 or 3.

    Raises:
        ValueError: for another shape, and for images that are not square.
    """
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise ValueError(
            "images must be square, [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, "
            f"got {list(images.shape)}"
        )
    return images.contiguous()
