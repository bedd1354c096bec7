import places
import pytest
import torch
import torch.nn.functional as F
from float_images import EPSILON, assert_right, images, strided_images
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import many_examples
from torch._subclasses.fake_tensor import FakeTensorMode

from nncx import ops
from nncx.ops.grouped_conv2d import _is_torchs, grouped_conv2d_reference

dtypes = pytest.mark.parametrize("dtype", EPSILON, ids=str)
layouts = pytest.mark.parametrize("layout", ["nchw", "nhwc"])


# Of the CPU's tiles; the emulated GPUs have test_blocks_of_a_gpu instead.
not_emulated = pytest.mark.parametrize("isa", [*places.CPU_PATHS, *places.GPU], indirect=True)


@not_emulated
@dtypes
@layouts
@pytest.mark.parametrize("channels", [1, 3, 8, 15, 17, 65])
@pytest.mark.parametrize("outputs", [1, 5, 6, 7, 8, 12, 13, 23, 24, 25, 33, 61])
def test_pointwise(isa: str, outputs: int, channels: int, layout: str, dtype) -> None:
    for height, width in ((1, 1), (7, 7), (5, 13)):
        x = images(2, channels, height, width, layout=layout, dtype=dtype)
        weight = torch.randn(outputs, channels, 1, 1).to(dtype)
        bias = torch.randn(outputs).to(dtype)
        assert_right(ops.grouped_conv2d(x, weight, bias), x, weight, bias)


@not_emulated
@layouts
@pytest.mark.parametrize("pixels", [1, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 65, 200])
def test_pixels(isa: str, pixels: int, layout: str) -> None:
    x, weight = images(3, 9, 1, pixels, layout=layout), torch.randn(26, 9, 1, 1)
    assert_right(ops.grouped_conv2d(x, weight), x, weight)


@not_emulated
@layouts
@pytest.mark.parametrize("channels", [2100, 4200])
def test_panels_larger_than_a_strip(isa: str, channels: int, layout: str) -> None:
    x, weight = images(1, channels, 5, 9, layout=layout), torch.randn(7, channels, 1, 1)
    assert_right(ops.grouped_conv2d(x, weight), x, weight)


@not_emulated
@layouts
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2), (1, 7)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, 2, (2, 1)])
def test_geometry(isa: str, kernel, stride, padding, dilation, layout: str) -> None:
    x, weight = images(2, 22, 11, 14, layout=layout), torch.randn(10, 11, *kernel)
    geometry = (stride, padding, dilation, 2)
    assert_right(ops.grouped_conv2d(x, weight, None, *geometry), x, weight, None, *geometry)


