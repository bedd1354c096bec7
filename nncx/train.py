"""The one training loop.

    task = nncx.train.Supervised(model)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    nncx.train.fit(task, loader, epochs=10, optimizer=optimizer, checkpoint="run.safetensors")

A *task* is a module that maps (inputs, targets) to a dictionary of scalars, of which "loss" is
minimised and the others are logged. What is trained, and how, is the task's: `Supervised` here,
`nncx.distill.Distiller` there. The loop knows only tasks, batches and optimizers.
"""

import contextlib
import inspect
import math
import numbers
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nncx._checkpoint import Run, check_folder, device_of


class Supervised(nn.Module):
    """Learning from labels: `{"loss": criterion(model(inputs), targets)}`.

    Args:
        criterion: a scalar of (logits, targets); None is cross-entropy.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self.criterion(self.model(inputs), targets)}


def fit(
    task: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    optimizer: Optimizer | Sequence[Optimizer],
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    validate: Callable[[], float] | None = None,
    keep_best: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train `task` until `epochs` epochs are complete, those of a resumed checkpoint included.

    Args:
        task: a module whose `forward(inputs, targets)` returns a dictionary of scalars with a
            "loss". A module whose forward has no `targets` is a model: `Supervised(model)`.
        data: batches (inputs, targets), iterated once per epoch and moved to the task's device.
        optimizer: one or several; each batch is one backward and a step of every one.
        scheduler: one or several, stepped after each epoch, without arguments.
        validate: called after each epoch; what it returns is logged as "validation".
        keep_best: give the task back as it was after the epoch whose "validation" was the lowest,
            of equals the first, instead of as the last epoch left it. Its state is part of the
            checkpoint, which grows by it.
        checkpoint: a file, rewritten after each epoch, that holds all that the next epoch depends
            on: the task, optimizers, schedulers, history, torch's random state and that of
            `data.generator`. (Not the random state of `random` and NumPy.)
        resume: continue from `checkpoint` if it exists. The result is, to the bit, that of a run
            that was never interrupted (on a GPU, if its kernels are deterministic). More epochs
            may be asked for than at first; the settings of optimizers and schedulers must stay.
        progress: a line on stderr per epoch and, on a terminal, a bar within it.

    Returns:
        One dictionary per epoch: "epoch" (from 1), the mean over all samples of each scalar of the
        task, and "validation".

    Raises:
        ValueError: for bad arguments, optimizers that do not train the task, a task without a
            loss, data that is not pairs of tensors, or a checkpoint that is damaged, of another
            task or settings, or past `epochs`.
        TypeError: if `task` is no nn.Module, as if its class were passed.
        FloatingPointError: after an epoch whose loss is not finite. The checkpoint stays that of
            the epoch before.
        KeyboardInterrupt: as it came; its message says what the checkpoint holds.
    """
    if not isinstance(epochs, numbers.Integral) or isinstance(epochs, bool) or epochs < 0:
        raise ValueError(f"epochs must be an integer of at least 0, got {epochs!r}")
    if not isinstance(task, nn.Module):
        raise TypeError(
            f"fit: task must be an nn.Module, got {getattr(task, '__name__', type(task).__name__)}"
        )
    if not _is_task(task):
        task = Supervised(task)
    if keep_best and validate is None:
        raise ValueError("keep_best chooses by what validate returns: give both or neither")
    generator = getattr(data, "generator", None)  # a DataLoader's
    run = Run(task, _as_list(optimizer), _as_list(scheduler), generator, keep_best)
    _check_optimizers(run.task, run.optimizers)
    _check_schedulers(run.schedulers, run.optimizers)
    if checkpoint is not None:
        check_folder(checkpoint)
        run.pack()  # what no file can hold is said before the first epoch, not after it
        if resume and os.path.exists(checkpoint):
            run.load(checkpoint, epochs)
            if progress:
                done = f"{len(run.history)} of {epochs} epochs done"
                print(f"resumed {os.fspath(checkpoint)}: {done}", file=sys.stderr)
    saved = len(run.history)
    try:
        for epoch in range(saved + 1, epochs + 1):
            start = time.monotonic()
            title = f"epoch {epoch}/{epochs}"
            with contextlib.closing(_with_bar(data, title, progress)) as batches:
                record = {"epoch": epoch, **_train_epoch(run.task, batches, run.optimizers)}
            _check_finite(record, checkpoint)
            if validate is not None:
                record["validation"] = float(validate())
            for each in run.schedulers:
                each.step()
            run.add(record)
            if checkpoint is not None:
                run.save(checkpoint)
                saved = epoch
            if progress:
                print(_line(title, record, time.monotonic() - start), file=sys.stderr)
    except KeyboardInterrupt as interrupt:
        if checkpoint is None:
            raise
        holds = f"{os.fspath(checkpoint)} holds {saved} of {epochs} epochs; run again to resume"
        message = holds if saved else "no epoch was complete, so there is nothing to resume"
        raise KeyboardInterrupt(f"training was interrupted: {message}") from interrupt
    run.restore_best()
    return run.history


