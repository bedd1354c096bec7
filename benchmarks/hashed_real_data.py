"""HashedNets against dense networks of as many parameters, on real data.

    python hashed_real_data.py --data mnist --compression 0.015625 --seeds 0 1

The network of the paper, 784-1000-10 with ReLU, hashed to a share of its parameters, and a dense
one of fewer hidden units that has as many. An epoch is chosen by the error on the validation split;
an error on the test split is that of the file, frozen and loaded again. One line of JSON a run.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nncx

HIDDEN = 1000
KINDS = ("hashed", "dense")


def network(kind: str, compression: float, dropout: float, pixels: int, seed: int) -> nn.Module:
    """With as many parameters, whatever the kind."""
    torch.manual_seed(seed)
    hashed = nncx.convert(_dense(HIDDEN, dropout, pixels), nncx.Hashed(compression, seed))
    if kind == "hashed":
        return hashed
    return _dense(round((_parameters(hashed) - 10) / (pixels + 11)), dropout, pixels)


def _dense(hidden: int, dropout: float, pixels: int) -> nn.Sequential:
    layers = nn.Linear(pixels, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run(splits: nncx.data.Splits, epochs: int, seed: int, **settings: Any) -> dict[str, Any]:
    """Trains one network; what the line says of it."""
    start = time.monotonic()
    model = network(pixels=splits.train[0][0].numel(), seed=seed, **settings)
    parameters = _parameters(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    validation, test = (
        nncx.data.loader(split, batch_size=500) for split in (splits.validation, splits.test)
    )
    history = nncx.train.fit(
        model,
        nncx.data.loader(splits.train, batch_size=200, shuffle=True, seed=seed),
        epochs=epochs,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / epochs)),
        validate=lambda: nncx.train.error_rate(model, validation),
        keep_best=True,
        progress=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        if settings["kind"] == "hashed":
            nncx.freeze(model)
        nncx.save(model, path)
        return settings | {
            "seed": seed,
            "validation": min(each["validation"] for each in history),
            "test": nncx.train.error_rate(nncx.load(path), test),
            "parameters": parameters,
            "file": path.stat().st_size,
            "seconds": round(time.monotonic() - start),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--compression", type=float, default=1 / 8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    splits = nncx.data.load(arguments.data)
    for seed in arguments.seeds:
        for kind in KINDS:
            settings = {"compression": arguments.compression, "dropout": arguments.dropout}
            line = run(splits, arguments.epochs, seed, kind=kind, **settings)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
