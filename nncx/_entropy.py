"""Codes at rest: a tensor of dense codes as a payload near their entropy, and back, to the bit.

Codes of `width` bits stand one behind the other (`nncx.nn.codes`). Their payload is of one of two
kinds, whichever is smaller; where the codes are smaller still, they have none:

    1  Huffman: the same bits, in symbols of one code or of several side by side, so that codes of
       one or two bits may come below a bit each
    2  relative (Han et al., "Deep Compression", ICLR 2016): the codes that are not 0, and the gaps
       between them, of 1 to 8 bits; both Huffman coded

docs/files.md has a payload byte by byte, `csrc/entropy.h` the codec. A payload is untrusted:
nothing is allocated that is not in proportion to its own size.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nncx._native import _C
from nncx.nn.codes import check_bits, pack_codes, packed_size, unpack_codes

_HUFFMAN, _RELATIVE = 1, 2
_HEADER = struct.Struct("<BBQ")  # kind, bits of a symbol or code, bytes of the tensor
_GAPS = struct.Struct("<BQQ")  # bits of a gap, number of gaps, bytes of their stream
_LENGTH_BITS = 4  # of a code's length, 12 at most
# A gap takes a bit at least and stands for 255 codes at most, of 8 bits at most.
_MOST_BYTES_OF_A_BYTE = 8 * 255


def encode(packed: Tensor, width: int) -> Tensor:
    """The payload of codes if it is shorter, else the codes.

    Args:
        packed: uint8 `[n]`, of `nncx.nn.codes.pack_codes`.
        width: of a code, 1 to 8 bits. A wrong one costs bytes, no bits: all come back.

    Returns:
        uint8, on the CPU: `[n]`, or shorter.

    Raises:
        ValueError: for another width.
    """
    check_bits(width)
    packed = packed.detach().cpu()
    best = min(_candidates(packed, width), key=lambda candidate: candidate.size)
    if best.size >= len(packed):
        return packed
    return torch.frombuffer(bytearray(best.payload()), dtype=torch.uint8)


def decoded_size(payload: Tensor) -> int:
    """How many bytes `decode` will give: at most 2,040 for one of the payload.

    Raises:
        ValueError: if the payload cannot be one.
    """
    return _read_header(_Reader(payload))[2]


def decode(payload: Tensor) -> Tensor:
    """Undo `encode`, where that gave a payload.

    Returns:
        uint8 `[decoded_size(payload)]`.

    Raises:
        ValueError: if the payload is damaged.
    """
    reader = _Reader(payload)
    kind, width, size = _read_header(reader)
    read = _read_huffman if kind == _HUFFMAN else _read_relative
    return torch.from_numpy(read(reader, width, size))


# ------------------------------------------------------------------------------------------------
# encoding


class _Text:
    """Symbols with a code of their own."""

    def __init__(self, symbols: np.ndarray, width: int) -> None:
        counts = np.bincount(symbols, minlength=2**width)
        self._symbols, self._lengths = symbols, _C.huffman_lengths(counts)
        self.stream_size = packed_size(int(counts @ self._lengths), 1)

    def table(self) -> bytes:
        """How many lengths there are, less one, and the lengths; those behind are 0."""
        lengths = torch.from_numpy(np.trim_zeros(self._lengths, "b"))
        return bytes([len(lengths) - 1, *pack_codes(lengths, _LENGTH_BITS).tolist()])

    def stream(self) -> bytes:
        return _C.huffman_encode(self._symbols, self._lengths).tobytes()


class _Candidate(NamedTuple):
    """What may become a payload: its head, the tables of its texts, their streams."""

    head: bytes
    texts: Sequence[_Text]

    @property
    def size(self) -> int:
        return len(self.head) + sum(len(text.table()) + text.stream_size for text in self.texts)

    def payload(self) -> bytes:
        tables, streams = [t.table() for t in self.texts], [t.stream() for t in self.texts]
        return b"".join([self.head, *tables, *streams])


def _candidates(packed: Tensor, width: int) -> Iterator[_Candidate]:
    codes = _symbols(packed, width)
    for several in range(width, 9, width):
        symbols = codes if several == width else _symbols(packed, several)
        head = _HEADER.pack(_HUFFMAN, several, len(packed))
        yield _Candidate(head, [_Text(symbols, several)])
    places = np.flatnonzero(codes)
    nonzero = _Text(codes[places], width)
    for gap_bits in range(1, 9):
        gaps = _gaps(places, len(codes), gap_bits)
        text = _Text(gaps, gap_bits)
        head = _HEADER.pack(_RELATIVE, width, len(packed))
        head += _GAPS.pack(gap_bits, len(gaps), text.stream_size)
        yield _Candidate(head, [text, nonzero])


def _symbols(packed: Tensor, width: int) -> np.ndarray:
    """All bits in symbols of `width` bits; the last one is filled up with 0."""
    count = _symbol_count(len(packed), width)
    filled = torch.nn.functional.pad(packed, (0, packed_size(count, width) - len(packed)))
    return unpack_codes(filled, count, width).numpy()


def _symbol_count(size: int, width: int) -> int:
    return -(-8 * size // width)


def _gaps(places: np.ndarray, count: int, gap_bits: int) -> np.ndarray:
    """The gaps before the nonzero codes at `places` of `count`, as `csrc/entropy.h` has them."""
    full = 2**gap_bits - 1
    zeros = np.diff(places, prepend=-1, append=count) - 1
    fulls = np.cumsum(zeros // full)
    gaps = np.full(fulls[-1] + len(places), full, np.uint8)
    gaps[fulls[:-1] + np.arange(len(places))] = zeros[:-1] % full
    return gaps


# ------------------------------------------------------------------------------------------------
# decoding


class _Reader:
    """Takes a payload's parts, one behind the other."""

    def __init__(self, payload: Tensor) -> None:
        self._rest = payload.numpy()
        self.most_bytes = _MOST_BYTES_OF_A_BYTE * len(self._rest)

    def take(self, size: int) -> np.ndarray:
        if size > len(self._rest):
            raise ValueError("it is cut short")
        part, self._rest = self._rest[:size], self._rest[size:]
        return part

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack(self.take(form.size))

    def table(self, width: int) -> np.ndarray:
        """Code lengths of symbols of `width` bits."""
        count = int(self.take(1)[0]) + 1
        if count > 2**width:
            raise ValueError(f"it has {count} symbols of {width} bits")
        packed = self.take(packed_size(count, _LENGTH_BITS))
        return unpack_codes(torch.from_numpy(packed), count, _LENGTH_BITS).numpy()

    def rest(self) -> np.ndarray:
        return self.take(len(self._rest))


