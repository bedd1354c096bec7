"""Pixels from 0 to 1 -> what a network sees."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NORMALIZATIONS = ("channels", "images", "imagenet")

# Of ImageNet's training images, as all weights of torchvision were trained with.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Normalizer:
    """Maps images, float32 [N, C, H, W], in place.

    Attributes:
        kind: one of `NORMALIZATIONS`.
        mean, std: per channel; what "images" does not need is kept to describe the data by.
    """

    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        if self.kind == "images":
            return _whiten(images)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return images.sub_(mean).div_(std)


def normalizer(kind: str, channels: int, sample: Callable[[], Tensor]) -> Normalizer:
    """For data of which `sample` gives training images, float32 [N, C, H, W] from 0 to 1."""
    if kind == "imagenet":
        if channels != 3:
            raise ValueError(
                f"the normalization imagenet is for 3 channels, got {channels}; take 'channels' or "
                "'images'"
            )
        return Normalizer(kind, *_IMAGENET)
    std, mean = torch.std_mean(sample(), dim=(0, 2, 3), correction=0)
    std[std == 0] = 1  # a channel without content stays 0
    return Normalizer(kind, tuple(mean.tolist()), tuple(std.tolist()))


def _whiten(images: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over all pixels and channels of each image.

    The deviation counts as at least that of a single step of one of 256 levels, as TensorFlow's
    `per_image_standardization` has it, so that an even image becomes 0.
    """
    if not len(images):
        return images
    std, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    least = 1 / (255 * images[0].numel() ** 0.5)
    return images.sub_(mean).div_(std.clamp_min_(least))
