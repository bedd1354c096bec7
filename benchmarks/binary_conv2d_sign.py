"""binary_conv2d_sign, bits in and bits out, against torch's convolution, BatchNorm and sign.

That is what stands between two sets of packed signs in a binary network. The rivals compute it in
floats and give signs as floats; on a GPU there are also the convolutions alone. The limits are
those of binary_conv2d.py.
"""

from collections.abc import Callable

import rivals
import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from binary_conv2d import BINARY_LIMITS, RESNET_1X1, RESNET_3X3, ConvShape
from binary_conv2d import SHAPES as CONV_SHAPES

from nncx import ops
from nncx.ops.binary_conv2d_sign import binary_conv2d_sign_reference

SHAPES = {"cpu": CONV_SHAPES["cpu"], "cuda": (*RESNET_3X3, *RESNET_1X1[::2])}


def prepare(shape: ConvShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    w = torch.randn(shape.o, shape.c, shape.k, shape.k)
    packed, signs = ops.pack_signs(x), ops.pack_signs(w)
    weight = ops.binary_conv2d_prepack(signs, shape.c)
    threshold = torch.randint(-20, 20, (shape.o,), dtype=torch.int32)
    flip = torch.rand(shape.o) > 0.5
    geometry = (shape.c, shape.o, shape.k, shape.stride, shape.padding)
    mean, var, gamma, beta = torch.randn(4, shape.o).abs()

    def to_signs(convolve: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: F.batch_norm(convolve(), mean, var, gamma, beta).sign_()

    convolutions = rivals.conv2d(x, w, None, shape.stride, shape.padding)
    chains = {name: to_signs(run) for name, run in convolutions.items()}
    if x.is_cuda:
        chains = {"float16 to signs:F.conv2d": chains["float16:F.conv2d"], **convolutions}
    arguments = (threshold, flip, *geometry)
    return Case(
        ours=lambda: ops.binary_conv2d_sign(packed, weight, *arguments),
        rivals=chains,
        reference=lambda: binary_conv2d_sign_reference(packed, signs, *arguments),
        work=shape.macs,
        reads=(packed, signs, threshold, flip),
    )


BENCHMARK = Benchmark(
    "binary_conv2d_sign", "GMAC/s", "torch float32", SHAPES, prepare, BINARY_LIMITS, peak="b1"
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
