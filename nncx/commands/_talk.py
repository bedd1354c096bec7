"""The four tables of the talk on Adversarial Network Compression: their rows, and its figures.

A row is a method with its options, as `nncx distill` takes them. Figures are test errors in
percent, as printed in A. Farshad's talk "Neural Network Compression"; what it does not print, or
prints without saying to which row it belongs, is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    Attributes:
        label: what the table calls it.
        method, options: as `distill.by_name`.
        layers: of the student, as `Recipe`.
        published: the talk's test error, by data set.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "float"
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Attributes: published_teacher: the talk's test error of the teacher, by data set."""

    title: str
    rows: tuple[Row, ...]
    note: str
    published_teacher: Mapping[str, float] = field(default_factory=dict)


def _discriminator(error: float, *hidden: int, maps: bool = False) -> Row:
    kind = "conv" if maps else "fc"
    options = {"hidden": list(hidden), **({"inputs": "map"} if maps else {})}
    label = "-".join(f"{width}{kind}" for width in hidden)
    return Row(label, "anc", options, published={"cifar100": error})


def _published(**errors: float) -> dict[str, float]:
    return {name.replace("_", "-"): error for name, error in errors.items()}


TABLES: dict[str, Table] = {
    "discriminators": Table(
        "Which discriminator",
        (
            _discriminator(32.45, 128, 256, 128),
            _discriminator(32.78, 64, 128, 256),
            _discriminator(32.82, 256, 256),
            _discriminator(33.05, 256, 128, 64),
            _discriminator(33.09, 64, 128, 64),
            _discriminator(33.28, 500, 500),
            _discriminator(33.46, 256, 64),
            _discriminator(33.51, 64, 64),
            _discriminator(33.68, 128, 256, maps=True),
            _discriminator(33.72, 128, 128),
        ),
        "A convolutional discriminator sees the maps from which the features are averaged.",
    ),
    "regularization": Table(
        "How the discriminator is regularised",
        (
            Row(
                "none",
                "anc",
                {"regulariser": "none"},
                published=_published(cifar10=10.07, cifar100=34.10, svhn=3.73, fashion_mnist=9.62),
            ),
            Row(
                "L1",
                "anc",
                {"regulariser": "l1"},
                published=_published(cifar10=8.19, cifar100=33.36, svhn=3.67, fashion_mnist=8.91),
            ),
            Row(
                "L2",
                "anc",
                {"regulariser": "l2"},
                published=_published(cifar10=8.16, cifar100=33.02, svhn=3.68, fashion_mnist=8.75),
            ),
            Row(
                "adversary samples",
                "anc",
                published=_published(cifar10=8.08, cifar100=32.45, svhn=3.66, fashion_mnist=8.61),
            ),
        ),
        "Of the talk's four figures for MNIST one is lost, so none can be told apart.",
    ),
    "inputs": Table(
        "What the discriminator sees",
        (
            Row(
                "student alone, with labels",
                "supervised",
                published=_published(cifar100=33.36, svhn=4.20, fashion_mnist=8.77),
            ),
            Row(
                "logits",
                "anc",
                {"inputs": "logits", "dropout": 0},
                published=_published(cifar100=33.90, svhn=3.74, fashion_mnist=8.90),
            ),
            Row(
                "logits + dropout",
                "anc",
                {"inputs": "logits"},
                published=_published(cifar100=33.41, svhn=3.81, fashion_mnist=8.84),
            ),
            Row(
                "features",
                "anc",
                {"dropout": 0},
                published=_published(cifar100=33.40, svhn=3.74, fashion_mnist=8.86),
            ),
            Row(
                "features + dropout",
                "anc",
                published=_published(cifar100=32.45, svhn=3.66, fashion_mnist=8.61),
            ),
        ),
        "The talk's header lost one label; its columns are taken to be in this order.",
        _published(cifar100=27.76, svhn=3.98, fashion_mnist=7.98),
    ),
    "comparison": Table(
        "The methods",
        (
            Row("student alone, with labels", "supervised"),
            Row("L2", "l2", published=_published(cifar10=9.07, cifar100=32.79)),
            Row("KD", "kd", published=_published(cifar10=8.88, cifar100=33.34)),
            Row("FitNets", "fitnets", published=_published(cifar10=8.39, cifar100=35.04)),
            Row("FSP", "fsp", published=_published(cifar10=11.30, cifar100=36.67)),
            Row(
                "BinaryConnect",
                "supervised",
                layers="binaryconnect-stochastic",
                published=_published(cifar10=8.27),
            ),
            Row("TTQ", "supervised", layers="ttq", published=_published(cifar10=8.87)),
            Row("ANC", "anc", published=_published(cifar10=8.08, cifar100=32.45)),
        ),
        "The talk compares with other papers' figures: those of FitNets (2.5M parameters), FSP "
        "(ResNet-8 and ResNet-14) and BinaryConnect (15.2M) are of other networks than its own "
        "ResNet-20 (0.27M), and TTQ began with a trained network. Here every method trains the "
        "same student by the same recipe, from the start.",
    ),
}
