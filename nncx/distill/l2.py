"""L2 distance of logits (L2-Ba)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nncx._checkpoint import device_of
from nncx._modes import evaluated
from nncx.distill._observe import Outputs
from nncx.distill.distiller import REDUCTIONS, check_choice, check_factor


class L2(nn.Module):
    """Squared distance of the logits; needs no labels.

    Forward, with student logits ``s`` and teacher logits ``t`` of shape ``[N, K]``::

        reduction="sum":   weight * mean_n  sum_k ((t[n, k] - s[n, k]) / std[k])^2
        reduction="mean":  weight * mean_n mean_k ((t[n, k] - s[n, k]) / std[k])^2

    The published form is the sum; the mean is torch's MSE. The two differ by the factor ``K``, the
    number of classes, so a weight found with one is wrong for the other. Ba and Caruana's own form
    has a further factor 1/2: ``weight=0.5``.

    ``std`` standardises the targets: in the paper the student learns ``(t - mean) / std``, with
    the mean and deviation of each class's logit over the training set. Here the student's logits go
    through the same map, so that what it returns stays on the teacher's scale and its largest logit
    is still its answer. The means cancel; the deviations decide how much a class weighs.

    Args:
        weight: Factor of the term (lambda in ANC).
        reduction: ``"sum"`` or ``"mean"`` over the classes; over the batch it is always the mean.
        std: Deviation of each class's teacher logit, ``[K]``, as :func:`logit_std` computes it;
            kept as a buffer. None: logits as they are.

    Raises:
        ValueError: If ``weight`` is negative or not finite, ``reduction`` is neither, or ``std``
            is not positive; on a call, if there are not as many classes as deviations.

    Paper: Ba and Caruana, Do Deep Nets Really Need to be Deep?, NIPS 2014, https://arxiv.org/abs/1312.6184
    """

    def __init__(
        self, weight: float = 1.0, *, reduction: str = "sum", std: Tensor | None = None
    ) -> None:
        super().__init__()
        check_factor("L2", "weight", weight)
        check_choice("L2", "reduction", reduction, REDUCTIONS)
        if std is not None and not (std.dim() == 1 and (std > 0).all() and std.isfinite().all()):
            raise ValueError(
                f"L2: std must hold one positive deviation for each class, got {std}: "
                "take nncx.distill.logit_std(teacher, data)"
            )
        self.weight = weight
        self.reduction = reduction
        self.register_buffer("std", std)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> Tensor:
        difference = teacher.logits - student.logits
        if self.std is not None:
            if len(self.std) != difference.shape[1]:
                raise ValueError(
                    f"L2: std must hold one deviation for each of the {difference.shape[1]} "
                    f"classes, got {len(self.std)}: take it from this teacher"
                )
            difference = difference / self.std
        squares = difference.square()
        distance = squares.sum(1) if self.reduction == "sum" else squares.mean(1)
        return self.weight * distance.mean()

    def extra_repr(self) -> str:
        return f"weight={self.weight}, reduction={self.reduction!r}"


def logit_std(teacher: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Standard deviation of each logit of ``teacher`` over ``data``, ``[K]``, for :class:`L2`.

    Args:
        teacher: A network; it runs in eval mode and is given back in the mode it was in.
        data: Batches ``(inputs, targets)`` of the training split.

    Raises:
        ValueError: If ``data`` is empty.
    """
    device = device_of(teacher)
    with evaluated(teacher), torch.no_grad():
        logits = [teacher(inputs.to(device)) for inputs, _ in data]
    if not logits:
        raise ValueError("logit_std: data must give at least one batch, got none")
    return torch.cat(logits).std(0, correction=0)
