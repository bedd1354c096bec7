"""`nncx train`: one network on one data set, from labels; what its file does is what is reported.

The network is trained with `train.fit`, the epoch is chosen on the validation split, the binary
layers are frozen, the file is written and loaded again, and only then is the test split looked at.

A run keeps a checkpoint in the output folder until it is through, so one that is interrupted
continues when the same recipe is given again. Of several processes, which torchrun started, the
first measures and writes.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import Dataset

from nncx import _files, _machine, _plots, _processes, _report, _store, data, train
from nncx.commands import _networks
from nncx.compress import TTQ, XNOR, BinaryConnect, binary_connect, convert, freeze, ttq
from nncx.compress._convert import Method
from nncx.distill import Stage
from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    SquaredHingeLoss,
    TTQConv2d,
    TTQLinear,
)

LAYERS: dict[str, Method | None] = {
    "float": None,
    "xnor": XNOR(),
    "binaryconnect": BinaryConnect(),
    "binaryconnect-stochastic": BinaryConnect(stochastic=True),
    "ttq": TTQ(),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "squared-hinge": SquaredHingeLoss,
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(Adam, fused=True),
    "sgd": partial(SGD, momentum=0.9, nesterov=True),
}
AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

MODEL, RESULT, CURVES = "model.safetensors", "result.json", "curves.png"
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """All that a training depends on: the same recipe gives the same network on one machine.

    Args:
        data, root: as `data.load`.
        image_size: of an image folder; the other data sets have their own.
        train_images: how many of the training images at most; which ones does not depend on `seed`.
        augment: of the training images, a key of `data.AUGMENTATIONS`.
        model, options: as `_networks.make`: its name, and more arguments of its constructor.
        layers: "float", or the method whose layers `convert` puts in: "xnor", "binaryconnect",
            "binaryconnect-stochastic", "ttq".
        loss: "cross-entropy", or "squared-hinge".
        optimizer: "adam", or "sgd" with Nesterov's momentum of 0.9.
        lr: the learning rate of the first epoch; BinaryConnect scales that of its weights, TTQ that
            of its learned values.
        lr_decay: the learning rate of the last epoch, divided by `lr`; between them it falls
            exponentially. 1 keeps it constant.
        amp: mixed precision of the training: "none", "bfloat16" or "float16".
        patience: as `train.fit`: epochs without a better validation after which it stops.

    Raises:
        ValueError: for a value that cannot be; that of data and model when they are made.
    """

    data: str = "digits"
    root: str | None = None
    image_size: int = 32
    train_images: int | None = None
    augment: str = "none"
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
    amp: str = "none"
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        tables = {
            "augment": data.AUGMENTATIONS,
            "layers": LAYERS,
            "loss": LOSSES,
            "optimizer": OPTIMIZERS,
            "amp": AMP,
        }
        for name, table in tables.items():
            value = getattr(self, name)
            if value not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, got {value!r}")
        for name in ("epochs", "batch", "train_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "lr_decay"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def depends_on(self) -> dict[str, Any]:
        """What makes it another training, as JSON has it: its checkpoints are named after this."""
        return asdict(self)


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
        trained_on: how many processes on what device; the other figures are of the CPU.
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
    trained_on: str
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


@dataclass(frozen=True)
class Setup:
    """What a training runs on, and what it writes besides: nothing that its result depends on.

    Args:
        device: where it is trained, as `train.processes` gives it. It is measured on the CPU.
        tensorboard: write events for TensorBoard as well.
        plot: draw the history to curves.png as well.

    Raises:
        ImportError: if matplotlib is missing for `plot`: now rather than after the training.
    """

    device: torch.device = torch.device("cpu")
    tensorboard: bool = False
    plot: bool = False

    def __post_init__(self) -> None:
        if self.plot:
            _plots.require_matplotlib()


ON_THE_CPU = Setup()


def run(recipe: Recipe, out: Path, setup: Setup = ON_THE_CPU) -> Result | None:
    """Train what `recipe` says; write model.safetensors, history.csv and result.json to `out`.

    Returns:
        None in all processes but the first.

    Raises:
        ValueError: for data or a network that cannot be, or a network that cannot be converted.
        FileNotFoundError, ImportError: as `data.load`, or for TensorBoard.
        FloatingPointError: if the training diverges.
        KeyboardInterrupt: as it came; the same call continues from the checkpoint.
    """
    splits = splits_of(recipe)
    model = build(recipe, splits)
    stage = Stage("supervised", train.Supervised(model, LOSSES[recipe.loss]()))
    stages = {stage: [student_optimizer(recipe, model, stage)]}
    result = train_stages(recipe, model, stages, splits, out, setup)
    if result is not None:
        write_result(result, out)
        remove_checkpoints(recipe, splits, out)
    return result


def train_stages(
    recipe: Recipe,
    model: nn.Module,
    stages: Mapping[Stage, list[Optimizer]],
    splits: data.Splits,
    out: Path,
    setup: Setup,
) -> Result | None:
    """Train `model` in `stages`, one after the other; write model.safetensors to the folder `out`.

    The stages share the recipe's epochs. The last decides which epoch is kept: what another one
    trains, as a hint, need not tell classes apart. Checkpoints stay until the result is written:
    see `remove_checkpoints`. None in all processes but the first.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    history: list[dict[str, float]] = []
    *_, final = stages
    for (stage, optimizers), epochs in zip(stages.items(), _epochs(recipe, stages), strict=True):
        training = Training(stage, optimizers, epochs, keep_best=stage is final)
        log = out if len(stages) == 1 else out / stage.name
        records = fit(recipe, model, training, splits, out, log, setup)
        last = [{**record, "epoch": len(history) + record["epoch"]} for record in records]
        history += last
    seconds = time.monotonic() - start
    if _processes.rank() > 0:
        return None
    if setup.plot:
        train.plot(history, out / CURVES)
    model.cpu()
    if recipe.layers != "float":
        freeze(model)
    return Result(
        recipe=recipe,
        **_measured(recipe, model, splits, out / MODEL),
        best_epoch=best_epoch(last),
        seconds=seconds,
        trained_on=trained_on(setup.device),
        machine=_machine.describe(),
        history=history,
    )


