"""Files of NumPy arrays."""

import numpy as np
import pytest
import torch

from nncx import data


def arrays(count=20, shape=(4, 4), classes=3):
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, np.arange(count) % classes


def written(path, **named):
    np.savez(path, **named)
    return path


@pytest.mark.parametrize(
    "images, labels", [("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y")]
)
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 3), (3, 5, 5)])
def test_names_and_layouts(tmp_path, images, labels, shape):
    named = {}
    for part, count in (("train", 12), ("test", 9)):
        named[images.format(part)], found = arrays(count, shape)
        named[labels.format(part)] = found[:, None]  # as MedMNIST has them
    splits = data.load(written(tmp_path / "set.npz", **named), validation=0.25)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [9, 3, 9]
    assert splits.classes == ("0", "1", "2")
    stored = torch.from_numpy(named[images.format("test")])
    stored = stored.view(9, *((1, 4, 4) if stored.ndim == 3 else stored.shape[1:]))
    stored = stored.permute(0, 3, 1, 2) if stored.shape[3] in (1, 3) else stored
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (splits.mean, splits.std))
    pixels, found = splits.test.tensors
    assert torch.equal(((pixels * std + mean) * 255).round().byte(), stored)
    assert found.tolist() == [i % 3 for i in range(9)]
    assert (splits.in_channels, splits.image_size) == tuple(stored.shape[1:3])


def test_own_validation_split_and_other_arrays(tmp_path):
    named = {"about": np.array(["text"], dtype=object)}
    for part, count in (("train", 9), ("val", 6), ("test", 3)):
        named[f"x_{part}"], named[f"y_{part}"] = arrays(count)
    splits = data.load(written(tmp_path / "set.npz", **named))
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [9, 6, 3]


def test_without_a_test_split_one_is_set_apart(tmp_path):
    images, labels = arrays(30)
    splits = data.load(written(tmp_path / "set.npz", x_train=images, y_train=labels), validation=0)
    assert (len(splits.train), len(splits.test)) == (24, 6)


def test_per_image_whitening(tmp_path):
    images, labels = arrays(10, (4, 4, 3))
    images[0] = 7
    path = written(
        tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )
    splits = data.load(path, validation=0, normalization="images")
    assert splits.normalization == "images"
    whitened = splits.test.tensors[0]
    assert whitened[0].eq(0).all()
    for ours, stored in zip(whitened[1:], images[1:].astype(np.float64), strict=True):
        expected = (stored - stored.mean()) / stored.std()
        np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_train": None}, "must hold images and labels of train, got one of them"),
        ({"x_train": None, "y_train": None}, "x_train and y_train, got x_test, y_test"),
        ({"x_train": arrays()[0].astype(np.float32)}, "images must be uint8, got float32"),
        ({"x_train": arrays(20, (4, 5))[0]}, r"images must be square, .* got \[20, 1, 4, 5\]"),
        ({"x_train": arrays(20, (4, 4, 2))[0]}, r"1 or 3 channels, got \[20, 4, 4, 2\]"),
        (
            {"x_train": arrays(20, (5, 5))[0]},
            r"must have one shape, got \(1, 4, 4\) after \(1, 5, 5\)",
        ),
        ({"y_train": np.arange(19)}, r"one integer for each of the 20 .*, got int64 \[19\]"),
        ({"y_train": np.ones(20)}, r"one integer for each of the 20 .*, got float64 \[20\]"),
        ({"y_train": np.arange(20) - 1}, "labels must count from 0, got -1"),
        ({"y_test": np.full(20, 3)}, "one of the 3 of the training images, got 3"),
        ({"y_train": np.array([0, 2] * 10)}, "class '1' has too few images to split"),
        ({"x_train": np.array([None] * 20)}, "is not an .npz file of numbers that can be read"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    named = (
        dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays() * 2, strict=True)) | change
    )
    path = written(tmp_path / "set.npz", **{k: v for k, v in named.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        data.load(path)


def test_damaged_files_are_refused(tmp_path):
    images, labels = arrays()
    whole = written(tmp_path / "set.npz", x_train=images, y_train=labels).read_bytes()
    np.save(tmp_path / "one.npy", images)
    for content in (
        b"",
        b"no arrays",
        whole[:100],
        whole[:-30],
        (tmp_path / "one.npy").read_bytes(),
    ):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"set.npz is not an .npz file of numbers"):
            data.load(tmp_path / "set.npz")
