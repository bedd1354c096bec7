"""int8_conv2d, int8 in and float or int8 out, against torch's float and quantized convolutions.

Activations are channels_last for ours and the quantized rivals. They are "symmetric", with zero
point 0 and never negative (as after a ReLU), or "affine", all 256 codes with the zero point -128;
avx2 has a faster kernel for the former. The quantized rivals, on CPUs, give quint8 with the same
arithmetic.

ONEDNN_MAX_CPU_ISA=AVX2 shows the rivals as they are on a CPU without VNNI, on one that has it:
oneDNN obeys, and the engine fbgemm, which has no such switch, is left out.
"""

from dataclasses import dataclass

import rivals
import torch
from bench import Benchmark, Case, main
from binary_conv2d import RESNET_1X1, RESNET_3X3, STAGES, ConvShape
from int8 import (
    ANY_SIGN,
    LOWEST,
    NON_NEGATIVE,
    by_engine,
    quantized,
    quantized_input,
    weights,
    with_kinds,
)

from nncx import ops
from nncx.ops.int8_conv2d import int8_conv2d_reference


@dataclass(frozen=True)
class Int8ConvShape:
    conv: ConvShape
    activations: str = "symmetric"
    out: str = "float32"

    def __str__(self) -> str:
        return f"{self.conv} {self.activations} to {self.out}"


RESNET18 = tuple(ConvShape(1, c, c, hw, 3) for c, hw in STAGES)
MOBILENET = tuple(
    ConvShape(1, c, o, hw, 1)
    for c, o, hw in (
        *((32, 64, 112), (64, 128, 56), (128, 128, 56), (256, 256, 28), (512, 512, 14)),
        (1024, 1024, 7),
    )
)
DEPTHWISE = tuple(
    ConvShape(1, c, c, hw, 3, stride, groups=c)
    for c, hw, stride in zip(
        (32, 64, 128, 256, 512, 1024), (112, 112, 56, 28, 14, 7), (1, 2, 1, 1, 1, 1), strict=True
    )
)
STEM = ConvShape(1, 3, 64, 224, 7, 2)
SHAPES = {
    "cpu": (
        *(
            Int8ConvShape(conv, activations, out)
            for activations in LOWEST
            for out in ("float32", "int8")
            for conv in (*RESNET18, *MOBILENET, STEM)
        ),
        *(Int8ConvShape(conv, "affine", "int8") for conv in DEPTHWISE),
    ),
    "cuda": (
        *(Int8ConvShape(conv, "affine", "int8") for conv in (*RESNET_3X3, *RESNET_1X1)),
        *(Int8ConvShape(conv, "affine", "float16") for conv in RESNET_3X3[:4]),
        Int8ConvShape(ConvShape(128, 3, 64, 224, 7, 2), "affine", "int8"),
    ),
}


def prepare(shape: Int8ConvShape) -> Case:
    conv, zero_point = shape.conv, LOWEST[shape.activations]
    codes, w_scale = weights(conv.o, conv.c // conv.groups, conv.k, conv.k)
    x = torch.randint(zero_point, 128, (conv.n, conv.c, conv.hw, conv.hw)).to(torch.int8)
    x = x.contiguous(memory_format=torch.channels_last)
    x_scale, out_scale, bias = 0.01, 0.1, torch.randn(conv.o)
    geometry = (conv.c, conv.o, conv.k, conv.stride, conv.padding, 1, conv.groups)
    epilogue = {
        "input_zero_point": torch.tensor(zero_point, dtype=torch.int8),
        "scale": w_scale * x_scale,
        "bias": bias,
    }
    if shape.out == "int8":
        epilogue["out_scale"] = torch.tensor(out_scale)
        epilogue["out_zero_point"] = torch.tensor(0, dtype=torch.int8)
    else:
        epilogue["out_dtype"] = getattr(torch, shape.out)
    prepacked = ops.int8_conv2d_prepack(codes, conv.groups)

    float_x = (x.float() - zero_point) * x_scale
    float_w = codes.float() * w_scale.view(-1, 1, 1, 1)

    def prepack():
        geometry = [conv.stride] * 2, [conv.padding] * 2, [1, 1], conv.groups
        packed = torch.ops.quantized.conv2d_prepack(quantized(codes, w_scale), bias, *geometry)
        quantized_x = quantized_input(x, x_scale, zero_point)
        return lambda: torch.ops.quantized.conv2d(quantized_x, packed, out_scale, 128)

    return Case(
        ours=lambda: ops.int8_conv2d(x, prepacked, *geometry, **epilogue),
        rivals={
            **with_kinds(
                rivals.conv2d(float_x, float_w, bias, conv.stride, conv.padding, conv.groups)
            ),
            **({} if x.is_cuda else by_engine(prepack)),
        },
        reference=lambda: int8_conv2d_reference(x, codes, *geometry, **epilogue),
        work=conv.macs,
        reads=(x, codes, w_scale, bias),
        limits=NON_NEGATIVE if shape.activations == "symmetric" else ANY_SIGN,
    )


BENCHMARK = Benchmark("int8_conv2d", "GMAC/s", "torch", SHAPES, prepare, peak="int8")

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
