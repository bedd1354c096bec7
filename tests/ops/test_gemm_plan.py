"""The GEMM of the binary and int8 ops on CUDA: which kernel a shape gets, and shapes for each."""

from typing import Any

import places
import pytest
import torch
from gpu_shapes import A100, EMULATED_GPUS, H200, RTX4090, T4, Shape, rows
from int8_operands import codes, zero_point
from torch import Tensor

from nncx import _C, ops

# ------------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize("path", EMULATED_GPUS)
@pytest.mark.parametrize("op", ["binary", "int8"])
def test_few_rows_are_skinny(op: str, path: str) -> None:
    kernel = {m: rows(m, 4096, 4096).plan(op, path, H200)["kernel"] for m in (1, 16, 17, 4096)}
    assert kernel == {1: "skinny", 16: "skinny", 17: path, 4096: path}


@pytest.mark.parametrize(
    ("channels", "address", "piece"),
    [(64, 0, 16), (64, 8, 8), (64, 4, 4), (64, 2, 1), (72, 0, 8), (12, 0, 4), (6, 0, 1), (3, 0, 1)],
)
def test_pieces_divide_channels_and_address(channels: int, address: int, piece: int) -> None:
    shape = Shape((8, channels, 14, 14), 64, (3, 3), padding=(1, 1))
    assert shape.plan("int8", "sm80", A100, address)["piece"] == piece


def test_a_word_of_bits_is_a_piece() -> None:
    for channels, piece in ((1, 8), (64, 8), (65, 16), (129, 8), (256, 16)):
        shape = Shape((8, channels, 14, 14), 64, (3, 3))
        assert shape.plan("binary", "sm80", A100)["piece"] == piece


@pytest.mark.parametrize(
    ("shape", "tile_outputs"),
    [
        (rows(4096, 4096, 4096), 128),
        (rows(4096, 4096, 64), 64),
        (rows(4096, 4096, 130), 64),  # a wide tile would have two outputs
        (rows(8192, 4096, 200), 128),
        (rows(128, 4096, 4096), 64),  # 32 wide tiles would leave 76 multiprocessors idle
        (rows(4096, 4092, 4096), 64),  # pieces of 4 bytes
    ],
)
def test_wide_tiles_of_sm80(shape: Shape, tile_outputs: int) -> None:
    assert shape.plan("int8", "sm80", A100)["tile"] == (128, tile_outputs)
    assert shape.plan("int8", "cuda_cores", A100)["tile"] == (128, 64)


