"""`nncx train`: one network on one data set, from labels; what its file does is what is reported.

The network is trained with `train.fit`, the epoch is chosen on the validation split, the binary
layers are frozen, the file is written and loaded again, and only then is the test split looked at.

A run keeps a checkpoint in the output folder until it is through, so one that is interrupted
continues when the same recipe is given again.
"""

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from nncx import _files, _machine, _networks, _report, _store, data, train
from nncx.compress import XNOR, BinaryConnect, convert, freeze
from nncx.compress._convert import Method
from nncx.compress.binary_connect import parameter_groups
from nncx.nn import SquaredHingeLoss

LAYERS: dict[str, Method | None] = {
    "float": None,
    "xnor": XNOR(),
    "binaryconnect": BinaryConnect(),
    "binaryconnect-stochastic": BinaryConnect(stochastic=True),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "squared-hinge": SquaredHingeLoss,
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(Adam, fused=True),
    "sgd": partial(SGD, momentum=0.9, nesterov=True),
}

MODEL, RESULT = "model.safetensors", "result.json"
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """All that a training depends on: the same recipe gives the same network on one machine.

    Args:
        data, root: as `data.load`.
        image_size: of an image folder; the other data sets have their own.
        model, options: as `models.by_name`: its name, and more arguments of its constructor.
        layers: "float", or the method whose layers `convert` puts in: "xnor", "binaryconnect",
            "binaryconnect-stochastic".
        loss: "cross-entropy", or "squared-hinge".
        optimizer: "adam", or "sgd" with Nesterov's momentum of 0.9.
        lr: the learning rate of the first epoch; BinaryConnect scales that of its weights.
        lr_decay: the learning rate of the last epoch, divided by `lr`; between them it falls
            exponentially. 1 keeps it constant.

    Raises:
        ValueError: for a value that cannot be; that of data and model when they are made.
    """

    data: str = "digits"
    root: str | None = None
    image_size: int = 32
    model: str = "resnet8"
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "float"
    loss: str = "cross-entropy"
    epochs: int = 20
    batch: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    lr_decay: float = 0.01
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, table in (("layers", LAYERS), ("loss", LOSSES), ("optimizer", OPTIMIZERS)):
            value = getattr(self, name)
            if value not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, got {value!r}")
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "lr_decay"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Result:
    """What a training brought: every figure is that of the file, loaded again.

    Attributes:
        test_error, validation_error: percent; the epoch was chosen by the latter.
        best_epoch: the one that is in the file, counted from 1.
        parameters: logical ones, of which a packed layer stores one bit each.
        file_bytes, float_file_bytes: of the file, and of the file of the same network in float.
        ratio: the latter by the former.
        seconds: of training, in this call: not those before an interruption.
        history: what `train.fit` returned.
    """

    recipe: Recipe
    test_error: float
    test_images: int
    validation_error: float
    best_epoch: int
    parameters: int
    file_bytes: int
    float_file_bytes: int
    ratio: float
    seconds: float
    machine: str
    history: list[dict[str, float]]

    def __str__(self) -> str:
        recipe = self.recipe
        smaller = "" if recipe.layers == "float" else f", {self.ratio:.1f}x smaller than float"
        return (
            f"{recipe.data} {recipe.model} {recipe.layers}: test error {self.test_error:.2f} % of "
            f"{self.test_images} images (validation {self.validation_error:.2f} %, epoch "
            f"{self.best_epoch} of {recipe.epochs}); {self.file_bytes:,} B{smaller}; "
            f"{self.seconds:.0f} s"
        )


def run(recipe: Recipe, out: Path) -> Result:
    """Train what `recipe` says; write model.safetensors and result.json to the folder `out`.

    Raises:
        ValueError: for data or a network that cannot be, or a network that cannot be converted.
        FileNotFoundError, ImportError: as `data.load`.
        FloatingPointError: if the training diverges.
        KeyboardInterrupt: as it came; the same call continues from the checkpoint.
    """
    splits = load_data(recipe.data, recipe.root, recipe.image_size)
    model = build(recipe, splits)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / f"{run_key(asdict(recipe), splits)}.checkpoint"
    start = time.monotonic()
    history = _fit(recipe, model, splits, checkpoint)
    seconds = time.monotonic() - start
    if recipe.layers != "float":
        freeze(model)
    result = _measure(recipe, model, splits, out / MODEL, history, seconds)
    write_result(result, out)
    checkpoint.unlink()
    return result


