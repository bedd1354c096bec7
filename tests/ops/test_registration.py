"""What torch needs of every op: fakes, refusals, FLOPs, gradients. One sample list for all."""

from collections.abc import Callable, Iterable

import pytest
import torch
from places import CPU_PATHS, EMULATED, GPU, at
from samples import (
    NNCX,
    byte,
    channel_shuffle,
    codebook_conv,
    codebook_linear,
    conv,
    conv_sign,
    depthwise_conv,
    every_sample,
    grouped_conv,
    hashed_linear,
    int8,
    int8_conv,
    int8_linear,
    int8_residual,
    linear,
    linear_sign,
    pool,
    quantize,
    samples,
    separable_conv,
    to_int8,
)
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from nncx import _C, ops


@every_sample
@pytest.mark.parametrize("place", [*CPU_PATHS, *GPU])
def test_opcheck(place: str, index: int) -> None:
    on_cpu = place in CPU_PATHS
    with at(place if on_cpu else _C.isa()):
        with torch.device("cpu" if on_cpu else place):
            sample = samples()[index]
        torch.library.opcheck(sample.op.default, sample.args, sample.kwargs)


REFUSED = {
    "pack 3-D": (NNCX.pack_signs, (torch.ones(2, 3, 4), 1)),
    "pack groups 0": (NNCX.pack_signs, (torch.ones(2, 4, 3, 3), 0)),
    "pack groups of rows": (NNCX.pack_signs, (torch.ones(2, 4), 2)),
    "pack groups not dividing": (NNCX.pack_signs, (torch.ones(2, 4, 3, 3), 3)),
    "pack integers": (NNCX.pack_signs, (torch.ones(2, 4, dtype=torch.int32), 1)),
    "conv prepack 4-D": (NNCX.binary_conv2d_prepack, (byte(4, 3, 3, 8), 6, 1)),
    "conv prepack float": (NNCX.binary_conv2d_prepack, (torch.ones(4, 3, 3, 1, 8), 6, 1)),
    "conv prepack groups": (NNCX.binary_conv2d_prepack, (byte(4, 3, 3, 1, 8), 6, 3)),
    "conv prepack bytes": (NNCX.binary_conv2d_prepack, (byte(4, 3, 3, 1, 8), 65, 1)),
    "linear prepack 1-D": (NNCX.binary_linear_prepack, (byte(8), 3)),
    "linear prepack bytes": (NNCX.binary_linear_prepack, (byte(4, 8), 65)),
    "linear prepack negative": (NNCX.binary_linear_prepack, (byte(4, 8), -1)),
    "conv input float": conv({"input": torch.ones(1, 4, 4, 2, 8)}),
    "conv input 4-D": conv({"input": byte(4, 4, 2, 8)}),
    "conv input groups": conv({"input": byte(1, 4, 4, 1, 8)}),
    "conv input bytes": conv({"input": byte(1, 4, 4, 2, 16)}),
    "conv weight not prepacked": conv({"weight": byte(4, 3, 3, 1, 8)}),
    "conv weight float": conv({"weight": torch.ones(100)}),
    "conv groups 0": conv({"groups": 0}),
    "conv groups not dividing": conv({"in_channels": 5}),
    "conv kernel 0": conv({"kernel_size": [0, 3]}),
    "conv stride 0": conv({"stride": [1, 0]}),
    "conv padding negative": conv({"padding": [-1, 0]}),
    "conv dilation 0": conv({"dilation": [0, 1]}),
    "conv kernel larger than input": conv({"kernel_size": [3, 5]}),
    "conv dilated kernel larger": conv({"dilation": [2, 2]}),
    "conv too much padding": conv({"padding": [2**30, 2**30], "stride": [2**30, 2**30]}),
    "conv padding that overflows": conv({"padding": [2**31 - 1] * 2, "stride": [2**31 - 1] * 2}),
    "conv stride beyond int32": conv({"stride": [2**40, 1]}),
    "conv kernel of three": conv({"kernel_size": [3, 3, 3]}),
    "conv stride of one": conv({"stride": [1]}),
    "conv too many terms": conv({"kernel_size": [40_000, 40_000], "padding": [20_000, 20_000]}),
    "conv channels that overflow": conv({"in_channels": 2**62, "kernel_size": [2, 2]}),
    "conv outputs that overflow": conv({"out_channels": 2**62}),
    "conv input_scale permuted": conv({"input_scale": torch.ones(1, 2, 2, 2).flatten(2)}),
    "conv pad_value 2": conv({"pad_value": 2}),
    "conv scale size": conv({"scale": torch.ones(5)}),
    "conv scale dtype": conv({"scale": torch.ones(4, dtype=torch.float64)}),
    "conv bias size": conv({"bias": torch.ones(1)}),
    "conv input_scale size": conv({"input_scale": torch.ones(1, 1, 2, 2)}),
    "conv out_dtype": conv({"out_dtype": torch.int32}),
    "conv sign threshold float": conv_sign({"threshold": torch.zeros(4)}),
    "conv sign threshold size": conv_sign({"threshold": torch.zeros(5, dtype=torch.int32)}),
    "conv sign flip uint8": conv_sign({"flip": byte(4)}),
    "conv sign flip size": conv_sign({"flip": torch.zeros(1, dtype=torch.bool)}),
    "conv sign out_groups 0": conv_sign({"out_groups": 0}),
    "conv sign out_groups not dividing": conv_sign({"out_groups": 3}),
    "conv sign input bytes": conv_sign({"input": byte(1, 4, 4, 2, 16)}),
    "conv sign stride 0": conv_sign({"stride": [1, 0]}),
    "conv sign weight not prepacked": conv_sign({"weight": byte(4, 3, 3, 1, 8)}),
    "linear sign threshold size": linear_sign({"threshold": torch.zeros(4, dtype=torch.int32)}),
    "linear sign flip dtype": linear_sign({"flip": torch.zeros(5)}),
    "linear sign input bytes": linear_sign({"input": byte(3, 8)}),
    "linear sign negative": linear_sign({"out_features": -1}),
    "pool 4-D": pool({"input": byte(4, 4, 2, 8)}),
    "pool floats": pool({"input": torch.ones(1, 4, 4, 2, 8)}),
    "pool odd bytes": pool({"input": byte(1, 4, 4, 2, 7)}),
    "pool kernel 0": pool({"kernel_size": [0, 3]}),
    "pool stride 0": pool({"stride": [2, 0]}),
    "pool padding negative": pool({"padding": [-1, 0]}),
    "pool padding more than half": pool({"padding": [2, 1]}),
    "pool dilation 0": pool({"dilation": [0, 1]}),
    "pool kernel larger than input": pool({"kernel_size": [7, 3]}),
    "pool kernel of three": pool({"kernel_size": [3, 3, 3]}),
    "linear input 3-D": linear({"input": byte(1, 3, 16)}),
    "linear input bytes": linear({"input": byte(3, 8)}),
    "linear too many terms": linear({"in_features": 2**30}),
    "linear outputs that overflow": linear({"out_features": 2**63 - 1}),
    "linear prepack too many": (NNCX.binary_linear_prepack, (byte(0, 8), 2**62)),
    "conv prepack too many": (NNCX.binary_conv2d_prepack, (byte(0, 3, 3, 1, 8), 2**62, 1)),
    "linear in_features negative": linear({"in_features": -1}),
    "linear weight not prepacked": linear({"weight": byte(5, 16)}),
    "linear bias size": linear({"bias": torch.ones(4)}),
    "linear input_scale size": linear({"input_scale": torch.ones(4)}),
    "linear out_dtype": linear({"out_dtype": torch.float64}),
    "codebook conv prepack bits 0": (
        NNCX.codebook_conv2d_prepack,
        (byte(27), 0, 6, 4, [3, 3], 2),
    ),
    "codebook conv prepack size": (NNCX.codebook_conv2d_prepack, (byte(26), 2, 6, 4, [3, 3], 2)),
    "codebook conv prepack groups": (NNCX.codebook_conv2d_prepack, (byte(27), 2, 6, 4, [3, 3], 4)),
    "codebook conv prepack kernel": (NNCX.codebook_conv2d_prepack, (byte(27), 2, 6, 4, [3], 2)),
    "codebook conv prepack float": (
        NNCX.codebook_conv2d_prepack,
        (torch.ones(27), 2, 6, 4, [3, 3], 2),
    ),
    "codebook conv prepack too many": (
        NNCX.codebook_conv2d_prepack,
        (byte(0), 8, 2**62, 0, [1, 1], 1),
    ),
    "codebook linear prepack bits 9": (NNCX.codebook_linear_prepack, (byte(132), 9, 70, 5)),
    "codebook linear prepack 2-D": (NNCX.codebook_linear_prepack, (byte(66, 2), 3, 70, 5)),
    "codebook linear prepack size": (NNCX.codebook_linear_prepack, (byte(131), 3, 70, 5)),
    "codebook linear prepack negative": (NNCX.codebook_linear_prepack, (byte(132), 3, -70, 5)),
    "codebook linear prepack too many": (NNCX.codebook_linear_prepack, (byte(0), 8, 2**62, 0)),
    "codebook conv bits": codebook_conv({"bits": 9}),
    "codebook conv input integer": codebook_conv({"input": byte(2, 6, 5, 4)}),
    "codebook conv input float64": codebook_conv({"input": torch.ones(2, 6, 5, 4).double()}),
    "codebook conv input 3-D": codebook_conv({"input": torch.ones(6, 5, 4)}),
    "codebook conv input channels": codebook_conv({"input": torch.ones(2, 7, 5, 4)}),
    "codebook conv groups": codebook_conv({"groups": 3}),
    "codebook conv kernel larger": codebook_conv({"kernel_size": [3, 5]}),
    "codebook conv kernel 0": codebook_conv({"kernel_size": [0, 1]}),
    "codebook conv stride 0": codebook_conv({"stride": [0, 1]}),
    "codebook conv padding negative": codebook_conv({"padding": [0, -1]}),
    "codebook conv padding that overflows": codebook_conv({"padding": [2**31 - 1] * 2}),
    "codebook conv dilation of three": codebook_conv({"dilation": [1, 1, 1]}),
    "codebook conv channels that overflow": codebook_conv({"in_channels": 2**62}),
    "codebook conv codebook size": codebook_conv({"codebook": torch.ones(8)}),
    "codebook conv codebook rows": codebook_conv({"codebook": torch.ones(1, 4)}),
    "codebook conv codebook dtype": codebook_conv({"codebook": torch.ones(4).half()}),
    "codebook conv codebook 0-D": codebook_conv({"codebook": torch.tensor(1.0)}),
    "codebook conv bias size": codebook_conv({"bias": torch.ones(5)}),
    "codebook conv activation": codebook_conv({"activation": "gelu"}),
    "codebook conv out_dtype": codebook_conv({"out_dtype": torch.float64}),
    "codebook conv weight not prepacked": codebook_conv({"weight": torch.ones(27)}),
    "codebook linear bits": codebook_linear({"bits": 0}),
    "codebook linear input 1-D": codebook_linear({"input": torch.ones(70)}),
    "codebook linear input features": codebook_linear({"input": torch.ones(3, 71)}),
    "codebook linear input float64": codebook_linear({"input": torch.ones(3, 70).double()}),
    "codebook linear in_features negative": codebook_linear({"in_features": -1}),
    "codebook linear too many terms": codebook_linear({"in_features": 2**30}),
    "codebook linear outputs that overflow": codebook_linear({"out_features": 2**63 - 1}),
    "codebook linear codebook columns": codebook_linear({"codebook": torch.ones(5, 7)}),
    "codebook linear bias dtype": codebook_linear({"bias": torch.ones(5).int()}),
    "codebook linear activation": codebook_linear({"activation": "ReLU"}),
    "codebook linear out_dtype": codebook_linear({"out_dtype": torch.int8}),
    "codebook linear weight 2-D": codebook_linear({"weight": byte(5, 70)}),
    "hashed linear input 1-D": hashed_linear({"input": torch.ones(70)}),
    "hashed linear input features": hashed_linear({"input": torch.ones(3, 71)}),
    "hashed linear input float64": hashed_linear({"input": torch.ones(3, 70).double()}),
    "hashed linear no buckets": hashed_linear({"buckets": torch.ones(0)}),
    "hashed linear buckets 2-D": hashed_linear({"buckets": torch.ones(4, 10)}),
    "hashed linear buckets dtype": hashed_linear({"buckets": torch.ones(40).half()}),
    "hashed linear in_features negative": hashed_linear({"in_features": -1}),
    "hashed linear too many terms": hashed_linear({"in_features": 2**30}),
    "hashed linear outputs that overflow": hashed_linear({"out_features": 2**63 - 1}),
    "hashed linear bias size": hashed_linear({"bias": torch.ones(4)}),
    "hashed linear bias dtype": hashed_linear({"bias": torch.ones(5).half()}),
    "hashed linear activation": hashed_linear({"activation": "gelu"}),
    "hashed linear out_dtype": hashed_linear({"out_dtype": torch.float64}),
    "hashed weight no buckets": (NNCX.hashed_weight, (torch.ones(0), 0, 4, 3)),
    "hashed weight buckets 2-D": (NNCX.hashed_weight, (torch.ones(5, 1), 0, 4, 3)),
    "hashed weight buckets dtype": (NNCX.hashed_weight, (torch.ones(5).half(), 0, 4, 3)),
    "hashed weight in_features negative": (NNCX.hashed_weight, (torch.ones(5), 0, -4, 3)),
    "hashed weight beyond memory": (NNCX.hashed_weight, (torch.ones(5), 0, 2**29, 2**40)),
    "hashed bucket sums 1-D": (NNCX.hashed_bucket_sums, (torch.ones(4), 0, 5)),
    "hashed bucket sums dtype": (NNCX.hashed_bucket_sums, (torch.ones(3, 4).half(), 0, 5)),
    "hashed bucket sums of none": (NNCX.hashed_bucket_sums, (torch.ones(3, 4), 0, 0)),
    "hashed bucket sums of too many": (NNCX.hashed_bucket_sums, (torch.ones(3, 4), 0, 2**31)),
    "shuffle 2-D": channel_shuffle({"input": torch.ones(2, 6)}),
    "shuffle groups 0": channel_shuffle({"groups": 0}),
    "shuffle groups not dividing": channel_shuffle({"groups": 4}),
    "shuffle wide elements": channel_shuffle({"input": torch.ones(2, 6, 1).cdouble()}),
    "grouped input integer": grouped_conv({"input": byte(2, 6, 5, 4)}),
    "grouped input float64": grouped_conv({"input": torch.ones(2, 6, 5, 4).double()}),
    "grouped input 3-D": grouped_conv({"input": torch.ones(6, 5, 4)}),
    "grouped weight 3-D": grouped_conv({"weight": torch.ones(12, 3, 3)}),
    "grouped weight channels": grouped_conv({"weight": torch.ones(12, 6, 3, 3)}),
    "grouped weight dtype": grouped_conv({"weight": torch.ones(12, 3, 3, 2).half()}),
    "grouped kernel 0": grouped_conv({"weight": torch.ones(12, 3, 0, 3)}),
    "grouped kernel larger": grouped_conv({"weight": torch.ones(12, 3, 6, 3)}),
    "grouped groups 0": grouped_conv({"groups": 0}),
    "grouped groups not dividing": grouped_conv({"groups": 4}),
    "grouped shuffle 0": grouped_conv({"shuffle": 0}),
    "grouped shuffle not dividing": grouped_conv({"shuffle": 5}),
    "grouped bias size": grouped_conv({"bias": torch.ones(6)}),
    "grouped bias dtype": grouped_conv({"bias": torch.ones(12).half()}),
    "grouped stride 0": grouped_conv({"stride": [0, 1]}),
    "grouped padding negative": grouped_conv({"padding": [0, -1]}),
    "grouped padding that overflows": grouped_conv({"padding": [2**31 - 1] * 2}),
    "grouped dilation 0": grouped_conv({"dilation": [1, 0]}),
    "grouped activation": grouped_conv({"activation": "gelu"}),
    "depthwise input integer": depthwise_conv({"input": byte(2, 6, 5, 4)}),
    "depthwise input float64": depthwise_conv({"input": torch.ones(2, 6, 5, 4).double()}),
    "depthwise input 3-D": depthwise_conv({"input": torch.ones(6, 5, 4)}),
    "depthwise weight 3-D": depthwise_conv({"weight": torch.ones(6, 3, 3)}),
    "depthwise weight of two channels": depthwise_conv({"weight": torch.ones(6, 2, 3, 3)}),
    "depthwise weight not dividing": depthwise_conv({"weight": torch.ones(8, 1, 3, 3)}),
    "depthwise weight dtype": depthwise_conv({"weight": torch.ones(6, 1, 3, 3).half()}),
    "depthwise kernel 0": depthwise_conv({"weight": torch.ones(6, 1, 0, 3)}),
    "depthwise kernel larger": depthwise_conv({"weight": torch.ones(6, 1, 6, 3)}),
    "depthwise no channels": depthwise_conv({"input": torch.ones(2, 0, 5, 4)}),
    "depthwise bias size": depthwise_conv({"bias": torch.ones(6)}),
    "depthwise bias dtype": depthwise_conv({"bias": torch.ones(12).half()}),
    "depthwise stride 0": depthwise_conv({"stride": [0, 1]}),
    "depthwise padding negative": depthwise_conv({"padding": [0, -1]}),
    "depthwise padding that overflows": depthwise_conv({"padding": [2**31 - 1] * 2}),
    "depthwise dilation 0": depthwise_conv({"dilation": [1, 0]}),
    "depthwise activation": depthwise_conv({"activation": "gelu"}),
    "separable input float64": separable_conv({"input": torch.ones(2, 6, 5, 4).double()}),
    "separable input 3-D": separable_conv({"input": torch.ones(6, 5, 4)}),
    "separable depthwise_weight 3-D": separable_conv({"depthwise_weight": torch.ones(6, 3, 3)}),
    "separable depthwise_weight not dividing": separable_conv(
        {"depthwise_weight": torch.ones(8, 1, 3, 3)}
    ),
    "separable depthwise_weight dtype": separable_conv(
        {"depthwise_weight": torch.ones(12, 1, 3, 2).half()}
    ),
    "separable kernel larger": separable_conv({"depthwise_weight": torch.ones(12, 1, 6, 3)}),
    "separable pointwise_weight 2-D": separable_conv({"pointwise_weight": torch.ones(7, 12)}),
    "separable pointwise_weight channels": separable_conv(
        {"pointwise_weight": torch.ones(7, 6, 1, 1)}
    ),
    "separable pointwise_weight 3 x 3": separable_conv(
        {"pointwise_weight": torch.ones(7, 12, 3, 3)}
    ),
    "separable depthwise_bias size": separable_conv({"depthwise_bias": torch.ones(6)}),
    "separable pointwise_bias dtype": separable_conv({"pointwise_bias": torch.ones(7).half()}),
    "separable stride 0": separable_conv({"stride": [0, 1]}),
    "separable padding that overflows": separable_conv({"padding": [2**31 - 1] * 2}),
    "separable depthwise_activation": separable_conv({"depthwise_activation": "gelu"}),
    "separable activation": separable_conv({"activation": "gelu"}),
    "quantize integers": quantize({"input": byte(3, 5)}),
    "quantize float64": quantize({"input": torch.ones(3, 5).double()}),
    "quantize a number": quantize({"input": torch.tensor(1.0)}),
    "quantize scale size": quantize({"scale": torch.ones(2), "zero_point": int8(2)}),
    "quantize scale dtype": quantize({"scale": torch.tensor(1.0).double()}),
    "quantize zero_point dtype": quantize({"zero_point": torch.tensor(0)}),
    "quantize zero_point shape": quantize({"zero_point": int8(3)}),
    "quantize an image by row": quantize(
        {"input": torch.ones(3, 1, 2, 2), "scale": torch.ones(3), "zero_point": int8(3)}
    ),
    "int8 conv prepack dtype": (NNCX.int8_conv2d_prepack, (torch.ones(4, 3, 3, 3), 1)),
    "int8 conv prepack 3-D": (NNCX.int8_conv2d_prepack, (int8(4, 3, 3), 1)),
    "int8 conv prepack groups 0": (NNCX.int8_conv2d_prepack, (int8(4, 3, 3, 3), 0)),
    "int8 conv prepack groups": (NNCX.int8_conv2d_prepack, (int8(4, 3, 3, 3), 3)),
    "int8 conv prepack terms": (NNCX.int8_conv2d_prepack, (int8(1, 7311, 3, 3), 1)),
    "int8 conv prepack many groups": (NNCX.int8_conv2d_prepack, (int8(0, 3, 1, 1), 2**62)),
    "int8 linear prepack dtype": (NNCX.int8_linear_prepack, (byte(4, 3),)),
    "int8 linear prepack 1-D": (NNCX.int8_linear_prepack, (int8(4),)),
    "int8 linear prepack terms": (NNCX.int8_linear_prepack, (int8(1, 65_794),)),
    "int8 conv input uint8": int8_conv({"input": byte(2, 6, 5, 4)}),
    "int8 conv input 3-D": int8_conv({"input": int8(6, 5, 4)}),
    "int8 conv input channels": int8_conv({"input": int8(2, 7, 5, 4)}),
    "int8 conv groups": int8_conv({"groups": 3}),
    "int8 conv kernel larger": int8_conv({"kernel_size": [3, 5]}),
    "int8 conv kernel 0": int8_conv({"kernel_size": [0, 1]}),
    "int8 conv stride 0": int8_conv({"stride": [0, 1]}),
    "int8 conv padding negative": int8_conv({"padding": [0, -1]}),
    "int8 conv dilation of one": int8_conv({"dilation": [1]}),
    "int8 conv terms": int8_conv({"kernel_size": [200, 200], "padding": [100, 100]}),
    "int8 conv channels that overflow": int8_conv({"in_channels": 2**62}),
    "int8 conv zero point int32": int8_conv({"input_zero_point": torch.tensor(0).int()}),
    "int8 conv zero point an image": int8_conv({"input_zero_point": int8(2)}),
    "int8 conv scale size": int8_conv({"scale": torch.ones(1)}),
    "int8 conv bias dtype": int8_conv({"bias": torch.ones(4).half()}),
    "int8 conv residual shape": int8_conv({"residual": torch.ones(2, 4, 3, 3)}),
    "int8 conv residual 3-D": int8_conv({"residual": torch.ones(4, 3, 2)}),
    "int8 conv residual dtype": int8_conv({"residual": torch.ones(2, 4, 3, 2).double()}),
    "int8 conv residual without scale": int8_conv({"residual": int8(2, 4, 3, 2)}),
    "int8 conv float residual with scale": int8_conv(
        int8_residual(2, 4, 3, 2) | {"residual": torch.ones(2, 4, 3, 2)}
    ),
    "int8 conv scale of no residual": int8_conv({"residual_scale": torch.tensor(1.0)}),
    "int8 conv residual scale shape": int8_conv(
        int8_residual(2, 4, 3, 2) | {"residual_scale": torch.ones(1)}
    ),
    "int8 conv activation": int8_conv({"activation": "gelu"}),
    "int8 conv out_scale alone": int8_conv({"out_scale": torch.tensor(1.0)}),
    "int8 conv out_zero_point alone": int8_conv({"out_zero_point": int8()}),
    "int8 conv out_scale shape": int8_conv(to_int8() | {"out_scale": torch.ones(4)}),
    "int8 conv out_dtype int8 without scale": int8_conv({"out_dtype": torch.int8}),
    "int8 conv out_dtype float with scale": int8_conv(to_int8() | {"out_dtype": torch.float32}),
    "int8 conv weight not prepacked": int8_conv({"weight": int8(4, 3, 3, 3)}),
    "int8 linear input 1-D": int8_linear({"input": int8(70)}),
    "int8 linear input features": int8_linear({"input": int8(3, 71)}),
    "int8 linear input float": int8_linear({"input": torch.ones(3, 70)}),
    "int8 linear in_features negative": int8_linear({"in_features": -1}),
    "int8 linear terms": int8_linear({"in_features": 65_794}),
    "int8 linear outputs that overflow": int8_linear({"out_features": 2**63 - 1}),
    "int8 linear zero points": int8_linear({"input_zero_point": int8(5)}),
    "int8 linear input_scale size": int8_linear({"input_scale": torch.ones(5)}),
    "int8 linear residual shape": int8_linear({"residual": torch.ones(5, 3)}),
    "int8 linear weight 2-D": int8_linear({"weight": byte(5, 70)}),
}


