"""Calls of every op: by its arguments' names, with changes, and a list of all ops'."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from nncx import ops

NNCX = torch.ops.nncx


class Sample(NamedTuple):
    op: Callable
    args: tuple
    kwargs: dict


NO_INT8_EPILOGUE = {  # behind bias and input_scale, in the schemas' order
    "residual": None,
    "residual_scale": None,
    "residual_zero_point": None,
    "activation": "none",
    "out_scale": None,
    "out_zero_point": None,
    "out_dtype": None,
}


def call(op: Callable, arguments: dict, changes: dict) -> tuple:
    """The op and its positional arguments."""
    assert changes.keys() <= arguments.keys()
    return op, tuple({**arguments, **changes}.values())


def byte(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape).to(torch.uint8)


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 9, shape).to(torch.int8)


def codebook_conv(changes: dict) -> tuple:
    arguments = {
        "input": torch.randn(2, 6, 5, 4),
        "weight": ops.codebook_conv2d_prepack(codes(27), 2, 6, 4, 3, 2),
        "codebook": torch.rand(4),
        "bits": 2,
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 2,
        "bias": None,
        "activation": "none",
        "out_dtype": None,
    }
    return call(NNCX.codebook_conv2d, arguments, changes)


def codebook_linear(changes: dict) -> tuple:
    arguments = {
        "input": torch.randn(3, 70),
        "weight": ops.codebook_linear_prepack(codes(132), 3, 70, 5),
        "codebook": torch.rand(5, 8),
        "bits": 3,
        "in_features": 70,
        "out_features": 5,
        "bias": None,
        "activation": "none",
        "out_dtype": None,
    }
    return call(NNCX.codebook_linear, arguments, changes)


def hashed_linear(changes: dict) -> tuple:
    arguments = {
        "input": torch.randn(3, 70),
        "buckets": torch.randn(40),
        "seed": 1,
        "in_features": 70,
        "out_features": 5,
        "bias": torch.rand(5),
        "activation": "relu",
        "out_dtype": torch.float16,
    }
    return call(NNCX.hashed_linear, arguments, changes)


def channel_shuffle(changes: dict) -> tuple:
    return call(NNCX.channel_shuffle, {"input": torch.randn(2, 6, 5, 4), "groups": 3}, changes)


def depthwise_conv(changes: dict) -> tuple:
    arguments = {
        "input": torch.randn(2, 6, 5, 4),
        "weight": torch.randn(12, 1, 3, 2),
        "bias": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "activation": "none",
    }
    return call(NNCX.depthwise_conv2d, arguments, changes)


def separable_conv(changes: dict) -> tuple:
    arguments = {
        "input": torch.randn(2, 6, 5, 4),
        "depthwise_weight": torch.randn(12, 1, 3, 2),
        "pointwise_weight": torch.randn(7, 12, 1, 1),
        "depthwise_bias": None,
        "pointwise_bias": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "depthwise_activation": "none",
        "activation": "none",
    }
    return call(NNCX.depthwise_separable_conv2d, arguments, changes)


def grouped_conv(changes: dict) -> tuple:
    arguments = {
        "input": torch.randn(2, 6, 5, 4),
        "weight": torch.randn(12, 3, 3, 2),
        "bias": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 2,
        "shuffle": 3,
        "activation": "none",
    }
    return call(NNCX.grouped_conv2d, arguments, changes)


def int8_epilogue() -> dict:
    return {
        "input_zero_point": int8(),
        "scale": torch.rand(4),
        "bias": torch.rand(4),
        "activation": "relu6",
    }


def to_int8() -> dict:
    return {"out_scale": torch.tensor(0.1), "out_zero_point": int8()}


def int8_residual(*shape: int) -> dict:
    zero_point = {"residual_zero_point": int8()}
    return {"residual": int8(*shape), "residual_scale": torch.tensor(0.1), **zero_point}


def int8_conv(changes: dict) -> tuple:
    arguments = {
        "input": int8(2, 6, 5, 4),
        "weight": ops.int8_conv2d_prepack(int8(4, 3, 3, 3), 2),
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 2,
        "input_zero_point": None,
        "scale": None,
        "bias": None,
        **NO_INT8_EPILOGUE,
        "channels_last": True,
    }
    return call(NNCX.int8_conv2d, arguments, changes)


def int8_linear(changes: dict) -> tuple:
    arguments = {
        "input": int8(3, 70),
        "weight": ops.int8_linear_prepack(int8(5, 70)),
        "in_features": 70,
        "out_features": 5,
        "input_zero_point": None,
        "scale": None,
        "bias": None,
        "input_scale": None,
        **NO_INT8_EPILOGUE,
    }
    return call(NNCX.int8_linear, arguments, changes)


def quantize(changes: dict) -> tuple:
    arguments = {"input": torch.randn(3, 5), "scale": torch.tensor(0.1), "zero_point": int8()}
    return call(NNCX.quantize_int8, arguments, changes)


def conv(changes: dict) -> tuple:
    arguments = {
        "input": byte(1, 4, 4, 2, 8),
        "weight": ops.binary_conv2d_prepack(byte(4, 3, 3, 1, 8), 6, 2),
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 2,
        "pad_value": 0,
        "scale": None,
        "bias": None,
        "input_scale": None,
        "out_dtype": None,
        "channels_last": True,
    }
    return call(NNCX.binary_conv2d, arguments, changes)


def conv_sign(changes: dict) -> tuple:
    arguments = {
        "input": byte(1, 4, 4, 2, 8),
        "weight": ops.binary_conv2d_prepack(byte(4, 3, 3, 1, 8), 6, 2),
        "threshold": torch.zeros(4, dtype=torch.int32),
        "flip": torch.zeros(4, dtype=torch.bool),
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 2,
        "pad_value": 0,
        "out_groups": 2,
    }
    return call(NNCX.binary_conv2d_sign, arguments, changes)


def linear_sign(changes: dict) -> tuple:
    arguments = {
        "input": byte(3, 16),
        "weight": ops.binary_linear_prepack(byte(5, 16), 70),
        "threshold": torch.zeros(5, dtype=torch.int32),
        "flip": torch.zeros(5, dtype=torch.bool),
        "in_features": 70,
        "out_features": 5,
    }
    return call(NNCX.binary_linear_sign, arguments, changes)


def pool(changes: dict) -> tuple:
    arguments = {
        "input": byte(1, 4, 4, 2, 8),
        "kernel_size": [3, 3],
        "stride": [2, 2],
        "padding": [1, 1],
        "dilation": [1, 1],
        "ceil_mode": False,
    }
    return call(NNCX.max_pool2d_signs, arguments, changes)


def linear(changes: dict) -> tuple:
    arguments = {
        "input": byte(3, 16),
        "weight": ops.binary_linear_prepack(byte(5, 16), 70),
        "in_features": 70,
        "out_features": 5,
        "scale": None,
        "bias": None,
        "input_scale": None,
        "out_dtype": None,
    }
    return call(NNCX.binary_linear, arguments, changes)


def samples() -> list[Sample]:
    """On the default device."""
    x, w = torch.randn(2, 6, 5, 4), torch.randn(4, 3, 3, 3)
    rows, matrix = torch.randn(3, 70), torch.randn(5, 70)
    conv = ops.binary_conv2d_prepack(ops.pack_signs(w), 6, 2)
    linear = ops.binary_linear_prepack(ops.pack_signs(matrix), 70)
    conv_args = (ops.pack_signs(x, 2), conv, 6, 4, [3, 3], [2, 1], [1, 1], [1, 1], 2, 1)
    linear_args = (ops.pack_signs(rows), linear, 70, 5)
    epilogue = (torch.rand(4), torch.rand(4), torch.rand(2, 2, 3, 4), torch.bfloat16)
    threshold, flip = torch.tensor([-3, 0, 1, 5], dtype=torch.int32), torch.rand(4) > 0.5
    five = torch.zeros(5, dtype=torch.int32), torch.rand(5) > 0.5
    codebook_conv_op, codebook_conv_args = codebook_conv({})
    codebook_linear_op, codebook_linear_args = codebook_linear({})
    return [
        Sample(NNCX.pack_signs, (x, 3), {}),
        Sample(NNCX.pack_signs, (rows,), {}),
        Sample(NNCX.binary_conv2d_prepack, (ops.pack_signs(w), 6, 2), {}),
        Sample(NNCX.binary_conv2d, conv_args, {}),
        Sample(NNCX.binary_conv2d, (*conv_args, *epilogue), {}),
        Sample(NNCX.binary_conv2d, (*conv_args, *epilogue, False), {}),
        Sample(NNCX.binary_conv2d_sign, (*conv_args[:2], threshold, flip, *conv_args[2:]), {}),
        Sample(NNCX.binary_conv2d_sign, (*conv_args[:2], threshold, flip, *conv_args[2:], 2), {}),
        Sample(NNCX.max_pool2d_signs, (ops.pack_signs(x, 2), [3, 2], [2, 1], [1, 0]), {}),
        Sample(NNCX.max_pool2d_signs, (ops.pack_signs(x), [2, 2], [2, 2]), {"ceil_mode": True}),
        Sample(NNCX.binary_linear_prepack, (ops.pack_signs(matrix), 70), {}),
        Sample(NNCX.binary_linear, linear_args, {}),
        Sample(NNCX.binary_linear, linear_args, {"scale": torch.rand(5), "bias": torch.rand(5)}),
        Sample(NNCX.binary_linear_sign, (*linear_args[:2], *five, *linear_args[2:]), {}),
        Sample(NNCX.codebook_conv2d_prepack, (codes(27), 2, 6, 4, [3, 3], 2), {}),
        Sample(codebook_conv_op, codebook_conv_args, {}),
        Sample(*codebook_conv({"input": x.half(), "codebook": torch.rand(4, 4)}), {}),
        Sample(
            *codebook_conv(
                {
                    "input": x.to(memory_format=torch.channels_last),
                    "bias": torch.rand(4),
                    "activation": "relu6",
                    "out_dtype": torch.bfloat16,
                }
            ),
            {},
        ),
        Sample(NNCX.codebook_linear_prepack, (codes(132), 3, 70, 5), {}),
        Sample(codebook_linear_op, codebook_linear_args, {}),
        Sample(codebook_linear_op, codebook_linear_args[:6], {"bias": torch.rand(5)}),
        Sample(*hashed_linear({}), {}),
        Sample(*hashed_linear({"input": torch.randn(3, 70).half(), "out_dtype": None}), {}),
        Sample(
            *hashed_linear(
                {
                    "input": torch.randn(3, 70).requires_grad_(),
                    "buckets": torch.randn(40).requires_grad_(),
                    "bias": torch.rand(5).requires_grad_(),
                    "activation": "relu6",
                    "out_dtype": None,
                }
            ),
            {},
        ),
        Sample(*channel_shuffle({"input": int8(2, 6, 5)}), {}),
        Sample(
            *channel_shuffle(
                {"input": torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)}
            ),
            {},
        ),
        Sample(*channel_shuffle({"input": torch.randn(2, 6, 5, 4).requires_grad_()}), {}),
        Sample(*depthwise_conv({}), {}),
        Sample(*depthwise_conv({"input": x.requires_grad_(), "activation": "relu6"}), {}),
        Sample(
            *depthwise_conv(
                {
                    "input": x.detach().to(memory_format=torch.channels_last).bfloat16(),
                    "weight": torch.randn(6, 1, 3, 3).bfloat16().requires_grad_(),
                    "bias": torch.randn(6).bfloat16().requires_grad_(),
                    "stride": [2, 1],
                    "padding": [1, 1],
                }
            ),
            {},
        ),
        Sample(*separable_conv({}), {}),
        Sample(
            *separable_conv(
                {
                    "input": torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last),
                    "depthwise_weight": torch.randn(6, 1, 3, 3).requires_grad_(),
                    "pointwise_weight": torch.randn(7, 6, 1, 1).requires_grad_(),
                    "depthwise_bias": torch.randn(6).requires_grad_(),
                    "pointwise_bias": torch.randn(7).requires_grad_(),
                    "stride": [2, 1],
                    "padding": [1, 1],
                    "depthwise_activation": "relu6",
                    "activation": "relu",
                }
            ),
            {},
        ),
        Sample(*grouped_conv({}), {}),
        Sample(
            *grouped_conv(
                {"input": torch.randn(2, 6, 5, 4).requires_grad_(), "activation": "relu6"}
            ),
            {},
        ),
        Sample(
            *grouped_conv(
                {
                    "input": torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last).half(),
                    "weight": torch.randn(6, 6, 1, 1).half().requires_grad_(),
                    "bias": torch.randn(6).half().requires_grad_(),
                    "groups": 1,
                    "shuffle": 1,
                    "stride": [2, 1],
                }
            ),
            {},
        ),
        Sample(*quantize({}), {}),
        Sample(*quantize({"input": x.half()}), {}),
        Sample(*quantize({"scale": torch.rand(3), "zero_point": int8(3)}), {}),
        Sample(NNCX.int8_conv2d_prepack, (int8(4, 3, 3, 3), 2), {}),
        Sample(*int8_conv({}), {}),
        Sample(*int8_conv(int8_epilogue() | {"residual": torch.rand(2, 4, 3, 2)}), {}),
        Sample(*int8_conv(to_int8() | int8_residual(2, 4, 3, 2)), {}),
        Sample(*int8_conv({"channels_last": False, "out_dtype": torch.bfloat16}), {}),
        Sample(NNCX.int8_linear_prepack, (int8(5, 70),), {}),
        Sample(*int8_linear({}), {}),
        Sample(*int8_linear({"input_zero_point": int8(3), "input_scale": torch.rand(3)}), {}),
        Sample(*int8_linear(to_int8() | int8_residual(3, 5)), {}),
    ]


every_sample = pytest.mark.parametrize("index", range(len(samples())))
