"""The distillation methods by name, as stages of training."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nncx.distill.adversarial import anc
from nncx.distill.distiller import Distiller
from nncx.distill.flow import fsp
from nncx.distill.hint import fitnets
from nncx.distill.kd import KD
from nncx.distill.l2 import L2
from nncx.distill.stage import Stage


def supervised(student: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
    """The student alone, from labels: what every method is compared with."""
    return student


def l2(student: nn.Module, teacher: nn.Module, **options: Any) -> Distiller:
    """:class:`L2` with its options."""
    return Distiller(student, teacher, [L2(**options)])


def kd(student: nn.Module, teacher: nn.Module, **options: Any) -> Distiller:
    """:class:`KD` with its options."""
    return Distiller(student, teacher, [KD(**options)])


METHODS: dict[str, Callable[..., nn.Module | list[Stage]]] = {
    method.__name__: method for method in (supervised, l2, kd, fitnets, fsp, anc)
}


def by_name(
    name: str,
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    example: Tensor | None = None,
    steps: int | None = None,
    **options: Any,
) -> list[Stage]:
    """The trainings of the method that a command line names, in order, all of the same student.

    Args:
        name: ``"supervised"``, ``"l2"``, ``"kd"``, ``"fitnets"``, ``"fsp"`` or ``"anc"``.
        student, teacher: The networks; ``"supervised"`` needs no teacher.
        example: A batch of inputs, for methods that need the sizes of inner layers.
        steps: Batches of all stages together, for methods whose losses change along the training.
        options: Those of the method: of :class:`L2`, :class:`KD`, :func:`fitnets`, :func:`fsp` or
            :func:`anc`.

    Raises:
        ValueError: If there is no such method, its teacher is missing, or by the method.
        TypeError: For an option that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"a distillation method is one of {', '.join(METHODS)}, got {name!r}")
    if teacher is None and name != "supervised":
        raise ValueError(f"the method {name!r} needs a teacher, got None: pass a trained network")
    parameters = inspect.signature(METHODS[name]).parameters
    given = {"example": example, "steps": steps}
    options |= {key: value for key, value in given.items() if key in parameters}
    made = METHODS[name](student, teacher, **options)
    return made if isinstance(made, list) else [Stage(name, made)]
