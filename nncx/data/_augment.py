"""Augmentations: pure functions of images and random numbers, which the loader draws.

As the numbers belong to the image, what it becomes depends neither on how many processes or workers
share a batch, nor on an interruption between epochs.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from nncx.data._files import Box, ImageFiles


class Augmentation(ABC):
    """Another look of each image, every time it comes.

    Attributes:
        numbers: how many random numbers an image takes, uniform in [0, 1).
        files_only: whether it is cut out of image files, before they are scaled.
    """

    numbers: ClassVar[int]
    files_only: ClassVar[bool] = False

    @abstractmethod
    def take(
        self, dataset: TensorDataset | ImageFiles, indices: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The images at `indices`, changed as `numbers` [N, self.numbers] say, and the labels."""


@dataclass(frozen=True)
class Crop(Augmentation):
    """The image at a random place of its padded self, mirrored every second time.

    Args:
        padding: zeros on each side, which are the mean pixel of a normalised image.
        flip: whether to mirror; not for digits and letters.

    Paper: He et al., Deep residual learning for image recognition, CVPR 2016, section 4.2.
    """

    padding: int = 4
    flip: bool = True
    numbers: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, got {self.padding}")

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images [N, C, H, W] and numbers [N, 3] -> [N, C, H, W]."""
        numbers = numbers.to(images.device)
        places = 2 * self.padding + 1
        down, right = (numbers[:, :2] * places).long().unbind(1)
        padded = F.pad(images, (self.padding,) * 4)
        windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)  # a view
        images = windows[torch.arange(len(images), device=images.device), :, down, right]
        return _mirrored(images, numbers[:, 2]) if self.flip else images

    def take(
        self, dataset: TensorDataset | ImageFiles, indices: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        images, labels = dataset[indices]
        return self(images, numbers), labels


@dataclass(frozen=True)
class ResizedCrop(Augmentation):
    """A random part of an image file, scaled to the size, mirrored every second time.

    The part has between `smallest` and all of the area, evenly, and a ratio of width and height
    between 3/4 and 4/3, evenly in its logarithm; what is wider or higher than the image is cut.

    Args:
        smallest: the least fraction of the area.
        flip: whether to mirror; not for digits and letters.

    Paper: Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6.
    """

    smallest: float = 0.08
    flip: bool = True
    numbers: ClassVar[int] = 5
    files_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest must be a fraction in (0, 1], got {self.smallest}")

    def box(self, width: int, height: int, numbers: tuple[float, ...]) -> Box:
        """What is cut out of an image of this size."""
        area, ratio, down, right, *_ = numbers
        pixels = width * height * (self.smallest + (1 - self.smallest) * area)
        stretch = math.exp((2 * ratio - 1) * math.log(4 / 3) / 2)
        cut_width = min(width, math.sqrt(pixels) * stretch)
        cut_height = min(height, math.sqrt(pixels) / stretch)
        left, upper = right * (width - cut_width), down * (height - cut_height)
        return left, upper, left + cut_width, upper + cut_height

    def take(self, dataset: ImageFiles, indices: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        rows = numbers.tolist()
        pixels = dataset.pixels(indices, lambda i, width, height: self.box(width, height, rows[i]))
        images = dataset.images(pixels)
        return _mirrored(images, numbers[:, 4]) if self.flip else images, dataset.labels[indices]


def _mirrored(images: Tensor, numbers: Tensor) -> Tensor:
    return torch.where(numbers.view(-1, 1, 1, 1) < 0.5, images.flip(3), images)


# By name, for command lines.
AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "crop": Crop(flip=False),
    "crop-flip": Crop(),
    "resized-crop": ResizedCrop(flip=False),
    "resized-crop-flip": ResizedCrop(),
}
