import float_images
import pytest
import torch
import torch.nn.functional as F
from float_images import EPSILON, images, strided_images
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from places import CPU_PATHS

from nncx import ops
from nncx.ops.depthwise_conv2d import depthwise_conv2d_reference

dtypes = pytest.mark.parametrize("dtype", EPSILON, ids=str)
layouts = pytest.mark.parametrize("layout", ["nchw", "nhwc"])


def filters(outputs: int, kernel: tuple[int, int], dtype=torch.float32) -> torch.Tensor:
    return torch.randn(outputs, 1, *kernel).to(dtype)


def assert_right(out, x, weight, bias=None, stride=1, padding=0, dilation=1) -> None:
    float_images.assert_right(out, x, weight, bias, stride, padding, dilation, x.shape[1])


@dtypes
@layouts
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 15, 16, 17, 24, 58, 65])
def test_channels(isa: str, channels: int, layout: str, dtype: torch.dtype) -> None:
    for stride in (1, 2):
        x = images(2, channels, 9, 11, layout=layout, dtype=dtype)
        weight, bias = filters(channels, (3, 3), dtype), torch.randn(channels).to(dtype)
        out = ops.depthwise_conv2d(x, weight, bias, stride, 1)
        assert_right(out, x, weight, bias, stride, 1)


@layouts
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 14, 16, 17, 28, 31, 33, 65])
def test_widths(isa: str, width: int, layout: str) -> None:
    for height in (1, 2, 3, 5, 6, 13):
        for stride in (1, 2, (2, 1), (1, 2)):
            x, weight = images(1, 19, height, width, layout=layout), filters(19, (3, 3))
            out = ops.depthwise_conv2d(x, weight, None, stride, 1)
            assert_right(out, x, weight, None, stride, 1)


@layouts
@pytest.mark.parametrize(
    "kernel", [(1, 1), (3, 3), (5, 5), (5, 2), (1, 7), (4, 3), (7, 7)], ids=str
)
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, 2, (2, 1)])
def test_geometry(isa: str, kernel, stride, padding, dilation, layout: str) -> None:
    x, weight = images(2, 11, 15, 14, layout=layout), filters(11, kernel)
    out = ops.depthwise_conv2d(x, weight, None, stride, padding, dilation)
    assert_right(out, x, weight, None, stride, padding, dilation)


@dtypes
@layouts
@pytest.mark.parametrize("multiplier", [2, 3, 16])
def test_multiplier(isa: str, multiplier: int, layout: str, dtype: torch.dtype) -> None:
    for channels in (1, 5, 16):
        x = images(2, channels, 7, 9, layout=layout, dtype=dtype)
        weight = filters(channels * multiplier, (3, 3), dtype)
        assert_right(ops.depthwise_conv2d(x, weight, None, 1, 1), x, weight, None, 1, 1)


@layouts
def test_padding_larger_than_the_image(isa: str, layout: str) -> None:
    x, weight = images(1, 9, 1, 2, layout=layout), filters(9, (3, 3))
    assert_right(ops.depthwise_conv2d(x, weight, None, 1, 4), x, weight, None, 1, 4)


@layouts
@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 0, 5, 5)], ids=str)
def test_empty(isa: str, shape: tuple[int, ...], layout: str) -> None:
    x, weight = images(*shape, layout=layout), filters(shape[1], (3, 3))
    assert ops.depthwise_conv2d(x, weight).shape == (*shape[:2], 3, 3)


@dtypes
@pytest.mark.parametrize("name", strided_images())
def test_memory_formats(isa: str, name: str, dtype: torch.dtype) -> None:
    """Any strides in; channels_last out where the input is that, else contiguous."""
    x = strided_images()[name].to(dtype)
    weight = filters(2 * x.shape[1], (3, 3), dtype).transpose(2, 3)  # not contiguous either
    out = ops.depthwise_conv2d(x, weight, None, 1, 1)
    assert_right(out, x, weight, None, 1, 1)
    kept = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last if kept else torch.contiguous_format)


