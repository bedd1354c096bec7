"""The distillation task: student, frozen teacher and losses, tied together by forward hooks."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nncx._checkpoint import device_of
from nncx.distill._observe import Outputs, check_layer, feature_layer, observe
from nncx.distill.cache import TeacherCache

REDUCTIONS = ("sum", "mean")


class Distiller(nn.Module):
    """Task that trains ``student`` to follow ``teacher``: ``task(inputs, targets) -> dict``.

    Each network runs exactly once per call; logits, features and the layers that losses ask for are
    read by forward hooks that live for that one call, so no model is edited and the task can be
    copied and pickled.

    A loss is a module called with ``(student: Outputs, teacher: Outputs, labels: Tensor | None)``.
    It returns a scalar, named in the logs after its class (``L2`` is ``"l2"``), or a dict of named
    scalar parts. All parts are added and minimised with one ``backward``. A loss that compares
    inner layers names them in its attributes ``student_layers`` and ``teacher_layers``, and finds
    their outputs in ``Outputs.maps``: see :class:`nncx.distill.Hint`. A loss that trains
    parameters *against* the student keeps them in its attribute ``discriminator`` and sees to it
    that no part sends them the gradient of another: see :class:`nncx.distill.Adversarial`.

    The teacher is put in eval mode, runs without gradient, and is no submodule: ``task.train()``
    does not touch it, and neither ``parameters()`` nor ``state_dict()`` holds it. It does follow
    ``task.to(...)``. Under ``torch.autocast`` the networks run in its dtype, the losses in float32.

    Args:
        student: Network to train; ``student(inputs)`` returns logits ``[N, classes]``.
        teacher: Trained network with the same classes.
        losses: Losses to add.
        student_features, teacher_features: Name, as in ``named_modules``, of the layer whose input
            is the feature vector. Default: the last ``nn.Linear``, else the last ``nn.Conv2d``, in
            the order in which the model registers them: name the layer if that is not the one that
            computes the logits. Maps ``[N, C, H, W]`` are averaged over space.

    Returns:
        ``"loss"``, which is minimised, and every part of it by name, detached, for the logs.

    Raises:
        ValueError: If ``losses`` is not a sequence of modules or is empty, student and teacher are
            one module, or there is no layer of a name that was given; on a call, if a network
            returns no tensor, the networks disagree on the shape of the logits, a layer is not
            called exactly once, or two losses share a name.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: Sequence[nn.Module],
        *,
        student_features: str | None = None,
        teacher_features: str | None = None,
    ) -> None:
        super().__init__()
        if student is teacher:
            raise ValueError(
                "student and teacher must be two modules, got one: pass copy.deepcopy(teacher)"
            )
        _check_losses(losses)
        self.student = student
        self.losses = nn.ModuleList(losses)
        self.student_features = feature_layer(student, student_features)
        self.teacher_features = feature_layer(teacher, teacher_features)
        self.student_layers = _layers(student, losses, "student_layers")
        self.teacher_layers = _layers(teacher, losses, "teacher_layers")
        object.__setattr__(self, "teacher", teacher.eval())  # past nn.Module: not a submodule
        object.__setattr__(self, "_cache", None)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        # The teacher first: what it needs in between is free again when the student's graph grows.
        teacher = self._teach(inputs) if self._cache is None else self._cache(inputs)
        student = observe(self.student, self.student_features, self.student_layers, inputs)
        if student.logits.shape != teacher.logits.shape:
            raise ValueError(
                "student and teacher must give logits of one shape, got "
                f"{tuple(student.logits.shape)} and {tuple(teacher.logits.shape)}: "
                "build both for the same classes"
            )

        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            student, teacher = student.float(), teacher.float()
        with torch.autocast(kind, enabled=False):  # squares and their sums need all digits
            parts = self._parts(student, teacher, targets)
        return {
            "loss": sum(parts.values()),
            **{name: part.detach() for name, part in parts.items()},
        }

    def cache_teacher(self, data: Iterable[tuple[Tensor, Tensor]], limit: int = 2**30) -> None:
        """Run the teacher once over ``data``; from then on look its outputs up by the inputs.

        An input is known by its bits, whatever batch or order it comes in. One that is not in
        ``data`` is refused, so data with random augmentation is; see :class:`TeacherCache`. What is
        kept is what the losses of this task look at. It is part of no ``state_dict``: call this
        again before a run is resumed. Call it after ``task.to(...)``, in the dtype of training.

        Args:
            data: Every input of the training, in any order; a loader without ``shuffle``.
            limit: Bytes that may be kept, on the task's device; while they are collected, twice as
                many are in use.

        Raises:
            ValueError: If ``data`` is empty, leaves samples out, or is random, or if more than
                ``limit`` bytes were needed.
        """
        device = device_of(self)
        cache = TeacherCache(lambda inputs: self._teach(inputs.to(device)), data, limit)
        object.__setattr__(self, "_cache", cache)

    def student_parameters(self) -> Iterator[nn.Parameter]:
        """Everything trained for the student: the student itself and the losses' adapters."""
        opponents = {id(parameter) for parameter in self.discriminator_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in opponents)

    def discriminator_parameters(self) -> Iterator[nn.Parameter]:
        """Everything trained against the student; empty without an adversarial loss."""
        for loss in self.losses:
            if isinstance(discriminator := getattr(loss, "discriminator", None), nn.Module):
                yield from discriminator.parameters()

    def _parts(
        self, student: Outputs, teacher: Outputs, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """The scalar parts of all losses by name."""
        parts: dict[str, Tensor] = {}
        for loss in self.losses:
            value = loss(student, teacher, labels)
            named = value if isinstance(value, dict) else {type(loss).__name__.lower(): value}
            if taken := parts.keys() & named.keys():
                raise ValueError(
                    f"losses must have different names, got {sorted(taken)} twice: "
                    "merge them into one or subclass the second"
                )
            parts |= named
        return parts

    def _teach(self, inputs: Tensor) -> Outputs:
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()  # somebody trained it since; not always: packed layers pack anew
        with torch.no_grad():
            return observe(self.teacher, self.teacher_features, self.teacher_layers, inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        # .to(), .cuda(), .double() all come through here.
        self.teacher._apply(fn, recurse)
        if self._cache is not None:
            self._cache._apply(fn, recurse)
        return super()._apply(fn, recurse)


def check_factor(owner: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value``, a loss's factor ``name``, is finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{owner}: {name} must be finite and at least 0, got {value}: try 1")


def check_choice(owner: str, name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless ``value``, a loss's option ``name``, is one of ``known``."""
    if value not in known:
        raise ValueError(f"{owner}: {name} must be one of {known}, got {value!r}: choose one")


def _check_losses(losses: Sequence[nn.Module]) -> None:
    if not isinstance(losses, Sequence | nn.ModuleList):
        raise ValueError(
            f"losses must be a sequence of losses, got {type(losses).__name__}: "
            "put it in a list, as in [nncx.distill.L2()]"
        )
    if not losses:
        raise ValueError("losses must hold at least one loss, got none: try [nncx.distill.L2()]")
    for loss in losses:
        if not isinstance(loss, nn.Module):
            got = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
            raise ValueError(
                f"every loss must be an nn.Module object, got {got}: "
                "construct it, as in [nncx.distill.L2()]"
            )


def _layers(model: nn.Module, losses: Iterable[nn.Module], attribute: str) -> tuple[str, ...]:
    """The layers of ``model`` that the losses name, each once, checked to exist."""
    names = dict.fromkeys(name for loss in losses for name in getattr(loss, attribute, ()))
    for name in names:
        check_layer(model, name, "a layer that a loss names")
    return tuple(names)
