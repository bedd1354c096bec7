"""A training of moments, and what two of them are compared by."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def samples(count=50):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def batches(seed=0, shuffle=True):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(samples(), 16, shuffle=shuffle, generator=generator)


def network():
    """BatchNorm has buffers, dropout needs the random state."""
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, amsgrad=True)


def numpy_sgd(parameters):
    """Settings as they come out of a sweep over NumPy arrays."""
    return torch.optim.SGD(
        parameters, lr=np.float32(0.1), momentum=np.float64(0.9), nesterov=np.bool_(True)
    )


def same(first, second):
    """Equal to the bit, through any nest of containers."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            same(one, other)
    else:
        assert first == second


class Interrupting(nn.Module):
    """Raises in its n-th training step, as Ctrl-C would."""

    def __init__(self, model, step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, x):
        if self.training:
            self.step -= 1
            if self.step == 0:
                raise KeyboardInterrupt
        return self.model(x)
