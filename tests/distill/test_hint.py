"""FitNets: the hint, the falling factor, and the two stages."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nncx.distill import KD, AnnealedKD, Distiller, Hint, Outputs, fitnets

LABELS = torch.tensor([0, 6, 3, 3])


def seen(**maps):
    return Outputs(torch.zeros(4, 7), torch.zeros(4, 1), maps)


def network(width, seed, pool=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(pool),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 7),
    )  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_formula(reduction):
    """Regressor and distance, position by position: [5, 4] -> [3, 2] takes a kernel of 3x3."""
    torch.manual_seed(0)
    loss = Hint("guided", "hint", (2, 5, 4), (3, 3, 2), weight=0.5, reduction=reduction)
    v, u = torch.randn(4, 2, 5, 4), torch.randn(4, 3, 3, 2)
    weight, bias = loss.regressor.weight, loss.regressor.bias
    assert weight.shape == (3, 2, 3, 3)
    total = 0.0
    for n in range(4):
        for y in range(3):
            for x in range(2):
                patch = v[n, :, y : y + 3, x : x + 3]
                r = torch.stack([(patch * weight[c]).sum() + bias[c] for c in range(3)])
                total += 0.5 * 0.5 * ((u[n, :, y, x] - r) ** 2).sum()
    expected = total / (4 * 3 * 2) / (3 if reduction == "mean" else 1)
    torch.testing.assert_close(loss(seen(guided=v), seen(hint=u)), expected)


def test_sizes_choose_the_regressor():
    assert Hint("a", "b", (5, 4, 4), (8, 4, 4)).regressor.kernel_size == (1, 1)
    linear = Hint("a", "b", (5,), (8,)).regressor
    assert isinstance(linear, nn.Linear) and linear.weight.shape == (8, 5)
    loss = Hint("a", "b", (5,), (8,))
    value = loss(seen(a=torch.ones(4, 5)), seen(b=loss.regressor(torch.ones(4, 5)).detach()))
    assert value == 0  # a student that is the hint up to a linear map pays nothing


def test_lambda_falls_linearly_and_is_part_of_the_state():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        Outputs(torch.randn(4, 7, generator=generator), torch.zeros(4, 1)) for _ in range(2)
    )
    loss = AnnealedKD(3, temperature=2.0, start=4.0, end=1.0)
    wanted = F.softmax(teacher.logits / 2, 1)
    soft = F.kl_div(F.log_softmax(student.logits / 2, 1), wanted, reduction="batchmean")
    for factor in (4.0, 3.0, 2.0):
        parts = loss(student, teacher, LABELS)
        torch.testing.assert_close(parts["kd"], factor * soft)
        torch.testing.assert_close(parts["labels"], F.cross_entropy(student.logits, LABELS))
        loss.eval()(student, teacher, LABELS)  # does not count
        loss.train()
    resumed = AnnealedKD(3, temperature=2.0)
    resumed.load_state_dict(loss.state_dict())
    for _ in range(2):  # it stays at the end
        torch.testing.assert_close(resumed(student, teacher, LABELS)["kd"], soft)
    # At lambda = 1 the two parts are KD's, but for its T^2.
    half = KD(2.0, alpha=0.5, weight=2.0)(student, teacher, LABELS)
    torch.testing.assert_close(half, parts["labels"] + 4 * soft)
    with pytest.raises(ValueError, match="needs labels, got None"):
        loss(student, teacher, None)


def test_first_stage_trains_up_to_the_guided_layer(images):
    student, teacher = network(4, 1), network(9, 2, pool=2)
    hint, kd = fitnets(student, teacher, images, steps=20, student_layer="1", teacher_layer="4")
    assert [hint.name, kd.name, hint.share + kd.share] == ["hint", "kd", 1]
    assert kd.task.losses[0].steps == 15 and hint.task.student is kd.task.student is student
    assert hint.task.losses[0].regressor.kernel_size == (4, 4)  # 6x6 -> 3x3

    hint.task(images)["loss"].backward()
    trained = {name for name, p in hint.task.named_parameters() if p.grad is not None}
    assert trained == {
        *(f"student.0.{name}" for name in ("weight", "bias")),
        *(f"losses.0.regressor.{name}" for name in ("weight", "bias")),
    }
    assert trained < {name for name, p in hint.task.named_parameters()}
    assert len(list(hint.student_parameters())) == 8 and not list(hint.discriminator_parameters())
    result = kd.task(images, LABELS)
    assert list(result) == ["loss", "labels", "kd"]


def test_default_layers_are_in_the_middle(images):
    hint, _ = fitnets(network(4, 1), network(9, 2), images, steps=1)
    assert (hint.task.student_layers, hint.task.teacher_layers) == (("3",), ("3",))


def test_what_does_not_fit_is_refused_in_a_sentence(images):
    student, teacher = network(4, 1, pool=2), network(9, 2)
    with pytest.raises(ValueError, match=r"at least as large .* got \[3, 3\] and \[6, 6\]: name"):
        fitnets(student, teacher, images, steps=1)
    with pytest.raises(ValueError, match=r"both vectors, got \[5\] for the student and \[8, 2"):
        Hint("a", "b", (5,), (8, 2, 2))
    with pytest.raises(ValueError, match=r"'a' of the student must give \[5\] .* got \[6\]"):
        Hint("a", "b", (5,), (8,))(seen(a=torch.zeros(4, 6)), seen(b=torch.zeros(4, 8)))
    with pytest.raises(ValueError, match="example must be a batch of inputs, .* got NoneType"):
        fitnets(student, teacher, None, steps=1)
    with pytest.raises(ValueError, match=r"steps must be the number of batches .* got None"):
        fitnets(student, teacher, images, steps=None)
    with pytest.raises(ValueError, match="pretraining must be .* between 0 and 1, got 1.0"):
        fitnets(student, teacher, images, steps=1, pretraining=1.0)
    with pytest.raises(ValueError, match="Linear must have children that return maps"):
        fitnets(nn.Linear(3, 7), nn.Linear(3, 7), torch.zeros(2, 3), steps=1)
    with pytest.raises(ValueError, match="a layer that a loss names .* Sequential, got 'conv9'"):
        Distiller(student, teacher, [Hint("0", "conv9", (4, 6, 6), (9, 6, 6))])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        AnnealedKD(0)
    with pytest.raises(ValueError, match="Hint: reduction must be one of .* got 'all'"):
        Hint("a", "b", (5,), (8,), reduction="all")
