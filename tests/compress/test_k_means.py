"""k-means of numbers, against the algorithm as it is written in textbooks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nncx.compress._k_means import INITS, k_means, nearest


def _lloyd(values, centroids):
    """With a matrix of all distances, where no cluster loses all of its values."""
    labels = None
    while True:
        distances = np.abs(values[:, None] - centroids)
        before, labels = labels, distances.argmin(1)
        if np.array_equal(before, labels):
            return centroids
        assert len(np.unique(labels)) == len(centroids)
        centroids = np.array([values[labels == j].mean() for j in range(len(centroids))])


@pytest.mark.parametrize("k", [1, 2, 7, 16])
@pytest.mark.parametrize("init", ["linear", "density"])
def test_it_is_lloyds_algorithm(init, k):
    values = np.random.default_rng(0).triangular(-1, 0.1, 1, size=3001)
    middles = (np.arange(k) + 0.5) / k
    start = {
        "linear": np.linspace(values.min(), values.max(), k),
        "density": np.quantile(values, middles, method="inverted_cdf"),
    }
    ours = k_means(torch.from_numpy(values), k, init).double().numpy()
    np.testing.assert_allclose(ours, _lloyd(values, start[init]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape, k", [((4000,), 255), ((63, 65), 16), ((17,), 16), ((500,), 3)])
def test_each_centroid_is_the_mean_of_the_values_nearest_to_it(shape, k, init):
    values = torch.distributions.Laplace(0.0, 0.02).sample(shape)
    centroids = k_means(values, k, init)
    assert centroids.dtype == torch.float32 and torch.equal(centroids, centroids.sort().values)
    codes = nearest(values, centroids)
    assert codes.shape == values.shape
    distances = (values.flatten()[:, None] - centroids).abs()
    chosen = distances.gather(1, codes.flatten()[:, None])[:, 0]
    assert torch.equal(chosen, distances.min(1).values)
    means = [values[codes == j].double().mean() for j in range(k)]  # NaN of an empty cluster
    torch.testing.assert_close(centroids, torch.stack(means).float(), rtol=1e-5, atol=1e-7)


def test_as_many_centroids_as_there_are_distinct_values_if_those_are_fewer():
    values = torch.tensor([[3.0, -1.0, 3.0], [0.5, -1.0, 3.0]])
    for k in (3, 4, 200):
        assert torch.equal(k_means(values, k), torch.tensor([-1.0, 0.5, 3.0]))
    assert torch.equal(k_means(values, 1), values.mean()[None])
    assert k_means(torch.empty(0), 5).shape == (0,)


def test_a_far_value_leaves_no_centroid_without_values():
    """Evenly spaced between 0 and 1000, all centroids but two begin without any value."""
    values = torch.cat((torch.rand(1000), torch.tensor([1000.0])))
    centroids = k_means(values, 8, "linear")
    assert nearest(values, centroids).unique().tolist() == list(range(8))
    assert centroids[-1] == 1000
    error = (values - centroids[nearest(values, centroids)]).square().mean()
    assert error < 1.1 / 12 / 7**2, "of 7 even cells"


def test_a_value_counts_as_often_as_it_is_there():
    values = torch.tensor([0.0] * 99 + [1.0, 10.0])
    torch.testing.assert_close(k_means(values, 2), torch.tensor([0.01, 10.0]))


@given(
    st.lists(st.floats(-1024, 1024, width=32), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sampled_from(INITS),
)
def test_any_numbers_end_and_give_the_same_twice(numbers, k, init):
    values = torch.tensor(numbers, dtype=torch.float32)
    centroids = k_means(values, k, init)
    assert torch.equal(centroids, k_means(values.flip(0), k, init))
    assert len(centroids) == min(k, len(set(values.tolist())))
    assert values.min() <= centroids.min() and centroids.max() <= values.max()


def test_random_depends_on_the_seed_alone():
    values = torch.randn(500)
    first = k_means(values, 90, "random", seed=1)
    torch.rand(1)  # moves torch's own generator
    assert torch.equal(k_means(values, 90, "random", seed=1), first)
    assert not torch.equal(k_means(values, 90, "random", seed=2), first)


def test_the_dtype_of_the_weights_does_not_matter():
    values = torch.randn(300).bfloat16()
    centroids = k_means(values, 9)
    assert torch.equal(centroids, k_means(values.double(), 9))
    assert torch.equal(nearest(values, centroids), nearest(values.double(), centroids))
