"""Whole networks after `nncx.convert(model, nncx.Mobile())` against the same ones in torch.

Float32, one image of 224 x 224, in evaluation: BatchNorm is folded in ours, as convert does; torch
runs the model as it was. Both layouts of torch are rivals; ours has the one that the line says.
"""

import copy
from typing import NamedTuple

import torch
from bench import Benchmark, Case, main
from torch import nn

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
    size: int = 224

    def __str__(self) -> str:
        return f"{self.network} n=1 hw={self.size} {self.layout}"


SHAPES = {
    "cpu": tuple(NetworkShape(name, layout) for name in NETWORKS for layout in ("nchw", "nhwc"))
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def prepare(shape: NetworkShape) -> Case:
    model = NETWORKS[shape.network]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a trained network has them
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, shape.size, shape.size)
    ours = nncx.convert(copy.deepcopy(model), nncx.Mobile())
    ours = ours.to(memory_format=FORMATS[shape.layout])
    images = {name: x.contiguous(memory_format=f) for name, f in FORMATS.items()}
    models = {name: copy.deepcopy(model).to(memory_format=f) for name, f in FORMATS.items()}
    return Case(
        ours=lambda: ours(images[shape.layout]),
        rivals={name: lambda name=name: models[name](images[name]) for name in FORMATS},
        reference=lambda: model(x),
        work=nncx.report(model, x, repeats=1).total.macs,
        tolerance=1e-4,
        reads=(x, *model.parameters()),
    )


BENCHMARK = Benchmark(
    "mobile_networks", "GMAC/s", "torch float32", SHAPES, prepare, {"avx2": 1, "avx512": 1}
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
