"""A CPU as bench.py sees it: one set of tensors, timed by the wall clock."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar

import torch

from nncx import _C
from nncx._machine import describe


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
