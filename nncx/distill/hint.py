"""FitNets: the teacher's inner layer as a hint for the student's, then distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nncx.distill._observe import Outputs, check_example, child_maps, feature_layer, probe
from nncx.distill.distiller import REDUCTIONS, Distiller, check_choice, check_factor
from nncx.distill.kd import KD
from nncx.distill.stage import Stage, check_pretraining


class Hint(nn.Module):
    """Squared distance of an inner layer of the teacher to a regressor on one of the student.

    Forward, with the teacher's hint ``u`` and the student's guided output ``v``, the mean over the
    batch and, for maps, over positions::

        reduction="sum":   weight * 1/2  sum_c (u[c] - r(v)[c])^2     (that of the authors' code)
        reduction="mean":  weight * 1/2 mean_c (u[c] - r(v)[c])^2

    The regressor ``r`` is linear and trained with the student. For maps it is a convolution without
    padding whose kernel, student's size - teacher's size + 1, makes the sizes equal: 1x1 where they
    are. For vectors it is a linear layer. Having no ReLU, it fits layers best that have none
    either: name them before their ReLU.

    The mean is the default since one learning rate then fits this loss and that of the second
    stage.

    Args:
        student_layer, teacher_layer: Names of guided layer and hint, as in ``named_modules``.
        student_shape, teacher_shape: What they return for one sample: ``[C, H, W]`` or ``[F]``.
        weight: Factor of the term.
        reduction: ``"sum"`` or ``"mean"`` over the channels.

    Raises:
        ValueError: If one layer gives a map and the other none, or the teacher's map is larger than
            the student's, or for values out of range; on a call, if a layer gives another shape.

    Paper: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, https://arxiv.org/abs/1412.6550
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_factor("Hint", "weight", weight)
        check_choice("Hint", "reduction", reduction, REDUCTIONS)
        self.student_layers = (student_layer,)
        self.teacher_layers = (teacher_layer,)
        self.student_shape = tuple(student_shape)
        self.teacher_shape = tuple(teacher_shape)
        self.weight = weight
        self.reduction = reduction
        self.regressor = _regressor(self.student_shape, self.teacher_shape)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> Tensor:
        guided = _look_up(student, self.student_layers[0], self.student_shape, "student")
        hint = _look_up(teacher, self.teacher_layers[0], self.teacher_shape, "teacher")
        squares = (hint - self.regressor(guided)).square()
        distance = squares.sum(1) if self.reduction == "sum" else squares.mean(1)
        return self.weight / 2 * distance.mean()

    def extra_repr(self) -> str:
        return (
            f"{self.student_layers[0]!r}, {self.teacher_layers[0]!r}, weight={self.weight}, "
            f"reduction={self.reduction!r}"
        )


class AnnealedKD(nn.Module):
    """Labels, and softened class probabilities whose factor changes along the training.

    Forward, with logits ``s`` and ``t``, labels ``y``, mean over the batch; two parts::

        "labels":  CE(y, softmax(s))
        "kd":      lambda * KL(softmax(t / T) || softmax(s / T))

    ``lambda`` goes linearly from ``start``, in the first call in training mode, to ``end``, after
    ``steps`` of them, and stays there. The count is a buffer, so a resumed run goes on with it.
    There is no factor ``T^2``, unlike in :class:`KD`: the authors' code has none.

    Args:
        steps: Batches over which ``lambda`` changes.
        temperature: ``T``.
        start, end: First and last ``lambda``.

    Raises:
        ValueError: For values out of range; on a call, if labels are ``None``.

    Paper: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, https://arxiv.org/abs/1412.6550
    """

    def __init__(
        self, steps: int, *, temperature: float = 3.0, start: float = 4.0, end: float = 1.0
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"AnnealedKD: steps must be at least 1, got {steps}: count batches")
        check_factor("AnnealedKD", "start", start)
        check_factor("AnnealedKD", "end", end)
        self.steps = steps
        self.start = start
        self.end = end
        self.labels = KD(alpha=0.0)
        self.soft = KD(temperature, alpha=1.0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self, student: Outputs, teacher: Outputs, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        done = (self.calls / self.steps).clamp(max=1)
        factor = (self.start + (self.end - self.start) * done) / self.soft.temperature**2
        if self.training:
            self.calls += 1
        return {
            "labels": self.labels(student, teacher, labels),
            "kd": factor * self.soft(student, teacher),
        }

    def extra_repr(self) -> str:
        return f"steps={self.steps}, start={self.start}, end={self.end}"


def fitnets(
    student: nn.Module,
    teacher: nn.Module,
    example: Tensor,
    *,
    steps: int,
    student_layer: str | None = None,
    teacher_layer: str | None = None,
    reduction: str = "mean",
    temperature: float = 3.0,
    start: float = 4.0,
    end: float = 1.0,
    pretraining: float = 0.25,
) -> list[Stage]:
    """FitNets in two stages: ``Hint`` up to the guided layer, then ``AnnealedKD`` from there.

    In the first stage only the student up to its guided layer, and the regressor, get gradients.
    The rest runs along, so running statistics of its BatchNorms move.

    Args:
        example: Inputs ``[N, ...]``, from which the sizes of the two layers come.
        steps: Batches of both stages together, ``epochs * len(loader)``: ``lambda`` falls over
            those of the second.
        student_layer, teacher_layer: Names of guided layer and hint. Default: of the network's own
            children that hold weights, return a map and run before the feature layer, the middle
            one.
        reduction: As in :class:`Hint`.
        temperature, start, end: As in :class:`AnnealedKD`.
        pretraining: Share of the epochs that the first stage gets. The paper stops both stages
            early instead, by a validation error.

    Raises:
        ValueError: As the two losses do, or if a network has no such layer.
    """
    check_example("fitnets", example)
    if not isinstance(steps, int):
        raise ValueError(
            "fitnets: steps must be the number of batches of both stages, over which lambda falls, "
            f"got {steps!r}: pass steps=epochs * len(loader)"
        )
    check_pretraining("fitnets", pretraining)
    student_layer = student_layer or _middle(student, example)
    teacher_layer = teacher_layer or _middle(teacher, example)
    hint = Hint(
        student_layer,
        teacher_layer,
        _shape(student, student_layer, example),
        _shape(teacher, teacher_layer, example),
        reduction=reduction,
    )
    steps = max(1, round(steps * (1 - pretraining)))
    kd = AnnealedKD(steps, temperature=temperature, start=start, end=end)
    return [
        Stage("hint", Distiller(student, teacher, [hint]), pretraining),
        Stage("kd", Distiller(student, teacher, [kd]), 1 - pretraining),
    ]


def _regressor(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    if len(student) == len(teacher) == 1:
        return nn.Linear(*student, *teacher)
    if not len(student) == len(teacher) == 3:
        raise ValueError(
            "Hint: both layers must give maps [C, H, W], or both vectors, got "
            f"{list(student)} for the student and {list(teacher)} for the teacher: name others"
        )
    kernel = tuple(s - t + 1 for s, t in zip(student[1:], teacher[1:], strict=True))
    if min(kernel) < 1:
        raise ValueError(
            "Hint: the student's map must be at least as large as the teacher's, got "
            f"{list(student[1:])} and {list(teacher[1:])}: name an earlier layer of the student or "
            "a later one of the teacher"
        )
    return nn.Conv2d(student[0], teacher[0], kernel)


def _look_up(outputs: Outputs, layer: str, shape: tuple[int, ...], owner: str) -> Tensor:
    output = outputs.maps[layer]
    if output.shape[1:] != shape:
        raise ValueError(
            f"Hint: layer {layer!r} of the {owner} must give {list(shape)} for a sample, got "
            f"{list(output.shape[1:])}: build the loss for inputs of this size"
        )
    return output


def _shape(model: nn.Module, layer: str, example: Tensor) -> torch.Size:
    return probe(model, feature_layer(model, None), [layer], example).maps[layer].shape[1:]


def _middle(model: nn.Module, example: Tensor) -> str:
    """The middle one of the children that hold weights and return maps."""
    layers = [
        name
        for name in child_maps(model, feature_layer(model, None), example)
        if list(model.get_submodule(name).parameters())
    ]
    if not layers:
        raise ValueError(
            f"fitnets: {type(model).__name__} must have children that return maps [N, C, H, W], so "
            "that a layer can be chosen, got none: pass student_layer and teacher_layer"
        )
    return layers[len(layers) // 2]
