"""What `nncx.train.fit` adds to forward, backward and step, written out.

Both train copies of one network, on the same batches in memory, with SGD and momentum, an epoch in
turns; the order reverses from round to round. A call of fit is one epoch, with all that it does
before and after the batches. The ratio is the median of the ratios within a round. Both end with
the same weights, to the bit, or no time is printed.

    python benchmarks/train_loop.py [--threads N] [--rounds N] [--markdown FILE]
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from nncx import _machine, models, train

BATCHES = 20
Batches = list[tuple[Tensor, Tensor]]

# Name, network, images of a batch, their size.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "LeNet-5": (models.LeNet5, 16, 28),
    "ResNet-8, half as wide": (lambda: models.ResNet(8, in_channels=1, width=8), 16, 28),
    "LeNet-300-100": (models.LeNet300100, 128, 28),
}


class Contender:
    """A copy of the network, its optimizer, and how long its epochs took."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.seconds: list[float] = []

    def epoch(self, batches: Batches) -> None:
        start = perf_counter()
        self._epoch(batches)
        self.seconds.append(perf_counter() - start)


class Bare(Contender):
    def _epoch(self, batches: Batches) -> None:
        self.model.train()
        criterion = nn.CrossEntropyLoss()
        for inputs, targets in batches:
            loss = criterion(self.model(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Fit(Contender):
    def _epoch(self, batches: Batches) -> None:
        train.fit(self.model, batches, epochs=1, optimizer=self.optimizer, progress=False)


class FitWithFiles(Contender):
    """Also with a checkpoint and a log."""

    def _epoch(self, batches: Batches) -> None:
        with tempfile.TemporaryDirectory() as folder:
            train.fit(
                self.model,
                batches,
                epochs=1,
                optimizer=self.optimizer,
                checkpoint=Path(folder) / "run",
                log=folder,
                progress=False,
            )


def measure(name: str, rounds: int) -> list[str]:
    """The cells of a row."""
    make, count, size = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    batches = [
        (torch.randn(count, 1, size, size), torch.randint(10, (count,))) for _ in range(BATCHES)
    ]
    contenders = bare, *fits = [kind(model) for kind in (Bare, Fit, FitWithFiles)]
    for i in range(rounds + 1):  # the first warms up
        for contender in contenders[:: 1 - 2 * (i % 2)]:
            contender.epoch(batches)
    for fit in fits:
        for ours, theirs in zip(fit.model.parameters(), bare.model.parameters(), strict=True):
            if not torch.equal(ours, theirs):
                raise AssertionError(f"{name}: fit and the bare loop must give the same weights")
    milliseconds = 1e3 * median(bare.seconds[1:]) / BATCHES
    rounds_of = [zip(fit.seconds[1:], bare.seconds[1:], strict=True) for fit in fits]
    percent = 100 * (median(ours / theirs for ours, theirs in rounds_of[0]) - 1)
    files = 1e3 * median(ours - theirs for ours, theirs in rounds_of[1])
    shape = f"{name}, {count} x {size} x {size}"
    return [shape, f"{milliseconds:.2f} ms", f"{percent:+.1f} %", f"{files:+.1f} ms an epoch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--markdown", type=Path, help="append a section to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        ["network, batch", "bare, a batch", "fit", "fit with checkpoint and log"],
        ["---", "---:", "---:", "---:"],
        *(measure(name, arguments.rounds) for name in NETWORKS),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machine = f"{_machine.describe()}; median of {arguments.rounds} epochs of {BATCHES} batches"
    print(f"{machine}\n\n{table}")
    if arguments.markdown is not None:
        with arguments.markdown.open("a") as file:
            file.write(f"\n## The training loop\n\n{machine}\n\n{table}\n")


if __name__ == "__main__":
    main()
