"""Several processes that train one task: each takes its part of every batch.

`train.fit` calls these functions always; in a process alone they do next to nothing. With others,
joined by torch.distributed, they see to it that a step is that of one process on the whole batch.
"""

import contextlib
import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

T = TypeVar("T")


@contextlib.contextmanager
def processes() -> Iterator[torch.device]:
    """Joins the processes that torchrun started, inside, and gives the device of this one.

        with nncx.train.processes() as device:
            model.to(device)
            nncx.train.fit(...)

    The device is the GPU of this process's local rank, or the CPU where there is no GPU; the
    processes talk through NCCL, or gloo. Without torchrun there is nothing to join, and the device
    is the first GPU, or the CPU.

    Raises:
        ValueError: if torchrun started more processes here than there are GPUs.
    """
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpus and local_rank >= gpus:
        raise ValueError(
            f"processes: a process of this machine must have a GPU of its own, got {gpus} GPUs for "
            f"process {local_rank + 1}; lower --nproc-per-node"
        )
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if not _started_by_torchrun() or distributed.is_initialized():
        yield device
        return
    if gpus:
        torch.cuda.set_device(device)  # where NCCL puts what it sends
    distributed.init_process_group("nccl" if gpus else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """Which of them this is: 0 is the first, which validates, writes and speaks for all."""
    return distributed.get_rank() if _joined() else 0


def check_joined() -> None:
    """Raises ValueError if others run the same program, each as if it were alone."""
    if _started_by_torchrun() and not _joined():
        raise ValueError(
            f"fit: the {os.environ['WORLD_SIZE']} processes of torchrun must be joined, got "
            "processes that do not know of each other; call it inside "
            "`with nncx.train.processes() as device:`"
        )


def check_alone(task: str) -> None:
    """Raises ValueError if others run the same program."""
    if _started_by_torchrun():
        raise ValueError(
            f"{task}: it must run in one process, got {os.environ['WORLD_SIZE']} of torchrun; start"
            " it without, and train several networks at a time with --jobs"
        )


def wrapped(task: nn.Module) -> nn.Module:
    """`task`, whose parameters become those of the first process, and gradients the mean of all."""
    if count() == 1:
        return task
    # The graph may leave out parameters (a hint trains only the lower layers), but always the same.
    return DistributedDataParallel(task, static_graph=True)


def draw_apart() -> None:
    """Another random state in each process, or all of them would drop out the same values."""
    if rank() > 0:
        torch.manual_seed(torch.initial_seed() + rank())


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Inside, the others begin when the first is through: it downloads, they find the files."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def wait_for_all() -> None:
    """Returns once every process is here."""
    if count() > 1:
        distributed.barrier()


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns in the first process, which alone calls it."""
    if count() == 1:
        return function()
    value = [function() if rank() == 0 else None]
    distributed.broadcast_object_list(value)
    return value[0]


def gathered(value: T) -> list[T]:
    """The value of each process, in each."""
    values = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    return values


def added_up(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if count() > 1:
        distributed.all_reduce(values)
    return values


def share_buffers(module: nn.Module) -> None:
    """Those of the first: each has seen other samples, so that running statistics differ."""
    if count() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)


def part_of(size: int) -> int:
    """How many of the samples of a whole batch are this process's."""
    return len(range(rank(), size, count()))


class Shards:
    """This process's part of each batch: `(inputs, targets, size)`, size being the whole batch's.

    Every count-th sample, beginning at the rank. Where there are fewer samples than processes, the
    last get the first sample, so that all take the same steps; their part, `part_of(size)`, is 0.

    A DataLoader reads only the samples of the part. Of other data each process makes all batches.
    Either way all processes must see one order: `data.generator` follows the first process.
    """

    def __init__(self, data: Iterable) -> None:
        self.data, self.sizes = data, None
        self.generator = getattr(data, "generator", None)
        if count() > 1 and isinstance(data, DataLoader):
            _check_order(data)
            if data.batch_sampler is not None and not isinstance(data.dataset, IterableDataset):
                self.sizes = deque()
                self.data = copy.copy(data)  # past its __setattr__, which guards its other settings
                vars(self.data)["batch_sampler"] = _Parts(data.batch_sampler, self.sizes)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        if self.generator is not None and count() > 1:
            self.generator.set_state(from_first(self.generator.get_state))
        for batch in self.data:
            inputs, targets = _pair(batch)
            if self.sizes is not None:
                yield inputs, targets, self.sizes.popleft()
            elif count() == 1:
                yield inputs, targets, len(inputs)
            else:
                part = _part(len(inputs))
                yield inputs[part], targets[part], len(inputs)


class _Parts:
    """A batch sampler's batches, of which it gives this process's part, and notes the size."""

    def __init__(self, batches: Iterable[list[int]], sizes: deque[int]) -> None:
        self.batches, self.sizes = batches, sizes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()  # of an epoch that was broken off
        for batch in self.batches:
            self.sizes.append(len(batch))
            yield batch[_part(len(batch))]


def _part(size: int) -> slice:
    return slice(rank(), None, count()) if rank() < size else slice(0, 1)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(batch, list | tuple) and len(batch) == 2
    if not (is_pair and all(isinstance(each, Tensor) for each in batch)):
        raise ValueError(
            "data must give pairs (inputs, targets) of tensors, got "
            f"{type(batch).__name__}; wrap it in a loader that does"
        )
    return batch[0], batch[1]


def _check_order(loader: DataLoader) -> None:
    """Its order must be the same in all processes."""
    if isinstance(loader.sampler, DistributedSampler):
        raise ValueError(
            "fit: data must give whole batches, which fit shares out, got a DistributedSampler; "
            "leave it out"
        )
    if isinstance(loader.sampler, RandomSampler) and loader.sampler.generator is None:
        raise ValueError(
            "fit: data for several processes must be shuffled by a generator, got a DataLoader "
            "without one; pass generator=torch.Generator().manual_seed(0), or use nncx.data.loader"
        )


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1
