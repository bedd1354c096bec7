"""`nncx compress`: a trained network in fewer bits, without training; what its file does is shown.

The network is read, traced, and compressed with the help of a few training images. Its file is
written and loaded again, and what comes back is measured beside the network in float. The
validation split is there to choose a method by, the test split for the figure that is reported.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from nncx import _machine, _networks, _recipe, _report, data, train
from nncx.compress import Half, Sensitivity, convert, freeze, quantize, sensitivity, vanhoucke
from nncx.compress.observers import MSE, Entropy, MinMax, MovingAverage, Observer, Percentile
from nncx.graph import Graph, trace
from nncx.nn.half import STORAGES

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MSE,
}
METHODS = ("int8", *STORAGES)

CALIBRATION_BATCH = 64
TIMED_BATCHES = (1, 16)
TIMED_RUNS = 20

# What only int8 knows, and what Vanhoucke's scheme decides.
_INT8 = ("calibration_images", "observer", "symmetric", "per_layer", "vanhoucke", "sensitivity")
_NOT_VANHOUCKE = ("observer", "symmetric", "per_layer", "skip", "sensitivity")


@dataclass(frozen=True)
class Compression:
    """All that a compression depends on.

    Args:
        model: a file of `nncx.save`; or the name of a network, as `models.by_name`, whose weights
            are in `weights`; or "torchvision:" and the name of one of torchvision's.
        weights: a state dict: a safetensors file, one of `nncx.save`, or one of `torch.save` with
            nothing but tensors. None takes what the model's file holds, or torchvision's own.
        options: of a network by name: more arguments of its constructor.
        method: "int8", or 16-bit storage: "float16", "bfloat16".
        data, root: as `data.load`.
        image_size: of an image folder; the other data sets have their own.
        calibration_images: how many of the training images at most, drawn at random.
        observer: "minmax", "moving-average", "percentile", "entropy", "mse".
        symmetric: inputs of layers have the zero point 0.
        per_layer: one scale for the weight of a layer instead of one for each output channel.
        skip: names of layers and blocks that stay float.
        vanhoucke: the scheme of `compress.vanhoucke`.
        sensitivity: measure also what each layer alone loses, on the validation split.
        seed: of the draw.

    Raises:
        ValueError: for a value that cannot be, or that another one leaves without a meaning; that
            of data and model when they are read.
    """

    model: str
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "int8"
    data: str = "digits"
    root: str | None = None
    image_size: int = 32
    calibration_images: int = 512
    observer: str = "minmax"
    symmetric: bool = False
    per_layer: bool = False
    skip: tuple[str, ...] = ()
    vanhoucke: bool = False
    sensitivity: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("observer", OBSERVERS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.calibration_images < 1:
            raise ValueError(
                f"calibration_images must be at least 1, got {self.calibration_images}"
            )
        if self.method != "int8":
            self._refuse(_INT8, f"the method {self.method}")
        if self.vanhoucke:
            self._refuse(_NOT_VANHOUCKE, "vanhoucke")

    def _refuse(self, names: tuple[str, ...], whose: str) -> None:
        for name in names:
            if (value := getattr(self, name)) != getattr(type(self), name):
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
    sensitivity: Sensitivity | None = None

    def __str__(self) -> str:
        table = "" if self.sensitivity is None else f"{self.sensitivity}\n\n"
        latencies = ", ".join(
            f"batch {batch}: {before:.2f} -> {self.latency_ms[batch]:.2f} ms"
            for batch, before in self.float_latency_ms.items()
        )
        return (
            f"{table}{self.compression.data} {self.compression.model} {self.compression.method}: "
            f"test error {self.float_test_error:.2f} -> {self.test_error:.2f} % of "
            f"{self.test_images} images (validation {self.float_validation_error:.2f} -> "
            f"{self.validation_error:.2f} %); {self.float_file_bytes:,} -> {self.file_bytes:,} B, "
            f"{self.ratio:.1f}x smaller; {latencies} (median) on {self.machine}"
        )


def run(compression: Compression, out: Path) -> Result:
    """Do what `compression` says; write model.safetensors and result.json to the folder `out`.

    Raises:
        ValueError: for data or a network that cannot be, that do not fit each other, or a network
            that cannot be compressed.
        FileNotFoundError, ImportError: as `data.load`, or for a file or torchvision.
    """
    if out.is_file():  # found now, not after the work
        raise ValueError(f"out must be a folder, got the file {out}; pass another name")
    splits = _recipe.load_data(compression.data, compression.root, compression.image_size)
    model = _networks.trained(compression.model, splits, compression.options, compression.weights)
    graph = trace(model, splits.train[0][0].unsqueeze(0))
    images = calibration_images(splits, compression.calibration_images, compression.seed)
    table = _sensitivity(compression, graph, images, splits) if compression.sensitivity else None
    compressed = freeze(_compressed(compression, graph, images))
    out.mkdir(parents=True, exist_ok=True)
    result = _measure(compression, splits, model, graph, compressed, out / _recipe.MODEL)
    result = replace(result, sensitivity=table)
    _recipe.write_result(result, out)
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


def _compressed(compression: Compression, graph: Graph, images: DataLoader) -> Graph:
    if compression.method != "int8":
        method = Half(STORAGES[compression.method])
        return convert(copy.deepcopy(graph), method, compression.skip)
    if compression.vanhoucke:
        return vanhoucke(graph, images)
    return quantize(graph, images, **_int8_settings(compression))


def _sensitivity(
    compression: Compression, graph: Graph, images: DataLoader, splits: data.Splits
) -> Sensitivity:
    metric = partial(train.error_rate, data=_recipe.evaluation(splits.validation))
    return sensitivity(graph, images, metric=metric, **_int8_settings(compression))


def _measure(
    compression: Compression,
    splits: data.Splits,
    model: nn.Module,
    graph: Graph,
    compressed: Graph,
    path: Path,
) -> Result:
    images = torch.stack([splits.test[i % len(splits.test)][0] for i in range(TIMED_BATCHES[-1])])
    loaded = _recipe.reloaded(compressed, path, images)
    file_bytes, float_file_bytes = path.stat().st_size, _recipe.saved_bytes(graph)
    latencies = {}
    with torch.inference_mode():
        for batch in TIMED_BATCHES:
            latencies[str(batch)] = _report.latency([model, loaded], (images[:batch],), TIMED_RUNS)
    (float_test_error, test_error), (float_validation_error, validation_error) = (
        [train.error_rate(each, _recipe.evaluation(split)) for each in (model, loaded)]
        for split in (splits.test, splits.validation)
    )
    return Result(
        compression=compression,
        test_error=test_error,
        float_test_error=float_test_error,
        test_images=len(splits.test),
        validation_error=validation_error,
        float_validation_error=float_validation_error,
        file_bytes=file_bytes,
        float_file_bytes=float_file_bytes,
        ratio=float_file_bytes / file_bytes,
        latency_ms={batch: after for batch, (_, after) in latencies.items()},
        float_latency_ms={batch: before for batch, (before, _) in latencies.items()},
        macs=_report.report(loaded, images[:1], repeats=1).macs,
        machine=_machine.describe(),
    )