def moved(arguments: Iterable, device: str) -> list:
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("device", ["meta", *EMULATED[:1], *GPU])
@pytest.mark.parametrize("case", REFUSED)
def test_all_devices_refuse_alike(case: str, device: str) -> None:
    """All raise, and say in the same words what must hold and which op says so."""
    op, arguments = REFUSED[case]
    if op.__name__ in ("hashed_weight", "hashed_bucket_sums") and device != "meta":
        pytest.skip(f"{op.__name__} has no kernel on CUDA: torch writes the weight out there")
    with pytest.raises(RuntimeError) as cpu:
        op(*arguments)
    with pytest.raises(RuntimeError) as other:
        if device in EMULATED:
            with at(device):
                getattr(torch.ops.nncx, op.__name__)(*arguments)
        else:
            op(*moved(arguments, device))
    must_hold = str(cpu.value).split(", got")[0]
    assert must_hold.startswith(op.__name__ + ": ")
    assert "\n" not in str(cpu.value)
    assert must_hold == str(other.value).split(", got")[0]


@pytest.mark.parametrize("device", ["meta", *GPU])
@every_sample
def test_operands_on_two_devices_are_refused(index: int, device: str) -> None:
    """The fake runs where any operand is on meta: it must not hand out memory it never wrote."""
    op, *given = samples()[index]
    leaves, structure = tree_flatten(given)
    operands = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for i in operands if len(operands) > 1 else ():
        one_elsewhere = [*leaves[:i], leaves[i].to(device), *leaves[i + 1 :]]
        args, kwargs = tree_unflatten(one_elsewhere, structure)
        sentence = f"{op.__name__}: .* on the input's device.* got .*(cpu|{device})"
        with pytest.raises(RuntimeError, match=sentence):
            op(*args, **kwargs)


