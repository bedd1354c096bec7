"""Folders that are read when their images are used, and what they share with those in memory."""

import numpy as np
import pytest
import torch
from images import Image, save_classes, save_image

from nncx import data


@pytest.fixture
def imagenet(tmp_path):
    """FOLDER/{train,val}/<wnid>/*.JPEG, of several sizes, one of them grey."""
    for part, count in (("train", 6), ("val", 2)):
        for position, name in enumerate(("n01440764", "n01443537", "n01484850")):
            for index in range(count):
                size, mode = (20 + 3 * index, 25), "L" if index == 1 else "RGB"
                shade = 100 * count + 10 * position + index
                save_image(tmp_path / part / name / f"{name}_{index}.JPEG", shade, size, mode)
    return tmp_path


@pytest.mark.parametrize("normalization", data.NORMALIZATIONS)
def test_lazy_images_are_those_in_memory(imagenet, normalization):
    options = dict(image_size=14, resize=16, validation=0.34, normalization=normalization)
    whole, lazy = (data.load(imagenet, lazy=lazy, **options) for lazy in (False, True))
    assert lazy.classes == ("n01440764", "n01443537", "n01484850")
    for field in ("classes", "num_classes", "in_channels", "image_size", "normalization"):
        assert getattr(whole, field) == getattr(lazy, field)
    assert lazy.mean == pytest.approx(whole.mean) and lazy.std == pytest.approx(whole.std)
    for part, count in (("train", 12), ("validation", 6), ("test", 6)):
        ours, theirs = getattr(lazy, part), getattr(whole, part)
        assert isinstance(ours, data.ImageFiles) and len(ours) == len(theirs) == count
        indices = [3, 0, 3]
        for index in (indices, torch.tensor(indices), 2, torch.tensor([], dtype=torch.long)):
            for found, expected in zip(ours[index], theirs[index], strict=True):
                torch.testing.assert_close(found, expected)


def test_the_centre_is_scaled_and_cut_as_torchvision_does(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    save_image(tmp_path / "class" / "0.png", 0, size=(64, 48))
    transforms = torchvision.transforms
    cut = transforms.Compose([transforms.Resize(24), transforms.CenterCrop(20)])
    theirs = np.asarray(cut(Image.open(tmp_path / "class" / "0.png"))).transpose(2, 0, 1)
    files = data.ImageFiles([tmp_path / "class" / "0.png"], torch.tensor([0]), 20, resize=24)
    ours = files.pixels(torch.tensor([0]))[0].numpy()
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_resized_crops_are_parts_of_the_image(imagenet):
    files = data.load(imagenet, image_size=14, lazy=True, normalization="imagenet").train
    crop, numbers = data.ResizedCrop(), torch.tensor([[0.3, 0.7, 0.2, 0.9, 0.1]])
    images, labels = crop.take(files, torch.tensor([4]), numbers)
    with Image.open(files.paths[4]) as image:
        box = crop.box(*image.size, numbers[0].tolist())
        cut = image.convert("RGB").resize((14, 14), Image.Resampling.BILINEAR, box)
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).flip(2) / 255  # 0.1: it is mirrored
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in (files.normalize.mean, files.normalize.std)
    )
    torch.testing.assert_close(images[0], (pixels - mean) / std)
    assert torch.equal(labels, files.labels[4:5])


def test_files_of_one_size_need_no_scaling(tmp_path):
    save_classes(tmp_path, {"cat": 5, "dog": 5})
    splits = data.load(tmp_path, lazy=True, validation=0)
    torch.testing.assert_close(splits.train[0], data.load(tmp_path, validation=0).train[0])
    save_image(splits.train.paths[1], 0, size=(9, 9))
    with pytest.raises(ValueError, match=r"one size, got \(9, 9\) for .*png after \(8, 8\); pass"):
        splits.train[1]
    with pytest.raises(ValueError, match="cut out of image files, got images that have their size"):
        list(data.loader(splits.train, augment=data.ResizedCrop(), workers=0))


def test_large_folders_are_lazy(tmp_path, monkeypatch):
    save_classes(tmp_path, {"cat": 5, "dog": 5})
    monkeypatch.setattr(data._folder, "_IN_MEMORY", 10 * 3 * 8 * 8 * 4)
    assert isinstance(data.load(tmp_path).train, torch.utils.data.TensorDataset)
    monkeypatch.setattr(data._folder, "_IN_MEMORY", 10 * 3 * 8 * 8 * 4 - 1)
    assert isinstance(data.load(tmp_path).train, data.ImageFiles)
    assert isinstance(data.load(tmp_path, lazy=False).train, torch.utils.data.TensorDataset)


def test_a_subset_of_files_is_files(imagenet):
    files = data.load(imagenet, image_size=8, lazy=True).train
    drawn = data.subset(files, 4, seed=0)
    assert len(drawn) == 4 and len(set(drawn.paths)) == 4
    assert all(
        path.parent.name == f"n{label}"
        for path, label in zip(
            drawn.paths,
            [["01440764", "01443537", "01484850"][i] for i in drawn.labels],
            strict=True,
        )
    )


def test_a_validation_split_of_its_own_is_taken_as_it_is(tmp_path):
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        save_classes(tmp_path / part, {"cat": count, "dog": count})
    for validation in (0.0, 0.5):
        splits = data.load(tmp_path, validation=validation)
        assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [8, 6, 4]


def test_refuses(imagenet):
    with pytest.raises(ValueError, match="resize must be at least image_size, .* got 8 for .* 9"):
        data.load(imagenet, image_size=9, resize=8)
    with pytest.raises(ValueError, match="resize must be at least image_size, .* of None"):
        data.load(imagenet, resize=8)
    with pytest.raises(ValueError, match="normalization imagenet is for 3 channels, got 1"):
        data.load(imagenet, image_size=8, channels=1, normalization="imagenet")
    (imagenet / "train").rename(imagenet / "training")
    with pytest.raises(ValueError, match=r"train/ and val/, all three or none, got \['val'\]"):
        data.load(imagenet, image_size=8)
