"""Data sets: splits that are disjoint, stratified and repeatable, and folders that are refused."""

import struct
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from images import Image, save_classes, save_image

from nncx import data


@pytest.fixture
def flat_folder(tmp_path):
    """FOLDER/<class>/*: 10 images of "cat", 20 of "dog"."""
    return save_classes(tmp_path, {"cat": 10, "dog": 20})


@pytest.fixture
def split_folder(tmp_path):
    """FOLDER/{train,test}/<class>/*: 6 and 2 images of each of "2" and "10"."""
    for part, count in (("train", 6), ("test", 2)):
        save_classes(tmp_path / part, {"2": count, "10": count})
    return tmp_path


def images_of(dataset):
    return dataset.tensors[0]


def labels_of(dataset):
    return dataset.tensors[1]


def as_set(dataset):
    return {image.numpy().tobytes() for image in images_of(dataset)}


@pytest.mark.skipif(find_spec("sklearn") is None, reason="the digits come with scikit-learn")
class TestDigits:
    def test_shapes_and_types(self):
        splits = data.load("digits")
        assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 1, 8)
        assert splits.classes == tuple("0123456789") and splits.name == "digits"
        assert sum(map(len, (splits.train, splits.validation, splits.test))) == 1797
        for part in (splits.train, splits.validation, splits.test):
            assert images_of(part).shape[1:] == (1, 8, 8)
            assert images_of(part).dtype == torch.float32
            assert labels_of(part).dtype == torch.int64

    def test_are_scikit_learns_images_with_their_labels(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        expected = {
            (image.astype(int).tobytes(), int(label))
            for image, label in zip(digits.images, digits.target, strict=True)
        }
        splits = data.load("digits")
        found = set()
        for part in (splits.train, splits.validation, splits.test):
            pixels = images_of(part) * splits.std[0] + splits.mean[0]
            for image, label in zip(pixels[:, 0], labels_of(part), strict=True):
                found.add(((image * 16).round().numpy().astype(int).tobytes(), int(label)))
        assert found == expected

    def test_splits_are_disjoint_and_stratified(self):
        splits = data.load("digits", validation=0.1)
        train, validation, test = map(as_set, (splits.train, splits.validation, splits.test))
        assert not train & validation and not train & test and not validation & test
        every = torch.cat([labels_of(p) for p in (splits.train, splits.validation, splits.test)])
        total = every.bincount()
        tests = labels_of(splits.test).bincount()
        assert (tests - 0.2 * total).abs().max() <= 0.5
        rest = total - tests
        assert (labels_of(splits.validation).bincount() - 0.1 * rest).abs().max() <= 0.5

    def test_seed_moves_validation_but_never_test(self):
        first, second, again = (data.load("digits", seed=seed) for seed in (0, 1, 0))
        assert torch.equal(labels_of(first.test), labels_of(second.test))
        assert torch.equal(images_of(first.train), images_of(again.train))
        assert not torch.equal(images_of(first.train), images_of(second.train))
        # the normalisation differs by a hair; the test images are the same
        undo = [images_of(s.test) * s.std[0] + s.mean[0] for s in (first, second)]
        torch.testing.assert_close(*undo)

    def test_training_pixels_are_normalized(self):
        splits = data.load("digits")
        images = images_of(splits.train)
        assert images.mean().abs() < 1e-5
        assert abs(images.std(correction=0).item() - 1) < 1e-5

    def test_no_validation(self):
        splits = data.load("digits", validation=0)
        assert len(splits.validation) == 0 and len(splits.train) + len(splits.test) == 1797

    def test_needs_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'nncx\[demo\]' .* '\.\[demo\]'"):
            data.load("digits")


def write_idx(folder, family, counts):
    """A data set in the original MNIST format, of `counts` (train, test) images."""
    raw = folder / family / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    written = {}
    for part, count in zip(("train", "t10k"), counts, strict=True):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        written[part] = images, labels
    return written


@pytest.mark.parametrize("name, family", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
class TestMnist:
    @pytest.mark.parametrize("where", ["root", "environment"])
    def test_reads_the_original_files(self, tmp_path, monkeypatch, name, family, where):
        pytest.importorskip("torchvision", reason="MNIST is read by torchvision")
        written = write_idx(tmp_path, family, (40, 20))
        monkeypatch.setenv("NNCX_DATA", str(tmp_path if where == "environment" else "/nowhere"))
        splits = data.load(name, tmp_path if where == "root" else None, validation=0.25)
        assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [30, 10, 20]
        assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 1, 28)
        assert splits.classes[0] == ("zero" if name == "mnist" else "T-shirt/top")
        images, labels = written["t10k"]
        pixels = images_of(splits.test)[:, 0] * splits.std[0] + splits.mean[0]
        assert np.array_equal((pixels * 255).round().numpy().astype(np.uint8), images)
        assert labels_of(splits.test).tolist() == labels.tolist()

    def test_missing_files_are_not_downloaded_into_a_given_root(self, tmp_path, name, family):
        pytest.importorskip("torchvision", reason="MNIST is read by torchvision")
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} does not hold {family}"):
            data.load(name, tmp_path)
        assert not list(tmp_path.rglob("*ubyte*"))

    @pytest.mark.parametrize("damage", ["empty", "short", "other", "header"])
    @pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
    def test_damaged_files_are_placed(self, tmp_path, name, family, damage, file):
        pytest.importorskip("torchvision", reason="MNIST is read by torchvision")
        write_idx(tmp_path, family, (40, 20))
        path = tmp_path / family / "raw" / file
        whole = path.read_bytes()
        damaged = {"empty": b"", "short": whole[:-9], "other": b"<html>" * 9, "header": whole[:6]}
        path.write_bytes(damaged[damage])
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} does not hold {family} whole"):
            data.load(name, tmp_path)

    @pytest.mark.parametrize("where", ["root", "environment"])
    def test_root_may_begin_with_home(self, tmp_path, monkeypatch, name, family, where):
        pytest.importorskip("torchvision", reason="MNIST is read by torchvision")
        write_idx(tmp_path / "sets", family, (40, 20))
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NNCX_DATA", "~/sets" if where == "environment" else "/nowhere")
        assert len(data.load(name, "~/sets" if where == "root" else None).test) == 20

    def test_needs_torchvision(self, monkeypatch, name, family):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(ImportError, match=rf"{family} .* pip install 'nncx\[data\]'"):
            data.load(name)

    def test_takes_no_folder_options(self, name, family):
        with pytest.raises(
            ValueError, match="image_size, resize, channels and lazy are for folders"
        ):
            data.load(name, image_size=32)


