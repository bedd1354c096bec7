"""Maxout against its definition; a network of maxouts keeps its signal."""

import pytest
import torch

from nncx.models import FitNet19, Maxout


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 3), (1, 12, 2, 5), (0, 6, 1, 1)])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_maxout_is_the_largest_of_neighbouring_channels(shape, pieces):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = Maxout(pieces)(x)
    assert y.shape == (shape[0], shape[1] // pieces, *shape[2:])
    for channel in range(y.shape[1]):
        own = [x[:, channel * pieces + piece] for piece in range(pieces)]
        assert torch.equal(y[:, channel], torch.stack(own).amax(0))


def test_maxout_refuses_no_pieces():
    with pytest.raises(ValueError, match="pieces must be an integer of at least 1, got 0"):
        Maxout(0)


def test_signal_neither_vanishes_nor_explodes_without_batchnorm():
    torch.manual_seed(0)
    logits = FitNet19()(torch.randn(4, 3, 16, 16))
    assert 0.1 < logits.std().item() < 10