@pytest.mark.parametrize("gpu", [T4, RTX4090, A100, H200])
@pytest.mark.parametrize("path", ["cuda_cores", "sm80"])
@pytest.mark.parametrize("n", [64, 4096])
@pytest.mark.parametrize("k", [1, 128, 129, 300, 4096])
def test_stages_fit_and_are_no_more_than_tiles(
    k: int, n: int, path: str, gpu: tuple[int, int]
) -> None:
    plan = rows(4096, k, n).plan("int8", path, gpu)
    k_tiles = -(-k // 128)
    assert 1 <= plan["stages"] <= k_tiles
    assert plan["shared_bytes"] <= gpu[1]
    if path == "sm80" and gpu is not T4:
        assert plan["stages"] >= min(3, k_tiles)


def test_two_blocks_share_a_multiprocessor_with_memory_for_them() -> None:
    narrow = rows(4096, 4096, 64)
    assert 2 * narrow.plan("int8", "sm80", A100)["shared_bytes"] <= A100[1]
    assert narrow.plan("int8", "sm80", A100)["stages"] == 3
    assert narrow.plan("int8", "sm80", RTX4090)["stages"] == 4  # of one block
    assert rows(4096, 4096, 4096).plan("int8", "sm80", A100)["stages"] == 4  # its registers fill it


# How A is loaded on sm90: batch 8, 14 x 14 pixels
@pytest.mark.parametrize(
    ("op", "channels", "options", "loader"),
    [
        ("int8", 64, {}, "im2col"),
        ("int8", 96, {}, "im2col"),
        ("int8", 80, {}, "gather"),  # columns of 16 bytes
        ("int8", 64, {"kernel_size": (1, 1)}, "tma"),
        ("int8", 80, {"kernel_size": (1, 1)}, "tma"),
        ("int8", 40, {"kernel_size": (1, 1)}, "gather"),  # pixels begin at multiples of 8
        ("int8", 64, {"kernel_size": (1, 1), "stride": (2, 2)}, "im2col"),
        ("int8", 64, {"kernel_size": (1, 1), "groups": 2}, "tma"),
        ("int8", 96, {"kernel_size": (1, 1), "groups": 2}, "gather"),  # 48 bytes: 1.5 steps
        ("int8", 64, {"stride": (8, 1)}, "im2col"),
        ("int8", 64, {"stride": (9, 1)}, "gather"),  # the map's steps end at 8,
        ("int8", 64, {"kernel_size": (7, 1), "dilation": (40, 1), "padding": (128, 0)}, "im2col"),
        ("int8", 64, {"kernel_size": (7, 1), "dilation": (43, 1), "padding": (128, 0)}, "gather"),
        ("binary", 64, {}, "gather"),
        ("binary", 256, {}, "im2col"),
        ("binary", 128, {"kernel_size": (1, 1)}, "tma"),
        ("binary", 64, {"kernel_size": (1, 1)}, "gather"),
    ],
)
def test_loaders(op: str, channels: int, options: dict[str, Any], loader: str) -> None:
    shape = Shape((8, channels, 14, 14), 64, **{"kernel_size": (3, 3), **options})
    plan = shape.plan(op, "sm90", H200)
    assert (plan["kernel"], plan["loader"]) == ("sm90", loader)
    assert shape.plan(op, "sm90", H200, address=8)["loader"] == "gather"


def plan_of_im2col(**options: Any) -> dict[str, Any]:
    return Shape((8, 192, 14, 13), 64, (3, 3), **options).plan("int8", "sm90", H200)["input_map"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": (1, 1)},
        {"padding": (1, 1), "stride": (2, 2)},
        {"padding": (0, 2), "stride": (3, 1)},
        {"padding": (2, 4), "dilation": (2, 3)},
        {"padding": (1, 0), "stride": (8, 2), "dilation": (3, 2)},
    ],
    ids=str,
)
def test_columns_begin_where_the_first_tap_reads(options: dict[str, Any]) -> None:
    """The steps from the lower corner that stay below the upper one are the output's pixels."""
    fields = plan_of_im2col(**options)
    stride, padding, dilation = (
        options.get(name, default)
        for name, default in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
    )
    for i, size in enumerate((13, 14)):  # w first
        of = 1 - i  # torch has h first
        pixels = (size + 2 * padding[of] - 2 * dilation[of] - 1) // stride[of] + 1
        begins = range(fields["lower"][i], size + fields["upper"][i], fields["steps"][i])
        assert [*begins] == [stride[of] * pixel - padding[of] for pixel in range(pixels)]


def test_maps_of_images() -> None:
    fields = plan_of_im2col(padding=(1, 1), groups=2)  # 96 bytes of a group: columns of 32
    assert fields["size"] == (192, 13, 14, 8)
    assert fields["strides"] == (192, 192 * 13, 192 * 13 * 14)
    assert (fields["box"], fields["swizzle"]) == ((32, 128), 32)
    assert plan_of_im2col(padding=(1, 1))["box"] == (64, 128)


def test_maps_of_matrices() -> None:
    plan = rows(600, 304, 200).plan("int8", "sm90", H200)
    assert plan["input_map"] == {
        "size": (304, 600),
        "row_stride": 304,
        "box": (128, 128),
        "swizzle": 128,
    }
    assert plan["weight_map"] == {
        "size": (384, 200),  # a row of the weight is a multiple of 128 bytes
        "row_stride": 384,
        "box": (128, plan["tile"][1]),
        "swizzle": 128,
    }


@pytest.mark.parametrize(
    "tiles", [(1, 1, 1), (5, 3, 2), (16, 4, 1), (17, 4, 3), (40, 1, 1), (1, 9, 2)]
)
def test_the_grid_has_every_tile_once(tiles: tuple[int, int, int]) -> None:
    row_tiles, output_tiles, groups = tiles
    order = [_C.gemm_tile(*tiles, i) for i in range(row_tiles * output_tiles * groups)]
    everything = {
        (g, r, o) for g in range(groups) for r in range(row_tiles) for o in range(output_tiles)
    }
    assert len(order) == len(everything) and set(order) == everything


