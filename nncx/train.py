"""The one training loop.

    task = nncx.train.Supervised(model)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    nncx.train.fit(task, loader, epochs=10, optimizer=optimizer, checkpoint="run.safetensors")

A *task* is a module that maps (inputs, targets) to a dictionary of scalars, of which "loss" is
minimised and the others are logged. What is trained, and how, is the task's: `Supervised` here,
`nncx.distill.Distiller` there. The loop knows only tasks, batches and optimizers. Processes that
torchrun started share out each batch, inside `with nncx.train.processes() as device:`.
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
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nncx import _processes
from nncx._checkpoint import Run, check_folder, device_of
from nncx._logs import Logs, plot
from nncx._processes import Shards, processes

__all__ = ["Supervised", "error_rate", "fit", "plot", "processes"]

AMP = (None, torch.bfloat16, torch.float16)


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
    patience: int | None = None,
    amp: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    log: str | os.PathLike[str] | None = None,
    tensorboard: bool = False,
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
        patience: stop when so many epochs in a row have not lowered "validation". It is a matter of
            the history: a run that was stopped so stays stopped when it is resumed.
        amp: torch.bfloat16 or torch.float16: the task runs under torch.autocast of that dtype. In
            float16 the loss is scaled, so that small gradients do not vanish.
        checkpoint: a file, rewritten after each epoch, that holds all that the next epoch depends
            on: the task, optimizers, schedulers, history, torch's random state and that of
            `data.generator`. (Not the random state of `random` and NumPy.)
        resume: continue from `checkpoint` if it exists. The result is, to the bit, that of a run
            that was never interrupted (on a GPU, if its kernels are deterministic). More epochs
            may be asked for than at first; the settings of optimizers and schedulers must stay,
            `amp` and the number of processes, too.
        log: a folder for history.csv, rewritten after each epoch: one row an epoch.
        tensorboard: write events for TensorBoard to that folder, too.
        progress: a line on stderr per epoch and, on a terminal, a bar within it.

    Several processes: each takes its part of every batch, so `data` gives the batches that one
    process alone would get, in the same order in each process. A step is then, to the rounding of
    sums, that of one process, if the loss is a mean over samples and no layer looks at other
    samples (BatchNorm does: `nn.SyncBatchNorm` is torch's answer). Parameters become those of the
    first process, running statistics too, and it alone calls `validate` and writes. In each batch
    the same parameters must get a gradient.

    Returns:
        One dictionary per epoch: "epoch" (from 1), the mean over all samples of each scalar of the
        task, and "validation".

    Raises:
        ValueError: for bad arguments, optimizers that do not train the task, a task without a
            loss, data that is not pairs of tensors or has no order that processes could share, or
            a checkpoint that is damaged, of another task or settings, or past `epochs`.
        ImportError: if TensorBoard is asked for and missing.
        TypeError: if `task` is no nn.Module, as if its class were passed.
        FloatingPointError: after an epoch whose loss is not finite. The checkpoint stays that of
            the epoch before.
        KeyboardInterrupt: as it came; its message says what the checkpoint holds.
    """
    _check_arguments(task, epochs, validate, keep_best, patience, amp, log, tensorboard)
    _processes.check_joined()
    if not _is_task(task):
        task = Supervised(task)
    batches = Shards(data)
    run = Run(task, _as_list(optimizer), _as_list(scheduler), batches.generator, keep_best, amp)
    _check_optimizers(run.task, run.optimizers)
    _check_schedulers(run.schedulers, run.optimizers)
    _processes.draw_apart()
    progress = progress and _processes.rank() == 0
    if checkpoint is not None:
        check_folder(checkpoint)
        run.pack()  # what no file can hold is said before the first epoch, not after it
        if resume and os.path.exists(checkpoint):
            run.load(checkpoint, epochs)
            if progress:
                done = f"{len(run.history)} of {epochs} epochs done"
                print(f"resumed {os.fspath(checkpoint)}: {done}", file=sys.stderr)
    forward = _processes.wrapped(run.task)
    with _logs(log, run.history, tensorboard) as logs, _explained(run, checkpoint, epochs):
        while len(run.history) < epochs and not _out_of_patience(run.history, patience):
            start = time.monotonic()
            epoch = len(run.history) + 1
            title = f"epoch {epoch}/{epochs}"
            with contextlib.closing(_with_bar(batches, title, progress)) as shards:
                record = {"epoch": epoch, **_train_epoch(run, forward, shards)}
            _check_finite(record, checkpoint)
            if validate is not None:
                record["validation"] = float(_processes.from_first(validate))
            for each in run.schedulers:
                each.step()
            run.add(record)
            if checkpoint is not None:
                run.save(checkpoint)
            if logs is not None:
                logs.add(run.history)
            if progress:
                print(_line(title, record, time.monotonic() - start), file=sys.stderr)
    if progress and _out_of_patience(run.history, patience):
        print(f"stopped: validation has not fallen for {patience} epochs", file=sys.stderr)
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
    run: Run, forward: nn.Module, batches: Iterable[tuple[Tensor, Tensor, int]]
) -> dict[str, float]:
    """One pass over the data; the mean over its samples of each scalar that the task returns."""
    device = device_of(run.task)
    sums: defaultdict[str, Tensor | float] = defaultdict(float)
    counts: Counter[str] = Counter()
    forward.train()
    for inputs, targets, size in batches:
        inputs = inputs.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with _autocast(device, run.amp):
            scalars = forward(inputs, targets)
        if not (isinstance(scalars, dict) and _is_scalar(scalars.get("loss"))):
            raise ValueError(
                "a task must return a dictionary with a scalar tensor 'loss', "
                f"{type(run.task).__name__} did not"
            )
        part = _processes.part_of(size)
        _step(run, scalars["loss"], _processes.count() * part / size)
        for name, value in scalars.items():
            if _is_scalar(value):
                # Summed where it is: reading a number from a GPU would wait for every batch.
                sums[name] = sums[name] + value.detach().double() * part
                counts[name] += part
    if not sums:
        raise ValueError("an epoch needs at least one batch, got none: can data be iterated again?")
    _processes.share_buffers(run.task)
    samples = torch.tensor(list(counts.values()), dtype=torch.double, device=device)
    totals, samples = _processes.added_up(torch.stack([*sums.values(), *samples])).view(2, -1)
    return dict(zip(sums, (totals / samples).tolist(), strict=True))


