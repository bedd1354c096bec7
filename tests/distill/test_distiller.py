"""The task: what it observes, what it trains, and what it leaves alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nncx.distill import KD, L2, Distiller, Hint, Outputs, anc, feature_size


def classifier(features=12, classes=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, features, 3), nn.BatchNorm2d(features), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes),
    )  # fmt: skip


def fully_convolutional(features=12, classes=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, features, 3), nn.ReLU(), nn.Conv2d(features, classes, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Observed(nn.Module):
    """A loss that keeps what it was shown."""

    def forward(self, student, teacher, labels):
        self.student, self.teacher, self.labels = student, teacher, labels
        return student.logits.mean()


class AlsoObserved(Observed):
    pass


class KeywordHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(input=x)


@pytest.fixture
def images():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_logits_and_features_are_those_of_the_networks(images):
    student, teacher, loss = classifier(seed=1), fully_convolutional(16, seed=2), Observed()
    labels = torch.arange(8) % 5
    Distiller(student, teacher, [loss]).eval()(images, labels)
    assert torch.equal(loss.student.logits, student(images))
    assert torch.equal(loss.student.features, student[:5](images))
    assert torch.equal(loss.teacher.logits, teacher(images))
    assert torch.equal(loss.teacher.features, teacher[:2](images).mean((2, 3)))
    assert loss.labels is labels
    assert isinstance(loss.student, Outputs) and not loss.teacher.features.requires_grad


def test_named_feature_layers(images):
    student, teacher, loss = classifier(seed=1), classifier(seed=2), Observed()
    task = Distiller(student, teacher, [loss], student_features="1", teacher_features="0")
    task.eval()(images)
    assert torch.equal(loss.student.features, student[0](images).mean((2, 3)))
    assert torch.equal(loss.teacher.features, images.mean((2, 3)))


def test_losses_see_the_layers_they_name(images):
    student, teacher = classifier(seed=1), classifier(16, seed=2)
    first, second = Observed(), AlsoObserved()
    first.student_layers, first.teacher_layers = ("0", "1"), ("0",)
    second.student_layers = ("1",)  # seen once for both
    task = Distiller(student, teacher, [first, second]).eval()
    task(images)
    assert list(first.student.maps) == ["0", "1"] and list(second.teacher.maps) == ["0"]
    assert torch.equal(second.student.maps["1"], student[:2](images))
    assert torch.equal(first.teacher.maps["0"], teacher[0](images))
    assert not first.teacher.maps["0"].requires_grad and first.student.maps["0"].requires_grad


def test_feature_layer_called_with_a_keyword():
    student, teacher, loss = KeywordHead(), KeywordHead(), Observed()
    inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    Distiller(student, teacher, [loss])(inputs)
    assert torch.equal(loss.student.features, inputs)


def test_parts_add_up_to_the_loss(images):
    task = Distiller(classifier(seed=1), classifier(seed=2), [L2(0.3), KD(2.0, 1.0)])
    result = task(images)
    assert list(result) == ["loss", "l2", "kd"]
    assert torch.equal(result["loss"], result["l2"] + result["kd"])
    assert result["loss"].requires_grad and not result["l2"].requires_grad


def test_teacher_is_neither_trained_nor_owned(images):
    student, teacher = classifier(seed=1), classifier(seed=2)
    before = copy.deepcopy(teacher.state_dict())
    task = Distiller(student, teacher, [L2()]).train()
    teacher.train()  # as a validation loop of the user might
    task(images)["loss"].backward()
    assert student.training and not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert {id(p) for p in task.parameters()} == {id(p) for p in student.parameters()}
    assert set(task.state_dict()) == {f"student.{key}" for key in student.state_dict()}


def test_teacher_in_eval_mode_is_left_alone(images):
    """Binary layers that are not frozen pack their weights on every call of eval()."""
    teacher = classifier(seed=2)
    task = Distiller(classifier(seed=1), teacher, [L2()])
    calls = []
    teacher[5].train = lambda mode=True: calls.append(mode) or nn.Module.train(teacher[5], mode)
    task(images)
    assert calls == []
    teacher[1].train()  # one layer is enough
    task(images)
    assert calls == [False] and not teacher[1].training


def test_teacher_follows_the_task_to_another_dtype(images):
    task = Distiller(classifier(seed=1), classifier(seed=2), [L2()]).double()
    assert task.teacher[0].weight.dtype == torch.float64
    assert task(images.double())["loss"].dtype == torch.float64


def test_losses_are_float32_under_autocast(images):
    student, teacher = classifier(8, seed=1), classifier(seed=2).eval()
    hint = Hint("0", "0", (8, 4, 4), (12, 4, 4))
    task = Distiller(student.eval(), teacher, [L2(), hint]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        result = task(images)
        logits = student(images), teacher(images)
    assert {value.dtype for value in result.values()} == {torch.float32}
    assert logits[0].dtype == torch.bfloat16
    squares = (logits[0].double() - logits[1].double()).square()
    torch.testing.assert_close(result["l2"].double(), squares.sum(1).mean(), atol=1e-6, rtol=1e-6)
    result["loss"].backward()


def test_each_network_runs_once(images):
    student, teacher = classifier(seed=1), classifier(seed=2)
    calls = []
    for model in (student, teacher):
        model.register_forward_hook(lambda model, *_: calls.append(model))
    anc(student, teacher)(images)
    assert calls == [teacher, student]


def test_no_hook_stays_behind(images):
    student, teacher = classifier(seed=1), classifier(seed=2)
    loss = Observed()
    loss.student_layers = loss.teacher_layers = ("0", "2")
    task = Distiller(student, teacher, [loss])
    task(images)
    with pytest.raises(RuntimeError):
        task(images[:, :2])
    with pytest.raises(ZeroDivisionError), teacher[2].register_forward_hook(lambda *_: 1 / 0):
        task(images)
    with pytest.raises(RuntimeError):  # nor after a run for the sizes of the layers
        anc(student, teacher, inputs="map", example=images[:, :2])
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_are_equal_and_independent(images, clone):
    task = anc(classifier(8, seed=1), classifier(seed=2)).eval()
    twin = clone(task)
    assert torch.equal(task(images)["loss"], twin(images)["loss"])
    assert twin.teacher is not task.teacher
    with torch.no_grad():
        twin.student[0].weight.zero_()
    assert not torch.equal(task(images)["loss"], twin(images)["loss"])


def test_training_brings_the_student_to_the_teacher(images):
    student, teacher = classifier(8, seed=1), classifier(seed=2)
    task = Distiller(student, teacher, [L2()])
    optimizer = torch.optim.Adam(task.student_parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = task(images)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert list(task.discriminator_parameters()) == []


def test_labels_reach_the_losses(images):
    labels = torch.arange(8) % 5
    student = classifier(seed=1).eval()
    task = Distiller(student, classifier(seed=2), [KD(alpha=0.0)]).eval()
    torch.testing.assert_close(
        task(images, labels)["loss"], F.cross_entropy(student(images), labels)
    )
    with pytest.raises(ValueError, match="needs labels, got None"):
        task(images)


def test_feature_size():
    assert feature_size(classifier(12)) == 12
    assert feature_size(fully_convolutional(9)) == 9
    assert feature_size(classifier(12), "1") == 12
    assert feature_size(classifier(12), "0") == 3
    with pytest.raises(ValueError, match="must state its input size .* got ReLU '2'"):
        feature_size(classifier(), "2")


def test_bad_construction():
    student, teacher = classifier(), classifier()
    with pytest.raises(ValueError, match="must be two modules"):
        Distiller(student, student, [L2()])
    with pytest.raises(ValueError, match="at least one loss"):
        Distiller(student, teacher, [])
    with pytest.raises(ValueError, match="must be a sequence of losses, got L2: put it in a list"):
        Distiller(student, teacher, L2())
    with pytest.raises(
        ValueError, match="must be an nn.Module object, got the class L2: construct"
    ):
        Distiller(student, teacher, [L2])
    with pytest.raises(ValueError, match="must be an nn.Module object, got 'l2'"):
        Distiller(student, teacher, ["l2"])
    with pytest.raises(ValueError, match="must be a module of Sequential, got 'fc'"):
        Distiller(student, teacher, [L2()], teacher_features="fc")
    with pytest.raises(ValueError, match="got Tanh with neither: name the layer"):
        Distiller(nn.Tanh(), teacher, [L2()])


def test_bad_calls(images):
    with pytest.raises(ValueError, match=r"logits of one shape, got \(8, 4\) and \(8, 5\)"):
        Distiller(classifier(classes=4), classifier(classes=5), [L2()])(images)
    with pytest.raises(ValueError, match=r"different names, got \['l2'\] twice"):
        Distiller(classifier(), classifier(), [L2(), L2()])(images)
    pair = classifier()
    pair.register_forward_hook(lambda *args: (args[-1], None))
    for networks in ((pair, classifier()), (classifier(), pair)):
        with pytest.raises(ValueError, match="Sequential must return .* one tensor, got tuple"):
            Distiller(*networks, [L2()])(images)

    shared = nn.Linear(4, 4)
    inputs = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="'0' of Sequential must be called exactly once .* got 2"):
        Distiller(nn.Sequential(shared, shared), nn.Linear(4, 4), [L2()])(inputs)
    unused = nn.Identity()
    unused.head = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'head' of Identity must be called .* got 0"):
        Distiller(unused, nn.Linear(4, 4), [L2()])(inputs)
