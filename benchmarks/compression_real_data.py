"""Each compression method on a LeNet and real data: errors, bytes and times, over several seeds.

    python benchmarks/compression_real_data.py --data mnist --model lenet300100 --seeds 0 1 2

A cell is one `nncx compress` of the network that one `nncx train` with the same seed made;
`--commands` prints them, and each can be run alone. Results stay in the folder `--out`: a run that
is interrupted continues when it is called again. Epochs are chosen by the error on the validation
split, and all figures are those of files, loaded again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from nncx._machine import describe
from nncx._table import markdown_table

FLOAT = "float"
# 12 times fewer weights: as Han et al. for LeNet-300-100, and of LeNet-5 rather in fc1, since its
# convolutions bear less (nncx.compress.pruning_sensitivity).
SPARSITY = {
    "lenet300100": '{"fc1": 0.92, "fc2": 0.91, "fc3": 0.74}',
    "lenet5": '{"conv2": 0.66, "fc1": 0.94, "fc2": 0.75}',
}
EPOCHS = {  # of the float network, and of each training of a compression
    "lenet300100": {FLOAT: 30, "prune": 12, "share": 4, "ttq": 15, "inq": 6},
    "lenet5": {FLOAT: 12, "prune": 6, "share": 2, "ttq": 5, "inq": 2},
}
# Chosen by validation errors of a few tries with one or two seeds.
TRAINING = {
    "lenet300100": {
        FLOAT: "--optimizer sgd --lr 0.1 --weight-decay 5e-4",
        "prune": "--optimizer sgd --lr 0.1 --weight-decay 5e-4",
        "inq": "--optimizer sgd --lr 0.01 --weight-decay 5e-4",
    },
    "lenet5": {
        FLOAT: "--lr 2e-3 --weight-decay 1e-5",
        "prune": "--lr 1e-3 --weight-decay 5e-5",
        "inq": "--lr 1e-3",
    },
}


class Row(NamedTuple):
    """Attributes: network: the row that it begins with; method: words of `nncx compress`."""

    network: str
    method: str


def compressions(model: str) -> dict[str, Row]:
    epochs = EPOCHS[model]
    prune = f"--method prune --method-option 'sparsity={SPARSITY[model]}'"
    prune += f" --method-option rounds=4 --method-option gap_bits=6 {TRAINING[model]['prune']}"
    share = "--method deep-compression --method-option conv_bits=6 --lr 1e-4"
    ttq = f"--method ttq --epochs {epochs['ttq']}"
    if model == "lenet300100":  # whose first layer has most of the weights
        ttq += " --skip fc3"
    return {
        "prune": Row(FLOAT, f"{prune} --epochs {epochs['prune']}"),
        "prune, share": Row("prune", f"{share} --epochs {epochs['share']}"),
        "prune, ttq": Row("prune", ttq),
        "ttq": Row(FLOAT, ttq),
        "inq": Row(FLOAT, f"--method inq {TRAINING[model]['inq']} --epochs {epochs['inq']}"),
        "int8": Row(FLOAT, "--method int8"),
    }


def commands(model: str, data: str, seed: int, out: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Name and folder of each row, and the words behind `nncx`; the float network is the first."""
    folders = {
        row: out / f"{row.replace(', ', '-')}-{seed}" for row in (FLOAT, *compressions(model))
    }
    of_all = ["--data", data, "--seed", str(seed), "--out"]
    training = f"train --model {model} --epochs {EPOCHS[model][FLOAT]} {TRAINING[model][FLOAT]}"
    yield FLOAT, folders[FLOAT], [*training.split(), *of_all, str(folders[FLOAT])]
    for name, row in compressions(model).items():
        network = str(folders[row.network] / "model.safetensors")
        words = ["compress", "--model", network, *shlex.split(row.method)]
        yield name, folders[name], [*words, *of_all, str(folders[name])]


def result(folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """What the command wrote; it is run where it has not been."""
    written = folder / "result.json"
    if not written.is_file():
        print(shlex.join(["nncx", *command]), file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "nncx", *command], check=True, stdout=sys.stderr)
    return json.loads(written.read_text())


def lines(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[list[str]]:
    """Of the table: its header, and one for each row, of whose results there is one a seed."""
    yield [
        *("", "file, B", "smaller", "validation error, %", "test error, %", "more than float"),
        *("ms, one image", "ms, 16 images", "seconds of training"),
    ]
    floats = [each["test_error"] for each in results[FLOAT]]
    for row, runs in results.items():
        size, seconds = mean(each["file_bytes"] for each in runs), mean(seconds_of(runs))
        errors = [spread([each[f"{s}_error"] for each in runs]) for s in ("validation", "test")]
        start = [row, f"{size:,.0f}"]
        if row == FLOAT:
            yield [*start, "1", *errors, "", "", "", f"{seconds:.0f}"]
            continue
        smaller = mean(each["ratio"] for each in runs)
        pairs = zip(runs, floats, strict=True)
        more = spread([each["test_error"] - before for each, before in pairs], sign="+")
        times = (milliseconds(runs, batch) for batch in ("1", "16"))
        yield [*start, f"{smaller:.1f}", *errors, more, *times, f"{seconds:.0f}"]


def seconds_of(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [each["seconds"] or 0.0 for each in runs]


def spread(figures: Sequence[float], sign: str = "") -> str:
    deviation = f" ± {stdev(figures):.2f}" if len(figures) > 1 else ""
    return f"{mean(figures):{sign}.2f}{deviation}"


def milliseconds(runs: Sequence[Mapping[str, Any]], batch: str) -> str:
    before, after = (median(r[n][batch] for r in runs) for n in ("float_latency_ms", "latency_ms"))
    return f"{before:.2f} → {after:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--model", choices=SPARSITY, default="lenet300100")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("compressed"))
    parser.add_argument("--commands", action="store_true", help="print them, and run nothing")
    options = parser.parse_args(arguments)
    folder = options.out / f"{options.data}-{options.model}"
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for row, out, command in commands(options.model, options.data, seed, folder):
            if options.commands:
                print(shlex.join(["nncx", *command]))
            else:
                results.setdefault(row, []).append(result(out, command))
    if results:
        print(f"{options.data}, {options.model}, seeds {options.seeds}; {describe()}\n")
        print(markdown_table([*lines(results)], texts=1))


if __name__ == "__main__":
    main()
