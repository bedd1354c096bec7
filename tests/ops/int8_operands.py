"""Operands of the int8 ops, and what must come out: in NumPy or int64, not by the references."""

import numpy as np
import torch
from torch import Tensor


def codes(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape).to(torch.int8)


def zero_point(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int8)


def weights(kind: str, *shape: int) -> Tensor:
    """By how many fours of them have sums that int16 does not hold, times 127."""
    gaussian = torch.randn(shape)
    return {
        "small": gaussian.mul(15).round().clamp(-60, 60),  # none
        "some large": gaussian.mul(36).round().clamp(-127, 127),  # one in some hundred
        "any": torch.randint(-128, 128, shape),  # one in seven
        "extreme": torch.randint(0, 2, shape).mul(255).sub(128),  # half
    }[kind].to(torch.int8)


KINDS = ("small", "some large", "any", "extreme")


def epilogue_by_hand(sums: Tensor, e: dict) -> Tensor:
    """What the contract says, float32 operation by operation in NumPy; channels are dimension 1."""
    channels = (-1, *[1] * (sums.dim() - 2))
    v = sums.numpy().astype(np.float32)
    if "scale" in e:
        v = v * e["scale"].numpy().reshape(channels)
    if "input_scale" in e:
        v = v * e["input_scale"].numpy()[:, None]
    if "bias" in e:
        v = v + e["bias"].numpy().reshape(channels)
    if "residual_scale" in e:
        centred = e["residual"].numpy().astype(np.int32) - int(e["residual_zero_point"])
        v = v + centred.astype(np.float32) * e["residual_scale"].numpy()
    elif "residual" in e:
        v = v + e["residual"].float().numpy()
    activation = e.get("activation", "none")
    if activation != "none":
        v = np.maximum(v, np.float32(0))
    if activation == "relu6":
        v = np.minimum(v, np.float32(6))
    assert v.dtype == np.float32
    if "out_scale" in e:
        rounded = np.rint(v * (np.float32(1) / e["out_scale"].numpy()))
        return torch.from_numpy(np.clip(rounded + int(e["out_zero_point"]), -128, 127)).to(
            torch.int8
        )
    return torch.from_numpy(v).to(e.get("out_dtype", torch.float32))


def epilogues(shape: list[int]) -> dict[str, dict]:
    """Of an output of that shape, by name."""
    channels = shape[1]
    scale, bias = torch.rand(channels) * 1e-3 + 1e-5, torch.randn(channels)
    to_int8 = {"out_scale": torch.tensor(0.037), "out_zero_point": zero_point(-11)}
    int8_residual = {
        "residual": codes(*shape),
        "residual_scale": torch.tensor(0.021),
        "residual_zero_point": zero_point(9),
    }
    return {
        "none": {},
        "scale": {"scale": scale},
        "bias, relu": {"bias": bias * 100, "activation": "relu"},
        "relu6, float16": {
            "scale": scale,
            "bias": bias,
            "activation": "relu6",
            "out_dtype": torch.float16,
        },
        "residual, bfloat16": {
            "scale": scale,
            "bias": bias,
            "residual": torch.randn(shape),
            "out_dtype": torch.bfloat16,
        },
        "float16 residual": {"scale": scale, "residual": torch.randn(shape).half()},
        "bfloat16 residual": {"residual": torch.randn(shape).bfloat16(), "activation": "relu"},
        "int8 residual": {"scale": scale, "bias": bias, **int8_residual, "activation": "relu"},
        "int8": {"scale": scale, "bias": bias, **to_int8},
        "int8, all": {
            "scale": scale,
            "bias": bias,
            **int8_residual,
            "activation": "relu6",
            **to_int8,
        },
    }
