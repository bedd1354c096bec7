"""FSP: how features change from one layer to another, as the flow of solution procedure."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nncx.distill._observe import Outputs, check_example, child_maps, feature_layer
from nncx.distill.distiller import REDUCTIONS, Distiller, check_choice, check_factor
from nncx.distill.stage import Stage, check_pretraining

Pairs = Sequence[tuple[str, str]]


class FSP(nn.Module):
    """Squared distance of flow matrices: products of two layers' maps, averaged over space.

    A flow matrix of the maps ``a`` ``[N, I, h, w]`` and ``b`` ``[N, J, h, w]`` of one network is::

        G[n, i, j] = 1 / (h w)  sum_xy a[n, i, x, y] b[n, j, x, y]

    where the spatially larger of the two maps is first averaged to the size of the smaller. With
    one pair of layers for each stage of the networks, student's and teacher's in the same order::

        reduction="sum":   weight  sum_pairs mean_n  sum_ij (G_teacher - G_student)^2    (published)
        reduction="mean":  weight  sum_pairs mean_n mean_ij (G_teacher - G_student)^2

    The two networks may have maps of different sizes, but need the same channels. The mean is the
    default since its size does not grow with the square of the width, nor need the learning rate
    shrink with it.

    Args:
        student_pairs, teacher_pairs: Names of the first and last layer of each stage, as in
            ``named_modules``.
        weight: Factor of the term.
        reduction: ``"sum"`` or ``"mean"`` over the entries of a matrix.

    Raises:
        ValueError: If there are no pairs, not equally many, or for values out of range; on a call,
            if a layer returns no map or channels differ.

    Paper: Yim et al., A Gift from Knowledge Distillation, CVPR 2017,
    https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html
    """

    def __init__(
        self,
        student_pairs: Pairs,
        teacher_pairs: Pairs,
        *,
        weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_factor("FSP", "weight", weight)
        check_choice("FSP", "reduction", reduction, REDUCTIONS)
        if len(student_pairs) != len(teacher_pairs) or not student_pairs:
            raise ValueError(
                "FSP: student and teacher must have equally many pairs of layers, at least one, "
                f"got {len(student_pairs)} and {len(teacher_pairs)}: name first and last layer of "
                "each stage"
            )
        self.student_pairs = [tuple(pair) for pair in student_pairs]
        self.teacher_pairs = [tuple(pair) for pair in teacher_pairs]
        self.student_layers = sum(self.student_pairs, ())
        self.teacher_layers = sum(self.teacher_pairs, ())
        self.weight = weight
        self.reduction = reduction

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> Tensor:
        loss = 0
        for own, other in zip(self.student_pairs, self.teacher_pairs, strict=True):
            flow, wanted = _flow(student, own, "student"), _flow(teacher, other, "teacher")
            if flow.shape != wanted.shape:
                raise ValueError(
                    "FSP: student and teacher must have the same channels, got "
                    f"{list(flow.shape[1:])} at {own} and {list(wanted.shape[1:])} at {other}: "
                    "name other layers, or take a student as wide as the teacher"
                )
            squares = (wanted - flow).square()
            distance = squares.sum((1, 2)) if self.reduction == "sum" else squares.mean((1, 2))
            loss = loss + distance.mean()
        return self.weight * loss

    def extra_repr(self) -> str:
        return (
            f"{self.student_pairs}, {self.teacher_pairs}, weight={self.weight}, "
            f"reduction={self.reduction!r}"
        )


def fsp(
    student: nn.Module,
    teacher: nn.Module,
    example: Tensor | None = None,
    *,
    student_pairs: Pairs | None = None,
    teacher_pairs: Pairs | None = None,
    reduction: str = "mean",
    pretraining: float = 0.25,
) -> list[Stage]:
    """FSP in two stages: :class:`FSP` alone, then the student alone, from labels.

    Args:
        example: Inputs ``[N, ...]`` to find the default pairs.
        student_pairs, teacher_pairs: As in :class:`FSP`. Default: for each ``nn.Sequential`` among
            the network's own children that returns a map, the child that runs before it, and it
            itself. Those are the stages of :class:`nncx.models.ResNet` and torchvision's ResNets.
        reduction: As in :class:`FSP`.
        pretraining: Share of the epochs that the first stage gets.

    Raises:
        ValueError: As :class:`FSP` does, or if a network has no such stages.
    """
    check_pretraining("fsp", pretraining)
    loss = FSP(
        _stages(student, example) if student_pairs is None else student_pairs,
        _stages(teacher, example) if teacher_pairs is None else teacher_pairs,
        reduction=reduction,
    )
    return [
        Stage("fsp", Distiller(student, teacher, [loss]), pretraining),
        Stage("labels", student, 1 - pretraining),
    ]


def _flow(outputs: Outputs, pair: tuple[str, str], owner: str) -> Tensor:
    """Flow matrix ``[N, I, J]`` of the maps of two layers."""
    maps = [outputs.maps[name] for name in pair]
    for name, each in zip(pair, maps, strict=True):
        if each.dim() != 4:
            raise ValueError(
                f"FSP: layer {name!r} of the {owner} must return maps [N, C, H, W], got "
                f"{list(each.shape)}: name another layer"
            )
    size = min(maps[0].shape[2:], maps[1].shape[2:], key=lambda shape: shape.numel())
    first, last = (F.adaptive_avg_pool2d(each, size).flatten(2) for each in maps)
    return torch.bmm(first, last.mT) / size.numel()


def _stages(model: nn.Module, example: Tensor | None) -> list[tuple[str, str]]:
    check_example("fsp", example)
    maps = list(child_maps(model, feature_layer(model, None), example))
    children = dict(model.named_children())
    pairs = [
        (before, name)
        for before, name in pairwise(maps)
        if isinstance(children[name], nn.Sequential)
    ]
    if not pairs:
        raise ValueError(
            f"fsp: {type(model).__name__} must have children of type nn.Sequential that return "
            "maps, so that stages can be found, got none: pass student_pairs and teacher_pairs"
        )
    return pairs
