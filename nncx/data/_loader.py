"""Batches: a whole one is read at once, in an order that a seed decides."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from nncx.data._augment import Augmentation
from nncx.data._files import ImageFiles

_MAX_WORKERS = 8


class Loader(DataLoader):
    """A DataLoader of `loader`.

    Attributes:
        deterministic: whether an image looks the same every time, so that what a teacher says of
            it can be kept.
    """

    deterministic: bool

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


def loader(
    dataset: TensorDataset | ImageFiles,
    batch_size: int = 128,
    shuffle: bool = False,
    seed: int = 0,
    *,
    augment: Augmentation | None = None,
    workers: int | None = None,
) -> Loader:
    """Batches of `dataset`; they depend on `seed` alone, and `train.fit` can resume them.

    Shuffled, for training, a last batch of a single image is left out: BatchNorm refuses it.
    Whatever an epoch has of chance is drawn from the loader's `generator` when its iteration
    begins.

    Args:
        augment: changes the images, otherwise in each epoch.
        workers: how many processes read; None is one for each CPU, at most 8, for image files, and
            none for images in memory.

    Raises:
        ValueError: for a batch size below 1, or an augmentation that is not for such images.
    """
    if augment is not None and augment.files_only:
        _check_scaled_files(dataset, augment)
    generator = torch.Generator().manual_seed(seed)
    numbers = 0 if augment is None else augment.numbers
    if workers is None:
        workers = min(_MAX_WORKERS, _cpus()) if isinstance(dataset, ImageFiles) else 0
    batches = Loader(
        _Reader(dataset, augment, guarded=workers > 0),
        batch_sampler=_Batches(len(dataset), batch_size, shuffle, numbers, generator),
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        generator=generator,
    )
    batches.deterministic = augment is None
    return batches


def subset(
    dataset: TensorDataset | ImageFiles, count: int, seed: int
) -> TensorDataset | ImageFiles:
    """`count` images drawn at random, all in another order if there are not as many."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(dataset), generator=generator)[:count]
    if isinstance(dataset, ImageFiles):
        return dataset.select(drawn)
    return TensorDataset(*dataset[drawn])


def _check_scaled_files(dataset: Dataset, augment: Augmentation) -> None:
    if not isinstance(dataset, ImageFiles) or dataset.resize is None:
        raise ValueError(
            f"a {type(augment).__name__} is cut out of image files, got images that have their "
            "size; take Crop, or load the folder with an image_size and lazy=True"
        )


@dataclass(frozen=True)
class _Draws:
    """Which images, and the random numbers of each; a slice of them is part of a batch."""

    indices: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> "_Draws":
        return _Draws(self.indices[part], self.numbers[part])


class _Batches:
    """The batches of each epoch, as a DataLoader asks for them."""

    def __init__(
        self, count: int, batch_size: int, shuffle: bool, numbers: int, generator: torch.Generator
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        lone = shuffle and batch_size > 1 and count % batch_size == 1 and count > 1
        self._count = count
        self._used = count - 1 if lone else count
        self._batch_size = batch_size
        self._sampler = SequentialSampler(range(count))
        if shuffle and count:
            self._sampler = RandomSampler(range(count), generator=generator)
        self._numbers = numbers
        self._generator = generator

    def __len__(self) -> int:
        return -(-self._used // self._batch_size)

    def __iter__(self) -> Iterator[_Draws]:
        order = torch.tensor(list(self._sampler), dtype=torch.int64)
        numbers = torch.rand(self._count, self._numbers, generator=self._generator)
        draws = _Draws(order, numbers)[: self._used]
        for start in range(0, self._used, self._batch_size):
            yield draws[start : start + self._batch_size]


class _Reader(Dataset):
    """Reads a batch at once.

    Args:
        guarded: give errors back instead of raising them: of those that a worker process raises,
            torch makes a page.
    """

    def __init__(self, dataset: Dataset, augment: Augmentation | None, guarded: bool) -> None:
        self.dataset = dataset
        self.augment = augment
        self.guarded = guarded

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: _Draws) -> tuple[Tensor, Tensor] | Exception:
        try:
            return self._read(draws)
        except (ValueError, OSError, ImportError) as error:
            if self.guarded:
                return error
            raise

    def _read(self, draws: _Draws) -> tuple[Tensor, Tensor]:
        if self.augment is not None:
            return self.augment.take(self.dataset, draws.indices, draws.numbers)
        if isinstance(self.dataset, TensorDataset | ImageFiles):
            return self.dataset[draws.indices]
        return default_collate([self.dataset[index] for index in draws.indices.tolist()])


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
