"""The one training loop.

    task = nncx.train.Supervised(model)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    nncx.train.fit(task, loader, epochs=10, optimizer=optimizer, checkpoint="run.safetensors")

A *task* is a module that maps (inputs, targets) to a dictionary of scalars, of which "loss" is
minimised and the others are logged. What is trained, and how, is the task's: `Supervised` here,
`nncx.distill.Distiller` there. The loop knows only tasks, batches and optimizers.
"""

import contextlib
import copy
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

from nncx import _files


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
    run = _Run(task, _as_list(optimizer), _as_list(scheduler), generator, keep_best)
    _check_optimizers(run.task, run.optimizers)
    _check_schedulers(run.schedulers, run.optimizers)
    if checkpoint is not None:
        _check_folder(checkpoint)
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
    device = _device(model)
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
    device = _device(task)
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


def _device(module: nn.Module) -> torch.device:
    """Where its first parameter is, or its first buffer (a frozen network has no parameters)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _as_list(one_or_several: Any) -> list[Any]:
    if one_or_several is None:
        return []
    return list(one_or_several) if isinstance(one_or_several, Sequence) else [one_or_several]


# ----------------------------------------------------------------------------
# checkpoints


def _check_folder(checkpoint: str | os.PathLike[str]) -> None:
    """Fail before the first epoch rather than after it."""
    folder = os.path.dirname(os.path.realpath(checkpoint))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"a checkpoint needs an existing folder, got {folder}")
    if os.path.isdir(checkpoint):
        raise IsADirectoryError(f"a checkpoint must be a file, got the folder {checkpoint}")


class _Run:
    """All that the next epoch depends on, and how it goes to a file and back."""

    def __init__(
        self,
        task: nn.Module,
        optimizers: list[Optimizer],
        schedulers: list[LRScheduler],
        generator: torch.Generator | None,
        keep_best: bool,
    ) -> None:
        self.task = task
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.generator = generator
        self.settings = [_settings(each.state_dict()) for each in (*optimizers, *schedulers)]
        self.history: list[dict[str, float]] = []
        self.keep_best = keep_best
        self.best: dict[str, Any] = {"validation": math.inf, "task": None}

    def add(self, record: dict[str, float]) -> None:
        """An epoch is complete."""
        self.history.append(record)
        if self.keep_best and record["validation"] < self.best["validation"]:
            state = copy.deepcopy(self.task.state_dict())
            self.best = {"validation": record["validation"], "task": state}

    def restore_best(self) -> None:
        if self.best["task"] is not None:
            self.task.load_state_dict(self.best["task"])

    def save(self, path: str | os.PathLike[str]) -> None:
        _files.write(path, *self.pack())

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the metadata of a checkpoint."""
        tensors: dict[str, Tensor] = {}
        state = {name: _to_json(value, name, tensors) for name, value in self._state().items()}
        return tensors, {"kind": "checkpoint", "state": state}

    def load(self, path: str | os.PathLike[str], epochs: int) -> None:
        """Take the state of a checkpoint, after it was found to fit: all of it or nothing."""
        tensors, metadata = _files.read(path)
        if metadata.get("kind") != "checkpoint":
            raise ValueError(f"{os.fspath(path)} is not a checkpoint of nncx.train.fit")
        with _refused_if_unsound(path):
            pairs = metadata["state"].items()
            state = {name: _from_json(value, tensors) for name, value in pairs}
            difference = self._difference(state)
            done = len(state["history"])
        if difference:
            raise ValueError(
                f"{os.fspath(path)} is the checkpoint of another run ({difference}): name another "
                "file, or start anew with resume=False"
            )
        if epochs < done:
            raise ValueError(
                f"{os.fspath(path)} has {done} epochs done, more than epochs={epochs}: ask for at "
                f"least {done}, name another file, or start anew with resume=False"
            )
        before = copy.deepcopy(self._state())
        with _refused_if_unsound(path):
            try:
                self._take(state)
            except Exception:
                self._take(before)
                raise

    def _take(self, state: dict[str, Any]) -> None:
        if self.keep_best:
            best = state["best"]
            self.best = {"validation": float(best["validation"]), "task": best["task"]}
            self.restore_best()  # so that one that does not fit is refused before the training
        self.task.load_state_dict(state["task"])
        for each, saved in zip(self.optimizers, state["optimizers"], strict=True):
            each.load_state_dict(saved)
        for each, saved in zip(self.schedulers, state["schedulers"], strict=True):
            each.load_state_dict(saved)
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and _device(self.task).type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], _device(self.task))
        if self.generator is not None:
            self.generator.set_state(state["random"]["data"])
        self.settings = state["settings"]
        self.history = state["history"]
        if self.keep_best:
            self.best = state["best"]

    def _state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if _device(self.task).type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(_device(self.task))
        if self.generator is not None:
            random["data"] = self.generator.get_state()
        return {
            "task": self.task.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "schedulers": [each.state_dict() for each in self.schedulers],
            "types": self._types(),
            "settings": self.settings,
            "random": random,
            "history": self.history,
            "best": self.best if self.keep_best else None,
        }

    def _types(self) -> list[str]:
        return [type(each).__name__ for each in (*self.optimizers, *self.schedulers)]

    def _difference(self, state: dict[str, Any]) -> str | None:
        """The first thing in which a checkpoint's state does not fit this run."""
        mine, saved = self.task.state_dict(), state["task"]
        for name in sorted(mine.keys() ^ saved.keys()):
            return f"only {'this task' if name in mine else 'the file'} has '{name}'"
        for name, tensor in mine.items():
            if _kind(tensor) != _kind(saved[name]):
                return f"'{name}' is {_kind(tensor)} here, {_kind(saved[name])} in the file"
        if self._types() != state["types"]:
            return f"it is trained with {self._types()} here, {state['types']} in the file"
        for each, other in zip(self.optimizers, state["optimizers"], strict=True):
            if _group_sizes(each.state_dict()) != _group_sizes(other):
                return f"{type(each).__name__} has other parameter groups here than in the file"
        if self.keep_best and not state.get("best"):
            return "it was begun without keep_best"
        if not all(isinstance(record, dict) for record in state["history"]):
            return "its history is not one of epochs"
        if self.generator is not None and "data" not in state["random"]:
            return "data has a generator here, it had none there"
        if "settings" not in state:
            return "the file does not hold the settings of its optimizers"
        reached = [_settings(each) for each in (*state["optimizers"], *state["schedulers"])]
        places = zip(self._types(), self.settings, state["settings"], reached, strict=True)
        for owner, *settings in places:
            for name in _changed(*settings):
                title = name.removeprefix("param_groups/0/").removeprefix("initial_")
                here, there = (each.get(name) for each in settings[:2])
                return f"{owner}'s {title} is {here} here, {there} in the file"
        return None


