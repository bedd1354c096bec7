"""Data sets by name, and the user's own folder of images, as tensors in memory.

    splits = nncx.data.load("digits")
    for images, labels in nncx.data.loader(splits.train, batch_size=128, shuffle=True):

Three splits, always: what is chosen (epochs, rates, methods) is chosen on `validation`, and `test`
is for the figure that is reported.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

# those that every build of Pillow reads
IMAGE_EXTENSIONS = tuple(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())

_TEST_FRACTION = 0.2
_TEST_SEED = 0  # of data sets without a test split: it is the same whatever the user's seed


@dataclass(frozen=True)
class Splits:
    """A data set in three parts.

    Attributes:
        train, validation, test: pairs of an image, float32 [C, H, W], and a label, int64.
            `(pixel - mean) / std` per channel, for pixels from 0 to 1.
        classes: the name of each label.
        image_size: height and width.
        mean, std: of the training pixels, per channel.
    """

    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    num_classes: int
    in_channels: int
    image_size: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    validation: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    channels: int | None = None,
) -> Splits:
    """Load a data set whole.

    Args:
        name: "digits" (scikit-learn's, 8x8), "mnist", "fashion-mnist", or a folder of images:
            FOLDER/{train,test}/<class>/* or FOLDER/<class>/*. The latter, like digits, has a fifth
            of each class set apart as test split, the same for every `seed`.
        root: where torchvision's data sets are; else $NNCX_DATA; else ~/.cache/nncx, into which
            they are downloaded.
        validation: the fraction of each class that is taken from the training images.
        seed: which images those are.
        image_size: for a folder: images are scaled and cropped at the centre to this square.
            None expects them square and of one size.
        channels: for a folder: 3 (the default) for RGB, 1 for grey.

    Raises:
        ValueError: for an argument that cannot be, and for a folder or an image that is not as it
            must be; the message names it.
        FileNotFoundError: if `root` or $NNCX_DATA does not hold the data set whole.
        ImportError: if the library that reads it is missing.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be a fraction in [0, 1), got {validation}")
    folder = Path(os.path.expanduser(name))
    if name in NAMED:
        if image_size is not None or channels is not None:
            raise ValueError(f"image_size and channels are for folders, {name!r} has its own")
        pixels = NAMED[name](root)
    elif folder.is_dir():
        pixels = _folder(folder, image_size, 3 if channels is None else channels)
    else:
        known = ", ".join(NAMED)
        raise ValueError(
            f"a data set is one of {known} or a folder of images, got {os.fspath(name)!r}"
        )
    return _split(os.fspath(name), pixels, validation, seed)


def loader(
    dataset: TensorDataset, batch_size: int = 128, shuffle: bool = False, seed: int = 0
) -> DataLoader:
    """Batches of `dataset`; the order depends on `seed` alone, and `train.fit` can resume it.

    Shuffled, for training, a last batch of a single image is left out: BatchNorm refuses it.
    """
    generator = torch.Generator().manual_seed(seed)
    lone = shuffle and batch_size > 1 and len(dataset) % batch_size == 1 and len(dataset) > 1
    return DataLoader(dataset, batch_size, shuffle, drop_last=lone, generator=generator)


@dataclass(frozen=True)
class _Pixels:
    """A data set as it is stored: images uint8 [N, C, H, W], labels int64 [N]; white is `white`."""

    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    white: int = 255


def _split(name: str, pixels: _Pixels, validation: float, seed: int) -> Splits:
    images, labels = pixels.train
    counts = labels.bincount(minlength=len(pixels.classes)).tolist()
    classes = dict(zip(pixels.classes, counts, strict=True))
    if pixels.test is None:
        train, part = _stratified(labels, _TEST_FRACTION, _TEST_SEED, classes)
        test_images, test_labels = images[part], labels[part]
        images, labels = images[train], labels[train]
    else:
        test_images, test_labels = pixels.test
    train, part = _stratified(labels, validation, seed, classes)

    train_images = images[train].float().div_(pixels.white)
    std, mean = torch.std_mean(train_images, dim=(0, 2, 3), correction=0, keepdim=True)
    std[std == 0] = 1  # a channel without content stays 0
    return Splits(
        name=name,
        train=TensorDataset(train_images.sub_(mean).div_(std), labels[train]),
        validation=TensorDataset(
            images[part].float().div_(pixels.white).sub_(mean).div_(std), labels[part]
        ),
        test=TensorDataset(
            test_images.float().div_(pixels.white).sub_(mean).div_(std), test_labels
        ),
        num_classes=len(pixels.classes),
        in_channels=images.shape[1],
        image_size=images.shape[2],
        classes=pixels.classes,
        mean=tuple(mean.flatten().tolist()),
        std=tuple(std.flatten().tolist()),
    )


def _stratified(
    labels: Tensor, fraction: float, seed: int, classes: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Indices of the rest and of the part: `fraction` of each class, at least one image of it.

    Args:
        classes: the name of each label, and how many images it had before any split.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, (name, total) in enumerate(classes.items()):
        members = (labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members))) if fraction > 0 else 0
        if len(members) <= count:
            raise ValueError(f"class {name!r} has too few images to split ({total})")
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[:count]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


# ----------------------------------------------------------------------------
# named data sets


def _digits(root: object) -> _Pixels:
    """The handwritten digits that scikit-learn ships: 1,797 images of 8x8 with 17 levels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the data set 'digits' comes with scikit-learn: {_install('demo')}"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return _Pixels(tuple("0123456789"), (images, labels), test=None, white=16)


def _mnist(root: str | os.PathLike[str] | None) -> _Pixels:
    return _torchvision("MNIST", root)


def _fashion_mnist(root: str | os.PathLike[str] | None) -> _Pixels:
    return _torchvision("FashionMNIST", root)


NAMED = {"digits": _digits, "fashion-mnist": _fashion_mnist, "mnist": _mnist}


def _torchvision(family: str, root: str | os.PathLike[str] | None) -> _Pixels:
    datasets = require_torchvision(f"{family} is read by").datasets
    given = root or os.environ.get("NNCX_DATA")
    folder = Path(os.path.expanduser(given or "~/.cache/nncx"))
    try:
        train, test = (
            getattr(datasets, family)(folder, train=train, download=not given)
            for train in (True, False)
        )
    except (RuntimeError, ValueError, EOFError, AssertionError) as error:  # absent or damaged
        raw = folder / family / "raw"
        remedy = (
            "put it there, or give no root and unset NNCX_DATA to have it downloaded"
            if given
            else f"delete {raw} to have it downloaded anew, or put it there"
        )
        raise FileNotFoundError(
            f"{folder} does not hold {family} whole, as torchvision lays it out ({family}/raw/*): "
            f"{remedy} ({type(error).__name__}: {error})"
        ) from error
    classes = tuple(re.sub(r"^\d - ", "", name) for name in train.classes)
    return _Pixels(
        classes, (train.data.unsqueeze(1), train.targets), (test.data.unsqueeze(1), test.targets)
    )


def require_torchvision(purpose: str) -> ModuleType:
    """Raises ImportError, in one sentence that begins with `purpose`, where it cannot be used."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        raise ImportError(
            f"{purpose} a torchvision that fits torch {torch.__version__}: "
            f"{_install('data')} ({error})"
        ) from error
    return torchvision


# ----------------------------------------------------------------------------
# image folders


def _folder(folder: Path, image_size: int | None, channels: int) -> _Pixels:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    parts = {part: folder / part for part in ("train", "test") if (folder / part).is_dir()}
    if len(parts) == 1:
        raise ValueError(f"{folder} must have both train/ and test/ or neither, got {list(parts)}")
    first, *rest = parts.values() or [folder]
    classes = _subfolders(first)
    if not classes:
        raise ValueError(f"{first} must hold one folder of images per class, got none")
    for other in rest:
        if _subfolders(other) != classes:
            different = sorted(set(_subfolders(other)) ^ set(classes), key=_natural)
            raise ValueError(f"{first} and {other} must hold the same classes, not so: {different}")
    train, *others = (_read_classes(part, classes, image_size, channels) for part in (first, *rest))
    for test, _ in others:
        if test.shape[1:] != train[0].shape[1:]:
            raise ValueError(
                f"{folder} must hold train and test images of one size, got {train[0].shape[2]} "
                f"and {test.shape[2]}; pass image_size to have them scaled"
            )
    return _Pixels(classes, train, others[0] if others else None)


def _subfolders(folder: Path) -> tuple[str, ...]:
    names = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return tuple(sorted(names, key=_natural))


def _read_classes(
    folder: Path, classes: Sequence[str], image_size: int | None, channels: int
) -> tuple[Tensor, Tensor]:
    """All images of FOLDER/<class>/**, uint8 [N, C, H, W], and their labels, int64 [N]."""
    images, labels = [], []
    expected = None if image_size is None else (channels, image_size, image_size)
    for label, name in enumerate(classes):
        paths = _image_files(folder / name)
        if not paths:
            raise ValueError(f"{folder / name} must hold images ({' '.join(IMAGE_EXTENSIONS)})")
        for path in paths:
            image = _read_image(path, image_size, channels)
            expected = expected or (channels, image.shape[1], image.shape[1])
            if image.shape != expected:
                raise ValueError(
                    f"images must be square and of one size, got {tuple(image.shape[1:])} for "
                    f"{path} after {expected[1:]}; pass image_size to have them scaled"
                )
            images.append(image)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def _image_files(folder: Path) -> list[Path]:
    files = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(files, key=lambda path: _natural(path.as_posix()))


def _read_image(path: Path, image_size: int | None, channels: int) -> Tensor:
    """The image as uint8 [C, H, W], with the rotation that its camera recorded."""
    import numpy as np

    pil = _pillow()
    try:
        with pil.Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits per channel; convert it first")
            image = pil.ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            if image_size is not None:
                image = pil.ImageOps.fit(
                    image, (image_size, image_size), pil.Image.Resampling.BILINEAR
                )
            pixels = torch.from_numpy(np.array(image))
    except (OSError, SyntaxError, ValueError, pil.Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()


def _pillow() -> ModuleType:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError(f"image folders are read by Pillow: {_install('data')}") from error
    return PIL


def _install(extra: str) -> str:
    return f"pip install 'nncx[{extra}]' (in a checkout: pip install '.[{extra}]')"


def _natural(text: str) -> tuple[list[str | int], str]:
    """Sort key that counts: "2" before "10"; the text itself decides between "1" and "01"."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", text))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, text
