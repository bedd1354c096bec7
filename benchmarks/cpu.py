"""A CPU as bench.py sees it: one set of tensors, timed by the wall clock.

Depending on what else is allocated, glibc gives the memory of large outputs back to the system and
takes it again in every call: 400 page faults and 0.6 ms for 1.6 MB. Here it keeps what it has, for
all contenders.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch

from nncx import _C
from nncx._machine import describe

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_ALL, _LARGEST = 2**30, 2**25  # bytes; the second is the most that it takes there


def keep_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, _ALL)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)


@dataclass(frozen=True)
class Cpu:
    """One CPU path of nncx, on so many threads."""

    path: str
    threads: int

    name: ClassVar[str] = "cpu"
    roof: ClassVar[None] = None  # its limit is a multiple of torch.mm's rate

    @contextmanager
    def active(self) -> Iterator[None]:
        before = _C.isa(), torch.get_num_threads()
        keep_memory()
        try:
            _C.set_isa(self.path)
            torch.set_num_threads(self.threads)
            yield
        finally:
            _C.set_isa(before[0])
            torch.set_num_threads(before[1])

    def preparing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def describe(self) -> str:
        return describe()

    def copies(self, moved: int) -> int:
        """One: the tensors stay in the caches, as those between the layers of a network do."""
        return 1

    def contender(self, runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
        (run,) = runs
        return run

    def turn(self, run: Callable[[], object], calls: int) -> float:
        """Seconds of a call; one before warms the caches."""
        run()
        start = perf_counter()
        for _ in range(calls):
            run()
        return (perf_counter() - start) / calls