def build(recipe: Recipe, splits: data.Splits) -> nn.Module:
    """The network, with the layers of the recipe, untrained."""
    model = _float_network(recipe, splits)
    method = LAYERS[recipe.layers]
    return model if method is None else convert(model, method)


def _float_network(recipe: Recipe, splits: data.Splits) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return _networks.make(recipe.model, splits, recipe.options)


def _optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    parameters = model.parameters()
    if isinstance(LAYERS[recipe.layers], BinaryConnect):
        parameters = parameter_groups(model, recipe.lr, squared=recipe.optimizer == "sgd")
    make = OPTIMIZERS[recipe.optimizer]
    return make(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _fit(
    recipe: Recipe, model: nn.Module, splits: data.Splits, checkpoint: Path
) -> list[dict[str, float]]:
    optimizer = _optimizer(recipe, model)
    per_epoch = recipe.lr_decay ** (1 / max(1, recipe.epochs - 1))
    validation = data.loader(splits.validation, EVALUATION_BATCH)
    torch.manual_seed(recipe.seed)
    return train.fit(
        train.Supervised(model, LOSSES[recipe.loss]()),
        data.loader(splits.train, recipe.batch, shuffle=True, seed=recipe.seed),
        epochs=recipe.epochs,
        optimizer=optimizer,
        scheduler=ExponentialLR(optimizer, per_epoch),
        validate=partial(train.error_rate, model, validation),
        keep_best=True,
        checkpoint=checkpoint,
    )


def _measure(
    recipe: Recipe,
    model: nn.Module,
    splits: data.Splits,
    path: Path,
    history: list[dict[str, float]],
    seconds: float,
) -> Result:
    image = splits.test[0][0].unsqueeze(0)
    loaded = reloaded(_networks.storable(model.eval(), image), path, image)
    best = min(history, key=lambda record: record["validation"])
    float_network = _networks.storable(_float_network(recipe, splits).eval(), image)
    file_bytes, float_file_bytes = path.stat().st_size, saved_bytes(float_network)
    return Result(
        recipe=recipe,
        test_error=train.error_rate(loaded, data.loader(splits.test, EVALUATION_BATCH)),
        test_images=len(splits.test),
        validation_error=train.error_rate(loaded, data.loader(splits.validation, EVALUATION_BATCH)),
        best_epoch=int(best["epoch"]),
        parameters=_report.report(loaded, image, repeats=1).total.parameters,
        file_bytes=file_bytes,
        float_file_bytes=float_file_bytes,
        ratio=float_file_bytes / file_bytes,
        seconds=seconds,
        machine=_machine.describe(),
        history=history,
    )


# ----------------------------------------------------------------------------
# what other commands do too


def load_data(name: str, root: str | None, image_size: int) -> data.Splits:
    """`data.load`, with `image_size` for what is an image folder."""
    return data.load(name, root, image_size=image_size if data.takes_image_size(name) else None)


def run_key(settings: dict[str, Any], splits: data.Splits) -> str:
    """Names a run in the file name of its checkpoint.

    Other settings, or other images in the same folder, never continue that file.
    """
    depends_on = [settings, splits.classes, len(splits.train), splits.mean, splits.std]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:8]


def reloaded(model: nn.Module, path: Path, images: Tensor) -> nn.Module:
    """Save `model` and load it again; what comes back was found to give the same bits."""
    _store.save(model, path)
    loaded = _store.load(path)
    with torch.no_grad():
        if not torch.equal(loaded(images), model(images)):
            raise RuntimeError(f"{path} must compute what was saved, but its logits differ")
    return loaded


def saved_bytes(model: nn.Module) -> int:
    """The size of the file of `model`: written, and looked at."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        _store.save(model, path)
        return path.stat().st_size


def write_result(result: Any, out: Path) -> None:
    """A dataclass as result.json in the folder `out`; infinity, which JSON lacks, as null."""
    fields = _without_infinities(asdict(result))
    text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
    _files.replace(out / RESULT, text.encode())


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
