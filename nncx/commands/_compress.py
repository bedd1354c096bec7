"""`nncx compress`: a trained network made smaller, by any method; what its file does is shown.

The network is read, and goes through the methods one after the other: first those that train, which
`_finetune` has, then perhaps one that does not, which needs a few training images at most. The
file is written and loaded again, and what comes back is measured beside the network in float. The
validation split is there to choose by, the test split for the figure that is reported.
"""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from nncx import _machine, _processes, _report, data, train
from nncx.commands import _finetune, _networks, _recipe
from nncx.commands._finetune import AnyMethod, Finetuned
from nncx.commands._recipe import Recipe, Setup
from nncx.compress import (
    Half,
    Sensitivity,
    convert,
    freeze,
    quantize,
    sensitivity,
    thaw,
    vanhoucke,
)
from nncx.compress._counterpart import GEOMETRY
from nncx.compress.observers import MSE, Entropy, MinMax, MovingAverage, Observer, Percentile
from nncx.graph import Graph, trace
from nncx.nn import PackedLayer
from nncx.nn.half import STORAGES

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MSE,
}
WITHOUT_TRAINING = ("int8", *STORAGES)
METHODS = (*_finetune.METHODS, *WITHOUT_TRAINING)

CALIBRATION_BATCH = 64
TIMED_BATCHES = (1, 16)
TIMED_RUNS = 20

# What only int8 knows, what Vanhoucke's scheme decides, and what only a training knows.
_INT8 = ("calibration_images", "observer", "symmetric", "per_layer", "vanhoucke", "sensitivity")
_NOT_VANHOUCKE = ("observer", "symmetric", "per_layer", "skip", "sensitivity")
_TRAINING = (
    *("method_options", "train_images", "augment", "loss", "epochs", "batch", "optimizer"),
    *("lr", "lr_decay", "weight_decay", "amp", "patience"),
)


@dataclass(frozen=True)
class Compression(Recipe):
    """All that a compression depends on: the recipe of its trainings, if it trains, and

    Args:
        model: a file of `nncx.save`; or the name of a network, as `models.by_name`, whose weights
            are in `weights`; or "torchvision:" and the name of one of torchvision's.
        weights: a state dict: a safetensors file, one of `nncx.save`, or one of `torch.save` with
            nothing but tensors. None takes what the model's file holds, or torchvision's own.
        options: of a network by name: more arguments of its constructor.
        epochs: of each training: of each step of a method that has steps.
        methods: of `_finetune.METHODS`, in order; as the last or the only one also "int8", or
            16-bit storage: "float16", "bfloat16".
        method_options: settings of the methods that train, as "bits"; where there are several
            methods with the name of its own, as "inq.bits".
        calibration_images: how many of the training images int8 draws at random, at most.
        observer: "minmax", "moving-average", "percentile", "entropy", "mse".
        symmetric: inputs of int8 layers have the zero point 0.
        per_layer: one scale for the weight of an int8 layer instead of one for each output channel.
        skip: names of layers and blocks that stay float.
        vanhoucke: the scheme of `compress.vanhoucke`.
        sensitivity: measure also what each int8 layer alone loses, on the validation split.
        seed: of all that is random.

    Raises:
        ValueError: for a value that cannot be, or that another one leaves without a meaning; that
            of data and model when they are read.
    """

    weights: str | None = None
    methods: tuple[str, ...] = ("int8",)
    method_options: Mapping[str, Any] = field(default_factory=dict)
    calibration_images: int = 512
    observer: str = "minmax"
    symmetric: bool = False
    per_layer: bool = False
    skip: tuple[str, ...] = ()
    vanhoucke: bool = False
    sensitivity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != Recipe.layers:
            raise ValueError(
                f"the layers of a compression are its methods', got layers {self.layers!r}; leave"
                " it out"
            )
        self._check_methods()
        if self.observer not in OBSERVERS:
            known = ", ".join(OBSERVERS)
            raise ValueError(f"observer must be one of {known}, got {self.observer!r}")
        if self.calibration_images < 1:
            raise ValueError(
                f"calibration_images must be at least 1, got {self.calibration_images}"
            )
        whose = f"the method {', '.join(self.methods)}"
        if "int8" not in self.methods:
            self._refuse(_INT8, whose)
        if not self.trained():
            self._refuse(_TRAINING, whose)
        elif self.sensitivity:
            self._refuse(("sensitivity",), f"int8 behind {', '.join(self.trained())}")
        if self.vanhoucke:
            self._refuse(_NOT_VANHOUCKE, "vanhoucke")

    def trained(self) -> dict[str, AnyMethod]:
        """The methods that train, by name, with their settings.

        Raises:
            ValueError: for settings that they do not have or that cannot be.
        """
        names = [name for name in self.methods if name in _finetune.METHODS]
        options: dict[str, dict[str, Any]] = {name: {} for name in names}
        for name, value in self.method_options.items() if names else ():
            owner, _, option = name.rpartition(".")
            owner = owner or (names[0] if len(names) == 1 else "")
            if owner not in options:
                raise ValueError(
                    f"an option must be of one of the methods {', '.join(names)}, as"
                    f" {names[0]}.NAME, got {name!r}"
                )
            options[owner][option] = value
        return {name: _finetune.made(name, its) for name, its in options.items()}

    def depends_on(self) -> dict[str, Any]:
        """Files count by their content."""
        return _recipe.with_contents(super().depends_on(), ("model", "weights"))

    def _check_methods(self) -> None:
        if not self.methods:
            raise ValueError(f"methods must be some of {', '.join(METHODS)}, got none")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"a method must be one of {', '.join(METHODS)}, got {name!r}")
            if self.methods.count(name) > 1:
                raise ValueError(f"a method must stand once, got {name!r} twice; leave out one")
        for name in self.methods[:-1]:
            if name in WITHOUT_TRAINING:
                raise ValueError(
                    f"{name} must be the last method, got {self.methods[-1]} behind it, which it"
                    " leaves no float weight; change the order"
                )

    def _refuse(self, names: tuple[str, ...], whose: str) -> None:
        defaults = {
            each.name: each.default if each.default_factory is MISSING else each.default_factory()
            for each in fields(self)
        }
        for name in names:
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{name} means nothing to {whose}, got {value!r}; leave it out")


