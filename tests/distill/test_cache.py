"""The teacher's outputs, computed once and found again by the inputs' bits."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nncx import data
from nncx.distill import L2, Distiller, Hint


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(13, 1, 4, 4, generator=generator)
    images[5] = images[2]  # twice the same image
    return TensorDataset(images, torch.arange(13) % 3)


@pytest.fixture
def task():
    return Distiller(network(1), network(2), [L2(), Hint("2", "1", (4, 2, 2), (4, 2, 2))]).eval()


def test_the_same_loss_without_the_teacher(task, dataset):
    plain = copy.deepcopy(task)
    task.cache_teacher(data.loader(dataset, 4))
    task.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    for inputs, targets in data.loader(dataset, 5, shuffle=True):  # other batches, other order
        result, expected = task(inputs, targets), plain(inputs, targets)
        for name in ("loss", "l2", "hint"):
            torch.testing.assert_close(result[name], expected[name])
    assert set(task.state_dict()) == set(plain.state_dict())
    assert list(map(id, task.parameters())) == list(map(id, task.student_parameters()))
    twin = copy.deepcopy(task)
    assert torch.equal(twin(inputs)["loss"], task(inputs)["loss"])


def test_what_was_not_seen_is_refused(task, dataset):
    task.cache_teacher(data.loader(dataset, 4))
    inputs = dataset.tensors[0][:3].clone()
    inputs[1, 0, 2, 2] += 1e-6
    with pytest.raises(ValueError, match="bit for bit, .* got 1 of 3 that are not: data with rand"):
        task(inputs)
    with pytest.raises(ValueError, match="got 3 of 3"):
        task(inputs.flip(3))


class Noisy(TensorDataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.rand(()), label


def test_data_that_cannot_be_cached(task, dataset):
    with pytest.raises(ValueError, match="data with random augmentation cannot be cached"):
        task.cache_teacher(DataLoader(Noisy(*dataset.tensors), 4))
    loader = DataLoader(dataset, 4)
    loader.deterministic = False
    with pytest.raises(ValueError, match="the same inputs in every epoch, got a loader with rand"):
        task.cache_teacher(loader)
    with pytest.raises(ValueError, match="every sample, got a loader with drop_last"):
        task.cache_teacher(DataLoader(dataset, 4, drop_last=True))
    # 3 logits, 16 features and a map of 4x2x2 for each sample, in float32
    with pytest.raises(ValueError, match="limit=1,000 bytes, got 1,120 after 8 samples"):
        task.cache_teacher(data.loader(dataset, 4), limit=1000)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        task.cache_teacher([])
    assert task._cache is None  # a task whose cache was refused goes on without
    task(dataset.tensors[0])


def test_the_cache_follows_the_task(task, dataset):
    task.cache_teacher(data.loader(dataset, 4))
    task.double()
    assert {each.dtype for each in task._cache.buffers()} == {torch.float64}
    with pytest.raises(ValueError, match="nor other data or another dtype"):
        task(dataset.tensors[0].double())