def test_blocks_side_by_side_share_rows_and_outputs() -> None:
    """128 tiles in a row read 16 + 8 parts of A and B; row by row they would read 2 + 64."""
    order = [_C.gemm_tile(64, 64, 1, i) for i in range(128)]
    assert len({row for _, row, _ in order}) + len({output for *_, output in order}) == 24


def test_what_sm90_leaves_to_sm80() -> None:
    assert rows(4096, 4098, 4096).plan("int8", "sm90", H200)["kernel"] == "sm80"
    assert rows(4096, 4096, 4096).plan("int8", "sm90", H200, address=2)["kernel"] == "sm80"
    assert rows(4096, 0, 4096).plan("int8", "sm90", H200)["kernel"] == "sm80"
    # more classes of border pixels than a block's table has lines
    wide = Shape((8, 64, 14, 14), 64, (3, 3), padding=(129, 0))
    assert wide.plan("int8", "sm90", H200)["kernel"] == "sm80"


@pytest.mark.parametrize(
    ("m", "n", "tile_outputs"),
    [
        (8192, 8192, 256),
        (4096, 4096, 256),
        (40000, 96, 128),
        (4096, 64, 64),
        (128, 8192, 64),  # 128 of the 132 multiprocessors; wider tiles would use 64 or 32
        (1024, 1024, 64),
    ],
)
def test_tiles_of_sm90(m: int, n: int, tile_outputs: int) -> None:
    plan = rows(m, 4096, n).plan("int8", "sm90", H200)
    assert plan["tile"] == (128, tile_outputs)
    assert plan["stages"] == {64: 8, 128: 6, 256: 4}[tile_outputs]
    assert plan["shared_bytes"] <= H200[1]


def test_tiles_count_groups() -> None:
    shape = Shape((2, 96, 16, 16), 130, (3, 3), padding=(1, 1), groups=2)
    assert shape.plan("int8", "sm80", A100)["tiles"] == 4 * 2 * 2


# ------------------------------------------------------------------------------------------------
# Shapes for each kernel of sm80 and cuda_cores: tile, piece, and K in one, two and many tiles

SHAPES = {
    # int8 channels; K is 4, 3 and 3 tiles, each time with a rest of steps that is not whole
    "wide, 16": (Shape((3, 48, 12, 13), 128, (3, 3), padding=(1, 1)), (128, 16)),
    "wide, 8": (Shape((2, 40, 20, 18), 100, (3, 3), (1, 1), (1, 2), (2, 1)), (128, 8)),
    "narrow, 16": (Shape((1, 112, 15, 17), 65, (3, 1), (2, 1), (1, 0)), (64, 16)),
    "narrow, 8": (Shape((1, 24, 9, 11), 33, (5, 3), (1, 2), (2, 1)), (64, 8)),
    "narrow, 4": (Shape((2, 20, 9, 7), 66, (3, 5), (1, 1), (1, 2)), (64, 4)),
    "narrow, 1": (Shape((2, 7, 12, 11), 31, (3, 7), (1, 1), (1, 3)), (64, 1)),
    "first layer": (Shape((1, 3, 31, 29), 64, (7, 7), (2, 2), (3, 3)), (64, 1)),
    "one step": (Shape((1, 3, 14, 13), 16, (3, 3), padding=(1, 1)), (64, 1)),
    "rows": (rows(300, 1000, 257), (64, 8)),
    "odd rows": (rows(131, 130, 70), (64, 1)),
    "groups, wide": (Shape((3, 48, 9, 8), 200, (3, 3), padding=(1, 1), groups=2), (128, 8)),
    "depthwise": (Shape((2, 10, 9, 8), 10, (3, 3), padding=(1, 1), groups=10), (64, 1)),
    "more taps outside than inside": (Shape((2, 16, 2, 3), 20, (5, 5), padding=(4, 4)), (64, 16)),
}


