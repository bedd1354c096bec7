"""Dense packing of small integer codes: the layout of packed weights in files and state dicts.

Code `i` of width `bits` occupies bits `i * bits ... (i + 1) * bits - 1` of the stream; bit `j` of
the stream is bit `j % 8` of byte `j // 8` (least significant bit first). Codes may straddle bytes,
so `n` codes always take `ceil(n * bits / 8)` bytes. A 1-bit code is a sign: 1 means +1.
"""

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely, in row-major order.

    Args:
        codes: uint8 or bool, any shape, `n` elements, each below `2 ** bits`.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 `[ceil(n * bits / 8)]`; the unused high bits of the last byte are 0.

    Raises:
        ValueError: for another width or dtype, or a code that does not fit.
    """
    check_bits(bits)
    if codes.dtype not in (torch.uint8, torch.bool):
        raise ValueError(
            f"pack_codes: codes must be uint8 or bool, got {codes.dtype}; convert them"
        )
    codes = codes.to(torch.uint8).flatten()
    if not codes.is_meta and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(
            f"pack_codes: a {bits}-bit code must be below {2**bits}, got {int(codes.max())};"
            " use more bits"
        )
    stream = _to_bits(codes, bits).flatten()
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8))
    return _from_bits(stream.view(-1, 8))


def pack_weight_signs(weight: Tensor) -> Tensor:
    """`pack_codes(weight >= 0, 1)`; at once for a weight on meta, of which `load` makes many."""
    if weight.is_meta:
        return weight.new_empty(packed_size(weight.numel(), 1), dtype=torch.uint8)
    return pack_codes(weight >= 0, 1)


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: uint8 `[ceil(count * bits / 8)]`.
        count: number of codes.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 `[count]`.

    Raises:
        ValueError: for another width, or if `packed` is not as long as `count` codes need.
    """
    check_bits(bits)
    size = packed_size(count, bits)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(
            f"unpack_codes: {count} codes of {bits} bits must come as uint8 [{size}], got"
            f" {packed.dtype} {list(packed.shape)}; pass what pack_codes returned"
        )
    stream = _to_bits(packed, 8).flatten()[: count * bits]
    return _from_bits(stream.view(count, bits))


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def check_bits(bits: int) -> None:
    """Raise ValueError for a width that no code has."""
    if not 1 <= bits <= 8:
        raise ValueError(f"the width of a code must be 1 to 8 bits, got {bits}")


def _to_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 `[n]` -> its lowest bits, uint8 `[n, bits]`, least significant first."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=values.device)
    return (values[:, None] >> shifts) & 1


def _from_bits(stream: Tensor) -> Tensor:
    """uint8 `[n, bits]` of 0 and 1, least significant first -> uint8 `[n]`."""
    shifts = torch.arange(stream.shape[1], dtype=torch.uint8, device=stream.device)
    return (stream << shifts).sum(1, dtype=torch.uint8)