@torch.no_grad()
def error_rate(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> float:
    """How many percent of the samples have their largest logit in the wrong place.

    The model runs in eval mode and is given back in the mode of each of its modules.

    Raises:
        ValueError: if there are no samples.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    wrong, count = torch.zeros((), dtype=torch.int64, device=device), 0
    model.eval()
    try:
        for inputs, targets in data:
            inputs, targets = inputs.to(device), targets.to(device)
            wrong += (model(inputs).argmax(1) != targets).sum()
            count += len(targets)
    finally:
        for module, mode in modes:  # outer modules first, since train() reaches into them
            if module.training != mode:
                module.train(mode)
    if count == 0:
        raise ValueError("an error rate needs at least one sample, got none")
    return 100 * wrong.item() / count


# ----------------------------------------------------------------------------
# one epoch


def _train_epoch(
    task: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizers: list[Optimizer]
) -> dict[str, float]:
    """One pass over the data; the mean over its samples of each scalar that the task returns."""
    device = device_of(task)
    sums: defaultdict[str, Tensor | float] = defaultdict(float)
    counts: Counter[str] = Counter()
    task.train()
    for batch in batches:
        inputs, targets = _pair(batch)
        inputs = inputs.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        scalars = task(inputs, targets)
        if not (isinstance(scalars, dict) and _is_scalar(scalars.get("loss"))):
            raise ValueError(
                "a task must return a dictionary with a scalar tensor 'loss', "
                f"{type(task).__name__} did not"
            )
        for optimizer in optimizers:
            optimizer.zero_grad()
        scalars["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        for name, value in scalars.items():
            if _is_scalar(value):
                # Summed where it is: reading a number from a GPU would wait for every batch.
                sums[name] = sums[name] + value.detach().double() * len(inputs)
                counts[name] += len(inputs)
    if not sums:
        raise ValueError("an epoch needs at least one batch, got none: can data be iterated again?")
    return {name: float(total) / counts[name] for name, total in sums.items()}


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(batch, list | tuple) and len(batch) == 2
    if not (is_pair and all(isinstance(each, Tensor) for each in batch)):
        raise ValueError(
            "data must give pairs (inputs, targets) of tensors, got "
            f"{type(batch).__name__}; wrap it in a loader that does"
        )
    return batch[0], batch[1]


def _check_optimizers(task: nn.Module, optimizers: list[Optimizer]) -> None:
    """Each must train the task, and nothing that a checkpoint of the task would not hold."""
    if not optimizers:
        raise ValueError("fit needs at least one optimizer, got none")
    its_own = {id(parameter) for parameter in task.parameters()}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = sum(id(parameter) not in its_own for parameter in parameters)
        if foreign:
            raise ValueError(
                f"an optimizer must hold parameters of the task, but {foreign} of the "
                f"{len(parameters)} of {name} are not of {type(task).__name__}: make it from the "
                "parameters of what is trained, after the last change of its layers"
            )
        if not any(parameter.requires_grad for parameter in parameters):
            raise ValueError(
                f"an optimizer must hold a parameter that requires a gradient, {name} has none"
            )
        if _needs_arguments(type(optimizer).step):
            raise ValueError(
                f"fit steps optimizers without a closure, which {name} needs: take another one"
            )


def _check_schedulers(schedulers: list[LRScheduler], optimizers: list[Optimizer]) -> None:
    for scheduler in schedulers:
        name = type(scheduler).__name__
        if _needs_arguments(type(scheduler).step):
            raise ValueError(
                f"fit steps schedulers without arguments, which {name} needs: take another one"
            )
        if not any(scheduler.optimizer is optimizer for optimizer in optimizers):
            raise ValueError(f"a scheduler must be of an optimizer that is given, {name} is not")


def _needs_arguments(method: Callable) -> bool:
    """Of the class, since schedulers put a function in the place of an optimizer's own `step`."""
    _, *parameters = inspect.signature(method).parameters.values()
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return any(p.default is p.empty for p in named)


def _check_finite(record: dict[str, float], checkpoint: str | os.PathLike[str] | None) -> None:
    if not math.isfinite(record["loss"]):
        anew = ""
        if checkpoint is not None and os.path.exists(checkpoint):  # it would bring back the rate
            anew = " and name another checkpoint, or start anew with resume=False"
        scalars = {name: value for name, value in record.items() if not math.isfinite(value)}
        raise FloatingPointError(
            f"training stopped in epoch {record['epoch']}, since its loss was not finite "
            f"({', '.join(f'{name} {value}' for name, value in scalars.items())}); "
            f"lower the learning rate{anew}"
        )


def _with_bar(data: Iterable, title: str, progress: bool) -> Iterator:
    """The batches, under a bar that vanishes when they are through."""
    if progress and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        data = track(data, title, console=Console(stderr=True), transient=True)
    yield from data


def _line(title: str, record: dict[str, float], seconds: float) -> str:
    scalars = (f"{name} {value:.4g}" for name, value in record.items() if name != "epoch")
    return "  ".join([title, *scalars, f"{seconds:.1f} s"])


def _is_task(module: nn.Module) -> bool:
    inner = getattr(module, "_orig_mod", module)  # torch.compile hides the signature
    return "targets" in inspect.signature(inner.forward).parameters


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _as_list(one_or_several: Any) -> list[Any]:
    if one_or_several is None:
        return []
    return list(one_or_several) if isinstance(one_or_several, Sequence) else [one_or_several]
