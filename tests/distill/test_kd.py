import math

import pytest
import torch
from torch.nn import functional as F

from nncx.distill import KD, Outputs

FEATURES = torch.zeros(6, 1)
LABELS = torch.tensor([0, 6, 3, 3, 1, 5])


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 6, 7, generator=generator, dtype=torch.float64)
    return Outputs(student, FEATURES), Outputs(teacher, FEATURES)


def written_out(student, teacher, labels, temperature, alpha):
    """The formula, sample by sample, in plain Python."""

    def softmax(logits, temperature):
        exponentials = [math.exp(z / temperature) for z in logits.tolist()]
        return [e / sum(exponentials) for e in exponentials]

    total = 0.0
    for s, t, label in zip(student.logits, teacher.logits, labels.tolist(), strict=True):
        soft = zip(softmax(t, temperature), softmax(s, temperature), strict=True)
        divergence = sum(p * math.log(p / q) for p, q in soft)
        entropy = -math.log(softmax(s, 1)[label])
        total += (1 - alpha) * entropy + alpha * temperature**2 * divergence
    return total / len(labels)


@pytest.mark.parametrize("temperature", [1, 4, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_formula(outputs, temperature, alpha):
    value = KD(temperature, alpha)(*outputs, LABELS)
    assert value.item() == pytest.approx(written_out(*outputs, LABELS, temperature, alpha))


def test_alpha_0_is_supervised_and_alpha_1_needs_no_labels(outputs):
    supervised = KD(alpha=0.0, weight=2.0)(*outputs, LABELS)
    torch.testing.assert_close(supervised, 2 * F.cross_entropy(outputs[0].logits, LABELS))
    loss = KD(alpha=1.0)
    assert torch.equal(loss(*outputs, LABELS), loss(*outputs, None))


def test_high_temperature_tends_to_half_the_l2_of_centred_logits(outputs):
    """Hinton 2015, section 2.1: distillation at large T matches logits."""
    student, teacher = (o.logits - o.logits.mean(1, keepdim=True) for o in outputs)
    expected = (student - teacher).square().mean(1).mean() / 2
    value = KD(temperature=1e4, alpha=1.0)(*outputs, None)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)


def test_labels_are_needed_below_alpha_1(outputs):
    with pytest.raises(ValueError, match=r"alpha=0.9 needs labels, got None"):
        KD()(*outputs, None)


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
        KD(temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got"):
        KD(alpha=alpha)


def test_bad_weight():
    with pytest.raises(ValueError, match="KD: weight must be finite and at least 0, got nan"):
        KD(weight=float("nan"))
