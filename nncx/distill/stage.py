"""One training of a distillation method."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from nncx.distill.distiller import Distiller


@dataclass(frozen=True)
class Stage:
    """One training of a method; those of a method go on with the same student, one after the other.

    ::

        for stage in nncx.distill.by_name("kd", student, teacher):
            optimizer = torch.optim.Adam(stage.student_parameters(), lr=1e-3)
            nncx.train.fit(stage.task, loader, epochs=round(30 * stage.share), optimizer=optimizer)

    Attributes:
        name: What it is called in logs and file names.
        task: A :class:`Distiller`, or the student itself, which ``train.fit`` trains from labels.
        share: Its part of all epochs; the shares of a method add up to 1.
    """

    name: str
    task: nn.Module
    share: float = 1.0

    def student_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained for the student: the student and the losses' regressors or adapters."""
        if isinstance(self.task, Distiller):
            return self.task.student_parameters()
        return self.task.parameters()

    def discriminator_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained against the student, by an optimizer of its own; empty but for ANC."""
        if isinstance(self.task, Distiller):
            return self.task.discriminator_parameters()
        return iter(())


def check_pretraining(owner: str, share: float) -> None:
    """Raise ValueError unless ``share`` leaves epochs to both stages of the method ``owner``."""
    if not 0 < share < 1:
        raise ValueError(
            f"{owner}: pretraining must be the first stage's share of the epochs, between 0 and 1, "
            f"got {share}: try 0.25"
        )
