"""ANC: one backward must do what the classical two alternating steps do."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nncx.distill import Adversarial, Outputs, anc

BATCH, INPUTS, CLASSES = 16, 6, 4


def network(features, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, features), nn.ReLU(), nn.Linear(features, CLASSES))


def outputs(features):
    return Outputs(torch.zeros(len(features), CLASSES), features)


def gradients(parameters):
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]


@pytest.fixture
def inputs():
    return torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("regulariser", ["adversary", "l1", "l2", "none"])
@pytest.mark.parametrize("student_width", [10, 7], ids=["same", "adapter"])
def test_one_backward_equals_the_two_steps(inputs, regulariser, student_width):
    student, teacher = network(student_width, 1), network(10, 2)
    mu, weight = 0.01, 0.3
    task = anc(student, teacher, weight=weight, regulariser=regulariser, mu=mu, hidden=(9, 5))

    torch.manual_seed(5)
    task(inputs)["loss"].backward()
    student_grads = gradients(task.student_parameters())
    opponent_grads = gradients(task.discriminator_parameters())

    # The classical procedure, on copies: student's step, gradients cleared, discriminator's step.
    twin = copy.deepcopy(task)
    twin.zero_grad()
    adapter, discriminator = twin.losses[0].adapter, twin.losses[0].discriminator
    torch.manual_seed(5)
    raw, logits = twin.student[:2](inputs), twin.student(inputs)
    features = adapter(raw)
    fake, adversary = F.dropout(features, 0.5), F.dropout(features, 0.5)  # two masks
    real, wanted = teacher[:2](inputs).detach(), teacher(inputs).detach()

    def bce(features, label):
        return F.binary_cross_entropy(
            torch.sigmoid(discriminator(features)), torch.full((BATCH, 1), float(label))
        )

    (bce(fake, 1) + weight * (logits - wanted).square().sum() / BATCH).backward()
    expected_student = gradients(twin.student_parameters())
    twin.zero_grad()
    matrices = [p for p in discriminator.parameters() if p.dim() == 2]
    regularisation = {
        "adversary": lambda: bce(adversary.detach(), 1),
        "l1": lambda: mu * sum(p.abs().sum() for p in matrices),
        "l2": lambda: mu * sum((p**2).sum() for p in matrices),
        "none": lambda: 0,
    }[regulariser]()
    (bce(real, 1) + bce(fake.detach(), 0) + regularisation).backward()
    expected_opponent = gradients(twin.discriminator_parameters())

    assert len(student_grads) == len(expected_student) == (4 if student_width == 10 else 6)
    torch.testing.assert_close(student_grads, expected_student)
    torch.testing.assert_close(opponent_grads, expected_opponent)


def test_no_part_reaches_the_other_player(inputs):
    torch.manual_seed(0)
    loss = Adversarial(8, 6)
    student, teacher = outputs(inputs.clone().requires_grad_()), outputs(torch.randn(BATCH, 8))
    loss(student, teacher)["adversarial"].backward()
    assert all(parameter.grad is None for parameter in loss.discriminator.parameters())
    assert student.features.grad.abs().sum() > 0 and loss.adapter.weight.grad.abs().sum() > 0

    student.features.grad = loss.adapter.weight.grad = None
    loss(student, teacher)["discriminator"].backward()
    assert student.features.grad is None and loss.adapter.weight.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.discriminator.parameters())


def test_labels_are_not_looked_at(inputs):
    task = anc(network(10, 1), network(10, 2))
    results = []
    for targets in (torch.arange(BATCH) % CLASSES, torch.randperm(BATCH), None):
        torch.manual_seed(0)
        task.zero_grad()
        result = task(inputs, targets)
        result["loss"].backward()
        results.append((result, gradients(task.parameters())))
    for result, grads in results[1:]:
        assert all(torch.equal(result[name], results[0][0][name]) for name in result)
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))
    assert list(result) == ["loss", "adversarial", "discriminator", "l2"]


def test_parameters_are_split_without_rest():
    task = anc(network(7, 1), network(10, 2))
    student, opponent = list(task.student_parameters()), list(task.discriminator_parameters())
    assert {id(p) for p in task.parameters()} == {id(p) for p in student} ^ {
        id(p) for p in opponent
    }
    assert any(p is task.losses[0].adapter.weight for p in student)
    assert task.losses[0].adapter.weight.shape == (10, 7)
    assert isinstance(anc(network(10, 1), network(10, 2)).losses[0].adapter, nn.Identity)


def test_discriminator_is_128_256_128_by_default():
    shapes = [tuple(layer.weight.shape) for layer in Adversarial(64).discriminator[::2]]
    assert shapes == [(128, 64), (256, 128), (128, 256), (1, 128)]
    assert all(isinstance(layer, nn.ReLU) for layer in Adversarial(64).discriminator[1::2])
    assert [type(layer) for layer in Adversarial(64, hidden=()).discriminator] == [nn.Linear]


def convolutional(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize("inputs", ["features", "logits", "map"])
def test_every_input_with_every_discriminator_and_regulariser(inputs):
    """D sees what it is to see, and each gradient comes from its own player's part."""
    images = torch.randn(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    size = {"features": (6,), "logits": (CLASSES,), "map": (6, 4, 4)}[inputs]
    shapes = [((5,), 6), ((3, 2, 3), 4)]  # of D, and the student's width: without and with adapter
    grid = itertools.product(["adversary", "l1", "l2", "none"], [0.0, 0.5], [False, True], shapes)
    for regulariser, dropout, conditional, (hidden, width) in grid:
        student, teacher = convolutional(width, 1), convolutional(6, 2)
        task = anc(student, teacher, inputs=inputs, regulariser=regulariser, dropout=dropout,
                   conditional=conditional, hidden=hidden, example=images[:1])  # fmt: skip
        seen, loss = [], task.losses[0]
        loss.discriminator.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        parts = {}
        loss.register_forward_hook(lambda *args, parts=parts: parts.update(args[-1]))
        result = task(images)
        assert list(result) == ["loss", "adversarial", "discriminator", "l2"]
        assert all(value.isfinite() for value in result.values())

        channels = size[0] + CLASSES * conditional
        assert {each.shape for each in seen} == {(BATCH, channels, *size[1:])}
        assert len(seen) == (4 if regulariser == "adversary" else 3)
        trained, real, labelled_0, *_ = seen
        own = {"features": teacher[:4], "logits": teacher, "map": teacher[:2]}[inputs](images)
        assert torch.equal(real[:, : size[0]], own)
        assert torch.equal(trained, labelled_0)
        if conditional:  # all are shown the teacher's class
            expected = F.one_hot(teacher(images).argmax(1), CLASSES).float()
            for each in seen:
                assert torch.equal(each[:, size[0] :].reshape(BATCH, CLASSES, -1).amax(2), expected)
                assert torch.equal(each[:, size[0] :].reshape(BATCH, CLASSES, -1).amin(2), expected)

        opponent = list(loss.discriminator.parameters())
        followers = list(task.student_parameters())
        own = torch.autograd.grad(parts["discriminator"], opponent, retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in own)
        leaked = torch.autograd.grad(
            parts["adversarial"], opponent, retain_graph=True, allow_unused=True
        ) + torch.autograd.grad(
            parts["discriminator"], followers, retain_graph=True, allow_unused=True
        )
        assert all(gradient is None for gradient in leaked)
        result["loss"].backward()
        assert all(torch.equal(p.grad, gradient) for p, gradient in zip(opponent, own, strict=True))
        assert all(p.grad.isfinite().all() for p in followers)


def test_convolutional_discriminator():
    """3x3 convolutions of stride 2, whatever the size of the map; whole channels are dropped."""
    torch.manual_seed(0)
    loss = Adversarial(8, inputs="map", student_layer="a", teacher_layer="b", hidden=(128, 256))
    shapes = [tuple(p.shape) for p in loss.discriminator.parameters() if p.dim() > 1]
    assert shapes == [(128, 8, 3, 3), (256, 128, 3, 3), (1, 256)]
    logits = torch.zeros(BATCH, CLASSES)
    for size in (1, 2, 7):
        maps = torch.ones(BATCH, 8, size, size)
        seen = []
        with loss.discriminator.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        ):
            loss(Outputs(logits, logits, {"a": maps}), Outputs(logits, logits, {"b": maps}))
        assert {0.0, 2.0} == set(seen[0].unique().tolist())
        assert torch.equal(seen[0].amin((2, 3)), seen[0].amax((2, 3)))
    with pytest.raises(ValueError, match=r"maps .* must be of one size, got \[3, 3\] and \[7, 7\]"):
        loss(
            Outputs(logits, logits, {"a": maps[:, :, :3, :3]}), Outputs(logits, logits, {"b": maps})
        )