def remove_checkpoints(recipe: Recipe, splits: data.Splits, out: Path) -> None:
    """Once the result is written: those of `train_stages`."""
    for path in out.glob(f"{_key(recipe, splits)}-*.checkpoint"):
        path.unlink()


def _key(recipe: Recipe, splits: data.Splits) -> str:
    return run_key(recipe.depends_on(), splits)


def _epochs(recipe: Recipe, stages: Iterable[Stage]) -> list[int]:
    """Those of each stage: its share, at least one, and all together the recipe's if they can."""
    *first, _ = (max(1, round(stage.share * recipe.epochs)) for stage in stages)
    return [*first, max(1, recipe.epochs - sum(first))]


def splits_of(recipe: Recipe) -> data.Splits:
    """The recipe's data; of several processes, the first may download them."""
    with _processes.first_goes_ahead():
        splits = load_data(recipe.data, recipe.root, recipe.image_size)
    if recipe.train_images is None:
        return splits
    return replace(splits, train=data.subset(splits.train, recipe.train_images, seed=0))


def build(recipe: Recipe, splits: data.Splits) -> nn.Module:
    """The network, with the layers of the recipe, untrained."""
    model = _float_network(recipe, splits)
    method = LAYERS[recipe.layers]
    return model if method is None else convert(model, method)


def _float_network(recipe: Recipe, splits: data.Splits) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return _networks.make(recipe.model, splits, recipe.options)


# Layers some of whose parameters learn at rates of their own.
_RATES = {
    (BinaryConnectConv2d, BinaryConnectLinear): binary_connect.parameter_groups,
    (TTQConv2d, TTQLinear): ttq.parameter_groups,
}


