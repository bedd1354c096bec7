"""The inputs in batches, as of a data loader."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor


def inputs_of(batches: Iterable[Any], task: str) -> tuple[Tensor, Iterator[Tensor]]:
    """The first input, and all of them with it."""
    if isinstance(batches, Tensor):
        raise TypeError(
            f"{task}: batches must be several, as a list or a data loader, got one tensor; pass"
            " [inputs]"
        )
    inputs = (_input(batch, task) for batch in batches)
    first = next(inputs, None)
    if first is None:
        raise ValueError(
            f"{task}: batches must be at least one, got none; pass inputs of the model, such as a"
            " data loader (an iterator that was read before is empty)"
        )
    return first, chain([first], inputs)


def _input(batch: Any, task: str) -> Tensor:
    value = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{task}: a batch must be a tensor, or a tuple that begins with one, got"
            f" {type(value).__name__}; pass inputs of the model"
        )
    return value
