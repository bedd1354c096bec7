"""For which shapes does a layer of few bits pay? Frozen, from floats to floats, against torch's.

One table a layer: rows are sizes of the input, columns channels or features. A cell is how many
times faster our layer is than torch's float32 layer in its faster memory format; below 1 it is
slower. Packing, epilogue and the call itself are included. No input is negative, as after a ReLU,
so that symmetric int8 has codes from 0 to 127. docs/break-even.md discusses the tables.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from statistics import median

import torch
from bench import take_turns
from cpu import Cpu
from torch import Tensor, nn

import nncx
from nncx import _C
from nncx._machine import describe

CHANNELS = (8, 16, 32, 64, 128, 256, 512)
SIZES = (7, 14, 28, 56)
FEATURES = (64, 256, 1024, 4096)
ROWS = (1, 16, 256)
CONVS = {
    "nncx.XNORConv2d": nncx.XNORConv2d,
    "nncx.BinaryConnectConv2d": nncx.BinaryConnectConv2d,
    "nncx.Int8Conv2d, symmetric=True": partial(nncx.Int8Conv2d, symmetric=True),
    "nncx.Int8Conv2d": nncx.Int8Conv2d,
}
LINEARS = {
    "nncx.XNORLinear": nncx.XNORLinear,
    "nncx.BinaryConnectLinear": nncx.BinaryConnectLinear,
    "nncx.Int8Linear, symmetric=True": partial(nncx.Int8Linear, symmetric=True),
    "nncx.Int8Linear": nncx.Int8Linear,
}


def frozen(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nncx.Int8Conv2d | nncx.Int8Linear):
        layer.set_input_range(0, 1)  # of torch.rand
    return nncx.freeze(nn.Sequential(layer))[0]


def ratio(ours: nn.Module, theirs: nn.Module, x: Tensor, rounds: int) -> float:
    """Torch's time over ours, both in their faster memory format."""
    contenders: dict[str, Callable[[], Tensor]] = {}
    formats = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (None,)
    for strides in formats:
        inputs, rival = x, theirs
        if strides is not None:
            inputs = x.to(memory_format=strides)
            rival = deepcopy(theirs).to(memory_format=strides)
        contenders[f"ours {strides}"] = lambda inputs=inputs: ours(inputs)
        contenders[f"torch {strides}"] = lambda inputs=inputs, rival=rival: rival(inputs)
    seconds = take_turns(contenders, rounds, Cpu(_C.isa(), torch.get_num_threads()))

    def fastest(name: str) -> list[float]:
        """Of each round, the time in the memory format that suits the layer."""
        times = (seconds[contender] for contender in seconds if contender.startswith(name))
        return [min(round) for round in zip(*times, strict=True)]

    return median(t / o for t, o in zip(fastest("torch"), fastest("ours"), strict=True))


def conv_table(name: str, kernel: int, rounds: int) -> list[list[str]]:
    header = [f"{kernel} x {kernel}, images", *(f"{c} ch." for c in CHANNELS)]
    rows = {size: [f"{size} x {size}"] for size in SIZES}
    for size, c in product(SIZES, CHANNELS):
        arguments = (c, c, kernel, 1, kernel // 2)
        ours, theirs = frozen(CONVS[name](*arguments)), nn.Conv2d(*arguments).eval()
        rows[size].append(_digits(ratio(ours, theirs, torch.rand(1, c, size, size), rounds)))
    return [header, *rows.values()]


def linear_table(name: str, rounds: int) -> list[list[str]]:
    header = ["rows", *(f"{f} features" for f in FEATURES)]
    rows = {m: [str(m)] for m in ROWS}
    for m, features in product(ROWS, FEATURES):
        ours, theirs = frozen(LINEARS[name](features, features)), nn.Linear(features, features)
        rows[m].append(_digits(ratio(ours, theirs, torch.rand(m, features), rounds)))
    return [header, *rows.values()]


def _with(text: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if text.lower() in name.lower()]


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _print(title: str, table: Sequence[Sequence[str]]) -> None:
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    print(f"\n{title}\n")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times layers of all sizes against torch.")
    parser.add_argument("--only", default="", help="tables whose layer has this in its name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=nncx._C.supported_isas(), default=nncx._C.isa())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    nncx._C.set_isa(options.isa)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{describe()}; median of {options.rounds} rounds, batch 1")
    with torch.inference_mode():
        for name, kernel in product(_with(options.only, CONVS), (3, 1)):
            _print(f"`{name}`", conv_table(name, kernel, options.rounds))
        for name in _with(options.only, LINEARS):
            _print(f"`{name}`", linear_table(name, options.rounds))


if __name__ == "__main__":
    main()
