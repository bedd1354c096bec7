"""What a GPU allows: the time below which no kernel can be, and a plot of how near ours come.

    python benchmarks/roofline.py benchmarks/results/nvidia-h200.jsonl

draws beside it nvidia-h200.svg from the records that `--device cuda --records FILE` appends. A call
must move its bytes at the bandwidth of a copy, measured in the same process, and do its operations
at the peak of the unit that does them: the longer of the two times is the floor.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Dense operations a second by data sheet, for the first name that the GPU's contains: int8 and
# float16 of the tensor cores, float32 of the others. b1, which Hopper's sheets leave out, has 8
# times the rate of int8 (A100: 4,992 and 624 TOPS): a k-step of the same bytes takes the same time.
INT8_FLOAT16_FLOAT32 = {
    "H200": (1979e12, 989e12, 67e12),
    "H100 PCIe": (1513e12, 756e12, 51e12),
    "H100 NVL": (1671e12, 835e12, 60e12),
    "H100": (1979e12, 989e12, 67e12),
    "A100": (624e12, 312e12, 19.5e12),
}


def peaks(gpu: str) -> dict[str, float]:
    """Operations a second by unit; none of a GPU that is not in the table."""
    for name, (int8, float16, float32) in INT8_FLOAT16_FLOAT32.items():
        if name in gpu:
            return {"b1": 8 * int8, "int8": int8, "float16": float16, "float32": float32}
    return {}


@dataclass(frozen=True)
class Work:
    """What one call does at least.

    Attributes:
        moved: Bytes that it reads and writes: each of its tensors once.
        operations: 2 for each multiply-accumulate; 0 where only bytes count.
        unit: What does them: "b1", "int8", "float16" or "float32".
    """

    moved: int
    operations: int = 0
    unit: str = ""


@dataclass(frozen=True)
class Roof:
    """The two limits of a GPU.

    Attributes:
        gpu: Its name.
        bandwidth: Bytes a second that a copy reads and writes, as measured.
    """

    gpu: str
    bandwidth: float

    def __str__(self) -> str:
        return f"{self.gpu}, copy {self.bandwidth / 1e12:.2f} TB/s"

    def floor(self, work: Work) -> tuple[float, str]:
        """The least seconds of a call, and what takes them: "memory" or the unit."""
        times = {"memory": work.moved / self.bandwidth}
        peak = peaks(self.gpu).get(work.unit)
        if peak:
            times[work.unit] = work.operations / peak
        limit = max(times, key=times.__getitem__)
        return times[limit], limit


@dataclass(frozen=True)
class Record:
    """A measured shape: a line of a records file."""

    op: str
    shape: str
    seconds: float
    work: Work
    roof: Roof

    def append_to(self, file: Path) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(self)) + "\n")


def read(file: Path) -> list[Record]:
    """The records of a file."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Record(**line | {"work": Work(**line["work"]), "roof": Roof(**line["roof"])})
        for line in lines
    ]


def plot(records: Sequence[Record], file: Path) -> None:
    """Draws operations a second over operations a byte, below the roof of each unit.

    Shapes that only move bytes have no place in it.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed to measure

    by_op: dict[str, list[Record]] = {}
    for record in records:
        if record.work.operations:
            by_op.setdefault(record.op, []).append(record)
    roof = records[0].roof
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte",
        ylabel="TOP/s",
        title=str(roof),
    )
    for op, measured in by_op.items():
        x = [record.work.operations / record.work.moved for record in measured]
        y = [record.work.operations / record.seconds / 1e12 for record in measured]
        axes.plot(x, y, "o", alpha=0.7, label=op)
    left, right = axes.get_xlim()
    for unit, peak in peaks(roof.gpu).items():
        ridge = peak / roof.bandwidth
        line = [left, min(max(ridge, left), right), right]
        axes.plot(line, [min(x * roof.bandwidth, peak) / 1e12 for x in line], "k-", linewidth=1)
        axes.annotate(unit, (right, peak / 1e12), ha="right", va="bottom")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws the roofline plot of a GPU's records.")
    parser.add_argument("records", type=Path)
    options = parser.parse_args(arguments)
    plot(read(options.records), options.records.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
