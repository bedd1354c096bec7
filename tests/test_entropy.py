"""The entropy codec against a Huffman code of plain Python; payloads, whole and damaged.

`reference_*` are written from the definitions: a heap, dictionaries, strings of "0" and "1".
"""

import functools
import heapq
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import many_examples

from nncx import _C, _entropy
from nncx.nn.codes import pack_codes, packed_size

LIMIT = 12


def reference_bits(counts: list[int]) -> int:
    """The length of a text under Huffman's own code, which has no limit."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    bits = heap[0] if len(heap) == 1 else 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        bits += pair
        heapq.heappush(heap, pair)
    return bits


def reference_limited_bits(counts: list[int], limit: int) -> int:
    """The length of a text under the best code of limited lengths, by trying all of them."""
    counts = sorted((count for count in counts if count), reverse=True)

    @functools.cache
    def best(first: int, length: int, room: int) -> float:
        """Of symbols from `first` on, none shorter than `length`; `room` in codes of `limit`."""
        if first == len(counts):
            return 0
        if length > limit or (len(counts) - first) > room:
            return float("inf")
        takes = 1 << (limit - length)
        here = float("inf")
        if takes <= room:
            here = counts[first] * length + best(first + 1, length, room - takes)
        return min(here, best(first, length + 1, room))

    return int(best(0, 1, 1 << limit))


def reference_codes(lengths: list[int]) -> dict[int, str]:
    """The canonical code: numbers in the order of (length, symbol)."""
    codes, number, before = {}, 0, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        number <<= length - before
        codes[symbol] = f"{number:0{length}b}"
        number, before = number + 1, length
    return codes


def reference_encode(symbols: list[int], lengths: list[int]) -> bytes:
    codes = reference_codes(lengths)
    text = "".join(codes[symbol] for symbol in symbols)
    bytes_of_bits = (text[i : i + 8][::-1] for i in range(0, len(text), 8))
    return bytes(int(bits, 2) for bits in bytes_of_bits)


def reference_pack(codes: list[int], width: int) -> bytes:
    stream = sum(code << i * width for i, code in enumerate(codes))
    return stream.to_bytes(packed_size(len(codes), width), "little")


def lengths_of(counts: list[int]) -> list[int]:
    return _C.huffman_lengths(np.array(counts, np.int64)).tolist()


def array(values: bytes | list[int]) -> np.ndarray:
    return np.array(list(values), np.uint8)


def counts_of(symbols: list[int], width: int) -> list[int]:
    counter = Counter(symbols)
    return [counter[symbol] for symbol in range(2**width)]


FIBONACCI = [1, 1]
while len(FIBONACCI) < 40:
    FIBONACCI.append(FIBONACCI[-1] + FIBONACCI[-2])

COUNTS = {
    "two": [3, 5],
    "equal": [7] * 256,
    "one of many": [0, 0, 0, 9, 0, 0],
    "the first": [9, 0, 0],
    "none": [0] * 16,
    "with holes": [0, 5, 0, 0, 1, 1, 40, 0],
    "at the limit": FIBONACCI[:13],  # Huffman's code for it has 12 bits
    "beyond the limit": FIBONACCI,
    "powers": [2**i for i in range(40)],
    "256, skewed": [2 ** (i // 8) for i in range(256)],
    "256, one frequent": [10**9] + [1] * 255,
}

# ---------------------------------------------------------------------------------------------
# code lengths


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_code_is_complete_and_within_the_limit(counts):
    lengths = lengths_of(counts)
    assert len(lengths) == len(counts) and max(lengths) <= LIMIT
    assert sum(2.0**-length for length in lengths if length) == 1
    assert all(length for length, count in zip(lengths, counts, strict=True) if count)
    assert sum(map(bool, lengths)) == max(2, sum(map(bool, counts)))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_code_is_as_short_as_huffmans_where_the_limit_does_not_bind(counts):
    lengths, shortest = lengths_of(counts), reference_bits(counts)
    bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
    if max(lengths) < LIMIT:
        assert bits == shortest
    assert bits >= shortest


def test_the_limit_costs_what_it_must():
    assert max(lengths_of(FIBONACCI[:13])) == LIMIT
    for counts in (FIBONACCI[:14], FIBONACCI[:15], [2**i for i in range(14)]):
        lengths = lengths_of(counts)
        bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
        assert bits == reference_limited_bits(counts, LIMIT) > reference_bits(counts)


@given(st.lists(st.integers(0, 2**20), min_size=2, max_size=256))
@many_examples
def test_any_counts_give_an_optimal_code(counts):
    lengths = lengths_of(counts)
    bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
    assert sum(2 ** (LIMIT - length) for length in lengths if length) == 2**LIMIT
    assert bits == reference_bits(counts) or max(lengths) == LIMIT


def test_rarer_symbols_have_longer_codes_and_equal_ones_are_in_order():
    assert lengths_of([1, 1, 1]) == [2, 2, 1]
    assert lengths_of([8, 1, 4, 1]) == [1, 3, 2, 3]
    assert lengths_of([0, 0, 3, 0]) == [1, 0, 1, 0]


# ---------------------------------------------------------------------------------------------
# streams


@st.composite
def texts(draw):
    """Symbols of `width` bits, few of them or all, with counts as uneven as may be."""
    width = draw(st.integers(1, 8))
    used = draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=2**width))
    skew = draw(st.sampled_from([1, 2, 6]))
    size = draw(st.sampled_from([0, 1, 2, 7, 63, 64, 65, 300, 1009]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    places = (rng.random(size) ** skew * len(used)).astype(int)
    return [used[place] for place in places], width


@given(texts())
@many_examples
def test_streams_are_those_of_the_canonical_code(text):
    symbols, width = text
    lengths = lengths_of(counts_of(symbols, width))
    stream = _C.huffman_encode(array(symbols), array(lengths))
    assert stream.tobytes() == reference_encode(symbols, lengths)
    for output_width in {width, 8}:
        packed = _C.huffman_decode(stream, array(lengths), len(symbols), output_width)
        assert packed.tobytes() == reference_pack(symbols, output_width)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_code_is_decoded(counts):
    lengths = lengths_of(counts)
    symbols = [symbol for symbol, length in enumerate(lengths) if length] * 9
    stream = _C.huffman_encode(array(symbols), array(lengths))
    assert stream.tobytes() == reference_encode(symbols, lengths)
    assert _C.huffman_decode(stream, array(lengths), len(symbols), 8).tolist() == symbols


def test_many_threads_decode_at_once():
    symbols = np.random.default_rng(0).integers(0, 200, 200_000).astype(np.uint8)
    lengths = _C.huffman_lengths(np.bincount(symbols))
    stream, results = _C.huffman_encode(symbols, lengths), []

    def decode():
        results.append(_C.huffman_decode(stream, lengths, len(symbols), 8))

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(result, symbols) for result in results)


@pytest.mark.parametrize(
    "lengths, message",
    [
        ([1, 1, 1], "leave too little room"),
        ([1, 2, 2, 12], "leave too little room"),
        ([1, 2, 3], "leave bits without a meaning"),
        ([0, 0], "leave bits without a meaning"),
        ([1, 0], "leave bits without a meaning"),
        ([13, *range(1, 14)], "longer than 12 bits"),
        ([255, 1, 1], "longer than 12 bits"),
        ([0], "must have 2 to .* symbols, got 1"),
        ([8] * 257, "must have 2 to .* symbols, got 257"),
    ],
)
def test_a_code_that_is_none_is_refused(lengths, message):
    for call in (
        lambda: _C.huffman_decode(array([0] * 9), array(lengths), 3, 8),
        lambda: _C.huffman_encode(array([0]), array(lengths)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_symbol_beyond_its_width_is_refused():
    with pytest.raises(ValueError, match="must have 2 to 4 symbols, got 5"):
        _C.huffman_decode(array([0]), array([1, 2, 3, 4, 4]), 1, 2)


@pytest.mark.parametrize("size", [1, 5, 100, 1000])
def test_a_stream_must_be_as_long_as_its_symbols(size):
    symbols = np.random.default_rng(size).integers(0, 40, size).astype(np.uint8)
    lengths = _C.huffman_lengths(np.bincount(symbols, minlength=2))
    stream = _C.huffman_encode(symbols, lengths)
    for cut in range(0, len(stream), max(1, len(stream) // 40)):
        with pytest.raises(ValueError, match="ends early"):
            _C.huffman_decode(stream[:cut], lengths, size, 8)
    for tail in ([0], [255], [0] * 20):
        with pytest.raises(ValueError, match="goes on behind its end"):
            _C.huffman_decode(np.append(stream, array(tail)), lengths, size, 8)
    with pytest.raises(ValueError, match="ends early"):
        _C.huffman_decode(stream, lengths, size + 8, 8)


def test_bits_behind_the_last_symbol_are_zero():
    lengths = array([1, 2, 2])
    stream = _C.huffman_encode(array([0, 1]), lengths)
    stream[-1] |= 128
    with pytest.raises(ValueError, match="goes on behind its end"):
        _C.huffman_decode(stream, lengths, 2, 8)


@pytest.mark.parametrize("count", [-1, 9, 2**40, 2**63 - 1])
def test_a_count_that_no_stream_holds_is_refused_before_memory_is_taken(count):
    with pytest.raises(ValueError, match="ends early"):
        _C.huffman_decode(array([0]), array([1, 1]), count, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _C.huffman_lengths(np.array([5])), "must have 2 to 256 symbols, got 1"),
        (lambda: _C.huffman_lengths(np.array([5, -1])), "counts must not be negative"),
        (lambda: _C.huffman_lengths(np.array([2**48, 1])), "2\\^48 together at most"),
        (lambda: _C.huffman_lengths(np.ones((2, 2), int)), "must have one dimension, got 2"),
        (lambda: _C.huffman_encode(array([2]), array([1, 1])), "must all have a code"),
        (lambda: _C.huffman_encode(array([1]), array([1, 0, 1])), "must all have a code"),
        (lambda: _C.huffman_decode(array([0]), array([1, 1]), 1, 0), "1 to 8 bits, got 0"),
        (lambda: _C.huffman_decode(array([0]), array([1, 1]), 1, 9), "1 to 8 bits, got 9"),
        (lambda: _C.relative_decode(array([]), array([]), 0, 8, 0), "a gap must be .* got 0"),
        (lambda: _C.relative_decode(array([]), array([]), 8, 9, 0), "a code must be .* got 9"),
        (lambda: _C.relative_decode(array([]), array([]), 8, 8, -1), "do not lead to its end"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------
# relative indices


def reference_gaps(codes: list[int], gap_bits: int) -> list[int]:
    full, gaps, zeros = 2**gap_bits - 1, [], 0
    for code in codes:
        if code:
            gaps.append(zeros)
            zeros = 0
        elif zeros + 1 == full:
            gaps.append(full)
            zeros = 0
        else:
            zeros += 1
    return gaps


@st.composite
def sparse_codes(draw):
    width = draw(st.integers(1, 8))
    size = draw(st.sampled_from([1, 2, 7, 8, 9, 64, 255, 256, 257, 1009]))
    density = draw(st.sampled_from([0, 0.003, 0.05, 0.3, 1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = rng.integers(1, 2**width, size) * (rng.random(size) < density)
    return codes.tolist(), width


@given(sparse_codes(), st.integers(1, 8))
@many_examples
def test_gaps_lead_back_to_the_codes(sparse, gap_bits):
    codes, width = sparse
    packed = reference_pack(codes, width)
    codes += [0] * (-(-8 * len(packed) // width) - len(codes))  # those that fill the last byte
    gaps, nonzero = reference_gaps(codes, gap_bits), [code for code in codes if code]
    assert _entropy._gaps(np.flatnonzero(codes), len(codes), gap_bits).tolist() == gaps
    decoded = _C.relative_decode(array(gaps), array(nonzero), gap_bits, width, len(packed))
    assert decoded.tobytes() == packed


@pytest.mark.parametrize(
    "gaps, codes, size, message",
    [
        ([3, 3], [1, 1], 4, None),
        ([3, 3], [1, 1], 3, "lead behind its end"),
        ([3, 3], [1], 4, "less nonzero codes than gaps"),
        ([3, 3], [1, 1, 1], 4, "more nonzero codes than gaps"),
        ([3, 3], [1, 16], 4, "a code of it is too large"),
        ([3, 3], [1, 1], 11, None),
        ([3, 3], [1, 1], 12, "do not lead to its end"),
        ([15], [], 7, "do not lead to its end"),
        ([15], [], 8, None),
        ([255, 255], [], 8, "do not lead to its end"),
        ([], [], 0, None),
    ],
)
def test_an_index_that_does_not_fit_is_refused(gaps, codes, size, message):
    """Of codes and gaps of 4 bits."""
    if message is None:
        assert len(_C.relative_decode(array(gaps), array(codes), 4, 4, size)) == size
        return
    with pytest.raises(ValueError, match=message):
        _C.relative_decode(array(gaps), array(codes), 4, 4, size)


def test_a_code_that_is_cut_by_the_end_is_refused():
    """The third code of 3 bits has two of them in the first byte."""
    assert _C.relative_decode(array([2]), array([3]), 4, 3, 1).tolist() == [3 << 6]
    with pytest.raises(ValueError, match="its last code does not fit"):
        _C.relative_decode(array([2]), array([4]), 4, 3, 1)


# ---------------------------------------------------------------------------------------------
# payloads


def sparse_tensor(count: int, width: int, density: float) -> torch.Tensor:
    codes = torch.randint(1, 2**width, (count,)) * (torch.rand(count) < density)
    return pack_codes(codes.to(torch.uint8), width)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 997, 20_000])
@pytest.mark.parametrize("width", range(1, 9))
def test_what_is_decoded_is_what_was_encoded(width, count, density):
    packed = sparse_tensor(count, width, density)
    payload = _entropy.encode(packed, width)
    if len(payload) == len(packed):  # the codes themselves
        assert torch.equal(payload, packed)
        return
    assert len(payload) < len(packed) == _entropy.decoded_size(payload)
    assert torch.equal(_entropy.decode(payload), packed)
    assert torch.equal(_entropy.encode(packed, width), payload)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("count", [3, 100])
def test_every_candidate_is_a_payload_of_the_size_it_says(count, width):
    packed = sparse_tensor(count, width, 0.2)
    kinds = Counter()
    for candidate in _entropy._candidates(packed, width):
        payload = torch.frombuffer(bytearray(candidate.payload()), dtype=torch.uint8)
        assert len(payload) == candidate.size
        assert torch.equal(_entropy.decode(payload), packed)
        kinds[int(payload[0])] += 1
    assert kinds == {1: 8 // width, 2: 8}


def test_the_smallest_is_taken():
    dense = torch.randint(0, 256, (999,), dtype=torch.uint8)
    assert torch.equal(_entropy.encode(dense, 8), dense)
    skewed = pack_codes((torch.rand(4000) * torch.rand(4000) * 16).to(torch.uint8), 4)
    assert _entropy.encode(skewed, 4)[0] == 1
    assert _entropy.encode(sparse_tensor(4000, 5, 0.05), 5)[0] == 2


def entropy_bits(symbols: torch.Tensor) -> float:
    counts = torch.bincount(symbols.flatten().int()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum() * symbols.numel())


@pytest.mark.parametrize(
    "width, density, over",
    [(1, 0.05, 0.08), (2, 0.1, 0.05), (5, 0.08, 0.05), (5, 1.0, 0.01), (8, 0.2, 0.05)],
)
def test_payloads_come_close_to_the_entropy_of_independent_codes(width, density, over):
    """Also below a bit a code; `over` is what they take beyond, tables included."""
    codes = torch.randint(1, 2**width, (100_000,)) * (torch.rand(100_000) < density)
    payload = _entropy.encode(pack_codes(codes.to(torch.uint8), width), width)
    payload_bits = 8 * len(payload)
    assert entropy_bits(codes) * 0.999 < payload_bits < entropy_bits(codes) * (1 + over)


def test_a_wrong_width_costs_bytes_but_no_bits():
    packed = sparse_tensor(3001, 5, 0.05)
    sizes = {}
    for width in range(1, 9):
        payload = _entropy.encode(packed, width)
        assert torch.equal(_entropy.decode(payload), packed)
        sizes[width] = len(payload)
    assert min(sizes, key=sizes.get) == 5


@pytest.mark.parametrize("width", [0, 9, -1])
def test_a_width_that_no_code_has_is_refused(width):
    with pytest.raises(ValueError, match="the width of a code must be 1 to 8 bits"):
        _entropy.encode(torch.zeros(100, dtype=torch.uint8), width)


def refused_or_bounded(payload: torch.Tensor) -> bool:
    try:
        size = _entropy.decoded_size(payload)
        assert size <= 2040 * len(payload)
        assert len(_entropy.decode(payload)) == size
    except ValueError as error:
        assert len(str(error)) < 200
        return True
    return False


@pytest.mark.parametrize("width, density", [(1, 0.01), (2, 0.3), (5, 0.05), (8, 0.5)])
def test_damaged_payloads_are_refused_or_give_what_they_say(width, density):
    payload = _entropy.encode(sparse_tensor(600, width, density), width)
    refused = 0
    for position in range(len(payload)):
        for flip in (1, 128, 255):
            damaged = payload.clone()
            damaged[position] ^= flip
            refused += refused_or_bounded(damaged)
    assert refused > len(payload) / 10
    for length in range(len(payload)):
        assert refused_or_bounded(payload[:length])
    assert refused_or_bounded(torch.cat([payload, torch.zeros(1, dtype=torch.uint8)]))


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("size", [2**20, 2**32, 2**63, 2**64 - 1])
def test_a_payload_that_claims_to_be_huge_is_refused_at_once(kind, size):
    payload = _entropy._HEADER.pack(kind, 8, size) + bytes(100)
    with pytest.raises(ValueError, match=f"it cannot hold {size} bytes"):
        _entropy.decoded_size(torch.frombuffer(bytearray(payload), dtype=torch.uint8))


@pytest.mark.parametrize(
    "gap_bits, gaps, stream",
    [(0, 1, 1), (9, 1, 1), (8, 9, 1), (8, 2**64 - 1, 1), (8, 8, 2**64 - 1)],
)
def test_gaps_that_cannot_be_are_refused(gap_bits, gaps, stream):
    head = _entropy._HEADER.pack(2, 8, 100) + _entropy._GAPS.pack(gap_bits, gaps, stream)
    payload = torch.frombuffer(
        bytearray(head + bytes([1, 17, 1, 17]) + bytes(40)), dtype=torch.uint8
    )
    with pytest.raises(ValueError, match="it cannot have|it is cut short"):
        _entropy.decode(payload)


def test_tables_with_too_many_symbols_are_refused():
    head = _entropy._HEADER.pack(1, 2, 1)
    payload = torch.frombuffer(bytearray(head + bytes([4, 0x21, 0x43, 0x4, 0])), dtype=torch.uint8)
    with pytest.raises(ValueError, match="it has 5 symbols of 2 bits"):
        _entropy.decode(payload)