# For sm90: tile and loader; K in 1 to 17 blocks of 128 bytes, the last of 1 to 4 steps; and more
# tiles than multiprocessors, so that blocks go on to a second one.
SM90_SHAPES = {
    "rows, 256": (rows(600, 304, 512), (256, "tma")),
    "rows, 128": (rows(900, 176, 100), (128, "tma")),
    "rows, 64, many blocks": (rows(1000, 2064, 60), (64, "tma")),
    "rows, less than a step": (rows(700, 16, 70), (128, "tma")),
    "pixels of groups": (Shape((2, 192, 12, 13), 30, groups=3), (64, "tma")),
    "columns of 128": (Shape((3, 128, 20, 18), 512, (3, 3), padding=(1, 1)), (256, "im2col")),
    "columns of 64": (Shape((2, 192, 21, 39), 70, (3, 2), (2, 1), (1, 1), (1, 2)), (128, "im2col")),
    "columns of 32": (Shape((9, 96, 9, 8), 40, (3, 3), padding=(1, 1)), (64, "im2col")),
    "columns, groups": (
        Shape((9, 192, 9, 8), 80, (3, 3), (1, 2), (2, 0), groups=2),
        (64, "im2col"),
    ),
    "taps outside": (Shape((30, 32, 2, 3), 20, (5, 3), padding=(4, 1)), (64, "im2col")),
    "pieces of 16": (Shape((4, 48, 12, 13), 512, (3, 3), padding=(1, 1)), (256, "gather")),
    "pieces of 8": (Shape((3, 40, 20, 18), 100, (3, 3), (1, 1), (1, 2), (2, 1)), (128, "gather")),
    "pieces of 4": (Shape((9, 20, 9, 7), 66, (3, 5), (1, 1), (1, 2)), (128, "gather")),
    "a group's bytes": (Shape((4, 72, 12, 13), 34, groups=2), (64, "gather")),
    "wide stride": (Shape((30, 32, 40, 41), 30, (3, 3), (9, 9)), (64, "gather")),
}