@contextlib.contextmanager
def _refused_if_unsound(path: str | os.PathLike[str]) -> Iterator[None]:
    """One sentence for whatever goes wrong with a file that has a valid hash and was not ours."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(
            f"{os.fspath(path)} is not a sound checkpoint ({reason}): name another file, or start "
            "anew with resume=False"
        ) from error


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _group_sizes(optimizer_state: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


def _settings(state: Any, name: str = "") -> dict[str, Any]:
    """What a state_dict holds beside parameters and their state, copied, by its place."""
    if isinstance(state, dict) and not isinstance(state, Counter):
        nested = {key: each for key, each in state.items() if key not in ("params", "state")}
    elif isinstance(state, list) and any(isinstance(each, dict) for each in state):
        nested = dict(enumerate(state))
    else:
        return {name: _plain(state)}
    settings = {}
    for key, each in nested.items():
        settings |= _settings(each, f"{name}/{key}" if name else str(key))
    return settings


def _changed(here: dict[str, Any], begun: dict[str, Any], reached: dict[str, Any]) -> list[str]:
    """The settings that are not those a run began with, sorted.

    What has changed from `begun` to `reached` is the progress of that run, not a setting.
    """
    constants = {n for n in here.keys() | begun.keys() if begun.get(n) == reached.get(n)}
    return sorted(name for name in constants if here.get(name) != begun.get(name))


def _plain(value: Any) -> Any:
    """A copy that compares as a whole: of Python's numbers, not of tensors and NumPy's."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else copy.copy(value)


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a nest of what state_dicts hold; its tensors go to `tensors`, by their place."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Tensor):
        if name in tensors:
            raise ValueError(f"a checkpoint cannot hold two tensors at '{name}'")
        tensors[name] = value
        return {"tensor": name}
    if getattr(value, "ndim", None) == 0:  # NumPy's, and it stays: it rounds as Python's does not
        return {"numpy": [value.dtype.name, _to_json(value.item(), name, tensors)]}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, dict):  # as pairs, since JSON would turn the keys of optimizers to strings
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[key, _to_json(v, f"{name}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_to_json(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    raise ValueError(f"a checkpoint cannot hold a {type(value).__name__} (at '{name}')")


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_to_json` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "numpy":
        import numpy as np

        dtype, number = np.dtype(content[0]), _from_json(content[1], tensors)
        if dtype.kind not in "biuf":
            raise ValueError(f"a number cannot be of dtype {dtype}")
        return dtype.type(number)
    if kind in ("list", "tuple"):
        items = [_from_json(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    pairs = {key: _from_json(item, tensors) for key, item in content}
    return Counter(pairs) if kind == "counter" else pairs
