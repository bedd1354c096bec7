"""Folders of images: FOLDER/<class>/*, or one such folder for each part."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nncx.data._files import IMAGE_EXTENSIONS, ImageFiles, image_files, natural, read_image
from nncx.data._splits import Parts, Pixels

_IN_MEMORY = 2**31  # bytes that the images may take as float32


def read_folder(
    folder: Path, image_size: int | None, resize: int | None, channels: int, lazy: bool | None
) -> Parts:
    """What is in `folder`; the arguments are those of `data.load`."""
    _check_geometry(image_size, resize, channels)
    folders = _parts(folder)
    classes = _classes(*folders.values())
    listed = {part: _list(path, classes) for part, path in folders.items()}
    resize = image_size if resize is None else resize
    if image_size is None:
        first, *_ = listed["train"][0]
        image_size = read_image(first, channels).shape[1]
    parts: dict[str, ImageFiles | Pixels] = {
        part: ImageFiles(paths, labels, image_size, resize, channels)
        for part, (paths, labels) in listed.items()
    }
    if lazy is None:
        lazy = 4 * sum(map(len, parts.values())) * channels * image_size**2 > _IN_MEMORY
    if not lazy:
        parts = {part: _decoded(files) for part, files in parts.items()}
    return Parts(classes, **parts)


def _check_geometry(image_size: int | None, resize: int | None, channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if resize is not None and (image_size is None or resize < image_size):
        raise ValueError(
            f"resize must be at least image_size, of which the centre is cut out, got {resize} for "
            f"an image_size of {image_size}"
        )


def _parts(folder: Path) -> dict[str, Path]:
    """The folders of the training images, first, and of the others that there are."""
    found = {part: folder / part for part in ("train", "test", "val") if (folder / part).is_dir()}
    if not found:
        return {"train": folder}
    if "train" not in found or len(found) == 1:
        raise ValueError(
            f"{folder} must have train/ and test/, train/ and val/, all three or none, got "
            f"{list(found)}"
        )
    if "test" not in found:  # as of ImageNet, whose validation images are what is reported
        return {"train": found["train"], "test": found["val"]}
    names = {"train": "train", "test": "test", "val": "validation"}
    return {names[part]: path for part, path in found.items()}


def _classes(first: Path, *rest: Path) -> tuple[str, ...]:
    classes = _subfolders(first)
    if not classes:
        raise ValueError(f"{first} must hold one folder of images per class, got none")
    for other in rest:
        if _subfolders(other) != classes:
            different = sorted(set(_subfolders(other)) ^ set(classes), key=natural)
            raise ValueError(f"{first} and {other} must hold the same classes, not so: {different}")
    return classes


def _subfolders(folder: Path) -> tuple[str, ...]:
    names = (p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return tuple(sorted(names, key=natural))


def _list(folder: Path, classes: Sequence[str]) -> tuple[list[Path], torch.Tensor]:
    """All images of FOLDER/<class>/**, and their labels, int64 [N]."""
    paths: list[Path] = []
    counts = []
    for name in classes:
        inside = image_files(folder / name)
        if not inside:
            raise ValueError(f"{folder / name} must hold images ({' '.join(IMAGE_EXTENSIONS)})")
        paths += inside
        counts.append(len(inside))
    return paths, torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))


def _decoded(files: ImageFiles) -> Pixels:
    return Pixels(files.pixels(torch.arange(len(files))), files.labels)
