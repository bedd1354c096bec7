"""Knowledge distillation with softened class probabilities (KD)."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from nncx.distill._observe import Outputs
from nncx.distill.distiller import check_factor


class KD(nn.Module):
    """Match the teacher's softened class probabilities, and the labels if there are any.

    Forward, with student logits ``s``, teacher logits ``t`` and labels ``y``, mean over the batch::

        weight * [ (1 - alpha) * CE(y, softmax(s))
                   + alpha * T^2 * KL(softmax(t / T) || softmax(s / T)) ]

    ``T^2`` keeps the gradient of the second term at the same size for every temperature.

    Args:
        temperature: ``T > 0``; larger values show more of the small probabilities.
        alpha: Share of the teacher in ``[0, 1]``. Labels are needed unless it is 1.
        weight: Factor of the whole term.

    Raises:
        ValueError: For values out of range; on a call, if ``alpha < 1`` and labels are ``None``.

    Paper: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531
    """

    def __init__(
        self, temperature: float = 4.0, alpha: float = 0.9, *, weight: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"KD: temperature must be positive and finite, got {temperature}: try 4"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"KD: alpha must lie in [0, 1], got {alpha}: 1 is the teacher alone")
        check_factor("KD", "weight", weight)
        self.temperature = temperature
        self.alpha = alpha
        self.weight = weight

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> Tensor:
        soft = F.kl_div(
            F.log_softmax(student.logits / self.temperature, 1),
            F.log_softmax(teacher.logits / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = self.alpha * self.temperature**2 * soft
        if self.alpha < 1:
            if labels is None:
                raise ValueError(
                    f"KD: alpha={self.alpha} needs labels, got None: pass labels or set alpha=1"
                )
            loss = loss + (1 - self.alpha) * F.cross_entropy(student.logits, labels)
        return self.weight * loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, alpha={self.alpha}, weight={self.weight}"
