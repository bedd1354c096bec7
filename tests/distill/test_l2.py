import pytest
import torch
from torch.nn import functional as F

from nncx.distill import L2, Outputs

FEATURES = torch.zeros(6, 1)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 7, generator=generator)


def test_sum_is_the_mean_squared_norm(logits):
    student, teacher = logits
    expected = sum(torch.dist(s, t) ** 2 for s, t in zip(student, teacher, strict=True)) / 6
    value = L2()(Outputs(student, FEATURES), Outputs(teacher, FEATURES), None)
    torch.testing.assert_close(value, expected)


def test_mean_is_torchs_mse(logits):
    student, teacher = logits
    value = L2(0.5, reduction="mean")(Outputs(student, FEATURES), Outputs(teacher, FEATURES), None)
    torch.testing.assert_close(value, 0.5 * F.mse_loss(student, teacher))


def test_equal_logits_cost_nothing_and_labels_do_not_matter(logits):
    same = Outputs(logits[0], FEATURES)
    assert L2()(same, same, None) == 0
    other = Outputs(logits[1], FEATURES)
    assert torch.equal(L2()(same, other, torch.arange(6)), L2()(same, other, None))


def test_gradient_pulls_towards_the_teacher(logits):
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    L2()(Outputs(student, FEATURES), Outputs(teacher, FEATURES), None).backward()
    torch.testing.assert_close(student.grad, 2 / 6 * (student.detach() - teacher))


def test_bad_reduction():
    with pytest.raises(ValueError, match='must be "sum" or "mean", got \'none\''):
        L2(reduction="none")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match="L2: weight must be finite and at least 0, got"):
        L2(weight)