CASES = [
    *[(place, name) for place in ("emulated cuda_cores", "emulated sm80") for name in SHAPES],
    *[("emulated sm90", name) for name in SM90_SHAPES],
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def place(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture
def shape(case: tuple[str, str]) -> Shape:
    return (SHAPES | SM90_SHAPES)[case[1]][0]


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_below_are_for_that_kernel(name: str) -> None:
    shape, (tile_outputs, piece) = SHAPES[name]
    plan = shape.plan("int8", "sm80", EMULATED_GPUS["sm80"])
    assert (plan["kernel"], plan["tile"], plan["piece"]) == ("sm80", (128, tile_outputs), piece)


@pytest.mark.parametrize("name", SM90_SHAPES)
def test_the_shapes_below_are_for_that_kernel_of_sm90(name: str) -> None:
    shape, (tile_outputs, loader) = SM90_SHAPES[name]
    plan = shape.plan("int8", "sm90", EMULATED_GPUS["sm90"])
    assert (plan["kernel"], plan["tile"], plan["loader"]) == ("sm90", (128, tile_outputs), loader)
    assert plan["tiles"] > EMULATED_GPUS["sm90"][0]


def at_both(place: str, run: Any) -> tuple[Tensor, Tensor]:
    """What the emulated GPU computes, and the CPU."""
    with places.at(place):
        out = run()
    with places.at(places.CPU_PATHS[0]):
        return out, run()


def int8_conv2d(shape: Shape, x: Tensor, w: Tensor, **epilogue: Any) -> Tensor:
    prepacked = ops.int8_conv2d_prepack(w, shape.groups)
    return ops.int8_conv2d(x, prepacked, shape.input[1], *shape[1:], **epilogue)


def int8_operands(shape: Shape) -> tuple[Tensor, Tensor]:
    channels = shape.input[1] // shape.groups
    return codes(*shape.input), codes(shape.out_channels, channels, *shape.kernel_size)


@pytest.mark.parametrize("channels_last", [True, False])
def test_int8(place: str, shape: Shape, channels_last: bool) -> None:
    x, w = int8_operands(shape)
    scale, bias = torch.rand(shape.out_channels), torch.randn(shape.out_channels)
    epilogue = dict(input_zero_point=zero_point(-7), scale=scale, bias=bias, activation="relu")
    out, expected = at_both(
        place, lambda: int8_conv2d(shape, x, w, **epilogue, channels_last=channels_last)
    )
    assert torch.equal(out, expected)


def test_int8_to_int8_with_a_residual_at_any_address(place: str, shape: Shape) -> None:
    x, w = int8_operands(shape)
    with places.at(places.CPU_PATHS[0]):
        size = int8_conv2d(shape, x, w).shape
    n, c, h, w_out = size
    memory = codes(n * h * w_out * c + 1)[1:]
    residual = memory.view(n, h, w_out, c).permute(0, 3, 1, 2)
    epilogue = dict(
        scale=torch.rand(c) * 1e-3,
        residual=residual,
        residual_scale=torch.tensor(0.1),
        residual_zero_point=zero_point(3),
        out_scale=torch.tensor(0.2),
        out_zero_point=zero_point(-3),
    )
    out, expected = at_both(place, lambda: int8_conv2d(shape, x, w, **epilogue))
    assert torch.equal(out, expected)


def binary_operands(shape: Shape) -> tuple[Tensor, Tensor]:
    """Eight times the channels where those of a group are a multiple of 8: K has as many bytes."""
    n, c, h, w = shape.input
    c = c * 8 if c // shape.groups % 8 == 0 else c
    return torch.randn(n, c, h, w), torch.randn(
        shape.out_channels, c // shape.groups, *shape.kernel_size
    )


@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize("channels_last", [True, False])
def test_binary(place: str, shape: Shape, channels_last: bool, pad_value: int) -> None:
    x, w = binary_operands(shape)
    scale, bias = torch.rand(shape.out_channels), torch.randn(shape.out_channels)

    def run() -> Tensor:
        prepacked = ops.binary_conv2d_prepack(ops.pack_signs(w), x.shape[1], shape.groups)
        arguments = (ops.pack_signs(x, shape.groups), prepacked, x.shape[1], *shape[1:], pad_value)
        return ops.binary_conv2d(*arguments, scale=scale, bias=bias, channels_last=channels_last)

    out, expected = at_both(place, run)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("pad_value", [0, 1, -1])
def test_binary_signs(place: str, shape: Shape, pad_value: int) -> None:
    x, w = binary_operands(shape)
    most = x.shape[1] * w[0, 0].numel() // shape.groups // 16 + 2
    threshold = torch.randint(-most, most, (shape.out_channels,), dtype=torch.int32)
    flip = torch.rand(shape.out_channels) > 0.5

    def run() -> Tensor:
        prepacked = ops.binary_conv2d_prepack(ops.pack_signs(w), x.shape[1], shape.groups)
        arguments = (ops.pack_signs(x, shape.groups), prepacked, threshold, flip, x.shape[1])
        return ops.binary_conv2d_sign(*arguments, *shape[1:], pad_value, shape.groups)

    out, expected = at_both(place, run)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("place", places.EMULATED)
@pytest.mark.parametrize("offset", [4, 8])
def test_an_input_at_any_address(place: str, offset: int) -> None:
    shape = Shape((2, 32, 9, 8), 40, (3, 3), padding=(1, 1))
    memory = codes(2 * 32 * 9 * 8 + 16)[offset:][: 2 * 32 * 9 * 8]
    x, w = memory.view(2, 9, 8, 32).permute(0, 3, 1, 2), codes(40, 32, 3, 3)
    out, expected = at_both(place, lambda: int8_conv2d(shape, x, w))
    assert torch.equal(out, expected)


def tap_sums(prepacked: Tensor, outputs: int, taps: int, channel_bytes: int) -> Tensor:
    """Behind the header, 64 unused bytes and the rows (csrc/cuda/gemm_weight.h)."""
    begin = 64 + 64 + outputs * (-(-taps * channel_bytes // 128) * 128)
    return prepacked[begin:][: (taps + 1) * outputs * 4].view(torch.int32).view(taps + 1, outputs)


@pytest.mark.parametrize("place", places.EMULATED)
def test_tap_sums(place: str) -> None:
    """What borders are corrected by; their last line is of all taps."""
    w = codes(21, 5, 3, 2)
    with places.at(place):
        int8 = ops.int8_conv2d_prepack(w)
        bits = ops.binary_conv2d_prepack(ops.pack_signs(w.float()), 5)
    for prepacked, channel_bytes, of_taps in (
        (int8, 5, w.int().sum(1)),
        (bits, 8, (w >= 0).int().sum(1)),
    ):
        expected = of_taps.flatten(1).T
        sums = tap_sums(prepacked, 21, 6, channel_bytes)
        assert torch.equal(sums, torch.cat([expected, expected.sum(0, keepdim=True)]).int())
