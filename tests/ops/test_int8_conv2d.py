import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from int8_operands import KINDS, codes, epilogue_by_hand, epilogues, weights, zero_point
from properties import many_examples

from nncx import ops
from nncx.ops.int8_conv2d import int8_conv2d_reference


def native(x, weight, stride=1, padding=0, dilation=1, groups=1, **epilogue):
    shape = (x.shape[1], weight.shape[0], tuple(weight.shape[2:]))
    prepacked = ops.int8_conv2d_prepack(weight, groups)
    return ops.int8_conv2d(x, prepacked, *shape, stride, padding, dilation, groups, **epilogue)


def sums(x, weight, stride=1, padding=0, dilation=1, groups=1, z=0) -> torch.Tensor:
    """torch's float64 convolution, which is exact on integers below 2^53."""
    x = x.contiguous().double() - z
    return F.conv2d(x, weight.double(), None, stride, padding, dilation, groups).long()


def assert_exact(x, weight, z: int = 0, **geometry) -> None:
    out = native(x, weight, input_zero_point=zero_point(z), **geometry)
    assert torch.equal(out, sums(x, weight, z=z, **geometry).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "z"), [(0, 0), (0, 5), (-128, 0), (-128, -128)])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 63, 64, 66])
def test_channels(isa: str, channels: int, low: int, z: int, kind: str) -> None:
    for out_channels in (1, 15, 16, 17, 65):
        x, weight = codes(2, channels, 5, 6, low=low), weights(kind, out_channels, channels, 3, 3)
        assert_exact(x, weight, z, padding=1)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2), (1, 7)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1), (1, 3)])
def test_geometry(isa: str, kernel, stride, padding, dilation) -> None:
    if 8 + 2 * (padding if isinstance(padding, int) else padding[1]) <= (kernel[1] - 1) * 3:
        dilation = 1
    for low in (0, -128):
        x, weight = codes(2, 12, 9, 8, low=low), weights("some large", 13, 12, *kernel)
        assert_exact(x, weight, 3, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize(
    ("channels", "out_channels", "groups"),
    [
        *[(6, 4, 2), (66, 99, 3), (24, 24, 24), (8, 24, 8), (128, 66, 2), (4, 6, 2), (4, 4, 4)],
        *[(21, 28, 7), (60, 30, 10), (20, 10, 10), (95, 5, 5), (136, 17, 17), (34, 85, 17)],
    ],
)
@pytest.mark.parametrize("low", [0, -128])
def test_groups(isa: str, channels: int, out_channels: int, groups: int, low: int) -> None:
    weight = weights("some large", out_channels, channels // groups, 3, 3)
    assert_exact(codes(2, channels, 7, 5, low=low), weight, 1, padding=1, groups=groups)


@pytest.mark.parametrize("z", [-128, -1, 0, 1, 127])
def test_padding_larger_than_the_image_adds_nothing(isa: str, z: int) -> None:
    for low in (0, -128):
        assert_exact(codes(1, 9, 1, 2, low=low), weights("any", 3, 9, 3, 3), z, padding=4)
    assert_exact(
        torch.full((1, 8, 3, 3), z).to(torch.int8), weights("any", 9, 8, 3, 3), z, padding=2
    )


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("w", [-128, 127])
@pytest.mark.parametrize("z", [-128, 0, 127])
def test_extremes(isa: str, x: int, w: int, z: int) -> None:
    image, weight = torch.full((1, 40, 6, 7), x), torch.full((20, 40, 3, 3), w)
    assert_exact(image.to(torch.int8), weight.to(torch.int8), z, padding=1)


def test_outliers_of_every_position(isa: str) -> None:
    """Runs of large weights from each place of a filter on; all activations differ."""
    x = torch.arange(128).repeat(2)[: 16 * 9].view(1, 16, 3, 3).to(torch.int8)
    for place in range(0, 16 * 9, 5):
        weight = torch.zeros(16, 16, 3, 3)
        for o in range(16):
            weight[o].view(-1)[(place + o + torch.arange(40)) % (16 * 9)] = (
                -127.0 if o % 2 else 127.0
            )
        assert_exact(x, weight.to(torch.int8))


@pytest.mark.parametrize("name", epilogues([1, 1, 1, 1]))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("out_channels", "size"), [(5, 3), (16, 7), (50, 9), (72, 13)])
def test_epilogue(isa: str, out_channels: int, size: int, channels_last: bool, name: str) -> None:
    epilogue = epilogues([2, out_channels, size, size])[name]
    if "residual" in epilogue and channels_last:  # any strides do
        epilogue["residual"] = epilogue["residual"].to(memory_format=torch.channels_last)
    x, weight = codes(2, 7, size, size), weights("any", out_channels, 7, 3, 3)
    options = {"input_zero_point": zero_point(-5), "channels_last": channels_last}
    out = native(x, weight, padding=1, **epilogue, **options)
    assert torch.equal(out, epilogue_by_hand(sums(x, weight, padding=1, z=-5), epilogue))
    last = channels_last or out.dtype == torch.int8
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_in_the_epilogue_passes(isa: str, channels_last: bool) -> None:
    x, weight = codes(1, 4, 5, 5), weights("any", 20, 4, 1, 1)
    bias = torch.zeros(20)
    bias[::7] = torch.nan
    out = native(x, weight, bias=bias, activation="relu6", channels_last=channels_last)
    assert torch.equal(out.isnan()[0, :, 0, 0], bias.isnan())
    quantized = native(
        x, weight, bias=bias, out_scale=torch.tensor(1.0), out_zero_point=zero_point(7)
    )
    assert (quantized[:, ::7] == 7).all()


@pytest.mark.parametrize("low", [0, -128])
def test_int8_out_is_quantize_int8_of_float_out(isa: str, low: int) -> None:
    x, weight = codes(2, 33, 9, 11, low=low), weights("some large", 40, 33, 3, 3)
    epilogue = {"scale": torch.rand(40) * 1e-3, "bias": torch.randn(40), "activation": "relu"}
    scale, z = torch.tensor(0.01), zero_point(-128)
    fused = native(x, weight, padding=1, **epilogue, out_scale=scale, out_zero_point=z)
    unfused = ops.quantize_int8(native(x, weight, padding=1, **epilogue), scale, z)
    assert torch.equal(fused, unfused)


def strided_images(low: int) -> dict[str, torch.Tensor]:
    x = codes(2, 6, 9, 8, low=low)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": codes(2, 6, 9, 16, low=low)[..., ::2],
        "transposed": x.transpose(2, 3),
        "some channels": codes(2, 9, 8, 12, low=low)[..., ::2].permute(0, 3, 1, 2),
        "one channel": codes(2, 1, 9, 8, low=low),
        "one pixel": codes(2, 6, 1, 1, low=low),
        "expanded": codes(1, 6, 9, 8, low=low).expand(3, -1, -1, -1),
    }