def _read_header(reader: _Reader) -> tuple[int, int, int]:
    kind, width, size = reader.unpack(_HEADER)
    if kind not in (_HUFFMAN, _RELATIVE) or not 1 <= width <= 8:
        raise ValueError(f"it is of kind {kind} with {width} bits, which this nncx does not know")
    if size > reader.most_bytes:
        raise ValueError(f"it cannot hold {size} bytes")
    return kind, width, size


def _read_huffman(reader: _Reader, width: int, size: int) -> np.ndarray:
    lengths = reader.table(width)
    packed = _C.huffman_decode(reader.rest(), lengths, _symbol_count(size, width), width)
    if packed[size:].any():
        raise ValueError("it has bits behind its end")
    return packed[:size]


def _read_relative(reader: _Reader, width: int, size: int) -> np.ndarray:
    gap_bits, count, stream_size = reader.unpack(_GAPS)
    if not 1 <= gap_bits <= 8 or count > 8 * stream_size:
        raise ValueError(f"it cannot have {count} gaps of {gap_bits} bits")
    gap_lengths, code_lengths = reader.table(gap_bits), reader.table(width)
    gaps = _C.huffman_decode(reader.take(stream_size), gap_lengths, count, 8)
    nonzero = np.count_nonzero(gaps != 2**gap_bits - 1)
    codes = _C.huffman_decode(reader.rest(), code_lengths, nonzero, 8)
    return _C.relative_decode(gaps, codes, gap_bits, width, size)
