"""Batches: their order, their chance, and how they are shared out."""

import pytest
import torch
from images import save_classes
from torch.utils.data import DataLoader, Subset, TensorDataset

from nncx import data


def numbered(count, size=1):
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 1, size, size).contiguous()
    return TensorDataset(images, torch.arange(count))


def epoch(batches):
    return [(images.clone(), labels.tolist()) for images, labels in batches]


def same(first, second):
    return all(
        torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
        for ours, theirs in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_order_is_that_of_a_plain_dataloader(shuffle):
    generator = torch.Generator().manual_seed(5)
    plain = DataLoader(numbered(10), 4, shuffle, generator=generator)
    ours = data.loader(numbered(10), 4, shuffle, seed=5)
    assert len(ours) == len(plain) == 3
    for _ in range(2):
        assert same(epoch(ours), epoch(plain))
    assert torch.equal(ours.generator.get_state(), generator.get_state())


def test_order_depends_on_the_seed_alone():
    def epochs(seed):
        batches = data.loader(numbered(10), batch_size=4, shuffle=True, seed=seed)
        return [[label for _, labels in batches for label in labels.tolist()] for _ in range(2)]

    torch.manual_seed(1)
    first = epochs(0)
    torch.manual_seed(2)
    assert epochs(0) == first and epochs(1) != first
    assert first[0] != first[1] and sorted(first[0]) == list(range(10))


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (9, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (3, 1, [1, 1, 1]),
        (1, 4, [1]),
        (0, 4, []),
    ],
)
def test_a_last_batch_of_one_is_left_out_of_training_only(images, batch_size, sizes):
    batches = data.loader(numbered(images), batch_size, shuffle=True)
    assert [len(labels) for _, labels in batches] == sizes and len(batches) == len(sizes)
    in_order = data.loader(numbered(images), batch_size)
    assert sum(len(labels) for _, labels in in_order) == images


def test_augmentation_changes_every_epoch_and_continues_from_the_generators_state():
    def batches():
        return data.loader(numbered(9, size=6), 4, True, seed=3, augment=data.Crop(2))

    whole = batches()
    first, second = epoch(whole), epoch(whole)
    assert not same(first, second)
    torch.manual_seed(99)  # the global state has no say
    interrupted = batches()
    state = None
    for _ in interrupted:
        state = interrupted.generator.get_state()  # all of the epoch's chance is drawn by now
        break
    resumed = batches()
    resumed.generator.set_state(state)
    assert same(epoch(resumed), second)


def test_a_part_of_a_batch_is_augmented_as_in_the_whole():
    """Several processes share a batch by slicing what the batch sampler gives."""
    batches = data.loader(numbered(10, size=6), 4, True, augment=data.Crop(2))
    draws = list(batches.batch_sampler)
    for draw in draws:
        whole, labels = batches.dataset.__getitems__(draw)
        for rank in range(3):
            part = draw[slice(rank, None, 3)]
            images, own = batches.dataset.__getitems__(part)
            assert len(part) == len(own)
            assert torch.equal(images, whole[rank::3]) and torch.equal(own, labels[rank::3])


def test_workers_change_nothing_but_who_reads(tmp_path):
    save_classes(tmp_path, {"cat": 6, "dog": 6}, size=(12, 10))
    splits = data.load(tmp_path, image_size=8, lazy=True, validation=0)

    def epochs(workers):
        batches = data.loader(
            splits.train, 4, True, augment=data.ResizedCrop(), workers=workers, seed=1
        )
        return epoch(batches) + epoch(batches)

    assert same(epochs(0), epochs(2))


def test_an_error_of_a_worker_is_one_sentence(tmp_path):
    save_classes(tmp_path, {"cat": 6, "dog": 6})
    splits = data.load(tmp_path, image_size=8, lazy=True)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"\A\S*png is not an image .*\Z"):
            list(data.loader(splits.test, workers=workers))


def test_says_whether_images_look_the_same_every_time():
    assert data.loader(numbered(4), shuffle=True).deterministic
    assert not data.loader(numbered(4), augment=data.Crop()).deterministic


def test_any_data_set_of_pairs_will_do():
    pairs = [(torch.tensor([float(i)]), i) for i in range(5)]
    expected = [([0.0, 1.0], [0, 1]), ([2.0, 3.0], [2, 3]), ([4.0], [4])]
    for dataset in (pairs, Subset(pairs, range(5))):
        found = [(x.flatten().tolist(), y.tolist()) for x, y in data.loader(dataset, 2)]
        assert found == expected


def test_subset_is_a_fixed_draw():
    drawn = data.subset(numbered(50), 20, seed=1)
    assert len(drawn) == 20 and len(set(drawn.tensors[1].tolist())) == 20
    assert torch.equal(drawn.tensors[0].flatten().long(), drawn.tensors[1])
    assert torch.equal(drawn.tensors[1], data.subset(numbered(50), 20, seed=1).tensors[1])
    assert not torch.equal(drawn.tensors[1], data.subset(numbered(50), 20, seed=2).tensors[1])
    assert sorted(data.subset(numbered(3), 20, seed=1).tensors[1].tolist()) == [0, 1, 2]


def test_refuses():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data.loader(numbered(4), 0)
    with pytest.raises(ValueError, match="a ResizedCrop is cut out of image files, .* take Crop"):
        data.loader(numbered(4), augment=data.ResizedCrop())
