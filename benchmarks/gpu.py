"""An NVIDIA GPU as bench.py sees it: CUDA graphs of calls on rotated tensors, timed by events.

The calls of a contender are captured once and replayed, so that neither Python nor launches decide
the time of small shapes. Each call of a graph has tensors of its own, as many sets as are together
twice the L2 cache, so that each call finds its tensors in memory. Outputs have their own too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import ClassVar

import torch
from roofline import Roof

from nncx import _C

# Not a power of two: a copy between tensors in step on the memory channels is a third slower.
COPY_BYTES = 49 * 2**23


class Gpu:
    """The current NVIDIA GPU. Making one measures its copy bandwidth."""

    name: ClassVar[str] = "cuda"
    path: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self.l2_bytes = properties.L2_cache_size
        self.roof = Roof(properties.name, self._copy_bandwidth())

    def _copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a large copy, when the clocks have gone up."""
        source = torch.randn(COPY_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        copy = self.contender([lambda: target.copy_(source)])
        self.turn(copy, 500)
        return 2 * COPY_BYTES / median(self.turn(copy, 5) for _ in range(9))

    @contextmanager
    def active(self) -> Iterator[None]:
        """torch's products at their fastest: float32 in TF32, cuDNN's algorithms tried out."""
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """New tensors are on the GPU, and references exact: without TF32 or cuDNN's Winograd."""
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            with torch.device("cuda"), torch.backends.cudnn.flags(enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def describe(self) -> str:
        return (
            f"{self.roof}, torch {torch.__version__}, "
            f"nncx {_C.version} for {' '.join(_C.cuda_architectures)}"
        )

    def copies(self, moved: int) -> int:
        """How many sets of tensors, `moved` bytes each, are together twice the L2 cache."""
        return 1 + -(-2 * self.l2_bytes // moved)

    def contender(self, runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """Replays all `runs`, which have run before once: they may choose their kernels then."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = [run() for run in runs]  # all at once, so that each has its memory
        del outputs
        return graph.replay

    def turn(self, run: Callable[[], object], calls: int) -> float:
        """Seconds of a call, by events before and behind all of them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
