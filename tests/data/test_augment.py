"""Augmentations against what they say, image by image."""

import math

import pytest
import torch
import torch.nn.functional as F

from nncx.data import AUGMENTATIONS, Crop, ResizedCrop

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "count, channels, size, padding", [(1, 1, 1, 0), (9, 3, 7, 4), (0, 3, 5, 2)]
)
@pytest.mark.parametrize("flip", [True, False])
def test_crop_is_a_window_of_the_padded_image(count, channels, size, padding, flip):
    images = torch.randn(count, channels, size, size, generator=GENERATOR)
    numbers = torch.rand(count, 3, generator=GENERATOR)
    expected = []
    for image, (down, right, mirror) in zip(images, numbers.tolist(), strict=True):
        top, left = (math.floor(number * (2 * padding + 1)) for number in (down, right))
        window = F.pad(image, (padding,) * 4)[:, top : top + size, left : left + size]
        expected.append(window.flip(2) if flip and mirror < 0.5 else window)
    cropped = Crop(padding, flip)(images, numbers)
    assert cropped.shape == images.shape
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cropped, expected, strict=True))


def test_crop_reaches_every_place_and_leaves_its_input_alone():
    image = torch.arange(1.0, 10).view(1, 1, 3, 3)
    edges = torch.cartesian_prod(torch.linspace(0, 0.999, 30), torch.linspace(0, 0.999, 30))
    images = image.repeat(len(edges), 1, 1, 1)
    crops = Crop(2, flip=False)(images, F.pad(edges, (0, 1)))
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 25
    assert torch.equal(images, image.repeat(len(edges), 1, 1, 1))


@pytest.mark.parametrize("width, height", [(640, 480), (30, 300), (7, 7)])
def test_resized_crop_lies_in_the_image_and_has_area_and_ratio_of_the_paper(width, height):
    crop = ResizedCrop()
    rows = [(0.0, 0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 0.5, 0.5, 0.5, 0.5)]
    rows += torch.rand(300, 5, generator=GENERATOR).tolist()
    for row in rows:
        left, upper, right, lower = crop.box(width, height, row)
        assert -1e-9 <= left < right <= width + 1e-9 and -1e-9 <= upper < lower <= height + 1e-9
        wide, high = right - left, lower - upper
        area = wide * high / (width * height)
        if wide < width - 1e-9 and high < height - 1e-9:
            assert area == pytest.approx(0.08 + 0.92 * row[0])
            assert 3 / 4 - 1e-9 <= wide / high <= 4 / 3 + 1e-9
        else:
            assert area <= 1 + 1e-9


def test_names_of_the_command_line():
    assert AUGMENTATIONS["none"] is None
    assert AUGMENTATIONS["crop-flip"] == Crop(4, flip=True)
    assert AUGMENTATIONS["crop"] == Crop(4, flip=False)
    assert AUGMENTATIONS["resized-crop-flip"] == ResizedCrop(0.08, flip=True)
    assert AUGMENTATIONS["resized-crop"] == ResizedCrop(0.08, flip=False)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Crop(-1), "padding must be at least 0, got -1"),
        (lambda: ResizedCrop(0), r"smallest must be a fraction in \(0, 1\], got 0"),
        (lambda: ResizedCrop(1.5), r"smallest must be a fraction in \(0, 1\], got 1.5"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
