"""Observers against numpy's quantiles, brute force, and divergences written out in loops."""

import math

import numpy as np
import pytest
import torch

from nncx.compress.observers import MSE, Entropy, MinMax, MovingAverage, Percentile, _Histogram
from nncx.nn import Int8Linear

OBSERVERS = [MinMax(), MovingAverage(0.3), Percentile(99.0), Entropy(), MSE()]
BINS = 2048  # at least, up to the largest magnitude


def _values(kind: str, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(count, generator=generator)
    return {
        "normal": values,
        "relu": values.relu(),
        "negative": -values.abs() - 0.1,
        "skewed": torch.where(values < 0, 0.2 * values, 3 * values**2),
        "heavy": values / values.flip(0).abs().clamp(min=0.05),
    }[kind]


KINDS = ["normal", "relu", "negative", "skewed", "heavy"]


def _observed(observer, values, batches=7):
    observer = observer.new()
    for batch in values.chunk(batches):
        observer.observe(batch)
    return observer


@pytest.fixture(params=OBSERVERS, ids=lambda observer: type(observer).__name__)
def observer(request):
    return request.param


# ---------------------------------------------------------------------------------------------
# what each chooses


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_min_max_is_all_that_was_seen(kind, symmetric):
    values = _values(kind)
    assert _observed(MinMax(), values).range(symmetric) == (values.min(), values.max())


def test_moving_average_is_that_of_the_batches():
    batches = [(-1.0, 2.0), (-3.0, 1.0), (0.5, 8.0)]
    observer = MovingAverage(0.25)
    for bounds in batches:
        observer.observe(torch.tensor(bounds))
    low, high = batches[0]
    for bounds in batches[1:]:
        low, high = 0.75 * low + 0.25 * bounds[0], 0.75 * high + 0.25 * bounds[1]
    np.testing.assert_allclose(observer.range(False), (low, high))


@pytest.mark.parametrize("percent", [90.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_numpys_quantile_to_a_bin(kind, percent):
    values = _values(kind)
    observer = _observed(Percentile(percent), values)
    x = values.double().numpy()
    part, bin_width = percent / 100, np.abs(x).max() / BINS
    low, high = np.quantile(x, 1 - part), np.quantile(x, part)
    # Between two values of the sample any number is a quantile; numpy interpolates.
    ranks = np.sort(x)
    gap = max(_gap(ranks, 1 - part), _gap(ranks, part))
    atol = bin_width + gap
    np.testing.assert_allclose(observer.range(False), (min(low, 0), max(high, 0)), 0, atol)
    limit = np.quantile(np.abs(x), part)
    expected = max(-limit, min(x.min(), 0)), min(limit, max(x.max(), 0))
    gap = _gap(np.sort(np.abs(x)), part)
    np.testing.assert_allclose(observer.range(True), expected, 0, bin_width + gap)


def _gap(ranks: np.ndarray, part: float) -> float:
    """From the value below a quantile to the second one above, by rank."""
    rank = part * (len(ranks) - 1)
    below, above = max(math.floor(rank) - 1, 0), min(math.ceil(rank) + 1, len(ranks) - 1)
    return ranks[above] - ranks[below]


def _error(x, low, high, symmetric):
    """Mean squared, of int8 codes whose range is [low, high]."""
    if symmetric:
        scale, zero_point = max(-low, high) / 127, 0
    else:
        scale = (high - low) / 255
        zero_point = np.clip(np.rint(-128 - low / scale), -128, 127)
    codes = np.clip(np.rint(x / scale) + zero_point, -128, 127)
    return np.square((codes - zero_point) * scale - x).mean()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_brute_force(kind, symmetric):
    values = _values(kind, 4000)
    x = values.double().numpy()
    found = _error(x, *_observed(MSE(), values).range(symmetric), symmetric)
    low, high = min(x.min(), 0), max(x.max(), 0)
    parts = np.arange(2, 101, 2) / 100
    if symmetric:
        grid = [(-part * max(-low, high), part * max(-low, high)) for part in parts]
    else:
        grid = [
            (a * low, b * high)
            for a in (parts if low else [0.0])
            for b in (parts if high else [0.0])
        ]
    best = min(_error(x, *bounds, symmetric) for bounds in grid)
    assert found <= 1.02 * best
    assert found <= _error(x, low, high, symmetric)


def _divergence(counts, size, levels):
    """KL of Migacz's slides for the first `size` bins, bin by bin."""
    outliers = sum(counts[size:])
    p = [float(count) for count in counts[:size]]
    p[-1] += outliers
    q = [0.0] * size
    for level in range(levels):
        bins = [i for i in range(size) if i * levels // size == level]
        filled = [i for i in bins if counts[i]]
        for i in filled:
            q[i] = sum(counts[j] for j in bins) / len(filled)
    total_p, total_q = sum(p), sum(q)
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        if a and not b:
            return math.inf
        if a:
            divergence += a / total_p * math.log(a / total_p * total_q / b)
    return divergence


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy"])
def test_entropy_has_the_least_divergence(kind, symmetric):
    values = _values(kind, 3000)
    low, high = _observed(Entropy(), values).range(symmetric)
    limit = max(-low, high)
    magnitudes = values[values != 0].abs().double().numpy()
    width = 2.0 ** math.floor(math.log2(magnitudes.max()) + 1) / 2048
    counts = np.histogram(magnitudes, bins=2048, range=(0, 2048 * width))[0].tolist()
    used = max(i for i, count in enumerate(counts) if count) + 1
    assert 1024 < used <= 2048
    levels = 256 if kind == "relu" and not symmetric else 128
    chosen = min(math.ceil(limit / width - 1e-9), used)
    least = _divergence(counts, chosen, levels)
    others = [*range(levels, used, 97), used, *range(chosen - 3, min(chosen + 4, used + 1))]
    others = [size for size in others if sum(counts[size:]) <= 0.01 * sum(counts)]
    assert used in others and len(others) > 3
    assert all(least <= _divergence(counts, size, levels) + 1e-12 for size in others)
    if kind == "heavy":
        assert limit < 0.5 * magnitudes.max(), "it clips what is rare"


def test_entropy_keeps_what_a_frequent_value_outshines():
    """The background of normalised images: beside it, clipping the rest looks harmless."""
    values = torch.cat([torch.full((8_000,), -0.42), torch.linspace(-0.42, 2.8, 2_000)])
    low, high = _observed(Entropy(), values).range(symmetric=False)
    assert low == pytest.approx(-0.42)
    assert high >= values.sort().values[-100], "a hundredth of the values, no more"


# ---------------------------------------------------------------------------------------------
# streams


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", [MinMax(), Percentile(99.0), Entropy(), MSE()])
def test_the_order_of_batches_does_not_matter(observer, symmetric):
    values = _values("heavy").abs().sort().values * 1e-3 * torch.tensor([1, -1]).repeat(10_000)
    values[-1] *= 1e4  # the range grows a thousandfold at the end
    once = _observed(observer, values, 1).range(symmetric)
    assert _observed(observer, values, 13).range(symmetric) == once
    assert _observed(observer, values.flip(0), 5).range(symmetric) == once


def test_a_histogram_of_batches_is_that_of_all_values():
    values = _values("heavy") * torch.logspace(-30, 3, 20_000)
    whole, batches = _Histogram(), _Histogram()
    whole.add(values, values.abs().max().item())
    for batch in values.split(999):
        batches.add(batch, batch.abs().max().item())
    assert whole.width == batches.width and whole.total == batches.total == 20_000
    x = values.double().numpy()
    for side, magnitudes in (("positive", x[x > 0]), ("negative", -x[x < 0])):
        counts = getattr(batches, side)
        assert np.array_equal(counts, getattr(whole, side))
        edges = np.arange(_Histogram.BINS + 1) * whole.width
        expected = np.histogram(magnitudes, edges)[0]
        assert np.array_equal(counts, expected) and counts.sum() == len(magnitudes)
        # and the largest is in the upper half
    assert _Histogram.BINS // 2 <= np.abs(x).max() / whole.width < _Histogram.BINS


def test_chunks_do_not_matter(monkeypatch):
    values = _values("skewed")
    expected = _observed(Percentile(99), values).range(False)
    monkeypatch.setattr(_Histogram, "CHUNK", 17)
    assert _observed(Percentile(99), values).range(False) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_any_dtype_and_shape(observer, dtype):
    values = (10 * _values("normal", 64)).to(dtype).view(2, 8, 4).transpose(0, 2)
    expected = _observed(observer, values.float().contiguous(), 1).range(False)
    observed = observer.new()
    observed.observe(values.requires_grad_() if dtype.is_floating_point else values)
    observed.observe(values[:0])
    assert observed.range(False) == expected


def test_new_ones_share_nothing(observer):
    first = observer.new()
    first.observe(torch.tensor([-1.0, 2.0]))
    second = first.new()
    second.observe(torch.tensor([-10.0, 20.0]))
    assert type(second) is type(first)
    assert first.range(False)[1] <= 2.0 < second.range(False)[1]
    assert vars(second).keys() == vars(first).keys()
    assert getattr(second, "percent", None) == getattr(observer, "percent", None)
    assert getattr(second, "momentum", None) == getattr(observer, "momentum", None)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [5.0], [-5.0], [1e-42, -3e-42], [3e38, -3e38], [0.0, 1e-30]]
)
def test_extreme_values_give_ranges_that_layers_take(observer, values, symmetric):
    observed = observer.new()
    observed.observe(torch.tensor(values))
    low, high = observed.range(symmetric)
    assert type(low) is float and type(high) is float
    assert -math.inf < low <= high < math.inf
    layer = Int8Linear(1, 1, symmetric=symmetric)
    layer.set_input_range(low, high)
    with torch.no_grad():
        assert layer.eval()(torch.tensor(values)[:, None]).isfinite().all()


# ---------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(observer, value):
    named, unnamed = observer.new("layer1.conv"), observer.new()
    batch = torch.tensor([[0.5, value], [-1.0, 1.0]])
    message = "observe: calibration data must be finite, got NaN or infinity"
    with pytest.raises(ValueError, match=f"{message} in the input of 'layer1.conv'; check"):
        named.observe(batch)
    with pytest.raises(ValueError, match=f"{message}; check"):
        unnamed.observe(batch)
    with pytest.raises(ValueError, match="must have seen a value"):
        named.range(True)


def test_a_range_of_nothing_is_refused(observer):
    with pytest.raises(ValueError, match="the observer of 'fc' must have seen a value, got none"):
        observer.new("fc").range(False)
    empty = observer.new()
    empty.observe(torch.empty(0, 3))
    with pytest.raises(ValueError, match="the observer must have seen a value, got none; call"):
        empty.range(True)


@pytest.mark.parametrize("percent", [50, 100.1, -1, math.nan])
def test_percentiles_that_cannot_be_are_refused(percent):
    with pytest.raises(ValueError, match=r"Percentile: percent must be in \(50, 100\], got"):
        Percentile(percent)


@pytest.mark.parametrize("momentum", [0, 1.1, math.nan])
def test_momenta_that_cannot_be_are_refused(momentum):
    with pytest.raises(ValueError, match=r"MovingAverage: momentum must be in \(0, 1\], got"):
        MovingAverage(momentum)
