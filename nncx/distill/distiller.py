"""The distillation task: student, frozen teacher and losses, tied together by forward hooks."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outputs(NamedTuple):
    """What a loss sees of a network.

    ``logits``, ``[N, classes]``, is what the network returned; ``features``, ``[N, F]``, the vector
    that feeds the layer which computes the logits.
    """

    logits: Tensor
    features: Tensor


class Distiller(nn.Module):
    """Task that trains ``student`` to follow ``teacher``: ``task(inputs, targets) -> dict``.

    Each network runs exactly once per call; logits and features are read by forward hooks that live
    for that one call, so no model is edited and the task can be copied and pickled.

    A loss is a module called with ``(student: Outputs, teacher: Outputs, labels: Tensor | None)``.
    It returns a scalar, named in the logs after its class (``L2`` is ``"l2"``), or a dict of named
    scalar parts. All parts are added and minimised with one ``backward``. A loss that trains
    parameters *against* the student keeps them in its attribute ``discriminator`` and sees to it
    that no part sends them the gradient of another: see :class:`nncx.distill.Adversarial`.

    The teacher is put in eval mode, runs without gradient, and is no submodule: ``task.train()``
    does not touch it, and neither ``parameters()`` nor ``state_dict()`` holds it. It does follow
    ``task.to(...)``.

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
            one module, or there is no such feature layer; on a call, if a network returns no
            tensor, the networks disagree on the shape of the logits, a feature layer is not called
            exactly once, or two losses share a name.
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
        self.student_features = _feature_layer(student, student_features)
        self.teacher_features = _feature_layer(teacher, teacher_features)
        object.__setattr__(self, "teacher", teacher.eval())  # past nn.Module: not a submodule

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        student = _observe(self.student, self.student_features, inputs)
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()  # somebody trained it since; not always: packed layers pack anew
        with torch.no_grad():
            teacher = _observe(self.teacher, self.teacher_features, inputs)
        if student.logits.shape != teacher.logits.shape:
            raise ValueError(
                "student and teacher must give logits of one shape, got "
                f"{tuple(student.logits.shape)} and {tuple(teacher.logits.shape)}: "
                "build both for the same classes"
            )

        parts: dict[str, Tensor] = {}
        for loss in self.losses:
            value = loss(student, teacher, targets)
            named = value if isinstance(value, dict) else {type(loss).__name__.lower(): value}
            if taken := parts.keys() & named.keys():
                raise ValueError(
                    f"losses must have different names, got {sorted(taken)} twice: "
                    "merge them into one or subclass the second"
                )
            parts |= named
        return {
            "loss": sum(parts.values()),
            **{name: part.detach() for name, part in parts.items()},
        }

    def student_parameters(self) -> Iterator[nn.Parameter]:
        """Everything trained for the student: the student itself and the losses' adapters."""
        opponents = {id(parameter) for parameter in self.discriminator_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in opponents)

    def discriminator_parameters(self) -> Iterator[nn.Parameter]:
        """Everything trained against the student; empty without an adversarial loss."""
        for loss in self.losses:
            if isinstance(discriminator := getattr(loss, "discriminator", None), nn.Module):
                yield from discriminator.parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        # .to(), .cuda(), .double() all come through here.
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def check_factor(owner: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value``, a loss's factor ``name``, is finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{owner}: {name} must be finite and at least 0, got {value}: try 1")


def feature_size(model: nn.Module, name: str | None = None) -> int:
    """Length of the feature vector that :class:`Distiller` takes from ``model``.

    Args:
        model: Any network.
        name: Layer whose input is the feature vector; default as in :class:`Distiller`: name it if
            the last registered layer is not the one that computes the logits.

    Raises:
        ValueError: If there is no such layer, or it does not state its input size.
    """
    name = _feature_layer(model, name)
    layer = model.get_submodule(name)
    for attribute in ("in_features", "in_channels", "num_features"):
        if isinstance(size := getattr(layer, attribute, None), int):
            return size
    raise ValueError(
        "the feature layer must state its input size (linear, convolution, batch norm), got "
        f"{type(layer).__name__} {name!r}: name the layer after it"
    )


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


def _feature_layer(model: nn.Module, name: str | None) -> str:
    """Name of the layer whose input is the feature vector, checked to exist."""
    layers = dict(model.named_modules())
    if name is None:
        for kind in (nn.Linear, nn.Conv2d):
            if found := [path for path, layer in layers.items() if isinstance(layer, kind)]:
                return found[-1]
        raise ValueError(
            "the default feature layer is the last nn.Linear or nn.Conv2d, got "
            f"{type(model).__name__} with neither: name the layer"
        )
    if name not in layers:
        raise ValueError(
            f"the feature layer must be a module of {type(model).__name__}, got {name!r}: "
            "choose a name from named_modules()"
        )
    return name


def _observe(model: nn.Module, name: str, inputs: Tensor) -> Outputs:
    """Run ``model`` once; take its logits, and the input of its feature layer."""
    seen: list[Tensor] = []

    def take_input(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(next(iter((*args, *kwargs.values()))))

    with model.get_submodule(name).register_forward_pre_hook(take_input, with_kwargs=True):
        logits = model(inputs)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} must return its logits as one tensor, got "
            f"{type(logits).__name__}: wrap it in a module that returns the logits alone"
        )
    if len(seen) != 1:
        raise ValueError(
            f"the feature layer {name!r} of {type(model).__name__} must be called exactly once in "
            f"a forward pass, got {len(seen)} calls: name another layer"
        )
    (features,) = seen
    return Outputs(logits, features.mean((2, 3)) if features.dim() == 4 else features)