def test_weights_that_only_the_cpu_can_read_are_refused_there() -> None:
    op, arguments = conv({"weight": byte(100)})
    with pytest.raises(RuntimeError, match="prepacked for the path of this process"):
        op(*arguments)


@pytest.mark.parametrize("op", [codebook_conv, codebook_linear])
def test_an_output_beyond_memory_is_refused_in_a_sentence(op: Callable) -> None:
    none, rows = byte(0), 2**44  # of no features: they take no memory
    if op is codebook_conv:
        weight = ops.codebook_conv2d_prepack(none, 2, 0, 2**20, 1)
        changes = {"input": torch.ones(rows, 0, 1, 1), "in_channels": 0, "out_channels": 2**20}
        changes |= {"kernel_size": [1, 1], "groups": 1}
    else:
        weight = ops.codebook_linear_prepack(none, 3, 0, 2**20)
        changes = {"input": torch.ones(rows, 0), "in_features": 0, "out_features": 2**20}
        changes |= {"codebook": torch.ones(8)}
    function, arguments = op(changes | {"weight": weight})
    with pytest.raises(RuntimeError, match="^nncx: torch must have memory for a tensor of shape"):
        function(*arguments)


def test_flops_count_two_per_product() -> None:
    x = torch.randn(2, 64, 10, 10)
    weight = ops.binary_conv2d_prepack(ops.pack_signs(torch.randn(32, 32, 3, 3)), 64, 2)
    rows = ops.pack_signs(torch.randn(7, 100))
    matrix = ops.binary_linear_prepack(ops.pack_signs(torch.randn(9, 100)), 100)
    with FlopCounterMode(display=False) as counter:
        ops.binary_conv2d(ops.pack_signs(x, 2), weight, 64, 32, 3, stride=2, groups=2)
        ops.binary_linear(rows, matrix, 100, 9)
    assert counter.get_total_flops() == 2 * (2 * 32 * 4 * 4 * 9 * 32) + 2 * (7 * 100 * 9)
    with FlopCounterMode(display=False) as counter:
        for op, arguments in (codebook_conv({}), codebook_linear({})):
            op(*arguments)
    assert counter.get_total_flops() == 2 * (2 * 4 * 3 * 2 * 9 * 3) + 2 * (3 * 70 * 5)
    with FlopCounterMode(display=False) as counter:
        op, arguments = hashed_linear({})
        op(*arguments)
        NNCX.hashed_bucket_sums(NNCX.hashed_weight(torch.ones(5), 0, 4, 3), 0, 5)
    assert counter.get_total_flops() == 2 * (3 * 70 * 5)
    with FlopCounterMode(display=False) as counter:
        op, arguments = grouped_conv({})
        op(*arguments)
    assert counter.get_total_flops() == 2 * (2 * 12 * 3 * 3 * 3 * 6)
    with FlopCounterMode(display=False) as counter:
        op, arguments = depthwise_conv({})
        op(*arguments)
    assert counter.get_total_flops() == 2 * (2 * 12 * 3 * 3 * 6)
    with FlopCounterMode(display=False) as counter:
        op, arguments = separable_conv({})
        op(*arguments)
    assert counter.get_total_flops() == 2 * (2 * 12 * 3 * 3 * 6) + 2 * (2 * 7 * 3 * 3 * 12)
    with FlopCounterMode(display=False) as counter:
        for op, arguments in (int8_conv({}), int8_linear({})):
            op(*arguments)
    assert counter.get_total_flops() == 2 * (2 * 4 * 3 * 2 * 9 * 3) + 2 * (3 * 70 * 5)


