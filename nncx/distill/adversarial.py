"""Adversarial network compression (ANC): a discriminator sets teacher and student apart."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nncx.distill.distiller import Distiller, Outputs, check_factor, feature_size
from nncx.distill.l2 import L2

REGULARISERS = ("adversary", "l1", "l2", "none")


class Adversarial(nn.Module):
    """Features that a trained discriminator D cannot tell from the teacher's; needs no labels.

    Let ``f_t`` be the teacher's features and ``f`` the student's, in the teacher's length. Dropout
    is the noise of this GAN; two independent masks give two samples of one distribution, the
    *student sample* ``f_s = dropout(f)`` and the *adversary sample* ``f_a = dropout(f)``. With the
    logit ``D(f)`` and its binary cross-entropy ``BCE(D(f), y)``, a mean over the batch, the two
    parts returned are::

        "adversarial":    weight * BCE(D(f_s), 1)                      trains student and adapter
        "discriminator":  BCE(D(f_t), 1) + BCE(D(f_s), 0) + R          trains D

        R = BCE(D(f_a), 1)     "adversary": student samples labelled as teacher
            mu * sum |w|       "l1": over D's weight matrices, not its biases
            mu * sum w^2       "l2": likewise
            0                  "none"

    The student's part is the non-saturating form of ``min log(1 - D(f_s))``: it raises D on the
    very sample that D labels 0. The published objective *maximises* ``-mu * sum |w|`` over D; D's
    part is minimised here, hence the plus sign.

    The one public re-implementation we know of labels the clean features ``f`` as 0 and trains the
    student on ``f_a``. We do not: D then tells clean features from dropped-out ones instead of
    student from teacher, and both players minimise ``BCE(D(f_a), 1)``, so both losses go to 0
    whatever the student learns.

    One backward serves both players: the first part sees D's parameters detached, the second sees
    the features detached. So the gradient of the sum is, for every network, exactly that of its own
    part, and the student need not run twice. A factor on D's part would only scale D's learning
    rate: there is none.

    With adversary samples the best D is ``(p_t + p_a) / (p_t + p_s + p_a)`` with ``p_s = p_a``:
    1/2 where only the student's samples lie, 1 where only the teacher's features do. So the mean of
    "discriminator" is at least 2 ln 2 = 1.386 nats, if D wins outright, and 3 H(2/3) = 1.91 at the
    equilibrium, where all distributions are equal; without adversary samples, 0 and 2 ln 2. The
    teacher's features are not dropped out, so with ``dropout`` > 0 D can also know them by their
    lack of zeros, and the equilibrium is a bound rather than a value to expect.

    Args:
        in_features: Length of the teacher's feature vector, which D sees.
        student_features: Length of the student's; if it differs, a linear ``adapter``, trained with
            the student, maps it to ``in_features``. Default: ``in_features``.
        hidden: Widths of D's hidden layers (ReLU); ``(128, 256, 128)`` was best in the paper.
        dropout: Probability of zeroing a student's feature (after the adapter) in each of the two
            samples; 0 makes both the student's own features.
        regulariser: R above: ``"adversary"``, ``"l1"``, ``"l2"`` or ``"none"``.
        mu: Factor of the ``"l1"`` and ``"l2"`` regulariser. The published value is not known to us.
            The sum runs over some 10^5 weights, so values near 1 silence D.
        weight: Factor of the student's part.

    Raises:
        ValueError: For values out of range; on a call, for features of another shape.

    Shapes: features ``[N, student_features]`` and ``[N, in_features]``; logits and labels are not
    looked at.

    Paper: Belagiannis, Farshad, Galasso, Adversarial Network Compression, ECCV Workshops 2018,
    https://arxiv.org/abs/1803.10750
    """

    def __init__(
        self,
        in_features: int,
        student_features: int | None = None,
        *,
        hidden: Sequence[int] = (128, 256, 128),
        dropout: float = 0.5,
        regulariser: str = "adversary",
        mu: float = 1e-4,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if regulariser not in REGULARISERS:
            raise ValueError(
                f"Adversarial: regulariser must be one of {REGULARISERS}, got {regulariser!r}: "
                "choose one"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"Adversarial: dropout must lie in [0, 1), got {dropout}: try 0.5")
        check_factor("Adversarial", "mu", mu)
        check_factor("Adversarial", "weight", weight)
        self.in_features = in_features
        self.student_features = in_features if student_features is None else student_features
        self.regulariser = regulariser
        self.mu = mu
        self.weight = weight
        self.dropout = nn.Dropout(dropout)
        self.adapter = (
            nn.Identity()
            if self.student_features == in_features
            else nn.Linear(self.student_features, in_features)
        )
        self.discriminator = _fully_connected(in_features, hidden)

    def forward(
        self, student: Outputs, teacher: Outputs, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        self._check(student.features, self.student_features, "student")
        self._check(teacher.features, self.in_features, "teacher")
        features = self.adapter(student.features)
        sample, adversary = self.dropout(features), self.dropout(features)  # two masks
        return {
            "adversarial": self.weight * self._student_part(sample),
            "discriminator": self._discriminator_part(
                teacher.features, sample.detach(), adversary.detach()
            ),
        }

    def _student_part(self, student: Tensor) -> Tensor:
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return _bce(functional_call(self.discriminator, fixed, (student,)), 1)

    def _discriminator_part(self, teacher: Tensor, student: Tensor, adversary: Tensor) -> Tensor:
        loss = _bce(self.discriminator(teacher), 1) + _bce(self.discriminator(student), 0)
        matrices = [layer.weight for layer in self.discriminator if isinstance(layer, nn.Linear)]
        match self.regulariser:
            case "adversary":
                return loss + _bce(self.discriminator(adversary), 1)
            case "l1":
                return loss + self.mu * sum(matrix.abs().sum() for matrix in matrices)
            case "l2":
                return loss + self.mu * sum(matrix.square().sum() for matrix in matrices)
        return loss

    def _check(self, features: Tensor, size: int, owner: str) -> None:
        if features.dim() != 2 or features.shape[1] != size:
            raise ValueError(
                f"Adversarial: the {owner}'s features must be [N, {size}], got "
                f"{tuple(features.shape)}: build the loss with nncx.distill.feature_size(model)"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.student_features}, regulariser={self.regulariser!r}, "
            f"mu={self.mu}, weight={self.weight}"
        )


def anc(
    student: nn.Module,
    teacher: nn.Module,
    *,
    weight: float = 1.0,
    reduction: str = "sum",
    hidden: Sequence[int] = (128, 256, 128),
    dropout: float = 0.5,
    regulariser: str = "adversary",
    mu: float = 1e-4,
    student_features: str | None = None,
    teacher_features: str | None = None,
) -> Distiller:
    """Adversarial network compression: ``Adversarial + weight * L2`` on logits, without labels.

    Optimisers, learning rates and lambda (``weight``) are the user's. The paper, as far as we know,
    trains both players by SGD at a learning rate of 1e-3 in batches of 128; ``nncx demo`` departs
    from it, with Adam for both and batches of 64. It keeps the default ``reduction="sum"``, whose
    term is larger than torch's mean by the number of classes, so lambda weighs more by as much.

    Args:
        weight, reduction: lambda, and the reduction over classes of :class:`L2`. The paper's lambda
            is not known to us: choose it on a validation split.
        hidden, dropout, regulariser, mu: As in :class:`Adversarial`.
        student_features, teacher_features: Names of the feature layers, as in :class:`Distiller`.

    Example::

        task = nncx.distill.anc(student, teacher)
        optimizers = [
            torch.optim.SGD(task.student_parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4),
            torch.optim.Adam(task.discriminator_parameters(), lr=1e-3),
        ]
        nncx.train.fit(task, data, epochs=200, optimizer=optimizers)
    """
    adversarial = Adversarial(
        feature_size(teacher, teacher_features),
        feature_size(student, student_features),
        hidden=hidden,
        dropout=dropout,
        regulariser=regulariser,
        mu=mu,
    )
    return Distiller(
        student,
        teacher,
        [adversarial, L2(weight, reduction=reduction)],
        student_features=student_features,
        teacher_features=teacher_features,
    )


def _fully_connected(in_features: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear-ReLU for every hidden width, then one logit."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_features, *hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((in_features, *hidden)[-1], 1))


def _bce(logits: Tensor, label: int) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
