"""Adversarial network compression (ANC): a discriminator sets teacher and student apart."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nncx.distill._observe import (
    Outputs,
    check_example,
    child_maps,
    feature_layer,
    feature_size,
    probe,
)
from nncx.distill.distiller import Distiller, check_choice, check_factor
from nncx.distill.l2 import L2

INPUTS = ("features", "logits", "map")
REGULARISERS = ("adversary", "l1", "l2", "none")


class Adversarial(nn.Module):
    """Features that a trained discriminator D cannot tell from the teacher's; needs no labels.

    Let ``f_t`` be the teacher's features and ``f`` the student's, in the teacher's length. D may
    see the logits instead, or what one layer of each network returns, ``inputs="map"``. Dropout
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

    D is fully connected, Linear-ReLU for every hidden width, then one logit. On maps it is
    convolutional: a 3x3 convolution of stride 2 and a ReLU for every hidden width, the average over
    space, then one logit; a feature is then a channel, which dropout zeroes whole.

    With ``classes``, D is conditional: beside each of its three inputs it sees the class that the
    *teacher* gives the image, one-hot (on maps as constant channels). That keeps the method free of
    labels. The teacher's probabilities would say more, but they are a function of its features, by
    which D would know the teacher at once.

    Args:
        in_features: Length of the teacher's feature vector, number of classes, or channels of the
            teacher's map: what D sees.
        student_features: The same of the student; if it differs, a linear ``adapter`` (on maps a
            1x1 convolution), trained with the student, maps it to ``in_features``. Default:
            ``in_features``.
        inputs: What D sees: ``"features"``, ``"logits"``, or ``"map"``.
        student_layer, teacher_layer: For ``"map"``, names of the layers that return the maps
            ``[N, C, H, W]``, which must be of one height and width.
        classes: Number of classes that D is conditional on; 0: it is not.
        hidden: Widths of D's hidden layers; ``(128, 256, 128)`` was best in the paper.
        dropout: Probability of zeroing a student's feature (after the adapter) in each of the two
            samples; 0 makes both the student's own features.
        regulariser: R above: ``"adversary"``, ``"l1"``, ``"l2"`` or ``"none"``.
        mu: Factor of the ``"l1"`` and ``"l2"`` regulariser. The published value is not known to us.
            The sum runs over some 10^5 weights, so values near 1 silence D.
        weight: Factor of the student's part.

    Raises:
        ValueError: For values out of range; on a call, for features of another shape.

    Labels are not looked at.

    Paper: Belagiannis, Farshad, Galasso, Adversarial Network Compression, ECCV Workshops 2018,
    https://arxiv.org/abs/1803.10750
    """

    def __init__(
        self,
        in_features: int,
        student_features: int | None = None,
        *,
        inputs: str = "features",
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        classes: int = 0,
        hidden: Sequence[int] = (128, 256, 128),
        dropout: float = 0.5,
        regulariser: str = "adversary",
        mu: float = 1e-4,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("Adversarial", "inputs", inputs, INPUTS)
        check_choice("Adversarial", "regulariser", regulariser, REGULARISERS)
        convolutional = inputs == "map"
        if {student_layer is not None, teacher_layer is not None} != {convolutional}:
            raise ValueError(
                'Adversarial: student_layer and teacher_layer must be given with inputs="map", and '
                f"only then, got {student_layer!r} and {teacher_layer!r} with {inputs!r}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"Adversarial: dropout must lie in [0, 1), got {dropout}: try 0.5")
        check_factor("Adversarial", "mu", mu)
        check_factor("Adversarial", "weight", weight)
        self.in_features = in_features
        self.student_features = in_features if student_features is None else student_features
        self.inputs = inputs
        self.student_layers = (student_layer,) if convolutional else ()
        self.teacher_layers = (teacher_layer,) if convolutional else ()
        self.classes = classes
        self.regulariser = regulariser
        self.mu = mu
        self.weight = weight
        self.dropout = nn.Dropout2d(dropout) if convolutional else nn.Dropout(dropout)
        self.adapter = _adapter(self.student_features, in_features, convolutional)
        build = _convolutional if convolutional else _fully_connected
        self.discriminator = build(in_features + classes, hidden)

    def forward(
        self, student: Outputs, teacher: Outputs, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        real = self._input(teacher, self.teacher_layers, self.in_features, "teacher")
        own = self._input(student, self.student_layers, self.student_features, "student")
        features = self.adapter(own)
        if features.shape[2:] != real.shape[2:]:
            raise ValueError(
                "Adversarial: the maps of student and teacher must be of one size, got "
                f"{list(features.shape[2:])} and {list(real.shape[2:])}: name other layers"
            )
        real, sample, adversary = (
            self._with_class(each, teacher.logits)
            for each in (real, self.dropout(features), self.dropout(features))  # two masks
        )
        return {
            "adversarial": self.weight * self._student_part(sample),
            "discriminator": self._discriminator_part(real, sample.detach(), adversary.detach()),
        }

    def _student_part(self, student: Tensor) -> Tensor:
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return _bce(functional_call(self.discriminator, fixed, (student,)), 1)

    def _discriminator_part(self, teacher: Tensor, student: Tensor, adversary: Tensor) -> Tensor:
        loss = _bce(self.discriminator(teacher), 1) + _bce(self.discriminator(student), 0)
        matrices = [p for p in self.discriminator.parameters() if p.dim() > 1]  # not biases
        match self.regulariser:
            case "adversary":
                return loss + _bce(self.discriminator(adversary), 1)
            case "l1":
                return loss + self.mu * sum(matrix.abs().sum() for matrix in matrices)
            case "l2":
                return loss + self.mu * sum(matrix.square().sum() for matrix in matrices)
        return loss

    def _input(self, outputs: Outputs, layers: Sequence[str], size: int, owner: str) -> Tensor:
        """What D is to see of a network, checked."""
        features = outputs.maps[layers[0]] if layers else getattr(outputs, self.inputs)
        expected = f"[N, {size}, H, W]" if layers else f"[N, {size}]"
        if features.dim() != (4 if layers else 2) or features.shape[1] != size:
            raise ValueError(
                f"Adversarial: the {owner}'s {self.inputs} must be {expected}, got "
                f"{tuple(features.shape)}: build the loss with nncx.distill.anc, or with "
                "nncx.distill.feature_size(model)"
            )
        return features

    def _with_class(self, features: Tensor, logits: Tensor) -> Tensor:
        if not self.classes:
            return features
        condition = F.one_hot(logits.argmax(1), self.classes).to(features.dtype)
        condition = condition.reshape(condition.shape + (1,) * (features.dim() - 2))
        return torch.cat([features, condition.expand(-1, -1, *features.shape[2:])], 1)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.student_features}, inputs={self.inputs!r}, "
            f"regulariser={self.regulariser!r}, mu={self.mu}, weight={self.weight}"
        )


def anc(
    student: nn.Module,
    teacher: nn.Module,
    *,
    example: Tensor | None = None,
    weight: float = 1.0,
    reduction: str = "sum",
    inputs: str = "features",
    conditional: bool = False,
    hidden: Sequence[int] = (128, 256, 128),
    dropout: float = 0.5,
    regulariser: str = "adversary",
    mu: float = 1e-4,
    student_features: str | None = None,
    teacher_features: str | None = None,
    student_map: str | None = None,
    teacher_map: str | None = None,
) -> Distiller:
    """Adversarial network compression: ``Adversarial + weight * L2`` on logits, without labels.

    Optimisers, learning rates and lambda (``weight``) are the user's. The paper, as far as we know,
    trains both players by SGD at a learning rate of 1e-3 in batches of 128; ``nncx demo`` departs
    from it, with Adam for both and batches of 64. It keeps the default ``reduction="sum"``, whose
    term is larger than torch's mean by the number of classes, so lambda weighs more by as much.

    Args:
        example: A batch of inputs, from which sizes come; needed unless D sees the features alone.
        weight, reduction: lambda, and the reduction over classes of :class:`L2`. The paper's lambda
            is not known to us: choose it on a validation split.
        inputs, hidden, dropout, regulariser, mu: As in :class:`Adversarial`. The discriminator
            128conv-256conv is ``inputs="map", hidden=(128, 256)``.
        conditional: Whether D sees the teacher's class too.
        student_features, teacher_features: Names of the feature layers, as in :class:`Distiller`.
        student_map, teacher_map: For ``inputs="map"``, names of the layers that return the maps.
            Default: the last of the network's own children that returns a map of more than one
            pixel before the feature layer runs: for the networks of :mod:`nncx.models`, what is
            averaged or flattened.

    Example::

        task = nncx.distill.anc(student, teacher)
        optimizers = [
            torch.optim.SGD(task.student_parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4),
            torch.optim.Adam(task.discriminator_parameters(), lr=1e-3),
        ]
        nncx.train.fit(task, data, epochs=200, optimizer=optimizers)
    """
    if inputs != "features" or conditional:
        check_example("anc", example)
    if inputs == "map":
        student_map = student_map or _last_map(student, student_features, example)
        teacher_map = teacher_map or _last_map(teacher, teacher_features, example)
    adversarial = Adversarial(
        _size(teacher, inputs, teacher_features, teacher_map, example),
        _size(student, inputs, student_features, student_map, example),
        inputs=inputs,
        student_layer=student_map,
        teacher_layer=teacher_map,
        classes=_size(teacher, "logits", teacher_features, None, example) if conditional else 0,
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


def _last_map(model: nn.Module, features: str | None, example: Tensor) -> str:
    layers = list(child_maps(model, feature_layer(model, features), example))
    if not layers:
        raise ValueError(
            f"anc: {type(model).__name__} must have children that return maps [N, C, H, W], so "
            "that a layer can be chosen, got none: pass student_map and teacher_map"
        )
    return layers[-1]


def _size(
    model: nn.Module, inputs: str, features: str | None, layer: str | None, example: Tensor | None
) -> int:
    """Length, or channels, of what D sees of ``model``."""
    if inputs == "features":
        return feature_size(model, features)
    layers = [] if layer is None else [layer]
    outputs = probe(model, feature_layer(model, features), layers, example)
    return (outputs.maps[layer] if layers else outputs.logits).shape[1]


def _adapter(inputs: int, outputs: int, convolutional: bool) -> nn.Module:
    if inputs == outputs:
        return nn.Identity()
    return nn.Conv2d(inputs, outputs, 1) if convolutional else nn.Linear(inputs, outputs)


def _fully_connected(in_features: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear-ReLU for every hidden width, then one logit."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_features, *hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((in_features, *hidden)[-1], 1))


def _convolutional(in_channels: int, hidden: Sequence[int]) -> nn.Sequential:
    """3x3 convolution of stride 2 and ReLU for every hidden width, mean over space, one logit."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_channels, *hidden)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
    head = nn.Linear((in_channels, *hidden)[-1], 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def _bce(logits: Tensor, label: int) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