def _step(run: Run, loss: Tensor, weight: float) -> None:
    """One of every optimizer. The mean of the processes' weighted losses is that of the batch."""
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    run.scaler.scale(loss if weight == 1 else loss * weight).backward()
    for optimizer in run.optimizers:
        run.scaler.step(optimizer)
    run.scaler.update()


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Without a dtype the caller's own autocast, if any, is left alone."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _out_of_patience(history: list[dict[str, float]], patience: int | None) -> bool:
    if patience is None:
        return False
    best, epoch = math.inf, 0
    for record in history:
        if record["validation"] < best:
            best, epoch = record["validation"], record["epoch"]
    return len(history) - epoch >= patience


@contextlib.contextmanager
def _logs(
    folder: str | os.PathLike[str] | None, history: list[dict[str, float]], tensorboard: bool
) -> Iterator[Logs | None]:
    """Of the first process, if a folder is named."""
    if folder is None or _processes.rank() > 0:
        yield None
        return
    with contextlib.closing(Logs(folder, history, tensorboard)) as logs:
        yield logs


@contextlib.contextmanager
def _explained(run: Run, checkpoint: str | os.PathLike[str] | None, epochs: int) -> Iterator[None]:
    """Ctrl-C says what the checkpoint holds."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if checkpoint is None:
            raise
        holds = f"{os.fspath(checkpoint)} holds {run.saved} of {epochs} epochs; run again to resume"
        message = holds if run.saved else "no epoch was complete, so there is nothing to resume"
        raise KeyboardInterrupt(f"training was interrupted: {message}") from interrupt


def _check_arguments(
    task: nn.Module,
    epochs: int,
    validate: Callable[[], float] | None,
    keep_best: bool,
    patience: int | None,
    amp: torch.dtype | None,
    log: str | os.PathLike[str] | None,
    tensorboard: bool,
) -> None:
    if not _is_integer(epochs) or epochs < 0:
        raise ValueError(f"epochs must be an integer of at least 0, got {epochs!r}")
    if patience is not None and (not _is_integer(patience) or patience < 1):
        raise ValueError(f"patience must be an integer of at least 1, or None, got {patience!r}")
    if not isinstance(task, nn.Module):
        raise TypeError(
            f"fit: task must be an nn.Module, got {getattr(task, '__name__', type(task).__name__)}"
        )
    if validate is None:
        if keep_best:
            raise ValueError("keep_best chooses by what validate returns: give both or neither")
        if patience is not None:
            raise ValueError("patience waits for what validate returns: give both or neither")
    if amp not in AMP:
        raise ValueError(f"amp must be torch.bfloat16, torch.float16 or None, got {amp!r}")
    if tensorboard and log is None:
        raise ValueError("tensorboard writes to the folder log, got none; give both or neither")


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


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _as_list(one_or_several: Any) -> list[Any]:
    if one_or_several is None:
        return []
    return list(one_or_several) if isinstance(one_or_several, Sequence) else [one_or_several]
