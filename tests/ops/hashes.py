"""The hash of hashed layers once more, in NumPy's unsigned integers."""

import numpy as np
import torch
from torch import Tensor


def places(seed: int, buckets: int, in_features: int, out_features: int) -> np.ndarray:
    """int64 ``[out_features, in_features]``: twice the bucket, plus one for minus."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed % 2**64)
        z = z + np.arange(1, out_features + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31)))[:, None]
        x = z.astype(np.uint32) + np.arange(in_features, dtype=np.uint32) * np.uint32(0x9E3779B1)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = (x + (z >> np.uint64(32)).astype(np.uint32)) * np.uint32(0x846CA68B)
        return (x.astype(np.uint64) * np.uint64(2 * buckets) >> np.uint64(32)).astype(np.int64)


def virtual_weight(buckets: Tensor, seed: int, in_features: int, out_features: int) -> Tensor:
    """``[out_features, in_features]``, as the paper writes it: a sign times a bucket."""
    place = torch.from_numpy(places(seed, len(buckets), in_features, out_features))
    return (1 - 2 * (place % 2)) * buckets[place // 2]
