"""L2 distance of logits (L2-Ba)."""

from torch import Tensor, nn

from nncx.distill.distiller import Outputs, check_factor


class L2(nn.Module):
    """Squared distance of the raw logits; needs no labels.

    Forward, with student logits ``s`` and teacher logits ``t`` of shape ``[N, K]``::

        reduction="sum":   weight * mean_n  sum_k (t[n, k] - s[n, k])^2      (the published form)
        reduction="mean":  weight * mean_n mean_k (t[n, k] - s[n, k])^2      (torch's MSE)

    The two differ by the factor ``K``, the number of classes, so a weight found with one is wrong
    for the other. Ba and Caruana's own form has a further factor 1/2: ``weight=0.5``.

    Args:
        weight: Factor of the term (lambda in ANC).
        reduction: ``"sum"`` or ``"mean"`` over the classes; over the batch it is always the mean.

    Raises:
        ValueError: If ``weight`` is negative or not finite, or ``reduction`` is neither.

    Paper: Ba and Caruana, Do Deep Nets Really Need to be Deep?, NIPS 2014, https://arxiv.org/abs/1312.6184
    """

    def __init__(self, weight: float = 1.0, *, reduction: str = "sum") -> None:
        super().__init__()
        check_factor("L2", "weight", weight)
        if reduction not in ("sum", "mean"):
            raise ValueError(
                f'L2: reduction over classes must be "sum" or "mean", got {reduction!r}: choose one'
            )
        self.weight = weight
        self.reduction = reduction

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> Tensor:
        squares = (teacher.logits - student.logits).square()
        distance = squares.sum(1) if self.reduction == "sum" else squares.mean(1)
        return self.weight * distance.mean()

    def extra_repr(self) -> str:
        return f"weight={self.weight}, reduction={self.reduction!r}"
