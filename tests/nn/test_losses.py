"""Losses against their formulas."""

import pytest
import torch

from nncx.nn import SquaredHingeLoss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_squared_hinge_is_its_formula(dtype):
    outputs = (torch.randn(5, 3) * 2).to(dtype)
    labels = torch.tensor([0, 2, 1, 1, 0])
    loss = SquaredHingeLoss()(outputs, labels)
    total = 0.0
    for row, label in zip(outputs.tolist(), labels.tolist(), strict=True):
        for index, output in enumerate(row):
            total += max(0.0, 1 - (1 if index == label else -1) * output) ** 2
    assert loss.dtype == dtype and loss.shape == ()
    assert loss.item() == pytest.approx(total / 15, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_squared_hinge_is_zero_beyond_the_margin_and_has_its_gradient():
    outputs = torch.tensor([[2.0, -1.0], [0.5, -3.0]], requires_grad=True)
    loss = SquaredHingeLoss()(outputs, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 0.25 / 4
    assert outputs.grad.tolist() == [[0, 0], [-0.25, 0]]


@pytest.mark.parametrize(
    "outputs, labels",
    [
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_squared_hinge_refuses_other_labels(outputs, labels):
    with pytest.raises(ValueError, match=r"labels must be int64 \[N\] for outputs .*, got torch"):
        SquaredHingeLoss()(outputs, labels)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_squared_hinge_refuses_labels_without_an_output(labels):
    message = rf"labels must be from 0 to 2, got {min(labels)} to {max(labels)}; give the network"
    with pytest.raises(ValueError, match=message):
        SquaredHingeLoss()(torch.zeros(2, 3), torch.tensor(labels))
