"""`nncx eval` and `nncx report`: what files do on the test split, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nncx import _compare, _machine, _report, _store, train
from nncx._compare import Comparison
from nncx.commands import _networks, _recipe

TIMED_RUNS = 20


@dataclass(frozen=True)
class Result:
    """Every figure is that of the file.

    Attributes:
        test_error: percent.
        parameters: logical ones, of which a packed layer stores few bits each.
        macs: of one image, by precision.
        latency_ms: median milliseconds of one image.
    """

    model: str
    data: str
    test_error: float
    test_images: int
    file_bytes: int
    parameters: int
    macs: dict[str, int]
    latency_ms: float
    machine: str

    def __str__(self) -> str:
        return (
            f"{self.data} {self.model}: test error {self.test_error:.2f} % of {self.test_images} "
            f"images; {self.file_bytes:,} B; {self.latency_ms:.3f} ms an image (median) on "
            f"{self.machine}"
        )


def run(
    model: str, data: str, root: str | None = None, image_size: int = 32, out: Path | None = None
) -> Result:
    """Measure the file `model` of `nncx.save`; write result.json to the folder `out`, if named.

    Args:
        data, root: as `data.load`.
        image_size: of an image folder; the other data sets have their own.

    Raises:
        ValueError: for data or a file that cannot be, or that do not fit each other.
        FileNotFoundError, ImportError: as `data.load`, or for the file.
    """
    loaded = _store.load(model)
    splits = _recipe.load_data(data, root, image_size)
    _networks.checked(loaded, splits)
    report = _report.report(loaded, splits.test[0][0].unsqueeze(0), file=model)
    result = Result(
        model=model,
        data=data,
        test_error=train.error_rate(loaded, _recipe.evaluation(splits.test)),
        test_images=len(splits.test),
        file_bytes=report.file_bytes,
        parameters=report.total.parameters,
        macs=report.macs,
        latency_ms=report.total.latency_ms,
        machine=_machine.describe(),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        _recipe.write_result(result, out)
    return result


def compare(
    files: Sequence[str],
    *,
    data: str | None = None,
    root: str | None = None,
    image_size: int = 32,
    shape: Sequence[int] | None = None,
) -> Comparison:
    """Measure files of `nncx.save`, one image at a time, all in turns.

    Args:
        data, root: as `data.load`; the errors are those on its test split. None leaves them out.
        image_size: of an image folder; the other data sets have their own.
        shape: of an image, where there are no data.

    Raises:
        ValueError: for data or a file that cannot be, that do not fit each other, or a file twice.
        FileNotFoundError, ImportError: as `data.load`, or for a file.
    """
    if (data is None) == (shape is None):
        raise ValueError(
            f"report: pass data, or else the shape of an image, got data {data!r} and shape"
            f" {shape!r}"
        )
    for file in files:
        if files.count(file) > 1:
            raise ValueError(f"report: files must differ, got {file} twice; leave one out")
    models = [_store.load(file) for file in files]
    errors: list[float | None] = [None] * len(files)
    if data is None:
        image = torch.zeros(1, *shape)
        for model in models:
            _networks.outputs(model, image)
    else:
        splits = _recipe.load_data(data, root, image_size)
        image = splits.test[0][0].unsqueeze(0)
        test = _recipe.evaluation(splits.test)
        errors = [train.error_rate(_networks.checked(model, splits), test) for model in models]
    reports = _report.measure(models, files, (image,), TIMED_RUNS)
    return _compare.compare(zip(_names(files), reports, errors, strict=True))


def _names(files: Sequence[str]) -> list[str]:
    """As short as they tell the files apart: that of the folder, else the whole path."""
    paths = [Path(file) for file in files]
    names = [path.parent.name if path.name == _recipe.MODEL else path.stem for path in paths]
    return names if all(names) and len(set(names)) == len(names) else list(files)
