"""What codebook_conv2d and codebook_linear share on the Python side."""

import torch
from torch import Tensor

from nncx._native import _C
from nncx.ops._activation import activate, check_activation
from nncx.ops._common import check, check_operand, check_out_dtype, check_prepacked, shape_text


def check_bits(op: str, bits: int) -> None:
    check(1 <= bits <= 8, lambda: f"{op}: bits must be 1 to 8, got {bits}")


def prepack_fake(
    op: str, codes: Tensor, bits: int, groups: int, out_channels: int, taps: int, channels: int
) -> Tensor:
    """The prepacked weight of `codes`, which are checked; sizes are those of one group."""
    size = -(-groups * out_channels * taps * channels * bits // 8)
    check(
        codes.dtype == torch.uint8 and codes.dim() == 1 and codes.shape[0] == size,
        lambda: (
            f"{op}: codes must be uint8 [{size}] from pack_codes, got {codes.dtype} of shape "
            f"{shape_text(codes)}"
        ),
    )
    numel = _C.codebook_prepacked_numel(
        groups, out_channels, taps, channels, bits, codes.device.type
    )
    return codes.new_empty(numel)


def check_operands(
    op: str,
    input: Tensor,
    weight: Tensor,
    codebook: Tensor,
    bits: int,
    out_channels: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Checks what follows the geometry; returns the dtype of the output."""
    check_activation(op, activation)
    shape = [2**bits] if codebook.dim() == 1 else [out_channels, 2**bits]
    check_operand(op, "codebook", input, codebook, shape)
    if bias is not None:
        check_operand(op, "bias", input, bias, [out_channels])
    dtype = check_out_dtype(op, input.dtype if out_dtype is None else out_dtype)
    check_prepacked(op, input, weight)
    return dtype


def decode(codes: Tensor, codebook: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """The weights behind dense codes, ``[rows, columns]``, a row per output channel."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = (codes[:, None] >> shifts & 1).flatten()[: rows * columns * bits]
    index = (stream.view(rows, columns, bits).long() << shifts[:bits]).sum(-1)
    return codebook.expand(rows, -1).gather(1, index)


def finish(sums: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype) -> Tensor:
    """The epilogue, on sums whose output channels are dimension 1."""
    if bias is not None:
        sums = sums + bias.view(-1, *[1] * (sums.dim() - 2))
    return activate(sums, activation).to(out_dtype)
