"""Whole networks after `nncx.convert(model, nncx.Mobile())` against the same ones in torch.

Images of 224 x 224, in evaluation: BatchNorm is folded in ours, as convert does; torch runs the
model as it was. Both layouts of torch are rivals; ours has the one that the line says. On a CPU it
is one image in float32, on a GPU also a batch, in float16.
"""

import copy
from typing import NamedTuple

import torch
from bench import Benchmark, Case, main
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nncx
from nncx.models import MobileNet, ShuffleNet, ShuffleNetV2

NETWORKS = {
    "MobileNet": MobileNet,
    "ShuffleNet": ShuffleNet,  # of 3 groups
    "ShuffleNetV2": ShuffleNetV2,
}


class NetworkShape(NamedTuple):
    network: str
    layout: str
    n: int = 1
    size: int = 224
    dtype: str = "float32"

    def __str__(self) -> str:
        dtype = f" {self.dtype}" if self.dtype != "float32" else ""
        return f"{self.network} n={self.n} hw={self.size} {self.layout}{dtype}"


SHAPES = {
    "cpu": tuple(NetworkShape(name, layout) for name in NETWORKS for layout in ("nchw", "nhwc")),
    "cuda": tuple(
        NetworkShape(name, "nhwc", n, dtype="float16") for name in NETWORKS for n in (1, 128)
    ),
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def prepare(shape: NetworkShape) -> Case:
    model = NETWORKS[shape.network]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a trained network has them
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    dtype = getattr(torch, shape.dtype)
    x = torch.randn(shape.n, 3, shape.size, shape.size).to(dtype)
    ours = nncx.convert(copy.deepcopy(model), nncx.Mobile())
    ours = ours.to(dtype).to(memory_format=FORMATS[shape.layout])
    images = {name: x.contiguous(memory_format=f) for name, f in FORMATS.items()}
    models = {
        name: copy.deepcopy(model).to(dtype).to(memory_format=f) for name, f in FORMATS.items()
    }
    return Case(
        ours=lambda: ours(images[shape.layout]),
        rivals={name: lambda name=name: models[name](images[name]) for name in FORMATS},
        reference=lambda: model(x.float()).to(dtype),
        work=macs(model, x.float()),
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,  # some tens of layers round to 11 bits
        reads=(x, *ours.parameters()),
    )


BENCHMARK = Benchmark(
    "mobile_networks",
    "GMAC/s",
    "torch",
    SHAPES,
    prepare,
    {"avx2": 1, "avx512": 1},
    peak="float16",
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
