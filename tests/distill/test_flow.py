"""FSP: flow matrices and the two stages."""

import pytest
import torch
from torch import nn

from nncx.distill import FSP, Outputs, fsp
from nncx.models import ResNet


def seen(*maps):
    return Outputs(torch.zeros(3, 7), torch.zeros(3, 1), dict(zip("abcd", maps, strict=False)))


def maps(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return seen(*(torch.randn(3, *shape, generator=generator) for shape in shapes))


def written_out(outputs, first, last):
    """The flow matrix, entry by entry; maps of one size."""
    a, b = outputs.maps[first], outputs.maps[last]
    flow = torch.zeros(3, a.shape[1], b.shape[1])
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            flow[:, i, j] = (a[:, i] * b[:, j]).sum((1, 2)) / (a.shape[2] * a.shape[3])
    return flow


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_formula(reduction):
    shapes = (2, 4, 5), (3, 4, 5), (4, 4, 5)
    student, teacher = maps(0, *shapes), maps(1, *shapes)
    pairs = [("a", "b"), ("b", "c")]
    expected = 0.0
    for pair in pairs:
        squares = (written_out(student, *pair) - written_out(teacher, *pair)) ** 2
        expected += 0.5 * squares.sum() / 3 / (squares[0].numel() if reduction == "mean" else 1)
    value = FSP(pairs, pairs, weight=0.5, reduction=reduction)(student, teacher)
    torch.testing.assert_close(value, expected)


def test_larger_maps_are_averaged_and_networks_may_differ_in_size():
    student, teacher = maps(0, (2, 4, 6), (3, 2, 3)), maps(1, (2, 3, 3), (3, 3, 3))
    pooled = seen(student.maps["a"].unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5)),
                  student.maps["b"])  # fmt: skip
    loss = FSP([("a", "b")], [("a", "b")])
    assert pooled.maps["a"].shape == (3, 2, 2, 3)
    torch.testing.assert_close(loss(student, teacher), loss(pooled, teacher))
    swapped = FSP([("b", "a")], [("b", "a")])  # the last map may be the larger one
    torch.testing.assert_close(swapped(student, teacher), loss(student, teacher))


def test_invariances():
    """The same flow costs nothing; where things are in the map does not matter."""
    shapes = (2, 4, 5), (3, 4, 5)
    student, teacher = maps(0, *shapes), maps(1, *shapes)
    loss = FSP([("a", "b")], [("a", "b")])
    assert loss(student, student) == 0
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    shuffled = (m.flatten(2)[:, :, order].unflatten(2, (4, 5)) for m in student.maps.values())
    torch.testing.assert_close(loss(seen(*shuffled), teacher), loss(student, teacher))


def test_stages_of_a_resnet():
    torch.manual_seed(0)
    student, teacher = ResNet(8, 1, width=2), ResNet(14, 1, width=2)
    images = torch.randn(2, 1, 8, 8)
    first, second = fsp(student, teacher, images, pretraining=0.4)
    assert [first.name, first.share, second.name, second.share] == ["fsp", 0.4, "labels", 0.6]
    pairs = [("conv", "stage1"), ("stage1", "stage2"), ("stage2", "stage3")]
    assert first.task.losses[0].student_pairs == first.task.losses[0].teacher_pairs == pairs
    first.task(images)["loss"].backward()
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None}
    assert trained == {"conv", "stage1", "stage2", "stage3"}
    assert second.task is student
    assert len(list(second.student_parameters())) == len(list(student.parameters()))


def test_what_does_not_fit_is_refused_in_a_sentence():
    pair = [("a", "b")]
    with pytest.raises(ValueError, match=r"same channels, got \[2, 3\] at .* and \[2, 4\] at"):
        FSP(pair, pair)(maps(0, (2, 4, 4), (3, 4, 4)), maps(0, (2, 4, 4), (4, 4, 4)))
    with pytest.raises(ValueError, match=r"'b' of the teacher must return maps .* got \[3, 9\]"):
        FSP(pair, pair)(maps(0, (2, 4, 4), (3, 4, 4)), maps(0, (2, 4, 4), (9,)))
    for pairs in ([], pair * 2):
        with pytest.raises(ValueError, match=f"equally many pairs .* got {len(pairs)} and"):
            FSP(pairs, pairs[1:])
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ValueError, match="Sequential must have children of type nn.Sequential"):
        fsp(plain, plain, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="example must be a batch of inputs"):
        fsp(plain, plain)
