"""The methods of `nncx compress` that train: a table, and what they do to a network one by one.

A method is an object with settings for `nncx.convert`. If it has `steps`, which moves its next
share of the weights each time, the network is trained after each of them, else once; always with a
new optimizer, and the epoch that is kept is chosen on the validation split.

Each training keeps a checkpoint in the output folder. A run that is interrupted does all again when
it is called again: what a step does depends on nothing but the network that it finds, and a
training that is through only gives it back.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nncx import _processes, data, train
from nncx.commands import _recipe
from nncx.commands._recipe import LOSSES, Recipe, Setup, Training
from nncx.compress import (
    INQ,
    TTQ,
    XNOR,
    DeepCompression,
    Hashed,
    LowRank,
    Method,
    Pruning,
    convert,
    prune_filters,
)
from nncx.distill import Stage


@dataclass(frozen=True)
class FilterPruning:
    """`compress.prune_filters`, a function of the whole network, as a method; its settings."""

    amount: float | Mapping[str, float] | None = None
    macs: float | None = None
    criterion: str = "L1"
    scheme: str = "independent"
    tied: bool = False
    minimum: int = 1
    multiple: int = 1

    def applied(self, model: nn.Module, example: Tensor, skip: Sequence[str]) -> nn.Module:
        return prune_filters(model, example, skip=skip, **asdict(self))


AnyMethod = Method | FilterPruning

METHODS: dict[str, Callable[..., AnyMethod]] = {
    "deep-compression": DeepCompression,
    "filters": FilterPruning,
    "hashed": Hashed,
    "inq": INQ,
    "low-rank": LowRank,
    "prune": Pruning,
    "ttq": TTQ,
    "xnor": XNOR,
}


@dataclass(frozen=True)
class Finetuned:
    """One training of a method.

    Attributes:
        name: of the method; where it has steps, with the number of the step.
        step: the figures of the step before it, None without steps.
        best_epoch: the one that was kept, counted from 1.
        history: what `train.fit` returned.
    """

    name: str
    step: dict[str, Any] | None
    best_epoch: int
    history: list[dict[str, float]]


def made(name: str, options: Mapping[str, Any]) -> AnyMethod:
    """The method of `METHODS` with these settings.

    Raises:
        ValueError: for settings that it does not have or that cannot be.
    """
    known = [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(known)}")
    try:
        return METHODS[name](**options)
    except TypeError as error:  # of a wrong type
        raise ValueError(f"{name} cannot be made with {dict(options)}: {error}") from error


def finetune(
    recipe: Recipe,
    methods: Mapping[str, AnyMethod],
    skip: Sequence[str],
    model: nn.Module,
    splits: data.Splits,
    out: Path,
    setup: Setup,
) -> tuple[nn.Module, list[Finetuned]]:
    """Apply the methods one after the other, and train.

    Args:
        recipe: how.
        skip: names of layers and blocks that stay as they are; none leaves it to the method.
        model: without frozen layers, in eval mode; changed.

    Returns:
        The network, not frozen yet, on the CPU, and its trainings.

    Raises:
        ValueError: if `model` cannot be converted.
        FloatingPointError, KeyboardInterrupt: as `train.fit`.
    """
    trainings = []
    for name, method in methods.items():
        torch.manual_seed(recipe.seed)
        model = applied(method, model, splits.train[0][0].unsqueeze(0), skip)
        for stage, step in _stages(name, method, recipe, model):
            out.mkdir(parents=True, exist_ok=True)  # not before it is clear that all can be
            optimizer = _recipe.student_optimizer(recipe, model, stage)
            training = Training(stage, [optimizer], recipe.epochs, keep_best=True)
            records = _recipe.fit(recipe, model, training, splits, out, out / stage.name, setup)
            best_epoch = _recipe.best_epoch(records)
            trainings.append(Finetuned(stage.name, step, best_epoch, records))
        model.cpu()
    return model, trainings


def applied(method: AnyMethod, model: nn.Module, example: Tensor, skip: Sequence[str]) -> nn.Module:
    """`model` with the layers of the method, to be trained."""
    if isinstance(method, FilterPruning):
        return method.applied(model, example, skip)
    return convert(model, method, skip or None)


def history(trainings: Sequence[Finetuned]) -> list[dict[str, float]]:
    """That of all trainings, as if they were one."""
    records = [record for training in trainings for record in training.history]
    return [{**record, "epoch": epoch} for epoch, record in enumerate(records, 1)]


def _stages(
    name: str, method: AnyMethod, recipe: Recipe, model: nn.Module
) -> Iterator[tuple[Stage, dict[str, Any] | None]]:
    """What is to be trained, and the figures of the step before it, which is told on stderr."""

    def stage(name: str) -> Stage:
        return Stage(name, train.Supervised(model, LOSSES[recipe.loss]()))

    if not hasattr(method, "steps"):
        yield stage(name), None
        return
    for number, step in enumerate(method.steps(model), 1):
        if _processes.rank() == 0:
            print(step, file=sys.stderr)
        yield stage(f"{name}-{number}"), asdict(step)
