"""The emulator computes what the PTX manual says, and finds the mistakes that it says it finds."""

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from emulator import build

CORES, SM80, SM90 = range(3)  # the emulated GPUs
FIRST = 1024  # the address of the first byte of dynamic shared memory
POISON = 0xD1

# Where 16-byte chunks of a 128-byte line go: the tables of the manual's "Swizzling modes".
LINES = {
    0: ["01234567"],
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: [
        *("01234567", "10325476", "23016745", "32107654"),
        *("45670123", "54761032", "67452301", "76543210"),
    ],
}


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    files = [*build.EMULATOR.glob("*.cpp"), build.EMULATOR / "kernels.cu"]
    library = ctypes.CDLL(str(build.build_or_skip(files, "kernels")))
    library.run_kernel.restype = ctypes.c_char_p
    return library


def run(
    kernels: ctypes.CDLL,
    name: str,
    inputs: np.ndarray,
    output: np.ndarray,
    numbers: Sequence[int] = (),
    *,
    device: int = SM90,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    map: Sequence[int] = (),
) -> str:
    """Runs a kernel of kernels.cu; returns what the emulator found wrong with it."""
    numbers = np.array([*numbers, *[0] * (8 - len(numbers))], np.int64)
    map = np.array(map, np.int64)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (inputs, output, numbers, map)]
    launch = (device, blocks, threads, shared)
    return kernels.run_kernel(name.encode(), *launch, *pointers, len(map)).decode()


def random_bytes(*shape: int) -> np.ndarray:
    """Random bytes at an address that is a multiple of 128."""
    count = int(np.prod(shape))
    memory = np.random.default_rng(count).integers(0, 256, count + 128, np.uint8)
    return memory[-memory.ctypes.data % 128 :][:count].reshape(shape)


def swizzled(picture: np.ndarray, span: int) -> np.ndarray:
    lines = picture.reshape(-1, 8, 16)
    table = LINES[span]
    order = [[int(chunk) for chunk in table[i % len(table)]] for i in range(len(lines))]
    return np.stack([line[o] for line, o in zip(lines, order, strict=True)]).reshape(-1)


# ------------------------------------------------------------------------------------------------
# Threads, warps and shared memory.


def test_shared_memory_starts_poisoned_in_every_block(kernels):
    out = np.zeros((3, 128), np.uint8)
    assert not run(kernels, "uninitialized", out, out, threads=64, blocks=3, shared=64)
    assert (out == POISON).all()


def test_missing_syncthreads(kernels):
    x, out = random_bytes(256), np.zeros(256, np.uint8)
    assert not run(kernels, "reversed", x, out, threads=256)
    assert (out == x[::-1]).all()
    assert not run(kernels, "reversed", x, out, [1], threads=256)
    assert (out != x[::-1]).any()


@pytest.mark.parametrize(
    ("at", "found"), [(0, False), (99, False), (100, True), (1023, True), (1024, True), (-1, True)]
)
def test_out_of_bounds(kernels, at: int, found: bool):
    out = np.zeros(1, np.uint8)
    error = run(kernels, "out_of_bounds", out, out, [0, at], shared=100)
    assert ("dynamic shared memory" in error) == found


def test_faults_end_the_launch(kernels):
    out = np.zeros(1, np.uint8)
    assert "memory that is not there" in run(kernels, "null_pointer", out, out)
    assert "stack is too small" in run(kernels, "stack_overflow", out, out)
    assert not run(kernels, "out_of_bounds", out, out, shared=1)  # the next one works


def test_misaligned_access(kernels):
    x, out = random_bytes(32), random_bytes(8)
    assert not run(kernels, "misaligned", x, out, [0, 8])
    assert (out == x[8:16]).all()
    assert "must be aligned" in run(kernels, "misaligned", x, out, [0, 12])


def test_deadlock_names_the_places(kernels):
    out = np.zeros(64, np.uint8)
    assert not run(kernels, "barriers", out, out, threads=64)
    assert "must be one place" in run(kernels, "barriers", out, out, [1], threads=64)
    error = run(kernels, "barriers", out, out, [2], threads=64)
    assert "deadlock" in error and "block (0, 0, 0)" in error
    assert error.count("32 threads") == 2 and error.count("kernels.cu:") == 2