def student_optimizer(recipe: Recipe, model: nn.Module, stage: Stage) -> Optimizer:
    """Of all that is trained for `model` in `stage`: itself, and what adapts it to the teacher."""
    its_own = {id(parameter) for parameter in model.parameters()}
    adapters = [p for p in stage.student_parameters() if id(p) not in its_own]
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    for layers, parameter_groups in _RATES.items():
        if any(isinstance(m, layers) and not m.frozen for m in model.modules()):
            groups = parameter_groups(model, recipe.lr, squared=recipe.optimizer == "sgd")
    if adapters:
        groups.append({"params": adapters})
    make = OPTIMIZERS[recipe.optimizer]
    return make(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


@dataclass(frozen=True)
class Training:
    """One call of `train.fit`; `keep_best`: whether its best epoch is kept rather than its last."""

    stage: Stage
    optimizers: Sequence[Optimizer]
    epochs: int
    keep_best: bool


def fit(
    recipe: Recipe,
    model: nn.Module,
    training: Training,
    splits: data.Splits,
    out: Path,
    log: Path,
    setup: Setup,
) -> list[dict[str, float]]:
    """Train `model` as `recipe` says; the checkpoint stays in `out`, see `remove_checkpoints`."""
    stage, optimizers = training.stage, training.optimizers
    per_epoch = recipe.lr_decay ** (1 / max(1, training.epochs - 1))
    stage.task.to(setup.device)
    torch.manual_seed(recipe.seed)
    return train.fit(
        stage.task,
        batches(recipe, splits),
        epochs=training.epochs,
        optimizer=optimizers,
        scheduler=[ExponentialLR(optimizer, per_epoch) for optimizer in optimizers],
        validate=partial(train.error_rate, model, evaluation(splits.validation)),
        keep_best=training.keep_best,
        patience=recipe.patience if training.keep_best else None,
        amp=AMP[recipe.amp],
        checkpoint=out / f"{_key(recipe, splits)}-{stage.name}.checkpoint",
        log=log,
        tensorboard=setup.tensorboard,
    )


def best_epoch(history: Iterable[Mapping[str, float]]) -> int:
    """The first of those with the lowest validation error."""
    return int(min(history, key=lambda record: record["validation"])["epoch"])


def _measured(
    recipe: Recipe, model: nn.Module, splits: data.Splits, path: Path
) -> dict[str, float | int]:
    """What the file of `model` does, which is written to `path` and loaded again."""
    image = splits.test[0][0].unsqueeze(0)
    loaded = reloaded(_networks.storable(model.eval(), image), path, image)
    float_network = _networks.storable(_float_network(recipe, splits).eval(), image)
    file_bytes, float_file_bytes = path.stat().st_size, saved_bytes(float_network)
    return {
        "test_error": train.error_rate(loaded, evaluation(splits.test)),
        "test_images": len(splits.test),
        "validation_error": train.error_rate(loaded, evaluation(splits.validation)),
        "parameters": _report.report(loaded, image, repeats=1).total.parameters,
        "file_bytes": file_bytes,
        "float_file_bytes": float_file_bytes,
        "ratio": float_file_bytes / file_bytes,
    }


def trained_on(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{_processes.count()} x {name}"


# ----------------------------------------------------------------------------
# what other commands do too


def load_data(name: str, root: str | None, image_size: int) -> data.Splits:
    """`data.load`, with `image_size` for what is an image folder."""
    return data.load(name, root, image_size=image_size if data.takes_image_size(name) else None)


def batches(recipe: Recipe, splits: data.Splits) -> data.Loader:
    """Of the training images, in an order that depends on the seed."""
    augment = data.AUGMENTATIONS[recipe.augment]
    return data.loader(splits.train, recipe.batch, shuffle=True, seed=recipe.seed, augment=augment)


def evaluation(split: Dataset) -> data.Loader:
    return data.loader(split, EVALUATION_BATCH)


def run_key(settings: dict[str, Any], splits: data.Splits) -> str:
    """Names a run in the file name of its checkpoint.

    Other settings, or other images in the same folder, never continue that file.
    """
    depends_on = [settings, splits.classes, len(splits.train), splits.mean, splits.std]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:8]


def with_contents(settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """`settings` where those of these names that are files are their SHA-256."""
    files = {name: settings[name] for name in names if settings[name] is not None}
    return settings | {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
        if Path(file).is_file()
    }


def reloaded(model: nn.Module, path: Path, images: Tensor, *, entropy: bool = False) -> nn.Module:
    """`nncx.save` and `load` of `model`; what comes back was found to give the same bits."""
    _store.save(model, path, entropy=entropy)
    loaded = _store.load(path)
    with torch.no_grad():
        if not torch.equal(loaded(images), model(images)):
            raise RuntimeError(f"{path} must compute what was saved, but its logits differ")
    return loaded


def saved_bytes(model: nn.Module) -> int:
    """The size of the file of `model`: written, and looked at."""
    with _store.saved_temporarily(model) as path:
        return path.stat().st_size


def is_done(recipe: Recipe, out: Path) -> bool:
    """Whether the folder `out` holds the network and the result of this very recipe."""
    try:
        written = json.loads((out / RESULT).read_text())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (out / MODEL).is_file() and written == json.loads(json.dumps(asdict(recipe)))


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