def test_asking_for_a_gradient_raises() -> None:
    scale = torch.ones(9, requires_grad=True)
    matrix = ops.binary_linear_prepack(ops.pack_signs(torch.randn(9, 20)), 20)
    out = ops.binary_linear(ops.pack_signs(torch.randn(3, 20)), matrix, 20, 9, scale=scale)
    with pytest.raises(RuntimeError, match="no gradient flows through packed signs"):
        out.sum().backward()


@pytest.mark.parametrize("prepare", [codebook_conv, codebook_linear])
def test_asking_a_codebook_op_for_a_gradient_raises(prepare: Callable) -> None:
    op, arguments = prepare({})
    out = op(arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match="no gradient flows through packed codes"):
        out.sum().backward()


@pytest.mark.parametrize("prepare", [int8_conv, int8_linear])
def test_asking_an_int8_op_for_a_gradient_raises(prepare: Callable) -> None:
    outputs = 4 if prepare is int8_conv else 5
    op, arguments = prepare({"bias": torch.zeros(outputs, requires_grad=True)})
    with pytest.raises(RuntimeError, match="no gradient flows through 8-bit codes"):
        op(*arguments).sum().backward()


def test_codes_have_no_gradient() -> None:
    """The output of quantize_int8 is an integer, to which torch gives no gradient at all."""
    codes = ops.quantize_int8(torch.ones(3, requires_grad=True), torch.tensor(1.0), int8())
    assert not codes.requires_grad


class BinaryNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = ops.binary_conv2d_prepack(ops.pack_signs(torch.randn(8, 6, 3, 3)), 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.binary_conv2d(ops.pack_signs(x), self.weight, 6, 8, 3, padding=1).relu()


class CodebookNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codebook = torch.tensor([-1.0, 1.0])
        self.conv = ops.codebook_conv2d_prepack(byte(54), 1, 6, 8, 3)
        self.linear = ops.codebook_linear_prepack(byte(10), 1, 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ops.codebook_conv2d(
            x, self.conv, self.codebook, 1, 6, 8, 3, padding=1, activation="relu"
        )
        return ops.codebook_linear(x.mean((2, 3)), self.linear, self.codebook, 1, 8, 10)


class Int8Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = ops.int8_conv2d_prepack(torch.randint(-9, 9, (8, 6, 3, 3)).to(torch.int8))
        self.linear = ops.int8_linear_prepack(torch.randint(-9, 9, (10, 8)).to(torch.int8))
        self.scale, self.zero_point = torch.tensor(0.1), int8()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ops.quantize_int8(x, self.scale, self.zero_point)
        x = ops.int8_conv2d(x, self.conv, 6, 8, 3, padding=1, activation="relu")
        x = ops.quantize_int8(x.mean((2, 3)), self.scale, self.zero_point)
        return ops.int8_linear(x, self.linear, 8, 10)


@pytest.mark.parametrize("device", ["cpu", *GPU])
@pytest.mark.parametrize("network", [BinaryNet, CodebookNet, Int8Net])
def test_compile_and_export_with_a_dynamic_batch(
    network: type[torch.nn.Module], device: str
) -> None:
    with torch.device(device):
        net, x = network(), torch.randn(3, 6, 7, 5)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    program = torch.export.export(
        net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}}
    )
    for batch in (3, 5):
        x = torch.randn(batch, 6, 7, 5, device=device)
        assert torch.equal(compiled(x), net(x))
        assert torch.equal(program.module()(x), net(x))
