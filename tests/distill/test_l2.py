import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nncx.distill import L2, Outputs, logit_std

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


def test_standardised(logits):
    """Both sides through the same map: the published targets, on the teacher's scale."""
    student, teacher = logits
    mean, std = teacher.mean(0), teacher.std(0, correction=0)
    data = [(teacher[:4], None), (teacher[4:], None)]
    torch.testing.assert_close(logit_std(nn.Identity(), data), std)
    loss = L2(reduction="mean", std=std)
    value = loss(Outputs(student, FEATURES), Outputs(teacher, FEATURES), None)
    torch.testing.assert_close(value, F.mse_loss((student - mean) / std, (teacher - mean) / std))
    # The unit of a logit does not matter, nor does a constant on a class.
    other = L2(reduction="mean", std=3 * std)
    student, teacher = 3 * student + 5, 3 * teacher + 5
    again = other(Outputs(student, FEATURES), Outputs(teacher, FEATURES), None)
    torch.testing.assert_close(again, value)
    assert torch.equal(loss.state_dict()["std"], std)


def test_bad_deviations(logits):
    both = Outputs(logits[0], FEATURES), Outputs(logits[1], FEATURES)
    with pytest.raises(ValueError, match="one deviation for each of the 7 classes, got 6: take it"):
        L2(std=torch.ones(6))(*both)
    for std in (torch.zeros(7), torch.full((7,), float("nan")), torch.ones(2, 7)):
        with pytest.raises(ValueError, match="std must hold one positive deviation for each class"):
            L2(std=std)
    with pytest.raises(ValueError, match="logit_std: data must give at least one batch, got none"):
        logit_std(nn.Identity(), [])


def test_bad_reduction():
    with pytest.raises(ValueError, match="reduction must be one of .* got 'none'"):
        L2(reduction="none")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_bad_weight(weight):
    with pytest.raises(ValueError, match="L2: weight must be finite and at least 0, got"):
        L2(weight)
