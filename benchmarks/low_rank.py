"""Low-rank expansions against the convolution that they stand for, both on torch's kernels.

A row is a layer, a batch and a memory layout; a column a scheme and by how many times it takes
fewer multiplications. A cell is the median of the ratios within a round (bench.py), above 1 where
the expansion is faster. Time follows multiplications only roughly.

    python benchmarks/low_rank.py [--threads N] [--rounds N] [--markdown FILE]

With a network of `nncx train`, instead, what becomes of it when one layer is expanded: errors of
the layer's output and of the network by the weights alone, after data reconstruction and after
training on, and times of that layer on what it gets from images.

    python benchmarks/low_rank.py --model run/model.safetensors --data fashion-mnist --layer conv2
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from bench import ROUNDS, take_turns
from cpu import Cpu
from torch import Tensor, nn

import nncx
from nncx import _C, LowRank, compress, convert, data, train
from nncx._machine import describe

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SPEEDUPS = (2.0, 3.0, 4.0)
EVALUATION_BATCH = 256
RECONSTRUCTION_IMAGES, RECONSTRUCTION_BATCH = 1024, 64


class Shape(NamedTuple):
    inputs: int
    outputs: int
    kernel: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.inputs} to {self.outputs}, {self.kernel}x{self.kernel}, {self.size}x{self.size}"
        )

    def layer(self) -> nn.Conv2d:
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, padding=self.kernel // 2)


SHAPES = (
    Shape(20, 50, 5, 12),  # LeNet-5, padded
    Shape(32, 64, 5, 14),  # LeNet-4
    Shape(96, 192, 5, 16),  # NiN
    Shape(64, 64, 3, 28),
    Shape(64, 64, 7, 28),
    Shape(3, 64, 7, 112),  # the first of a ResNet, but for its stride
)


def expanded(layer: nn.Module, scheme: int, speedup: float) -> nn.Module | None:
    """None where no rank is that fast."""
    method = LowRank(scheme, speedup=speedup)
    return method.replace(layer).eval() if method.replaces(layer) else None


def seconds(
    layers: Sequence[nn.Module], inputs: Sequence[Tensor], rounds: int, device: Cpu
) -> list[list[float]]:
    """Of a call of each layer with its input, by layer and round, in turns."""
    contenders: dict[str, Callable[[], object]] = {
        str(at): lambda layer=layer, x=x: layer(x)
        for at, (layer, x) in enumerate(zip(layers, inputs, strict=True))
    }
    with torch.inference_mode():
        return list(take_turns(contenders, rounds, device).values())


def median_ratio(before: Sequence[float], after: Sequence[float]) -> float:
    return median(b / a for b, a in zip(before, after, strict=True))


def shape_rows(rounds: int, device: Cpu) -> Iterator[list[str]]:
    columns = [(scheme, speedup) for scheme in (2, 1) for speedup in SPEEDUPS]
    yield ["layer", "batch", "layout", "torch, ms"] + [
        f"scheme {scheme}, {speedup:g}x fewer" for scheme, speedup in columns
    ]
    for shape in SHAPES:
        torch.manual_seed(0)
        layer = shape.layer().eval()
        expansions = [expanded(layer, *column) for column in columns]
        for batch in (1, 16):
            for layout, memory_format in FORMATS.items():
                x = torch.randn(batch, shape.inputs, shape.size, shape.size)
                made = [each for each in (layer, *expansions) if each is not None]
                made = [each.to(memory_format=memory_format) for each in made]
                x = x.to(memory_format=memory_format)
                times = seconds(made, [x] * len(made), rounds, device)
                ratios = iter(f"{median_ratio(times[0], each):.2f}x" for each in times[1:])
                yield [str(shape), str(batch), layout, f"{1e3 * median(times[0]):.3f}"] + [
                    "-" if each is None else next(ratios) for each in expansions
                ]


def network_rows(options: argparse.Namespace, device: Cpu) -> Iterator[list[str]]:
    splits = data.load(options.data)
    original = nncx.load(options.model)
    layer = original.get_submodule(options.layer)
    validation, test = (data.loader(s, EVALUATION_BATCH) for s in (splits.validation, splits.test))
    drawn = data.subset(splits.train, RECONSTRUCTION_IMAGES, options.seed)
    images = [inputs for inputs, _ in data.loader(drawn, RECONSTRUCTION_BATCH)]
    columns = ("network", "rank", "MACs", "error of the layer's output", "validation error")
    yield [*columns, "test error", "seconds"]
    cost = f"{macs(layer, original, images[0]):,}"
    yield ["float", "", cost, "", *errors(original, validation, test)]
    for speedup in options.speedup:
        model = copy.deepcopy(original)
        method = LowRank(options.scheme, speedup=speedup)
        convert(model, method, skip=lambda name, _: name != options.layer)
        expansion = model.get_submodule(options.layer)
        cost = f"{macs(expansion, model, images[0]):,}"
        by_weights = errors(model, validation, test)
        start = perf_counter()
        (row,) = compress.reconstruct(model, original, images).layers
        taken = perf_counter() - start
        name = f"scheme {options.scheme}, {speedup:g}x fewer"
        yield [name, str(row.rank), cost, f"{row.before:.2%}", *by_weights, ""]
        by_data = errors(model, validation, test)
        yield ["+ data", "", "", f"{row.after:.2%}", *by_data, f"{taken:.0f}"]
        if options.epochs:
            start = perf_counter()
            tune(model, splits.train, options)
            taken = perf_counter() - start
            yield ["+ training", "", "", "", *errors(model, validation, test), f"{taken:.0f}"]
        yield [
            f"speed-up of {options.layer}",
            *speed(layer, expansion, original, images, options, device),
        ]


def macs(layer: nn.Module, model: nn.Module, images: Tensor) -> int:
    """Of one image."""
    x = layer_input(layer, model, images[:1])
    return nncx.report(nn.Sequential(layer), x, repeats=1).total.macs


def layer_input(layer: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    return seen[0]


def errors(model: nn.Module, *loaders: data.Loader) -> list[str]:
    with torch.no_grad():
        return [f"{train.error_rate(model, loader):.2f} %" for loader in loaders]


def tune(model: nn.Module, split: object, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    batches = data.loader(split, 128, shuffle=True, seed=options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    train.fit(model.train(), batches, epochs=options.epochs, optimizer=optimizer)
    model.eval()


def speed(
    layer: nn.Module,
    expansion: nn.Module,
    model: nn.Module,
    images: Sequence[Tensor],
    options: argparse.Namespace,
    device: Cpu,
) -> Iterator[str]:
    """The fastest layout of each side."""
    made = [
        copy.deepcopy(each).to(memory_format=memory_format)
        for each in (layer, expansion)
        for memory_format in FORMATS.values()
    ]
    for batch in (1, 16):
        x = layer_input(layer, model, images[0][:batch])
        inputs = [x.to(memory_format=each) for each in FORMATS.values()] * 2
        times = seconds(made, inputs, options.rounds, device)
        before, after = (min(side, key=median) for side in (times[:2], times[2:]))
        yield (
            f"batch {batch}: {1e3 * median(before):.3f} -> {1e3 * median(after):.3f} ms,"
            f" {median_ratio(before, after):.2f}x"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the table to it")
    parser.add_argument("--model", metavar="FILE", help="of nncx.save")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--layer", default="conv2")
    parser.add_argument("--scheme", type=int, default=2)
    parser.add_argument("--speedup", type=float, nargs="+", default=[3.0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = Cpu(_C.isa(), options.threads)
    with device.active():
        head = f"{describe()}; median of {options.rounds} rounds"
        print(head, flush=True)
        rows = (
            network_rows(options, device) if options.model else shape_rows(options.rounds, device)
        )
        told = []
        for row in rows:
            print(" | ".join(row), flush=True)  # at once, for a run that is stopped
            told.append(row)
    if options.markdown:
        with options.markdown.open("a") as file:
            file.write(f"{head}\n\n{as_markdown(told)}\n\n")


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its header."""
    columns = len(rows[0])
    padded = [[*row, *[""] * (columns - len(row))] for row in rows]
    header, *others = (f"| {' | '.join(row)} |" for row in padded)
    return "\n".join([header, f"|{'---|' * columns}", *others])


if __name__ == "__main__":
    main()
