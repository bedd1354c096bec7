"""Data sets by name, the user's own images, and batches of them.

    splits = nncx.data.load("digits")
    for images, labels in nncx.data.loader(splits.train, batch_size=128, shuffle=True):

Three splits, always: what is chosen (epochs, rates, methods) is chosen on `validation`, and `test`
is for the figure that is reported.
"""

import os
from pathlib import Path

from nncx.data._arrays import read_arrays
from nncx.data._augment import AUGMENTATIONS, Augmentation, Crop, ResizedCrop
from nncx.data._files import IMAGE_EXTENSIONS, ImageFiles
from nncx.data._folder import read_folder
from nncx.data._loader import Loader, loader, subset
from nncx.data._named import NAMED, require_torchvision
from nncx.data._normalize import NORMALIZATIONS
from nncx.data._splits import Splits, split

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Crop",
    "IMAGE_EXTENSIONS",
    "ImageFiles",
    "Loader",
    "NAMED",
    "NORMALIZATIONS",
    "ResizedCrop",
    "Splits",
    "load",
    "loader",
    "require_torchvision",
    "subset",
    "takes_image_size",
]


def load(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    validation: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    resize: int | None = None,
    channels: int | None = None,
    normalization: str = "channels",
    lazy: bool | None = None,
) -> Splits:
    """Load a data set: whole into memory, or, of large image folders, what its images are.

    Args:
        name: "cifar10", "cifar100", "digits" (scikit-learn's, 8x8), "fashion-mnist", "mnist" or
            "svhn"; or a folder of images, FOLDER/{train,test}/<class>/* or FOLDER/<class>/*; or a
            file of NumPy arrays, FILE.npz. docs/data.md has the layouts. A data set without a test
            split, like digits, has a fifth of each class set apart, the same for every `seed`.
        root: where torchvision's data sets are; else $NNCX_DATA; else ~/.cache/nncx, into which
            they are downloaded.
        validation: the fraction of each class that is taken from the training images, unless the
            data set has a validation split of its own.
        seed: which images those are.
        image_size: for a folder: images are scaled and cropped at the centre to this square.
            None expects them square and of one size.
        resize: for a folder: to what their shorter side is scaled first; 256 with an `image_size`
            of 224 is what ImageNet's networks are evaluated with. None is `image_size`.
        channels: for a folder: 3 (the default) for RGB, 1 for grey.
        normalization: "channels": mean 0 and deviation 1 over the training images, per channel;
            "images": over each image (per-image whitening); "imagenet": with ImageNet's means and
            deviations, which torchvision's weights expect.
        lazy: for a folder: images are read when they are used, not now. None does so if they would
            take more than 2 GiB. The means of "channels" are then those of 512 images.

    Raises:
        ValueError: for an argument that cannot be, and for a folder, a file or an image that is not
            as it must be; the message names it.
        FileNotFoundError: if `root` or $NNCX_DATA does not hold the data set whole.
        ImportError: if the library that reads it is missing.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be a fraction in [0, 1), got {validation}")
    if normalization not in NORMALIZATIONS:
        known = ", ".join(NORMALIZATIONS)
        raise ValueError(f"normalization must be one of {known}, got {normalization!r}")
    path = Path(os.path.expanduser(name))
    if takes_image_size(name):
        parts = read_folder(path, image_size, resize, 3 if channels is None else channels, lazy)
    elif any(option is not None for option in (image_size, resize, channels, lazy)):
        raise ValueError(
            f"image_size, resize, channels and lazy are for folders, {os.fspath(name)!r} has its"
            " own images; leave them out"
        )
    elif name in NAMED:
        parts = NAMED[name](root)
    elif path.is_file():
        parts = read_arrays(path)
    else:
        raise ValueError(
            f"a data set is one of {', '.join(NAMED)}, a folder of images or an .npz file, got "
            f"{os.fspath(name)!r}"
        )
    return split(os.fspath(name), parts, validation, seed, normalization)


def takes_image_size(name: str | os.PathLike[str]) -> bool:
    """Whether `load` can scale the images: those of a folder, which no data set is named like."""
    return name not in NAMED and Path(os.path.expanduser(name)).is_dir()
