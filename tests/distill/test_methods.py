"""Every method by its name, trained as a command line does it."""

import copy
import math

import pytest
import torch

from nncx import XNOR, BinaryConnect, convert, data, train
from nncx.distill import METHODS, Distiller, by_name, logit_std
from nncx.models import ResNet

STEPS = 4


def resnet(depth, seed):
    torch.manual_seed(seed)
    return ResNet(depth, in_channels=1, num_classes=3, width=4)


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 8, 8, generator=generator)
    return data.loader(torch.utils.data.TensorDataset(images, torch.arange(8) % 3), 4)


def fit(stage, loader, **arguments):
    groups = stage.student_parameters(), list(stage.discriminator_parameters())
    optimizers = [torch.optim.Adam(group, lr=1e-3) for group in groups if group]
    return train.fit(stage.task, loader, optimizer=optimizers, progress=False, **arguments)


def trained(model):
    """The children of the network that the last step gave a gradient."""
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [XNOR(), BinaryConnect()], ids=["xnor", "binaryconnect"])
def test_any_student_learns_by_any_method(loader, layers):
    """An epoch of every stage trains what it is to train, and not the teacher."""
    teacher = resnet(8, 1)
    frozen = copy.deepcopy(teacher.state_dict())
    whole = {"conv", "stage1", "stage2", "stage3", "bn", "fc"}
    parts = {"hint": {"conv", "stage1", "stage2"}, "fsp": {"conv", "stage1", "stage2", "stage3"}}
    for name in METHODS:
        student = convert(resnet(8, 2), layers)
        stages = by_name(name, student, teacher, example=next(iter(loader))[0], steps=STEPS)
        assert sum(stage.share for stage in stages) == 1
        for stage in stages:
            (record,) = fit(stage, loader, epochs=1)
            assert all(map(math.isfinite, record.values())), (name, record)
            assert trained(student) == parts.get(stage.name, whole), (name, stage.name)
    assert all(torch.equal(value, frozen[key]) for key, value in teacher.state_dict().items())


def test_options_reach_the_losses(loader):
    teacher = resnet(8, 1)
    (stage,) = by_name("l2", resnet(8, 2), teacher, std=logit_std(teacher, loader), weight=0.5)
    assert stage.task.losses[0].weight == 0.5 and stage.task.losses[0].std.shape == (3,)
    (stage,) = by_name("kd", resnet(8, 2), teacher, steps=9, temperature=2.0, alpha=1.0)
    assert (stage.task.losses[0].temperature, stage.task.losses[0].alpha) == (2.0, 1.0)
    student = resnet(8, 2)
    (stage,) = by_name("supervised", student)
    assert stage.task is student and not isinstance(stage.task, Distiller)


def test_a_loss_that_is_not_finite_stops_the_training(loader):
    teacher = resnet(8, 1)
    torch.nn.init.constant_(teacher.fc.bias, float("nan"))
    (stage,) = by_name("l2", resnet(8, 2), teacher)
    with pytest.raises(FloatingPointError, match=r"epoch 1, since its loss was not finite \(loss"):
        fit(stage, loader, epochs=1)


def test_what_does_not_exist_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="one of supervised, l2, kd, fitnets, fsp, anc, got 'at'"):
        by_name("at", resnet(8, 2), resnet(8, 1))
    with pytest.raises(ValueError, match="'kd' needs a teacher, got None"):
        by_name("kd", resnet(8, 2))
    with pytest.raises(TypeError, match="temperature"):
        by_name("anc", resnet(8, 2), resnet(8, 1), temperature=2)
