"""The native operations. docs/ops.md lists every schema; `torch.ops.nncx` holds the same ops."""

from nncx.ops.binary_conv2d import binary_conv2d, binary_conv2d_prepack
from nncx.ops.binary_conv2d_sign import binary_conv2d_sign
from nncx.ops.binary_linear import binary_linear, binary_linear_prepack
from nncx.ops.binary_linear_sign import binary_linear_sign
from nncx.ops.codebook_conv2d import codebook_conv2d, codebook_conv2d_prepack
from nncx.ops.codebook_linear import codebook_linear, codebook_linear_prepack
from nncx.ops.max_pool2d_signs import max_pool2d_signs
from nncx.ops.pack_signs import pack_signs

__all__ = [
    "binary_conv2d",
    "binary_conv2d_prepack",
    "binary_conv2d_sign",
    "binary_linear",
    "binary_linear_prepack",
    "binary_linear_sign",
    "max_pool2d_signs",
    "codebook_conv2d",
    "codebook_conv2d_prepack",
    "codebook_linear",
    "codebook_linear_prepack",
    "pack_signs",
]
