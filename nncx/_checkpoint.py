"""All that the next epoch of `nncx.train.fit` depends on, and how it goes to a file and back.

A checkpoint is a file of `nncx._files`: the tensors by their place in the state, and beside them
the state as JSON. It is untrusted like any file: one that does not fit is refused in one sentence,
and the run is left as it was.
"""

import contextlib
import copy
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nncx import _files, _processes


def device_of(module: nn.Module) -> torch.device:
    """Where its first parameter is, or its first buffer (a frozen network has no parameters)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def check_folder(checkpoint: str | os.PathLike[str]) -> None:
    """Fail before the first epoch rather than after it."""
    folder = os.path.dirname(os.path.realpath(checkpoint))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"a checkpoint needs an existing folder, got {folder}")
    if os.path.isdir(checkpoint):
        raise IsADirectoryError(f"a checkpoint must be a file, got the folder {checkpoint}")


class Run:
    """All that the next epoch depends on, and how it goes to a file and back."""

    def __init__(
        self,
        task: nn.Module,
        optimizers: list[Optimizer],
        schedulers: list[LRScheduler],
        generator: torch.Generator | None,
        keep_best: bool,
        amp: torch.dtype | None,
    ) -> None:
        self.task = task
        self.amp = amp
        # It does nothing unless enabled: only float16 has gradients that vanish unscaled.
        self.scaler = torch.amp.GradScaler(device_of(task).type, enabled=amp == torch.float16)
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.generator = generator
        self.settings = [_settings(each.state_dict()) for each in (*optimizers, *schedulers)]
        self.history: list[dict[str, float]] = []
        self.saved = 0  # how many of its epochs the file holds
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
        """All processes give their random state; the first writes."""
        packed = self.pack()
        if _processes.rank() == 0:
            _files.write(path, *packed)
        self.saved = len(self.history)

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
        self.saved = done

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
        self.scaler.load_state_dict(state["scaler"])
        random = state["random"][_processes.rank()]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and device_of(self.task).type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], device_of(self.task))
        if self.generator is not None:
            self.generator.set_state(state["order"])
        self.settings = state["settings"]
        self.history = state["history"]

    def _state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if device_of(self.task).type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device_of(self.task))
        return {
            "task": self.task.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "schedulers": [each.state_dict() for each in self.schedulers],
            "types": self._types(),
            "settings": self.settings,
            "amp": str(self.amp),
            "scaler": self.scaler.state_dict(),
            "random": _processes.gathered(random),
            "order": None if self.generator is None else self.generator.get_state(),
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
        if self.generator is not None and state["order"] is None:
            return "data has a generator here, it had none there"
        if len(state["random"]) != _processes.count():
            return f"{_processes.count()} processes here, {len(state['random'])} in the file"
        if str(self.amp) != state["amp"]:
            return f"amp is {self.amp} here, {state['amp']} in the file"
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
