"""The teacher's outputs, computed once where the inputs are the same in every epoch."""

from collections.abc import Callable, Iterable
from hashlib import blake2b

import torch
from torch import Tensor, nn

from nncx.distill._observe import Outputs


class TeacherCache(nn.Module):
    """Outputs of a teacher for a fixed set of inputs, found again by the inputs' bits.

    Made by :meth:`nncx.distill.Distiller.cache_teacher`. A sample's key is a hash of its values
    (16 bytes of BLAKE2b), so that shuffling, other batch sizes and subsets are all the same to it.
    A sample with another value anywhere is another sample, and is refused: nothing is ever answered
    with the teacher's output for a different image. To rounding, the outputs are those of a teacher
    that runs along; torch's kernels may round a sample differently in a batch of another size.

    Args:
        teach: From inputs ``[N, ...]`` to the teacher's outputs.
        data: Batches ``(inputs, targets)``, iterated over once, and their first batch once more to
            see that it stays the same.
        limit: Bytes of outputs that may be kept.

    Raises:
        ValueError: If ``data`` is empty, leaves samples out, or is random, or if ``limit`` is
            exceeded; on a call, for an input that was not in ``data``.
    """

    def __init__(
        self,
        teach: Callable[[Tensor], Outputs],
        data: Iterable[tuple[Tensor, Tensor]],
        limit: int,
    ) -> None:
        super().__init__()
        if not getattr(data, "deterministic", True):  # nncx.data.loader says so
            raise ValueError(
                "cache_teacher: data must give the same inputs in every epoch, got a loader with "
                "random augmentation: train without it, or without the cache"
            )
        if getattr(data, "drop_last", False):
            raise ValueError(
                "cache_teacher: data must give every sample, got a loader with drop_last: pass one "
                "without, and without shuffle"
            )
        self.rows: dict[bytes, int] = {}
        batches: list[Outputs] = []
        count = size = 0
        for inputs, _ in data:
            for row, key in enumerate(_keys(inputs), start=count):
                self.rows.setdefault(key, row)
            batches.append(teach(inputs))
            count += len(inputs)
            size += sum(each.nbytes for each in _tensors(batches[-1]))
            if size > limit:
                raise ValueError(
                    f"cache_teacher: the teacher's outputs must fit into limit={limit:,} bytes, "
                    f"got {size:,} after {count:,} samples: raise the limit or do not cache"
                )
        if not batches:
            raise ValueError("cache_teacher: data must give at least one batch, got none")
        self.names = list(batches[0].maps)
        columns = zip(*map(_tensors, batches), strict=True)
        for index, column in enumerate(columns):
            self.register_buffer(f"column{index}", torch.cat(column), persistent=False)
        for inputs, _ in data:
            self._find(inputs)
            break

    def forward(self, inputs: Tensor) -> Outputs:
        rows = torch.tensor(self._find(inputs), dtype=torch.int64).to(self.column0.device)
        logits, features, *maps = (column[rows] for column in self.buffers())
        return Outputs(logits, features, dict(zip(self.names, maps, strict=True)))

    def _find(self, inputs: Tensor) -> list[int]:
        rows = [self.rows.get(key) for key in _keys(inputs)]
        if None in rows:
            raise ValueError(
                "cache_teacher: every input must be, bit for bit, one of those that the teacher's "
                f"outputs were computed for, got {rows.count(None)} of {len(rows)} that are not: "
                "data with random augmentation cannot be cached, nor other data or another dtype"
            )
        return rows


def _keys(inputs: Tensor) -> list[bytes]:
    """One hash for each sample."""
    samples = inputs.detach().cpu().flatten(1).contiguous().view(torch.uint8)
    return [blake2b(sample, digest_size=16).digest() for sample in samples.numpy()]


def _tensors(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs.logits, outputs.features, *outputs.maps.values())
