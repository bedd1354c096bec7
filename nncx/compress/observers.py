"""Observers: from the activations of calibration batches to the range that int8 shall cover.

An observer sees any number of batches in bounded memory; the order in which values come matters to
`MovingAverage` alone. `new` makes one like it that has seen nothing, for each layer its own.

Each class states how it chooses. What lies outside of the range is clipped, what lies inside is
rounded to steps that grow with it: all but the first two trade one error for the other.
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Self

import numpy as np
import torch
from torch import Tensor

from nncx.nn.quantizers import int8_input, int8_input_parameters

_MOST_CLIPPED = 0.01  # of the values, by `Entropy`


class Observer(ABC):
    """What all share: the least and the largest value, and the checks."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._reset()

    def new(self, name: str | None = None) -> Self:
        """One with the same settings that has seen nothing; `name`, for messages, of its layer."""
        observer = copy.copy(self)
        observer._name = name
        observer._reset()
        return observer

    def observe(self, values: Tensor) -> None:
        """See a batch: a real tensor of any shape, dtype and device; an empty one says nothing.

        Raises:
            ValueError: for NaN or infinity; then nothing of the batch counts.
        """
        if not values.numel():
            return
        values = values.detach().float()
        minimum, maximum = (bound.item() for bound in torch.aminmax(values))
        if not (math.isfinite(minimum) and math.isfinite(maximum)):
            where = "" if self._name is None else f" in the input of '{self._name}'"
            raise ValueError(
                f"observe: calibration data must be finite, got NaN or infinity{where}; check the"
                " batches and the float model"
            )
        self._see(values, minimum, maximum)

    def range(self, symmetric: bool) -> tuple[float, float]:
        """Minimum and maximum for `set_input_range`, within those of the values and 0.

        Args:
            symmetric: whether the codes will have the zero point 0.

        Raises:
            ValueError: if no value was seen.
        """
        if self._minimum > self._maximum:
            where = "" if self._name is None else f" of '{self._name}'"
            raise ValueError(
                f"range: the observer{where} must have seen a value, got none; call observe(batch)"
            )
        low, high = self._choose(symmetric)  # at edges of bins, which may lie outside
        low, high = max(low, min(self._minimum, 0.0)), min(high, max(self._maximum, 0.0))
        return float(low), float(high)

    def _reset(self) -> None:
        self._minimum, self._maximum = math.inf, -math.inf

    def _see(self, values: Tensor, minimum: float, maximum: float) -> None:
        """Take note of a batch, float32, and of its bounds."""
        self._minimum = min(self._minimum, minimum)
        self._maximum = max(self._maximum, maximum)

    @abstractmethod
    def _choose(self, symmetric: bool) -> tuple[float, float]: ...


class MinMax(Observer):
    """From the least to the largest value: nothing is clipped."""

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        return self._minimum, self._maximum


class MovingAverage(Observer):
    """The averages of the batches' least and largest values: `a += momentum * (batch - a)`.

    Args:
        momentum: of a batch; the first one counts as a whole.

    Raises:
        ValueError: for a momentum that is not in (0, 1].

    Paper: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018.
    """

    def __init__(self, momentum: float = 0.1) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(f"MovingAverage: momentum must be in (0, 1], got {momentum}")
        self.momentum = momentum
        super().__init__()

    def _reset(self) -> None:
        super()._reset()
        self._average: tuple[float, float] | None = None

    def _see(self, values: Tensor, minimum: float, maximum: float) -> None:
        super()._see(values, minimum, maximum)
        low, high = self._average or (minimum, maximum)
        self._average = (
            low + self.momentum * (minimum - low),
            high + self.momentum * (maximum - high),
        )

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        return self._average


class _HistogramObserver(Observer):
    def _reset(self) -> None:
        super()._reset()
        self._histogram = _Histogram()

    def _see(self, values: Tensor, minimum: float, maximum: float) -> None:
        super()._see(values, minimum, maximum)
        self._histogram.add(values, max(-minimum, maximum))


class Percentile(_HistogramObserver):
    """Clips, at either end, at most a small part of all values.

    Affine: the largest values, `100 - percent` percent of all, lie above the maximum, as many below
    the minimum. Symmetric: as many lie outside of `[-t, t]`. Exact to one of at least 2048 bins.

    Args:
        percent: of the values that lie below the maximum.

    Raises:
        ValueError: if `percent` is not in (50, 100].

    Paper: McKinstry et al., "Discovering Low-Precision Networks Close to Full-Precision Networks
    for Efficient Embedded Inference", 2018.
    """

    def __init__(self, percent: float = 99.99) -> None:
        if not 50 < percent <= 100:
            raise ValueError(f"Percentile: percent must be in (50, 100], got {percent}")
        self.percent = percent
        super().__init__()

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        histogram = self._histogram
        outside = histogram.total * (1 - self.percent / 100)
        if symmetric:
            limit = _limit(histogram.magnitudes, outside) * histogram.width
            return -limit, limit
        low = _limit(histogram.negative, outside) * histogram.width
        return -low, _limit(histogram.positive, outside) * histogram.width


