"""Dense codes against arithmetic on one big Python integer."""

import pytest
import torch

from nncx.nn.codes import pack_codes, packed_size, unpack_codes

COUNTS = [0, 1, 7, 8, 9, 63, 64, 65, 1009]


def _codes(count, bits):
    generator = torch.Generator().manual_seed(count * 8 + bits)
    return torch.randint(2**bits, (count,), dtype=torch.uint8, generator=generator)


def _as_stream(codes, bits):
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    return list(stream.to_bytes(-(-len(codes) * bits // 8), "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_layout_and_round_trip(count, bits):
    codes = _codes(count, bits)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == _as_stream(codes, bits)
    assert packed.numel() == packed_size(count, bits)
    assert torch.equal(unpack_codes(packed, count, bits), codes)


def test_bool_and_shape_are_row_major():
    signs = torch.tensor([[True, False, False], [False, True, True]]).T
    assert pack_codes(signs, 1).tolist() == [0b101001]


def test_meta_tensors_have_the_right_size():
    assert pack_codes(torch.empty(65, dtype=torch.uint8, device="meta"), 3).shape == (25,)


@pytest.mark.parametrize("bits", [0, 9])
def test_refuses_width(bits):
    with pytest.raises(ValueError, match=f"1 to 8 bits, got {bits}"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 4, bits)


def test_refuses_code_that_does_not_fit():
    with pytest.raises(ValueError, match="2-bit code must be below 4, got 4"):
        pack_codes(torch.tensor([1, 4], dtype=torch.uint8), 2)


def test_refuses_dtype():
    with pytest.raises(ValueError, match="uint8 or bool, got torch.float32"):
        pack_codes(torch.zeros(4), 1)


@pytest.mark.parametrize("packed", [torch.zeros(2, dtype=torch.uint8), torch.zeros(1)])
def test_refuses_packed_of_other_size_or_dtype(packed):
    with pytest.raises(ValueError, match=r"must come as uint8 \[1\]"):
        unpack_codes(packed, 8, 1)
