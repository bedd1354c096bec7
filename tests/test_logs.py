"""The table, the events and the plot of a training."""

import csv
import math
import sys
from pathlib import Path

import pytest
from training import batches, network, sgd

from nncx import _logs
from nncx.train import fit, plot


def trained(epochs: int, validations: list[float] = (), **settings) -> list[dict[str, float]]:
    """Epoch i validates to `validations[i - 1]`, as far as they go."""
    model = network()
    optimizer = sgd(model.parameters())
    if validations:
        settings["validate"] = iter(validations).__next__
    return fit(model, batches(), epochs=epochs, optimizer=optimizer, progress=False, **settings)


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "history.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


class TestTable:
    def test_a_row_an_epoch_to_the_last_bit(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "folder"
        history = trained(3, [3.0, math.inf, 1.0], log=folder)
        assert rows(folder) == history

    def test_a_resumed_run_has_each_epoch_once(self, tmp_path: Path) -> None:
        settings = {"checkpoint": tmp_path / "run", "log": tmp_path}
        trained(2, **settings)
        (tmp_path / "history.csv").unlink()  # as if stopped before it was written
        trained(2, **settings)
        assert len(rows(tmp_path)) == 2
        assert rows(tmp_path) == trained(3, **settings)[:2] and len(rows(tmp_path)) == 3

    def test_a_scalar_that_comes_later_has_its_column(self) -> None:
        text = _logs.to_csv([{"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 0.5, "hint": 2.0}])
        assert text == "epoch,loss,hint\n1,0.1,\n2,0.5,2.0\n"


class TestTensorBoard:
    def test_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError, match=r"need tensorboard: pip install 'nncx\[logs\]'"):
            trained(1, log=tmp_path, tensorboard=True)

    def test_a_resumed_run_has_each_epoch_once(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        settings = {"log": tmp_path, "tensorboard": True}
        trained(3, [7.0, 6.0, 5.0], **settings)  # without a checkpoint: the next begins anew
        settings["checkpoint"] = tmp_path / "run"
        trained(1, [4.0], **settings)
        history = trained(2, [3.0], **settings)
        events = EventAccumulator(str(tmp_path)).Reload()
        assert events.Tags()["scalars"] == ["loss", "validation"]
        for name in ("loss", "validation"):
            values = {each.step: each.value for each in events.Scalars(name)}
            assert values == pytest.approx({each["epoch"]: each[name] for each in history})

    def test_needs_a_folder(self) -> None:
        with pytest.raises(ValueError, match="tensorboard writes to the folder log, got none"):
            trained(1, tensorboard=True)


class TestPlot:
    def test_a_panel_for_the_task_and_one_for_the_validation(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        history = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "validation": 9.0}]
        sizes = []
        for i, records in enumerate((history[:1], history)):
            plot(records, tmp_path / f"{i}.png")
            header = (tmp_path / f"{i}.png").read_bytes()[:24]
            assert header.startswith(b"\x89PNG")
            sizes.append(int.from_bytes(header[20:24], "big"))  # the height
        assert sizes[1] > 1.5 * sizes[0]

    def test_needs_an_epoch(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one epoch, got none"):
            plot([], tmp_path / "curves.png")
