"""Small images on disk."""

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")


def save_image(path, shade, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(shade)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def save_classes(folder, counts, **arguments):
    """FOLDER/<class>/*: `counts` images of each."""
    for position, (name, count) in enumerate(counts.items()):
        for index in range(count):
            shade = 1000 * count + 100 * position + index
            save_image(folder / name / f"{index}.png", shade, **arguments)
    return folder