def test_dropout_makes_the_samples(inputs):
    loss = Adversarial(INPUTS)
    student, teacher = outputs(inputs), outputs(inputs)
    assert loss(student, teacher)["adversarial"] != loss(student, teacher)["adversarial"]
    loss.eval()
    assert loss(student, teacher)["adversarial"] == loss(student, teacher)["adversarial"]


def test_discriminator_never_sees_the_clean_features():
    """Else it would tell clean features from dropped-out ones, not student from teacher."""
    loss, seen = Adversarial(64), []
    loss.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    teacher = torch.full((BATCH, 64), 3.0)
    loss(outputs(torch.ones(BATCH, 64)), outputs(teacher))
    trained, real, labelled_0, labelled_1 = seen
    assert torch.equal(real, teacher)
    assert trained is not labelled_0 and torch.equal(trained, labelled_0)  # one sample, detached
    assert not torch.equal(labelled_0, labelled_1)  # two masks
    for sample in (labelled_0, labelled_1):
        assert set(sample.unique().tolist()) == {0.0, 2.0}  # zeroed, or scaled by 1 / (1 - 0.5)


def test_weight_scales_the_students_part_alone(inputs):
    torch.manual_seed(0)
    loss = Adversarial(INPUTS, dropout=0.0)
    plain = loss(outputs(inputs), outputs(inputs + 1))
    loss.weight = 3.0
    scaled = loss(outputs(inputs), outputs(inputs + 1))
    torch.testing.assert_close(scaled["adversarial"], 3 * plain["adversarial"])
    assert torch.equal(scaled["discriminator"], plain["discriminator"])


