"""binary_conv2d_sign, bits in and bits out, against torch's convolution, BatchNorm and sign.

That is what stands between two sets of packed signs in a binary network. The rivals compute it in
float32, in one of torch's two layouts, and give signs as floats. The limits are those of
binary_conv2d.py.
"""

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from binary_conv2d import BINARY_LIMITS, SHAPES, ConvShape

from nncx import ops
from nncx.ops.binary_conv2d_sign import binary_conv2d_sign_reference


def prepare(shape: ConvShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    w = torch.randn(shape.o, shape.c, shape.k, shape.k)
    packed, signs = ops.pack_signs(x), ops.pack_signs(w)
    weight = ops.binary_conv2d_prepack(signs, shape.c)
    threshold = torch.randint(-20, 20, (shape.o,), dtype=torch.int32)
    flip = torch.rand(shape.o) > 0.5
    geometry = (shape.c, shape.o, shape.k, shape.stride, shape.padding)
    mean, var, gamma, beta = torch.randn(4, shape.o).abs()

    def rival(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, w, None, shape.stride, shape.padding)
        return F.batch_norm(y, mean, var, gamma, beta).sign_()

    x_nhwc, w_nhwc = (t.to(memory_format=torch.channels_last) for t in (x, w))
    arguments = (threshold, flip, *geometry)
    return Case(
        ours=lambda: ops.binary_conv2d_sign(packed, weight, *arguments),
        rivals={"nchw": lambda: rival(x, w), "nhwc": lambda: rival(x_nhwc, w_nhwc)},
        reference=lambda: binary_conv2d_sign_reference(packed, signs, *arguments),
        work=shape.macs,
    )


BENCHMARK = Benchmark(
    "binary_conv2d_sign", "GMAC/s", "torch float32", SHAPES, prepare, limits=BINARY_LIMITS
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
