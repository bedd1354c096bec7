"""CIFAR and SVHN, from small files in their original formats."""

import pickle
import sys

import numpy as np
import pytest

from nncx import data

datasets = pytest.importorskip("torchvision", reason="these are read by torchvision").datasets


def pixels(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    names = {"label_names": [f"class {i}" for i in range(10)]}
    counts = {"data_batch_1": 40, "test_batch": 20}
    return write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, counts, "labels", names)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    counts = {"train": 200, "test": 100}
    return write_cifar(tmp_path, monkeypatch, datasets.CIFAR100, counts, "fine_labels", names)


def write_cifar(root, monkeypatch, family, counts, labels, names):
    """Pickled dictionaries with a row of 3072 bytes for each image, and one with the names."""
    folder = root / family.base_folder
    folder.mkdir()
    num_classes = len(next(iter(names.values())))
    for name, count in counts.items():
        entry = {"data": pixels(count, 3072), labels: [i % num_classes for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / family.meta["filename"]).write_bytes(pickle.dumps(names))
    train, test = counts
    # No digests: these are other images.
    monkeypatch.setattr(family, "train_list", [[train, None]])
    monkeypatch.setattr(family, "test_list", [[test, None]])
    monkeypatch.setattr(family, "meta", {**family.meta, "md5": None})
    return root


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """{train,test}_32x32.mat: X [32, 32, 3, N], y [N, 1] from 1 to 10, which is the digit 0."""
    scipy_io = pytest.importorskip("scipy.io")
    split_list = {}
    for part, count in (("train", 40), ("test", 20)):
        images = pixels(count, 32, 32, 3).transpose(1, 2, 3, 0)
        labels = (np.arange(count) % 10)[:, None]
        labels[labels == 0] = 10
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels})
        split_list[part] = ["", f"{part}_32x32.mat", None]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return tmp_path


@pytest.mark.parametrize(
    "name, counts, num_classes",
    [("cifar10", (40, 20), 10), ("cifar100", (200, 100), 100), ("svhn", (40, 20), 10)],
)
def test_reads_the_original_files(request, name, counts, num_classes):
    root = request.getfixturevalue(name)
    splits = data.load(name, root, validation=0.25 if num_classes == 10 else 0.5)
    train, test = counts
    held_out = num_classes
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [
        train - held_out,
        held_out,
        test,
    ]
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (num_classes, 3, 32)
    assert splits.classes[3] == ("3" if name == "svhn" else "class 3")
    stored = pixels(test, 32, 32, 3).transpose(0, 3, 1, 2) if name == "svhn" else pixels(test, 3072)
    images, labels = splits.test.tensors
    for channel in range(3):
        undone = (images[:, channel] * splits.std[channel] + splits.mean[channel]) * 255
        expected = stored.reshape(test, 3, 32, 32)[:, channel]
        assert np.array_equal(undone.round().numpy().astype(np.uint8), expected)
    assert labels.tolist() == [i % num_classes for i in range(test)]


@pytest.mark.parametrize(
    "name, where",
    [
        ("cifar10", r"CIFAR10 whole, .*\(cifar-10-batches-py/\*\)"),
        ("cifar100", r"CIFAR100 whole, .*\(cifar-100-python/\*\)"),
        ("svhn", r"SVHN whole, .*\(\{train,test\}_32x32.mat\)"),
    ],
)
def test_missing_and_damaged_files_are_placed(request, tmp_path, name, where):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=f"empty does not hold {where}: put it there"):
        data.load(name, empty)
    assert not list(empty.iterdir())
    root = request.getfixturevalue(name)
    for path in [p for p in root.rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FileNotFoundError, match=where):
            data.load(name, root)
        path.write_bytes(whole)


def test_svhn_needs_scipy(svhn, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"SVHN is read by torchvision with scipy.*nncx\[data\]"):
        data.load("svhn", svhn)