@dtypes
@layouts
@pytest.mark.parametrize("kernel", [(3, 3), (5, 4)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activation(isa: str, activation: str, kernel, layout: str, dtype: torch.dtype) -> None:
    x = images(3, 35, 13, 10, layout=layout, dtype=dtype)
    weight, bias = 3 * filters(35, kernel, dtype), torch.randn(35).to(dtype)
    plain = ops.depthwise_conv2d(x, weight, bias, 1, 1)
    out = ops.depthwise_conv2d(x, weight, bias, 1, 1, activation=activation)
    assert (plain < 0).any() and (plain > 6).any()
    assert torch.equal(out, getattr(F, activation)(plain))


@layouts
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_nan_and_infinity_pass(isa: str, activation: str, layout: str) -> None:
    x, weight = images(1, 20, 6, 6, layout=layout), filters(20, (3, 3))
    x[0, 2, 1, 1], x[0, 19, 4, 4] = torch.nan, torch.inf
    expected = depthwise_conv2d_reference(x, weight, None, 1, 1, 1, activation)
    out = ops.depthwise_conv2d(x, weight, None, 1, 1, 1, activation)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_numbers_beyond_float16_become_infinite(isa: str) -> None:
    x, weight = torch.full((1, 9, 4, 4), 300.0).half(), torch.full((9, 1, 3, 3), 300.0).half()
    assert ops.depthwise_conv2d(x, weight).isinf().all()


@dtypes
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_memory_formats_give_the_same_bits(isa: str, stride: int, kernel, dtype) -> None:
    x, weight = images(2, 30, 19, 17, dtype=dtype), filters(30, kernel, dtype)
    bias = torch.randn(30).to(dtype)
    out = ops.depthwise_conv2d(x, weight, bias, stride, 1)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(out, ops.depthwise_conv2d(last, weight, bias, stride, 1))


@layouts
@pytest.mark.parametrize("shape", [(3, 48, 29, 27), (1, 200, 7, 7), (1, 40, 56, 56)], ids=str)
def test_threads_and_repetitions_give_the_same_bits(isa: str, shape, layout: str) -> None:
    x, weight = images(*shape, layout=layout), filters(shape[1], (3, 3))
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(ops.depthwise_conv2d(x, weight, None, 1, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("isa", CPU_PATHS, indirect=True)
@layouts
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_gradients_are_torch_s(isa: str, activation: str, layout: str) -> None:
    tensors = [images(2, 6, 8, 7, layout=layout), 2 * filters(12, (3, 3)), torch.randn(12)]
    geometry = (2, 1, (1, 2), activation)
    gradients = []
    for op in (ops.depthwise_conv2d, depthwise_conv2d_reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = op(*leaves, *geometry)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", range(3))
def test_gradient_of_one_operand(wanted: int) -> None:
    tensors = [images(2, 6, 8, 7), filters(12, (3, 3)), torch.randn(12)]
    tensors[wanted].requires_grad_()
    gradients = []
    for op in (ops.depthwise_conv2d, depthwise_conv2d_reference):
        out = op(*tensors)
        gradients += torch.autograd.grad(out.square().sum(), tensors[wanted])
    torch.testing.assert_close(*gradients)


def test_second_gradient() -> None:
    x, weight = images(1, 4, 5, 5).requires_grad_(), filters(4, (3, 3)).requires_grad_()
    second = []
    for op in (ops.depthwise_conv2d, depthwise_conv2d_reference):
        (first,) = torch.autograd.grad(op(x, weight).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_gradcheck_in_double(activation: str) -> None:
    x, weight = images(2, 3, 5, 4).double(), 3 * filters(6, (3, 2)).double()
    bias = torch.randn(6).double()
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    geometry = ((2, 1), 1, 1, activation)
    assert torch.autograd.gradcheck(lambda *t: ops.depthwise_conv2d(*t, *geometry), tensors)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    multiplier=st.integers(1, 3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    kernel=st.one_of(st.just((3, 3)), st.tuples(st.integers(1, 6), st.integers(1, 6))),
    stride=st.one_of(st.just((1, 1)), st.just((2, 2)), pairs),
    dilation=st.one_of(st.just((1, 1)), pairs),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    layout=st.sampled_from(["nchw", "nhwc"]),
    dtype=st.sampled_from(list(EPSILON)),
)
def test_any_geometry(
    isa, batch, channels, multiplier, size, kernel, stride, dilation, padding, layout, dtype
) -> None:
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in range(2)))
    x = images(batch, channels, *size, layout=layout, dtype=dtype)
    weight = filters(channels * multiplier, kernel, dtype)
    geometry = (stride, padding, dilation)
    assert_right(ops.depthwise_conv2d(x, weight, None, *geometry), x, weight, None, *geometry)


@dtypes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_both_layouts_have_the_same_bits(isa: str, kernel: int, stride: int, dtype) -> None:
    """Images of several strips of the GPU's kernels, and of parts of one."""
    for channels, multiplier, size, padding in (
        (8, 1, (30, 30), kernel // 2),
        (6, 1, (16, 15), 0),
        (4, 2, (40, 8), 1),
        (2, 1, (33, 9), kernel),
    ):
        x = images(2, channels, *size, dtype=dtype)
        weight = filters(channels * multiplier, (kernel, kernel), dtype)
        bias = torch.randn(channels * multiplier).to(dtype)
        out = ops.depthwise_conv2d(x, weight, bias, stride, padding)
        assert_right(out, x, weight, bias, stride, padding)
        nhwc = x.to(memory_format=torch.channels_last)
        assert torch.equal(ops.depthwise_conv2d(nhwc, weight, bias, stride, padding), out)


def test_doubles_are_checked_alike() -> None:
    """What goes to torch is refused in the same words."""
    x, weight = images(1, 6, 8, 8).double(), filters(6, (3, 3))
    with pytest.raises(RuntimeError, match="weight must be float64 of shape"):
        ops.depthwise_conv2d(x, weight)
    with pytest.raises(RuntimeError, match="padding must be two numbers from 0"):
        ops.depthwise_conv2d(x, weight.double(), padding=-1)
