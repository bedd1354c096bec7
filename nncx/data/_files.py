"""Images that stay files until they are used."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nncx.data._install import install
from nncx.data._normalize import Normalizer

# those that every build of Pillow reads
IMAGE_EXTENSIONS = tuple(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels

_SAMPLE = 512  # images whose mean is that of all, to less than a step of 256 levels


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """Pairs of an image, float32 [C, H, W], and its label, int64, decoded when they are asked for.

    An index is an integer, or a tensor or list of them, which gives a batch [N, C, H, W] and [N].

    Attributes:
        paths, labels: of every image.
        image_size: height and width.
        resize: to what the shorter side is scaled before `image_size` is cut out at the centre;
            None takes only images that have the size.
        channels: 3 for RGB, 1 for grey.
        normalize: of pixels from 0 to 1.

    Raises:
        ValueError: when an image is asked for that cannot be read or has another size.
    """

    paths: Sequence[Path]
    labels: Tensor
    image_size: int
    resize: int | None = None
    channels: int = 3
    normalize: Normalizer | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        indices = torch.as_tensor(index)
        images = self.images(self.pixels(indices.flatten()))
        return images.reshape(*indices.shape, *self.shape), self.labels[indices]

    def images(self, pixels: Tensor) -> Tensor:
        """Normalised float32 of uint8."""
        images = pixels.float().div_(255)
        return images if self.normalize is None else self.normalize(images)

    def pixels(self, indices: Tensor, box: Callable[[int, int, int], Box] | None = None) -> Tensor:
        """Uint8 [N, C, H, W].

        Args:
            box: of (position in the batch, width, height), what is cut out and scaled to the size;
                None cuts at the centre.
        """
        pixels = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        for position, index in enumerate(indices.tolist()):
            path = self.paths[index]
            if self.resize is None:
                image = read_image(path, self.channels)
                if image.shape != self.shape:
                    raise ValueError(
                        f"images must be square and of one size, got {tuple(image.shape[1:])} for "
                        f"{path} after {self.shape[1:]}; pass image_size to have them scaled"
                    )
            else:
                cut = self._centre if box is None else lambda *size: box(position, *size)  # noqa: B023
                image = read_image(path, self.channels, self.image_size, cut)
            pixels[position] = image
        return pixels

    def _centre(self, width: int, height: int) -> Box:
        side = self.image_size * min(width, height) / self.resize
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side

    def select(self, indices: Tensor) -> "ImageFiles":
        """Those at `indices`, in that order."""
        paths = [self.paths[index] for index in indices.tolist()]
        return replace(self, paths=paths, labels=self.labels[indices])

    def sample(self) -> Tensor:
        """Some of the images as float32 from 0 to 1, the same ones every time."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return self.pixels(order[:_SAMPLE]).float().div_(255)

    def dataset(self, normalize: Normalizer) -> "ImageFiles":
        return replace(self, normalize=normalize)


def read_image(
    path: Path,
    channels: int,
    image_size: int | None = None,
    box: Callable[[int, int], Box] | None = None,
) -> Tensor:
    """The image as uint8 [C, H, W], with the rotation that its camera recorded.

    Args:
        box: of (width, height), what is scaled to a square of `image_size`; None with None.
    """
    import numpy as np

    pil = _pillow()
    try:
        with pil.Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits per channel; convert it first")
            image = pil.ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            if image_size is not None:
                bilinear = pil.Image.Resampling.BILINEAR
                image = image.resize((image_size, image_size), bilinear, box(*image.size))
            pixels = torch.from_numpy(np.array(image))
    except (OSError, SyntaxError, ValueError, pil.Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()


def image_files(folder: Path) -> list[Path]:
    """All in `folder` and below, in an order that counts; not what is hidden."""
    files = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(files, key=lambda path: natural(path.as_posix()))


def natural(text: str) -> tuple[list[str | int], str]:
    """Sort key that counts: "2" before "10"; the text itself decides between "1" and "01"."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", text))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, text


def _pillow() -> ModuleType:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError(f"image folders are read by Pillow: {install('data')}") from error
    return PIL