@pytest.mark.parametrize("low", [0, -128])
@pytest.mark.parametrize("name", strided_images(0))
def test_any_strides(isa: str, name: str, low: int) -> None:
    x = strided_images(low)[name]
    assert_exact(x, weights("any", 37, x.shape[1], 1, 1), 2)


@pytest.mark.parametrize(
    ("shape", "out_channels"), [((0, 8, 5, 5), 4), ((2, 8, 5, 5), 0), ((2, 0, 5, 5), 3)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty(isa: str, shape: tuple[int, ...], out_channels: int, channels_last: bool) -> None:
    weight = weights("any", out_channels, shape[1], 3, 3)
    out = native(codes(*shape), weight, bias=torch.ones(out_channels), channels_last=channels_last)
    assert out.shape == (shape[0], out_channels, 3, 3)
    assert (out == 1).all() or shape[1]


@pytest.mark.parametrize("low", [0, -128])
@pytest.mark.parametrize("shape", [(3, 48, 29, 27), (1, 40, 7, 7), (1, 200, 1, 1)])
def test_threads_and_repetitions_give_the_same_bits(isa: str, shape, low: int) -> None:
    x, weight = codes(*shape, low=low), weights("some large", 80, shape[1], 3, 3)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(native(x, weight, padding=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], sums(x, weight, padding=1).float())
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize(("size", "channels"), [(56, 64), (112, 32), (7, 512)])
def test_more_lines_than_scratch_holds(isa: str, size: int, channels: int) -> None:
    """Of 8-bit and of 16-bit activations scratch holds different numbers of lines."""
    for low in (0, -128):
        assert_exact(
            codes(1, channels, size, size, low=low), weights("small", 8, channels, 3, 3), padding=1
        )


def test_reference_agrees(isa: str) -> None:
    x, weight = codes(2, 12, 6, 5), weights("any", 9, 4, 3, 2)
    geometry = (12, 9, (3, 2), (2, 1), (1, 2), (1, 2), 3)
    prepacked = ops.int8_conv2d_prepack(weight, 3)
    for channels_last in (True, False):
        for epilogue in epilogues([2, 9, 3, 7]).values():
            options = {
                **epilogue,
                "input_zero_point": zero_point(4),
                "channels_last": channels_last,
            }
            expected = int8_conv2d_reference(x, weight, *geometry, **options)
            out = ops.int8_conv2d(x, prepacked, *geometry, **options)
            assert torch.equal(out, expected)
            assert out.stride() == expected.stride()


def test_weight_of_another_geometry_is_refused(isa: str) -> None:
    x, prepacked = codes(1, 8, 4, 4), ops.int8_conv2d_prepack(codes(2, 8, 3, 3))
    with pytest.raises(RuntimeError, match="must be prepacked for groups=1, out_channels/groups=3"):
        ops.int8_conv2d(x, prepacked, 8, 3, 3)
    with pytest.raises(RuntimeError, match="prepacked for .*taps=1, in_channels/groups=8, got"):
        ops.int8_conv2d(x, prepacked, 8, 2, 1)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@many_examples
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.one_of(st.integers(1, 70), st.sampled_from([8, 16, 64])),
    outputs=st.integers(1, 70),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    low=st.sampled_from([0, -128]),
    z=st.integers(-128, 127),
    kind=st.sampled_from(KINDS),
)
def test_any_geometry(
    isa, batch, groups, channels, outputs, size, kernel, stride, dilation, padding, low, z, kind
) -> None:
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in range(2)))
    x = codes(batch, groups * channels, *size, low=low)
    weight = weights(kind, groups * outputs, channels, *kernel)
    assert_exact(x, weight, z, stride=stride, padding=padding, dilation=dilation, groups=groups)
