"""A network that lost filters against the whole one: errors, sizes and times on real data.

    python benchmarks/filter_pruning.py --model run/model.safetensors --data fashion-mnist \
        --amounts '{"stage1.0": 0.5, "stage3": 0.5}' --epochs 3 --out small.safetensors

The network of `nncx train` is pruned and trained on with Adam, whose rate falls from 1e-3 to 1e-5;
the epoch is chosen by the error on the validation split. What is measured is the file, loaded
again. Times are CPU seconds of one thread, so that other programs matter less: the two networks
take turns, and a ratio is the median of those within a round. One line of JSON.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

import nncx
from nncx import data, train
from nncx._machine import describe
from nncx.compress import prune_filters

TIMED_BATCHES = (1, 64)
ROUNDS, WARM_UP = 15, 3


def train_on(model: nn.Module, splits: data.Splits, arguments: argparse.Namespace) -> None:
    images = data.subset(splits.train, arguments.train_images, seed=0)
    batches = data.loader(images, 64, shuffle=True, seed=arguments.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scheduler = ExponentialLR(optimizer, 0.01 ** (1 / max(arguments.epochs - 1, 1)))
    train.fit(
        model.train(),
        batches,
        epochs=arguments.epochs,
        optimizer=optimizer,
        scheduler=scheduler,
        validate=partial(train.error_rate, model, data.loader(splits.validation, 250)),
        keep_best=True,
        checkpoint=arguments.out.with_suffix(".checkpoint"),
    )


@torch.no_grad()
def times(whole: nn.Module, small: nn.Module, images: Tensor) -> dict[str, float]:
    """Milliseconds of a batch in both, and how many times the small one is faster."""
    rounds = []
    for _ in range(WARM_UP + ROUNDS):
        starts = [process_time()]
        for model in (whole, small):
            model(images)
            starts.append(process_time())
        rounds.append((starts[1] - starts[0], starts[2] - starts[1]))
    rounds = rounds[WARM_UP:]
    before, after = (1e3 * median(each) for each in zip(*rounds, strict=True))
    return {"whole": before, "small": after, "ratio": median(a / b for a, b in rounds)}


def measure(whole: nn.Module, small: nn.Module, splits: data.Splits) -> dict[str, Any]:
    images = torch.stack([splits.test[index][0] for index in range(TIMED_BATCHES[-1])])
    report = nncx.report(small, images[:1], baseline=whole, repeats=1)
    totals = {"whole": report.baseline.total, "small": report.total}
    return {
        "error": {
            split: {
                name: train.error_rate(model, data.loader(getattr(splits, split), 250))
                for name, model in (("whole", whole), ("small", small))
            }
            for split in ("validation", "test")
        },
        "macs": {name: total.macs for name, total in totals.items()},
        "parameters": {name: total.parameters for name, total in totals.items()},
        "ms": {batch: times(whole, small, images[:batch]) for batch in TIMED_BATCHES},
        "machine": describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--amounts", type=json.loads, required=True)
    parser.add_argument("--train-images", type=int, default=12_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    splits = data.load(arguments.data)
    whole = nncx.load(arguments.model)
    small = prune_filters(whole, splits.test[0][0].unsqueeze(0), arguments.amounts)
    train_on(small, splits, arguments)
    nncx.save(small, arguments.out)
    print(json.dumps(measure(whole, nncx.load(arguments.out), splits)))


if __name__ == "__main__":
    main()
