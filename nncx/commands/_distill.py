"""`nncx distill`: a student learns from a teacher, by any method; what its file does is reported.

The student's training is that of `nncx train`: the epoch is chosen on the validation split, the
file is written and loaded again, and only then is the test split looked at. The teacher is a
trained network, or one by name that is trained first, with labels.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from nncx import _processes, data, distill, models, train
from nncx.commands import _networks, _recipe
from nncx.commands._recipe import Recipe, Result, Setup
from nncx.distill import Distiller, Stage

TEACHER = "teacher"  # its folder, in that of the student


@dataclass(frozen=True)
class Distillation(Recipe):
    """All that a distillation depends on: the recipe of the student, and

    Args:
        teacher: a trained network, as `_networks.trained`; or the name of a network by
            `models.by_name`, which is first trained with labels by the student's settings.
        teacher_options: of a network by name: more arguments of its constructor.
        teacher_weights: a state dict for the teacher, which then is not trained.
        method: one of `distill.METHODS`.
        method_options: its options, as `distill.by_name`.
        discriminator_lr: of Adam, for a method that trains a network against the student.
        cache_teacher: run the teacher once over the training images and keep its outputs, which
            must fit into memory; refused with augmentation.

    Raises:
        ValueError: for a value that cannot be; that of data and networks when they are made.
    """

    teacher: str = "resnet20"
    teacher_options: Mapping[str, Any] = field(default_factory=dict)
    teacher_weights: str | None = None
    method: str = "anc"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    discriminator_lr: float = 1e-3
    cache_teacher: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in distill.METHODS:
            known = ", ".join(distill.METHODS)
            raise ValueError(f"method must be one of {known}, got {self.method!r}")
        if self.loss != Recipe.loss:
            raise ValueError(
                f"a distillation's loss is its method's, got loss {self.loss!r}; leave it out"
            )
        if self.cache_teacher and self.augment != "none":
            raise ValueError(
                f"cache_teacher needs images that are the same in every epoch, got augment "
                f"{self.augment!r}; leave out one of them"
            )
        if not 0 < self.discriminator_lr < float("inf"):
            raise ValueError(f"discriminator_lr must be above 0, got {self.discriminator_lr}")

    def depends_on(self) -> dict[str, Any]:
        """Files of the teacher count by their content."""
        return _recipe.with_contents(super().depends_on(), ("teacher", "teacher_weights"))


@dataclass(frozen=True)
class Distilled(Result):
    """What a distillation brought: the student's result, and the teacher's figures.

    Attributes:
        teacher_test_error, teacher_validation_error: percent.
        teacher_file_bytes: of its file, as `nncx.save` writes it.
    """

    teacher_test_error: float
    teacher_validation_error: float
    teacher_parameters: int
    teacher_file_bytes: int

    def __str__(self) -> str:
        return (
            f"{super().__str__()}; by {self.recipe.method} from {self.recipe.teacher}, whose test"
            f" error is {self.teacher_test_error:.2f} %"
        )


def run(
    distillation: Distillation, out: Path, setup: Setup = _recipe.ON_THE_CPU
) -> Distilled | None:
    """Do what `distillation` says; write model.safetensors and result.json to the folder `out`.

    A teacher that is trained first is in the subfolder `teacher`.

    Returns:
        None in all processes but the first.

    Raises:
        As `_recipe.run`; ValueError also for a teacher and a student that do not fit each other.
    """
    splits = _recipe.splits_of(distillation)
    student = _recipe.build(distillation, splits)
    teacher = _teacher(distillation, splits, out / TEACHER, setup)
    figures = _processes.from_first(lambda: _measured(teacher.to(setup.device), splits))
    stages = _stages(distillation, student, teacher.cpu(), splits)
    if distillation.cache_teacher:
        _cache_teacher(stages, splits, setup.device)
    optimizers = {stage: _optimizers(distillation, student, stage) for stage in stages}
    result = _recipe.train_stages(distillation, student, optimizers, splits, out, setup)
    if result is None:
        return None
    distilled = Distilled(**vars(result), **figures)
    _recipe.write_result(distilled, out)
    _recipe.remove_checkpoints(distillation, splits, out)
    return distilled


def teacher_recipe(distillation: Distillation) -> Recipe | None:
    """How the teacher is trained; None if it comes with its weights."""
    name, weights = distillation.teacher, distillation.teacher_weights
    if weights is not None or not models.is_name(name):
        return None
    student = {each.name: getattr(distillation, each.name) for each in fields(Recipe)}
    network = {"model": name, "options": distillation.teacher_options, "layers": "float"}
    return Recipe(**{**student, **network})


def trained_teacher(recipe: Recipe, out: Path, setup: Setup = _recipe.ON_THE_CPU) -> Path:
    """The file of a teacher, which is trained unless `out` holds the result of this recipe."""
    if not _processes.from_first(lambda: _recipe.is_done(recipe, out)):
        result = _recipe.run(recipe, out, setup)
        if result is not None:
            print(f"teacher: {result}", file=sys.stderr)
    return out / _recipe.MODEL


def _teacher(distillation: Distillation, splits: data.Splits, out: Path, setup: Setup) -> nn.Module:
    if (recipe := teacher_recipe(distillation)) is not None:
        untrained = _networks.make(recipe.model, splits, recipe.options)
        student = _recipe.build(distillation, splits)
        _stages(distillation, student, untrained, splits)  # what cannot be is said before training
        file = trained_teacher(recipe, out, setup)
        _processes.wait_for_all()  # the first writes the file
        return _networks.trained(str(file), splits)
    options, weights = distillation.teacher_options, distillation.teacher_weights
    return _networks.trained(distillation.teacher, splits, options, weights)


def _stages(
    distillation: Distillation, student: nn.Module, teacher: nn.Module, splits: data.Splits
) -> list[Stage]:
    options = dict(distillation.method_options)
    torch.manual_seed(distillation.seed)  # of adapters and discriminator, whoever trained before
    try:
        return distill.by_name(
            distillation.method,
            student,
            teacher,
            example=torch.stack([splits.train[0][0]] * 2),
            steps=len(_recipe.batches(distillation, splits)) * distillation.epochs,
            **options,
        )
    except TypeError as error:  # an option that it does not have
        raise ValueError(f"{distillation.method} cannot be made with {options}: {error}") from error


def _cache_teacher(stages: list[Stage], splits: data.Splits, device: torch.device) -> None:
    for stage in stages:
        if isinstance(stage.task, Distiller):
            stage.task.to(device).cache_teacher(_recipe.evaluation(splits.train))


def _optimizers(distillation: Distillation, student: nn.Module, stage: Stage) -> list[Optimizer]:
    optimizers = [_recipe.student_optimizer(distillation, student, stage)]
    if opponent := list(stage.discriminator_parameters()):
        optimizers.append(Adam(opponent, lr=distillation.discriminator_lr))
    return optimizers


def _measured(teacher: nn.Module, splits: data.Splits) -> dict[str, float | int]:
    """The figures of the teacher: before the student is trained, so that nothing is lost."""
    validation_error, test_error = (
        train.error_rate(teacher, _recipe.evaluation(split))
        for split in (splits.validation, splits.test)
    )
    return {
        "teacher_test_error": test_error,
        "teacher_validation_error": validation_error,
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "teacher_file_bytes": _recipe.saved_bytes(teacher),
    }
