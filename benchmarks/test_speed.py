"""The same shapes and checks under pytest-benchmark, to compare our times from commit to commit.

Rivals are not timed here: only turns within one round (bench.py) make an honest ratio.
"""

import binary_conv2d
import binary_conv2d_sign
import binary_linear
import channel_shuffle
import codebook_conv2d
import codebook_linear
import depthwise_conv2d
import depthwise_separable_conv2d
import entropy
import grouped_conv2d
import hashed_linear
import int8_conv2d
import int8_linear
import max_pool2d_signs
import mobile_networks
import pack_signs
import pytest
import quantize_int8
import torch
import xnor_conv2d

from nncx._machine import describe

MODULES = (
    pack_signs,
    binary_linear,
    binary_conv2d,
    binary_conv2d_sign,
    max_pool2d_signs,
    codebook_linear,
    codebook_conv2d,
    hashed_linear,
    xnor_conv2d,
    quantize_int8,
    int8_linear,
    int8_conv2d,
    depthwise_conv2d,
    grouped_conv2d,
    depthwise_separable_conv2d,
    channel_shuffle,
    mobile_networks,
    entropy,
)
BENCHMARKS = [module.BENCHMARK for module in MODULES]


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        pytest.param(op, shape, id=f"{op.name}  {shape}")
        for op in BENCHMARKS
        for shape in op.shapes["cpu"]
    ],
)
def test_speed(benchmark, op, shape) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        case = op.prepare(shape)
        case.check()
        benchmark.group = op.name
        benchmark.extra_info.update(machine=describe(), work=case.work, unit=op.unit)
        benchmark(case.ours)
