"""The native operations. docs/ops.md lists every schema; `torch.ops.nncx` holds the same ops."""

from nncx.ops.binary_conv2d import binary_conv2d, binary_conv2d_prepack
from nncx.ops.binary_conv2d_sign import binary_conv2d_sign
from nncx.ops.binary_linear import binary_linear, binary_linear_prepack
from nncx.ops.binary_linear_sign import binary_linear_sign
from nncx.ops.channel_shuffle import channel_shuffle
from nncx.ops.codebook_conv2d import codebook_conv2d, codebook_conv2d_prepack
from nncx.ops.codebook_linear import codebook_linear, codebook_linear_prepack
from nncx.ops.depthwise_conv2d import depthwise_conv2d
from nncx.ops.depthwise_separable_conv2d import depthwise_separable_conv2d
from nncx.ops.grouped_conv2d import grouped_conv2d
from nncx.ops.hashed_linear import hashed_linear
from nncx.ops.hashed_weight import hashed_bucket_sums, hashed_weight
from nncx.ops.int8_conv2d import int8_conv2d, int8_conv2d_prepack
from nncx.ops.int8_linear import int8_linear, int8_linear_prepack
from nncx.ops.max_pool2d_signs import max_pool2d_signs
from nncx.ops.pack_signs import pack_signs
from nncx.ops.quantize_int8 import quantize_int8
from nncx.ops.sign_int8 import sign_int8

__all__ = [
    "binary_conv2d",
    "binary_conv2d_prepack",
    "binary_conv2d_sign",
    "binary_linear",
    "binary_linear_prepack",
    "binary_linear_sign",
    "channel_shuffle",
    "codebook_conv2d",
    "codebook_conv2d_prepack",
    "codebook_linear",
    "codebook_linear_prepack",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "grouped_conv2d",
    "hashed_bucket_sums",
    "hashed_linear",
    "hashed_weight",
    "int8_conv2d",
    "int8_conv2d_prepack",
    "int8_linear",
    "int8_linear_prepack",
    "max_pool2d_signs",
    "pack_signs",
    "quantize_int8",
    "sign_int8",
]