@dataclass(frozen=True)
class Result:
    """What a compression brought: every figure but those of `float_...` is that of the file.

    Attributes:
        test_error, validation_error: percent.
        file_bytes, float_file_bytes: of the file, and of the file of the same network in float.
        ratio: the latter by the former.
        latency_ms: median milliseconds of a batch, by its size; float and compressed took turns.
        macs: of one image, by precision.
        trainings: of the methods that train, in order.
        seconds, trained_on: as of `_recipe.Result`; None where nothing was trained.
        sensitivity: if it was asked for; its metric is the validation error.
    """

    compression: Compression
    test_error: float
    float_test_error: float
    test_images: int
    validation_error: float
    float_validation_error: float
    file_bytes: int
    float_file_bytes: int
    ratio: float
    latency_ms: dict[str, float]
    float_latency_ms: dict[str, float]
    macs: dict[str, int]
    machine: str
    trainings: list[Finetuned]
    seconds: float | None = None
    trained_on: str | None = None
    sensitivity: Sensitivity | None = None

    def __str__(self) -> str:
        table = "" if self.sensitivity is None else f"{self.sensitivity}\n\n"
        latencies = ", ".join(
            f"batch {batch}: {before:.2f} -> {self.latency_ms[batch]:.2f} ms"
            for batch, before in self.float_latency_ms.items()
        )
        seconds = "" if self.seconds is None else f"; {self.seconds:.0f} s of training"
        return (
            f"{table}{self.compression.data} {self.compression.model} "
            f"{', '.join(self.compression.methods)}: "
            f"test error {self.float_test_error:.2f} -> {self.test_error:.2f} % of "
            f"{self.test_images} images (validation {self.float_validation_error:.2f} -> "
            f"{self.validation_error:.2f} %); {self.float_file_bytes:,} -> {self.file_bytes:,} B, "
            f"{self.ratio:.1f}x smaller; {latencies} (median) on {self.machine}{seconds}"
        )


def run(compression: Compression, out: Path, setup: Setup = _recipe.ON_THE_CPU) -> Result | None:
    """Do what `compression` says; write model.safetensors and result.json to the folder `out`.

    Returns:
        None in all processes but the first.

    Raises:
        ValueError: for data or a network that cannot be, that do not fit each other, or a network
            that cannot be compressed.
        FileNotFoundError, ImportError: as `data.load`, or for a file or torchvision.
        FloatingPointError: if a training diverges.
        KeyboardInterrupt: as it came; the same call continues from the checkpoints.
    """
    if out.is_file():  # found now, not after the work
        raise ValueError(f"out must be a folder, got the file {out}; pass another name")
    for drawn in ("plot", "tensorboard"):
        if getattr(setup, drawn) and not compression.trained():
            methods = ", ".join(compression.methods)
            raise ValueError(f"{drawn} draws trainings, got only {methods}; leave it out")
    splits = _recipe.splits_of(compression)
    model = _networks.trained(compression.model, splits, compression.options, compression.weights)
    thawed = thaw(copy.deepcopy(model)).eval()
    _rehearse(compression, thawed, splits)
    start = time.monotonic()
    compressed, trainings = _finetune.finetune(
        compression,
        compression.trained(),
        compression.skip,
        thawed,
        splits,
        out,
        setup,
    )
    seconds = time.monotonic() - start
    if _processes.rank() > 0:
        return None
    if setup.plot:
        train.plot(_finetune.history(trainings), out / _recipe.CURVES)
    table = _sensitivity(compression, model, splits) if compression.sensitivity else None
    images = _calibration_images(compression, splits)
    compressed = _frozen(_stored_smaller(compression, compressed.eval(), images, splits))
    out.mkdir(parents=True, exist_ok=True)
    result = Result(
        compression=compression,
        **_measured(splits, model, compressed, out / _recipe.MODEL),
        machine=_machine.describe(),
        trainings=trainings,
        seconds=seconds if trainings else None,
        trained_on=_recipe.trained_on(setup.device) if trainings else None,
        sensitivity=table,
    )
    _recipe.write_result(result, out)
    _recipe.remove_checkpoints(compression, splits, out)
    return result