def test_warp_functions(kernels):
    out = np.zeros((5, 32), np.uint32)
    assert not run(kernels, "warp", out, out)
    lanes = np.arange(32)
    assert (out[0] == sum(1 << i for i in range(0, 32, 3))).all()
    assert (out[1] == lanes.sum()).all()
    assert (out[2] == np.where(lanes < 14, lanes + 2, np.where(lanes < 16, lanes, 0))).all()
    assert (out[3] == np.where(lanes < 5, lanes, lanes - 5)).all()
    assert (out[4] == lanes // 8 * 8 + 3).all()


@pytest.mark.parametrize(
    ("mistake", "message"), [(1, "deadlock"), (2, "one place"), (3, "not in the mask")]
)
def test_diverged_warps(kernels, mistake: int, message: str):
    out = np.zeros((5, 32), np.uint32)
    assert message in run(kernels, "warp", out, out, [mistake])


# ------------------------------------------------------------------------------------------------
# sm_80


@pytest.mark.parametrize("mistake", range(4))
def test_cp_async(kernels, mistake: int):
    x, out = random_bytes(7, 1024), np.zeros((7, 1024), np.uint8)
    error = run(kernels, "staged_copy", x, out, [mistake, 7], device=SM80, threads=64)
    expected = np.where(np.arange(7)[:, None] % 3 != 2, x[:, ::-1], 0)
    right = not error and (out == expected).all()
    assert right == (mistake == 0)


@pytest.mark.parametrize("format", ["f16", "bf16"])
def test_mma_of_floats(kernels, format: str):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[format]
    x, out = torch.randn(24, 16).to(dtype), np.zeros((16, 8), np.float32)
    assert not run(kernels, f"fragments_{format}", x.view(torch.uint8).numpy(), out, device=SM80)
    expected = 1 + x[:16].double() @ x[16:].double().T
    np.testing.assert_allclose(out, expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", ["b1", "s8"])
def test_mma(kernels, format: str):
    x, out = random_bytes(24, 32), np.zeros((16, 8), np.int32)
    assert not run(kernels, f"fragments_{format}", x, out, device=SM80)
    assert (out == 1 + products(x[:16], x[16:], format)).all()
    error = run(kernels, f"fragments_{format}", x, out, device=CORES)
    assert "needs code compiled for 8.0" in error


def products(a: np.ndarray, b: np.ndarray, format: str) -> np.ndarray:
    if format == "b1":
        a, b = (np.unpackbits(m, axis=1).astype(np.int32) for m in (a, b))
    else:
        a, b = (m.view(np.int8).astype(np.int32) for m in (a, b))
    return a @ b.T


def test_ldmatrix(kernels):
    x, out = random_bytes(4, 8, 16), np.zeros((32, 4), np.uint32)
    assert not run(kernels, "matrices", x, out, device=SM80)
    assert (out == x.view(np.uint32).reshape(4, 32).T).all()
    assert "must be aligned" in run(kernels, "matrices", x, out, [1], device=SM80)


# ------------------------------------------------------------------------------------------------
# sm_90a


def load_box(kernels, x, rows, width, map, at, *, images=0, offsets=(0, 0), mistake=0, threads=32):
    out = np.zeros(rows * width, np.uint8)
    numbers = [mistake, out.size, images, *at, *[0] * (4 - len(at)), offsets[0] + 256 * offsets[1]]
    error = run(kernels, "load_box", x, out, numbers, shared=out.size + 8, map=map, threads=threads)
    return error or out


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("at", [(0, 0), (16, 3), (96, 30), (-16, -5), (112, 40)])
def test_tma_tiled(kernels, span: int, at: tuple[int, int]):
    x, rows, width, size = random_bytes(37, 144), 24, span or 48, (37, 119)
    map = [size[1], size[0], 144, width, rows, span]
    padded = np.zeros((100, 300), np.uint8)
    padded[20:57, 50:169] = x[:, :119]
    expected = padded[20 + at[1] :][:rows, 50 + at[0] :][:, :width]
    assert (load_box(kernels, x, rows, width, map, at) == swizzled(expected, span)).all()


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "padding"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((2, 3), (2, 1), (1, 2), (0, 2)),
        ((1, 1), (3, 2), (1, 1), (0, 0)),
        ((5, 4), (1, 2), (2, 3), (4, 1)),
    ],
)
@pytest.mark.parametrize(("c", "span"), [(0, 0), (16, 64), (64, 32)])
def test_tma_im2col_is_a_convolution(kernels, kernel, stride, dilation, padding, c, span):
    """The rows that a box reads are the pixels under one tap of the filter, output by output."""
    n, height, width, channels = 3, 11, 13, 80
    rows, depth = 40, span or 16
    x = random_bytes(n, height, width, channels)
    padded = np.pad(x, [(0, 0), *[(p, p) for p in padding], (0, 64)])
    (reach_h, reach_w) = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
    out_h = (height + 2 * padding[0] - reach_h - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - reach_w - 1) // stride[1] + 1
    map = [channels, width, height, n, channels, width * channels, height * width * channels]
    map += [-padding[1], -padding[0], padding[1] - reach_w, padding[0] - reach_h]
    map += [depth, rows, stride[1], stride[0], span]
    for r, s in np.ndindex(kernel):
        offset = (s * dilation[1], r * dilation[0])
        taps = padded[:, offset[1] :: stride[0], offset[0] :: stride[1], c : c + depth]
        taps = taps[:, :out_h, :out_w].reshape(-1, depth)
        for first in (0, 17, len(taps) - 5):
            image, h, w = np.unravel_index(first, (n, out_h, out_w))
            at = (c, w * stride[1] - padding[1], h * stride[0] - padding[0], image)
            expected = np.pad(taps, [(0, rows), (0, 0)])[first : first + rows]
            out = load_box(kernels, x, rows, depth, map, at, images=1, offsets=offset)
            assert (out == swizzled(expected, span)).all()