class TestFolder:
    def test_flat(self, flat_folder):
        splits = data.load(flat_folder, validation=0.25)
        assert splits.name == str(flat_folder) and splits.classes == ("cat", "dog")
        assert (splits.num_classes, splits.in_channels, splits.image_size) == (2, 3, 8)
        assert labels_of(splits.test).bincount().tolist() == [2, 4]
        assert labels_of(splits.validation).bincount().tolist() == [2, 4]
        assert labels_of(splits.train).bincount().tolist() == [6, 12]
        parts = [as_set(p) for p in (splits.train, splits.validation, splits.test)]
        assert len(set.union(*parts)) == 30

    def test_pixels_labels_and_normalization_per_channel(self, split_folder):
        splits = data.load(str(split_folder), validation=0)
        images = images_of(splits.train)
        assert images.mean((0, 2, 3)).abs().max() < 1e-5
        assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (splits.mean, splits.std))
        for index, path in enumerate(["2/0.png", "2/1.png", "10/0.png", "10/1.png"]):
            pixels = (images_of(splits.test)[index] * std + mean) * 255
            expected = np.asarray(Image.open(split_folder / "test" / path)).transpose(2, 0, 1)
            assert np.array_equal(pixels.round().numpy().astype(np.uint8), expected)

    def test_given_test_split_and_natural_order(self, split_folder):
        splits = data.load(split_folder, validation=0.5)
        assert splits.classes == ("2", "10")
        assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [6, 6, 4]
        assert labels_of(splits.test).tolist() == [0, 0, 1, 1]

    def test_order_of_files_counts(self, tmp_path):
        names = ["1.png", "2.PNG", "10.png", "a1b2.png", "a1b10.png", "sub/3.png", "²3.png"]
        for index, name in enumerate(names):
            save_image(tmp_path / "class" / name, index)
        splits = data.load(tmp_path, lazy=True, validation=0)
        every = [*splits.train.paths, *splits.test.paths]
        found = [path.relative_to(tmp_path / "class").as_posix() for path in every]
        assert sorted(found, key=names.index) == names
        assert found[: len(splits.train)] == [n for n in names if n in found[: len(splits.train)]]

    def test_is_scaled_and_cropped_at_the_centre(self, tmp_path):
        for index in range(4):
            save_image(tmp_path / "wide" / f"{index}.png", index, size=(16, 8))
            save_image(tmp_path / "tall" / f"{index}.png", index, size=(8, 24))
        splits = data.load(tmp_path, image_size=8)
        assert splits.image_size == 8 and images_of(splits.train).shape[1:] == (3, 8, 8)
        path = tmp_path / "wide" / "0.png"
        wide = data.ImageFiles([path], torch.tensor([0]), 8, resize=8).pixels(torch.tensor([0]))[0]
        expected = np.asarray(Image.open(path))[:, 4:12].transpose(2, 0, 1)
        assert np.array_equal(wide.numpy(), expected)

    def test_grey(self, flat_folder):
        splits = data.load(flat_folder, channels=1)
        assert splits.in_channels == 1 and len(splits.mean) == 1
        assert images_of(splits.train).shape[1:] == (1, 8, 8)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
    def test_modes(self, tmp_path, mode):
        for index in range(3):
            save_image(tmp_path / "class" / f"{index}.png", index, mode=mode)
        assert data.load(tmp_path).in_channels == 3

    def test_constant_channel_is_zero(self, tmp_path):
        for index in range(4):
            (tmp_path / "class").mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (7, 50 * index, 0)).save(tmp_path / "class" / f"{index}.png")
        images = images_of(data.load(tmp_path).train)
        assert images.isfinite().all() and images[:, 2].eq(0).all()

    def test_hidden_and_other_files_are_left_out(self, flat_folder):
        (flat_folder / ".cache").mkdir()
        (flat_folder / "README.txt").write_text("about")
        (flat_folder / "cat" / "notes.txt").write_text("about")
        (flat_folder / "cat" / "._0.png").write_bytes(b"resource fork")
        splits = data.load(flat_folder)
        assert sum(map(len, (splits.train, splits.validation, splits.test))) == 30

    def test_broken_image_is_named(self, flat_folder):
        whole = (flat_folder / "cat" / "3.png").read_bytes()
        for content in (b"", b"no image", whole[: len(whole) // 2]):
            (flat_folder / "cat" / "3.png").write_bytes(content)
            with pytest.raises(ValueError, match=r"cat/3.png is not an image that can be read"):
                data.load(flat_folder)

    def test_sixteen_bits_are_refused_not_clipped(self, flat_folder):
        pixels = np.full((8, 8), 40_000, dtype=np.uint16)
        Image.fromarray(pixels).save(flat_folder / "cat" / "3.png")
        with pytest.raises(ValueError, match="cat/3.png .* more than 8 bits"):
            data.load(flat_folder)

    def test_sizes_must_agree(self, split_folder):
        save_image(split_folder / "train" / "2" / "7.png", 0, size=(9, 9))
        with pytest.raises(ValueError, match=r"one size, got \(9, 9\) for .*2/7.png .*image_size"):
            data.load(split_folder)
        assert data.load(split_folder, image_size=8).image_size == 8

    def test_sizes_of_train_and_test_must_agree(self, split_folder):
        for path in (split_folder / "test").rglob("*.png"):
            save_image(path, 0, size=(4, 4))
        with pytest.raises(
            ValueError, match=r"one size, got \(4, 4\) for .*test.* after \(8, 8\); pass image_size"
        ):
            data.load(split_folder)

    def test_images_must_be_square(self, tmp_path):
        save_image(tmp_path / "class" / "0.png", 0, size=(4, 8))
        with pytest.raises(ValueError, match=r"must be square .* got \(8, 4\)"):
            data.load(tmp_path)

    def test_layouts_that_are_refused(self, split_folder, tmp_path_factory):
        with pytest.raises(ValueError, match="one folder of images per class, got none"):
            data.load(tmp_path_factory.mktemp("empty"))
        (split_folder / "train" / "empty").mkdir()
        with pytest.raises(ValueError, match=r"hold the same classes, not so: \['empty'\]"):
            data.load(split_folder)
        (split_folder / "test" / "empty").mkdir()
        with pytest.raises(ValueError, match="train/empty must hold images"):
            data.load(split_folder)

    def test_train_without_test_is_refused(self, split_folder):
        (split_folder / "test").rename(split_folder / "valid")
        with pytest.raises(ValueError, match=r"all three or none, got \['train'\]"):
            data.load(split_folder)

    def test_class_too_small_to_split(self, flat_folder):
        save_image(flat_folder / "lion" / "0.png", 0)
        with pytest.raises(ValueError, match=r"class 'lion' has too few images to split \(1\)"):
            data.load(flat_folder)
        save_image(flat_folder / "lion" / "1.png", 1)
        with pytest.raises(ValueError, match=r"class 'lion' has too few images to split \(2\)"):
            data.load(flat_folder)
        save_image(flat_folder / "lion" / "2.png", 2)
        assert data.load(flat_folder).classes == ("cat", "dog", "lion")

    def test_may_begin_with_home(self, flat_folder, monkeypatch):
        monkeypatch.setenv("HOME", str(flat_folder.parent))
        assert data.load(f"~/{flat_folder.name}").classes == ("cat", "dog")

    def test_needs_pillow(self, flat_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL.ImageOps", None)
        with pytest.raises(ImportError, match=r"pip install 'nncx\[data\]' .* '\.\[data\]'"):
            data.load(flat_folder)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "cifar"}, "one of cifar10, .*mnist, svhn, a folder .* got 'cifar'"),
        ({"name": "digits", "validation": 1.0}, r"validation must be .* got 1.0"),
        ({"name": "digits", "validation": -0.1}, r"validation must be .* got -0.1"),
        ({"name": "digits", "channels": 3}, "'digits' has its own"),
        ({"name": "digits", "lazy": True}, "'digits' has its own"),
        (
            {"name": "digits", "normalization": "none"},
            "one of channels, images, imagenet, got 'none",
        ),
        ({"name": ".", "channels": 2}, r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"name": ".", "image_size": 0}, "image_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)