def train_discriminator(loss, teacher_mean, steps=150, teacher_dropout=0.0):
    """Discriminator's loss, averaged over the last steps, with features drawn afresh each step."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=1e-2)
    values = []
    for _ in range(steps):
        student, teacher = torch.randn(512, 4), torch.randn(512, 4) + teacher_mean
        teacher = F.dropout(teacher, teacher_dropout)
        value = loss(outputs(student), outputs(teacher))["discriminator"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return sum(values[-50:]) / 50


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("regulariser", "nats"), [("adversary", 1.9095), ("none", 1.3863)])
def test_equilibrium(regulariser, nats, dropout):
    """All distributions equal: D* is the share of samples labelled as teacher.

    Equality needs the teacher's features to carry the noise of the student's samples.
    """
    torch.manual_seed(0)
    loss = Adversarial(4, hidden=(32,), regulariser=regulariser, dropout=dropout)
    nn.init.constant_(loss.discriminator[-1].bias, -1.0)  # away from either equilibrium
    value = train_discriminator(loss, teacher_mean=0.0, teacher_dropout=dropout)
    assert value == pytest.approx(nats, abs=0.02)
    samples = F.dropout(torch.randn(1000, 4), dropout)
    share = torch.sigmoid(loss.discriminator(samples)).mean().item()
    assert share == pytest.approx(2 / 3 if regulariser == "adversary" else 1 / 2, abs=0.03)
    # One BCE per kind of sample, each the entropy of the share.
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    kinds = 3 if regulariser == "adversary" else 2
    assert kinds * entropy == pytest.approx(nats, abs=0.05)


def test_adversary_samples_bound_a_discriminator_that_wins():
    """It answers 1/2 where only the student is: 2 ln 2 in all, where "none" would reach 0."""
    torch.manual_seed(0)
    loss = Adversarial(4, hidden=(32,))
    value = train_discriminator(loss, teacher_mean=20.0)
    assert value == pytest.approx(2 * math.log(2), abs=0.02)


def test_the_game_does_not_collapse(inputs):
    """Neither player may drive its loss to 0 by agreeing with the other on a label."""
    task = anc(network(10, 1), network(10, 2), hidden=(32, 32))
    torch.manual_seed(0)
    optimizers = [
        torch.optim.Adam(task.student_parameters(), lr=5e-3),
        torch.optim.Adam(task.discriminator_parameters(), lr=2e-3),
    ]
    history = []
    for _ in range(300):
        result = task(inputs)
        task.zero_grad()
        result["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        history.append((result["adversarial"].item(), result["discriminator"].item()))
    adversarial, discriminator = torch.tensor(history[-50:]).mean(0).tolist()
    assert adversarial > 0.4  # 0.69 if D answers 1/2, 0.41 at the equilibrium of 2/3
    assert discriminator > 1.3  # its bound is 1.386


def test_discriminator_learns_a_difference():
    torch.manual_seed(0)
    loss = Adversarial(4, hidden=(32,), regulariser="none")
    assert train_discriminator(loss, teacher_mean=3.0) < 0.2


@pytest.mark.parametrize("regulariser", ["l1", "l2"])
def test_weight_regularisers_shrink_the_discriminator(regulariser):
    """The published sign is for a maximised objective; with a minus here weights would grow."""

    def norm_after(name):
        torch.manual_seed(0)
        loss = Adversarial(4, hidden=(32,), regulariser=name, mu=1e-2)
        train_discriminator(loss, teacher_mean=3.0, steps=60)
        return sum(p.square().sum().item() for p in loss.discriminator.parameters() if p.dim() > 1)

    assert norm_after(regulariser) < 0.8 * norm_after("none")


def test_bad_arguments(inputs):
    with pytest.raises(ValueError, match="regulariser must be one of .* got 'ours'"):
        Adversarial(8, regulariser="ours")
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        Adversarial(8, dropout=1.0)
    for name in ("mu", "weight"):
        with pytest.raises(ValueError, match=f"Adversarial: {name} must be finite .* got nan"):
            Adversarial(8, **{name: float("nan")})
    with pytest.raises(ValueError, match="inputs must be one of .* got 'pixels': choose"):
        Adversarial(8, inputs="pixels")
    with pytest.raises(ValueError, match="layer must be given with .* only then, got None and 'b'"):
        Adversarial(8, inputs="map", teacher_layer="b")
    with pytest.raises(ValueError, match="anc: example must be a batch of inputs, .* got NoneType"):
        anc(network(10, 1), network(10, 2), conditional=True)
    with pytest.raises(ValueError, match="anc: Sequential must have children that return maps"):
        anc(network(10, 1), network(10, 2), inputs="map", example=inputs)
    loss = Adversarial(8, 5)
    with pytest.raises(ValueError, match=r"student's features must be \[N, 5\], got \(16, 6\)"):
        loss(outputs(inputs), outputs(torch.zeros(BATCH, 8)))
    with pytest.raises(ValueError, match=r"teacher's features must be \[N, 8\], got \(2, 3, 8\)"):
        loss(outputs(torch.zeros(BATCH, 5)), outputs(torch.zeros(2, 3, 8)))