def test_tma_of_memory_that_is_not_there(kernels, monkeypatch):
    x, errors = random_bytes(64, 128), set()
    for seed in range(6):
        monkeypatch.setenv("NNCX_EMULATOR_SEED", str(seed))
        error = load_box(kernels, x, 8, 64, [128, 64, 1 << 38, 64, 8, 64], (0, 0))
        assert "memory that is not there" in error
        errors.add("in the background" in error)
    assert errors == {False, True}


def test_maps_that_the_driver_refuses(kernels):
    x = random_bytes(64, 128)
    good = [128, 64, 128, 64, 8, 64]
    assert not isinstance(load_box(kernels, x, 8, 64, good, (0, 0)), str)
    for at, value in [(0, 0), (2, 120), (3, 24), (3, 272), (4, 257), (5, 32), (5, 48)]:
        map = [*good[:at], value, *good[at + 1 :]]
        assert load_box(kernels, x, 8, 64, map, (0, 0)) == "the driver refuses the map"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (1, "barrier_fence_init"),
        (2, "more bytes"),
        (3, "deadlock"),
        (4, "never waited for"),
        (5, "fence_async"),
        (6, "more threads arrive"),
        (7, "no initialized mbarrier"),
    ],
)
def test_mistakes_with_barriers(kernels, mistake: int, message: str):
    x = random_bytes(64, 128)
    map = [128, 64, 128, 64, 8, 64]
    errors = []
    for seed in range(4):  # what lands at once needs no wait, by chance
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NNCX_EMULATOR_SEED", str(seed))
            errors.append(load_box(kernels, x, 8, 64, map, (0, 0), mistake=mistake))
    assert any(isinstance(error, str) and message in error for error in errors)


def operand(matrix: np.ndarray, span: int, address: int) -> tuple[np.ndarray, int]:
    """A picture of shared memory that holds [rows, 32] bytes K-major, and its descriptor."""
    rows = len(matrix)
    if span == 0:  # 8 x 16 bytes follow one another: two along K, then the next eight rows
        picture = matrix.reshape(rows // 8, 8, 2, 16).transpose(0, 2, 1, 3).reshape(-1)
        return picture, (address >> 4) | (128 >> 4) << 16 | (256 >> 4) << 32
    wide = random_bytes(rows, span).copy()
    k = 32 if span > 32 else 0  # the second of the 32 bytes that fit
    wide[:, k : k + 32] = matrix
    descriptor = (address + k) >> 4 | (8 * span >> 4) << 32 | {128: 1, 64: 2, 32: 3}[span] << 62
    return swizzled(wide, span), descriptor


def multiply(kernels, format, n, span, mistake=0):
    a, b = random_bytes(64, 32), random_bytes(n, 32)
    picture_a, descriptor_a = operand(a, span, FIRST)
    start_b = -(-picture_a.size // 1024) * 1024
    picture_b, descriptor_b = operand(b, span, FIRST + start_b)
    shared = random_bytes(start_b + picture_b.size)
    shared[: picture_a.size] = picture_a
    shared[start_b:] = picture_b
    out = np.zeros((64, n), np.int32)
    numbers = np.array([mistake, shared.size, descriptor_a, descriptor_b], np.uint64).view(np.int64)
    name = f"multiply_{format}_{n}"
    error = run(kernels, name, shared, out, numbers, shared=shared.size, threads=128)
    return error, bool((out == 2 * products(a, b, format)).all())


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(("format", "n"), [("b1", 8), ("b1", 256), ("s8", 24), ("s8", 128)])
def test_wgmma(kernels, format: str, n: int, span: int):
    assert multiply(kernels, format, n, span) == ("", True)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (1, "without fence_async"),
        (2, "wgmma_fence"),
        (3, ""),
        (4, "never waited for"),
        (5, "must agree"),
        (6, ""),
        (7, "without fence_async"),
    ],
)
def test_mistakes_with_wgmma(kernels, monkeypatch, mistake: int, message: str):
    results = []
    for seed in range(4):
        monkeypatch.setenv("NNCX_EMULATOR_SEED", str(seed))
        results.append(multiply(kernels, "b1", 8, 128, mistake))
    assert any(not right and message in error for error, right in results)


@pytest.mark.parametrize("mistake", range(4))
def test_pipeline(kernels, mistake: int):
    x, out = random_bytes(64, 1024), np.zeros((64, 64), np.int32)
    map = [1024, 64, 1024, 128, 64, 128]
    shared = 2 * 64 * 128 + 32
    error = run(kernels, "pipeline", x, out, [mistake, 8], shared=shared, threads=160, map=map)
    right = not error and (out == products(x, x, "s8")).all()
    assert right == (mistake == 0)