class Entropy(_HistogramObserver):
    """The `[-t, t]` in which codes tell most about the values: least Kullback-Leibler divergence.

    Magnitudes are counted in 2048 bins (at least half of them up to the largest). For each t at the
    end of a bin, P are the counts up to t, with those beyond added to the last bin; Q is what stays
    of the counts up to t when each of 128 levels (256 if the codes are affine and all values have
    one sign) tells only its sum, spread evenly over those of its bins that are not empty. t has the
    least `KL(P || Q)`, both normalised, of those beyond which lies at most a hundredth of the
    values. (Without that limit one frequent value, such as the background of normalised images,
    outshines all others: a LeNet for MNIST lost 88 points.) Zeros do not count: every range has a
    code for them.

    Paper: Migacz, "8-bit Inference with TensorRT", GTC 2017.
    """

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        counts = self._histogram.magnitudes.reshape(-1, 2).sum(1)
        one_sided = self._minimum >= 0 or self._maximum <= 0
        bins = _least_divergence(counts, 128 if symmetric or not one_sided else 256)
        limit = 2 * bins * self._histogram.width
        return -limit, limit


class MSE(_HistogramObserver):
    """The range of least mean squared error, of rounding and clipping together.

    The bounds are hundredths of the least and the largest value. Affine: the two are searched in
    turn until neither gets better. Values count as the middles of their bins (of at least 2048),
    zeros not at all, as every range has a code for them.

    Paper: Sung, Shin and Hwang, "Resiliency of Deep Neural Networks under Quantization", 2015.
    """

    def _choose(self, symmetric: bool) -> tuple[float, float]:
        values, counts = self._histogram.values()

        def error(bounds: tuple[float, float]) -> float:
            scale, zero_point = int8_input_parameters(torch.tensor(bounds), symmetric)
            wrong = values - scale * int8_input(values, scale, zero_point)
            return float((wrong.double().square() * counts).sum())

        parts = [part / 100 for part in range(1, 101)]
        low, high = min(self._minimum, 0.0), max(self._maximum, 0.0)
        if symmetric:
            limit = max(-low, high)
            return min(((-part * limit, part * limit) for part in parts), key=error)
        best = (low, high)
        while True:
            before = best
            best = min(((best[0], part * high) for part in parts), key=error)
            best = min(((part * low, best[1]) for part in parts), key=error)
            if error(best) >= error(before):
                return before


class _Histogram:
    """Counts of values in bins whose width is a power of two and doubles as the range grows.

    A pair of bins becomes one bin then, so that no count is ever estimated: the result is that of
    all values at once.
    """

    BINS = 4096  # on each side of 0; the largest magnitude is in the upper half of them
    CHUNK = 2**20  # values at once: their bins take 8 bytes each

    def __init__(self) -> None:
        self.total = 0  # zeros included, which are in no bin
        self.width = 0.0  # while only zeros were seen
        self._counts = np.zeros(2 * self.BINS, dtype=np.int64)  # [-BINS, BINS) * width

    def add(self, values: Tensor, largest: float) -> None:
        """Count float32 values, of which `largest` is the largest magnitude."""
        self.total += values.numel()
        if not largest:
            return
        width = math.ldexp(1.0, math.frexp(largest)[1]) / self.BINS  # largest < BINS * width
        if width > self.width:
            self._widen(width)
        for chunk in values.flatten().split(self.CHUNK):
            bins = (chunk[chunk != 0].double() / self.width).floor().long() + self.BINS
            self._counts += torch.bincount(bins, minlength=2 * self.BINS).cpu().numpy()

    @property
    def positive(self) -> np.ndarray:
        """Counts by magnitude, from 0 on."""
        return self._counts[self.BINS :]

    @property
    def negative(self) -> np.ndarray:
        return self._counts[: self.BINS][::-1]

    @property
    def magnitudes(self) -> np.ndarray:
        return self.positive + self.negative

    def values(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins that are not empty, float32, and their counts, float64."""
        (filled,) = self._counts.nonzero()
        middles = (filled - self.BINS + 0.5) * self.width
        return torch.from_numpy(middles).float(), torch.from_numpy(self._counts[filled]).double()

    def _widen(self, width: float) -> None:
        if self.width:
            old, self._counts = self._counts, np.zeros_like(self._counts)
            bins = np.arange(-self.BINS, self.BINS) // int(width / self.width)
            np.add.at(self._counts, bins + self.BINS, old)
        self.width = width


def _limit(counts: np.ndarray, outside: float) -> float:
    """Where `outside` of the counts are beyond, in bins; linear inside of one."""
    inside = counts.sum() - outside
    if inside <= 0:
        return 0.0
    sums = counts.cumsum()
    last = int(np.searchsorted(sums, inside))
    return last + 1 - (sums[last] - inside) / counts[last]


def _least_divergence(counts: np.ndarray, levels: int) -> int:
    """How many of the bins to keep: see `Entropy`."""
    filled = int(counts.nonzero()[0][-1]) + 1 if counts.any() else 1
    inside = np.searchsorted(counts.cumsum(), (1 - _MOST_CLIPPED) * counts.sum())
    sizes = range(max(min(levels, filled), int(inside) + 1), filled + 1)
    return min(sizes, key=lambda size: _divergence(counts, size, levels))


def _divergence(counts: np.ndarray, size: int, levels: int) -> float:
    kept = counts[:size].astype(np.float64)
    present = kept > 0
    p = kept.copy()
    p[-1] += counts[size:].sum()
    if not present[-1] and p[-1]:
        return math.inf  # Q lacks what P has
    level = np.arange(size) * levels // size
    sums = np.bincount(level, kept)
    q = np.where(present, sums[level] / np.maximum(np.bincount(level, present), 1)[level], 0.0)
    p, q = p[present] / p.sum(), q[present] / q.sum()
    return float(p @ np.log(p / q))