@dtypes
@layouts
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "shuffle"),
    [
        (6, 4, 2, 2),
        (24, 60, 3, 3),
        (60, 24, 3, 12),
        (24, 24, 24, 4),
        (16, 64, 1, 2),
        (130, 66, 2, 66),
        (8, 240, 2, 3),
        (9, 90, 3, 1),
    ],
)
def test_groups_and_shuffle(
    isa: str, channels, outputs, groups, shuffle, kernel, layout: str, dtype
) -> None:
    x = images(2, channels, 7, 5, layout=layout, dtype=dtype)
    weight = torch.randn(outputs, channels // groups, kernel, kernel).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    geometry = (1, kernel // 2, 1, groups, shuffle)
    out = ops.grouped_conv2d(x, weight, bias, *geometry)
    assert_right(out, x, weight, bias, *geometry)
    plain = ops.grouped_conv2d(x, weight, bias, *geometry[:-1])
    assert torch.equal(out, F.channel_shuffle(plain, shuffle))


@dtypes
@layouts
@pytest.mark.parametrize(
    ("shape", "outputs", "groups", "shuffle"),
    [
        ((1, 240, 9, 8), 60, 3, 3),  # two blocks of pixels, the last one partly filled
        ((1, 60, 5, 13), 240, 3, 1),  # whole pixels of three groups
        ((2, 48, 5, 4), 606, 3, 3),  # slices of groups, passes that are not equal
        ((1, 14, 3, 30), 300, 2, 1),  # pieces of 4 bytes, or 2 that are put together
        ((3, 200, 5, 5), 18, 1, 6),  # chunks of K; a shuffle that scatters
        ((2, 30, 6, 6), 30, 30, 30),  # a channel each
    ],
    ids=str,
)
def test_blocks_of_a_gpu(isa: str, shape, outputs, groups, shuffle, layout: str, dtype) -> None:
    x = images(*shape, layout=layout, dtype=dtype)
    for kernel in (1, 3):
        weight = torch.randn(outputs, shape[1] // groups, kernel, kernel).to(dtype)
        bias = torch.randn(outputs).to(dtype)
        geometry = ((1, 2), kernel // 2, 1, groups, shuffle)
        out = ops.grouped_conv2d(x, weight, bias, *geometry)
        assert_right(out, x, weight, bias, *geometry)


@layouts
def test_padding_larger_than_the_image(isa: str, layout: str) -> None:
    x, weight = images(1, 9, 1, 2, layout=layout), torch.randn(3, 9, 3, 3)
    assert_right(ops.grouped_conv2d(x, weight, None, 1, 4), x, weight, None, 1, 4)


@layouts
@pytest.mark.parametrize(
    ("shape", "outputs"), [((0, 8, 5, 5), 4), ((2, 8, 5, 5), 0), ((2, 0, 5, 5), 3)], ids=str
)
def test_empty(isa: str, shape: tuple[int, ...], outputs: int, layout: str) -> None:
    x, weight = images(*shape, layout=layout), torch.randn(outputs, shape[1], 3, 3)
    bias = torch.randn(outputs)
    out = ops.grouped_conv2d(x, weight, bias)
    assert torch.equal(out, bias.view(-1, 1, 1).expand(shape[0], outputs, 3, 3))


@dtypes
@pytest.mark.parametrize("name", strided_images())
def test_memory_formats(isa: str, name: str, dtype: torch.dtype) -> None:
    """Any strides in; channels_last out where the input is that, else contiguous."""
    x = strided_images()[name].to(dtype)
    weight = torch.randn(10, x.shape[1], 3, 3).to(dtype).transpose(2, 3)  # not contiguous either
    out = ops.grouped_conv2d(x, weight, None, 1, 1)
    assert_right(out, x, weight, None, 1, 1)
    kept = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last if kept else torch.contiguous_format)


@dtypes
@layouts
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activation(isa: str, activation: str, layout: str, dtype: torch.dtype) -> None:
    x = images(3, 34, 13, 10, layout=layout, dtype=dtype)
    weight, bias = torch.randn(30, 17, 1, 1).to(dtype), torch.randn(30).to(dtype)
    arguments = (x, weight, bias, 1, 0, 1, 2, 3)
    plain = ops.grouped_conv2d(*arguments)
    out = ops.grouped_conv2d(*arguments, activation=activation)
    assert (plain < 0).any() and (plain > 6).any()
    assert torch.equal(out, getattr(F, activation)(plain))


@layouts
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_nan_and_infinity_pass(isa: str, activation: str, layout: str) -> None:
    x, weight = images(1, 20, 6, 6, layout=layout), torch.randn(12, 20, 3, 3)
    x[0, 2, 1, 1], x[0, 19, 4, 4] = torch.nan, torch.inf
    arguments = (x, weight, None, 1, 1, 1, 1, 3, activation)
    expected = grouped_conv2d_reference(*arguments)
    out = ops.grouped_conv2d(*arguments)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_numbers_beyond_float16_become_infinite(isa: str) -> None:
    x, weight = torch.full((1, 9, 4, 4), 300.0).half(), torch.full((9, 9, 1, 1), 300.0).half()
    assert ops.grouped_conv2d(x, weight).isinf().all()


@dtypes
@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_formats_give_the_same_bits(isa: str, kernel: int, dtype) -> None:
    x, weight = images(2, 30, 19, 17, dtype=dtype), torch.randn(28, 15, kernel, kernel).to(dtype)
    arguments = (weight, torch.randn(28).to(dtype), 1, kernel // 2, 1, 2)
    out = ops.grouped_conv2d(x, *arguments)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(out, ops.grouped_conv2d(last, *arguments))


@layouts
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", [(3, 48, 29, 27), (1, 200, 7, 7), (1, 40, 56, 56)], ids=str)
def test_threads_and_repetitions_give_the_same_bits(isa: str, shape, kernel, layout) -> None:
    x, weight = images(*shape, layout=layout), torch.randn(80, shape[1] // 2, kernel, kernel)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(ops.grouped_conv2d(x, weight, None, 1, kernel // 2, 1, 2, 4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("isa", places.CPU_PATHS, indirect=True)
@layouts
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_gradients_are_torch_s(isa: str, activation: str, layout: str) -> None:
    tensors = [images(2, 6, 8, 7, layout=layout), torch.randn(12, 3, 3, 3), torch.randn(12)]
    geometry = (2, 1, (1, 2), 2, 3, activation)
    gradients = []
    for op in (ops.grouped_conv2d, grouped_conv2d_reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = op(*leaves, *geometry)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", range(3))
def test_gradient_of_one_operand(wanted: int) -> None:
    tensors = [images(2, 6, 8, 7), torch.randn(12, 6, 3, 3), torch.randn(12)]
    tensors[wanted].requires_grad_()
    gradients = []
    for op in (ops.grouped_conv2d, grouped_conv2d_reference):
        out = op(*tensors)
        gradients += torch.autograd.grad(out.square().sum(), tensors[wanted])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_second_gradient() -> None:
    x, weight = images(1, 4, 5, 5).requires_grad_(), torch.randn(6, 2, 3, 3).requires_grad_()
    second = []
    for op in (ops.grouped_conv2d, grouped_conv2d_reference):
        out = op(x, weight, None, 1, 0, 1, 2, 3)
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_gradcheck_in_double(activation: str) -> None:
    x, weight = images(2, 4, 5, 4).double(), torch.randn(6, 2, 3, 2).double()
    tensors = [t.requires_grad_() for t in (x, weight, torch.randn(6).double())]
    geometry = ((2, 1), 1, 1, 2, 3, activation)
    assert torch.autograd.gradcheck(lambda *t: ops.grouped_conv2d(*t, *geometry), tensors)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@many_examples
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    channels=st.integers(1, 40),
    outputs=st.integers(1, 40),
    shuffle=st.integers(1, 40),
    size=st.tuples(st.integers(1, 12), st.integers(1, 20)),
    kernel=st.one_of(st.just((1, 1)), pairs),
    stride=st.one_of(st.just((1, 1)), pairs),
    dilation=st.one_of(st.just((1, 1)), pairs),
    padding=st.one_of(st.just((0, 0)), st.tuples(st.integers(0, 5), st.integers(0, 5))),
    layout=st.sampled_from(["nchw", "nhwc"]),
    dtype=st.sampled_from(list(EPSILON)),
)
def test_any_geometry(
    isa, batch, groups, channels, outputs, shuffle, size, kernel, stride, dilation, padding, layout,
    dtype,
) -> None:  # fmt: skip
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in range(2)))
    assume(groups * outputs % shuffle == 0)
    x = images(batch, groups * channels, *size, layout=layout, dtype=dtype)
    weight = torch.randn(groups * outputs, channels, *kernel).to(dtype)
    bias = torch.randn(groups * outputs).to(dtype)
    geometry = (stride, padding, dilation, groups, shuffle)
    assert_right(ops.grouped_conv2d(x, weight, bias, *geometry), x, weight, bias, *geometry)


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "groups", "dense"),
    [
        (240, 60, 1, 3, False),
        (960, 240, 1, 3, False),
        (256, 256, 1, 1, False),
        (264, 256, 1, 1, True),
        (28, 28, 3, 1, False),
        (64, 64, 3, 2, True),
        (0, 5, 3, 1, False),
    ],
)
def test_dense_halves_on_a_gpu_are_torchs(channels, outputs, kernel, groups, dense) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, channels, 7, 7).half()
        weight = torch.empty(outputs, channels // groups, kernel, kernel).half()
        assert _is_torchs(x, weight, 1) == dense
        assert not _is_torchs(x, weight, 2)
        assert not _is_torchs(x.float(), weight.float(), 1)
        assert not _is_torchs(x.cpu(), weight.cpu(), 1)


def test_doubles_are_checked_alike() -> None:
    """What goes to torch is refused in the same words."""
    x, weight = images(1, 6, 8, 8).double(), torch.randn(8, 3, 1, 1)
    with pytest.raises(RuntimeError, match="weight must be float64 of shape"):
        ops.grouped_conv2d(x, weight, groups=2)
    with pytest.raises(RuntimeError, match="shuffle must divide the channels, got shuffle=3"):
        ops.grouped_conv2d(x, weight.double(), groups=2, shuffle=3)