def calibration_images(splits: data.Splits, count: int, seed: int) -> DataLoader:
    """Batches of `count` training images drawn at random, of all if there are not as many."""
    return data.loader(data.subset(splits.train, count, seed), CALIBRATION_BATCH)


def _int8_settings(compression: Compression) -> dict[str, Any]:
    """What `quantize` and `sensitivity` share."""
    return {
        "observer": OBSERVERS[compression.observer](),
        "skip": compression.skip,
        "per_channel": not compression.per_layer,
        "symmetric": compression.symmetric,
    }


def _rehearse(compression: Compression, model: nn.Module, splits: data.Splits) -> None:
    """Find out before the first training whether each method leaves something to those behind."""
    if len(compression.methods) == 1:
        return
    model, example = copy.deepcopy(model), splits.train[0][0].unsqueeze(0)
    methods = compression.trained()
    for number, name in enumerate(compression.methods):
        try:
            if name in methods:
                model = _finetune.applied(methods[name], model, example, compression.skip)
            else:
                _stored_smaller(compression, model, [example], splits)
        except ValueError as error:
            if number == 0:
                raise
            before = ", ".join(compression.methods[:number])
            raise ValueError(f"{name} cannot follow {before}: {error}") from error


def _stored_smaller(
    compression: Compression, model: nn.Module, images: Iterable[Any], splits: data.Splits
) -> nn.Module:
    """What the last method makes of `model`, if it is one that does not train."""
    method = compression.methods[-1]
    if method in STORAGES:
        return convert(model, Half(STORAGES[method]), compression.skip)
    if method != "int8":
        return model
    graph = _graph(model, splits)
    if compression.vanhoucke:
        return vanhoucke(graph, images)
    return quantize(graph, images, **_int8_settings(compression))


def _frozen(model: nn.Module) -> nn.Module:
    """Without float weights in layers that need none, if there are such layers."""
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        return freeze(model)
    return model


def _graph(model: nn.Module, splits: data.Splits) -> Graph:
    return trace(model, splits.train[0][0].unsqueeze(0))


def _calibration_images(compression: Compression, splits: data.Splits) -> DataLoader:
    return calibration_images(splits, compression.calibration_images, compression.seed)


def _sensitivity(compression: Compression, model: nn.Module, splits: data.Splits) -> Sensitivity:
    metric = partial(train.error_rate, data=_recipe.evaluation(splits.validation))
    graph, images = _graph(model, splits), _calibration_images(compression, splits)
    return sensitivity(graph, images, metric=metric, **_int8_settings(compression))


def _measured(
    splits: data.Splits, model: nn.Module, compressed: nn.Module, path: Path
) -> dict[str, Any]:
    """Of the file of `compressed`, which is written and loaded again, beside the float `model`."""
    images = torch.stack([splits.test[i % len(splits.test)][0] for i in range(TIMED_BATCHES[-1])])
    loaded = _recipe.reloaded(_networks.storable(compressed, images), path, images, entropy=True)
    float_file_bytes = _recipe.saved_bytes(_networks.storable(_in_float(model), images))
    file_bytes = path.stat().st_size
    latencies = {}
    with torch.inference_mode():
        for batch in TIMED_BATCHES:
            latencies[str(batch)] = _report.latency([model, loaded], (images[:batch],), TIMED_RUNS)
    (float_test_error, test_error), (float_validation_error, validation_error) = (
        [train.error_rate(each, _recipe.evaluation(split)) for each in (model, loaded)]
        for split in (splits.test, splits.validation)
    )
    return {
        "test_error": test_error,
        "float_test_error": float_test_error,
        "test_images": len(splits.test),
        "validation_error": validation_error,
        "float_validation_error": float_validation_error,
        "file_bytes": file_bytes,
        "float_file_bytes": float_file_bytes,
        "ratio": float_file_bytes / file_bytes,
        "latency_ms": {batch: after for batch, (_, after) in latencies.items()},
        "float_latency_ms": {batch: before for batch, (before, _) in latencies.items()},
        "macs": _report.report(loaded, images[:1], repeats=1).macs,
    }


def _in_float(model: nn.Module) -> nn.Module:
    """A network like `model` but for its values, whose layers store floats, and no masks or codes.

    `model` has others where it is the file of a method that has not been frozen yet.
    """
    plain = copy.deepcopy(model)
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, PackedLayer) and name:
            kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
            geometry = {each: getattr(layer, each) for each in GEOMETRY[kind]}
            parent, _, attribute = name.rpartition(".")
            new = kind(**geometry, bias=layer.bias is not None).eval()
            setattr(plain.get_submodule(parent), attribute, new)
    return plain
