"""Both convolutions at once against one after the other, which tests of their own hold right."""

from itertools import product

import pytest
import torch
from float_images import EPSILON, images, strided_images
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from places import CPU_PATHS
from torch import Tensor

from nncx import ops
from nncx.ops._conv2d import memory_format
from nncx.ops.depthwise_separable_conv2d import depthwise_separable_conv2d_reference

on_cpu_paths = pytest.mark.parametrize("isa", CPU_PATHS, indirect=True)


def operands(
    x: Tensor,
    outputs: int,
    multiplier: int = 1,
    kernel: tuple[int, int] = (3, 3),
    bias: bool = True,
) -> list[Tensor | None]:
    """The input, and random weights and biases for it."""
    between = x.shape[1] * multiplier
    weights = [torch.randn(between, 1, *kernel), torch.randn(outputs, between, 1, 1)]
    biases = [torch.randn(between), torch.randn(outputs)]
    given = [t.to(x.dtype) for t in (*weights, *biases)]
    return [x, *given] if bias else [x, *given[:2], None, None]


def apart(
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, *arguments
) -> Tensor:
    *geometry, depthwise_activation, activation = arguments
    between = ops.depthwise_conv2d(
        x, depthwise_weight, depthwise_bias, *geometry, depthwise_activation
    )
    return ops.grouped_conv2d(between, pointwise_weight, pointwise_bias, activation=activation)


def assert_same_bits(tensors: list[Tensor | None], *arguments) -> None:
    out, expected = (
        ops.depthwise_separable_conv2d(*tensors, *arguments),
        apart(*tensors, *arguments),
    )
    assert torch.equal(out, expected) and out.dtype == expected.dtype
    layout = memory_format(tensors[0])
    assert out.is_contiguous(memory_format=layout)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@on_cpu_paths
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 24), st.integers(1, 12), st.integers(1, 24)),
    outputs=st.integers(1, 30),
    multiplier=st.integers(1, 3),
    kernel=st.one_of(st.just((3, 3)), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    stride=st.one_of(st.just((1, 1)), st.just((2, 2)), pairs),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.one_of(st.just((1, 1)), pairs),
    activations=st.tuples(*[st.sampled_from(["none", "relu", "relu6"])] * 2),
    layout=st.sampled_from(["nchw", "nhwc"]),
    dtype=st.sampled_from(list(EPSILON)),
    bias=st.booleans(),
)
def test_any_geometry(
    isa,
    shape,
    outputs,
    multiplier,
    kernel,
    stride,
    padding,
    dilation,
    activations,
    layout,
    dtype,
    bias,
) -> None:
    size = shape[2:]
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in range(2)))
    x = images(*shape, layout=layout, dtype=dtype)
    tensors = operands(x, outputs, multiplier, kernel, bias)
    assert_same_bits(tensors, stride, padding, dilation, *activations)


@on_cpu_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_images_of_many_blocks(isa: str, layout: str, dtype: torch.dtype) -> None:
    """More lines between the convolutions than stay in the cache, in parts of any thread."""
    before = torch.get_num_threads()
    try:
        for kernel, stride, padding in (((3, 3), 1, 1), ((3, 3), 2, 0), ((5, 2), (3, 1), (4, 0))):
            x = images(2, 9, 101, 83, layout=layout, dtype=dtype)
            tensors = operands(x, 5, 2, kernel)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert_same_bits(tensors, stride, padding, (2, 1), "relu", "relu6")
    finally:
        torch.set_num_threads(before)


@on_cpu_paths
def test_a_line_that_does_not_fit_the_cache(isa: str) -> None:
    assert_same_bits(operands(images(1, 40, 2, 3000), 2), 1, 1, 1, "relu", "none")


@pytest.mark.parametrize("name", strided_images())
def test_memory_formats(isa: str, name: str) -> None:
    """On a GPU, too, where the op is the two, one after the other."""
    assert_same_bits(operands(strided_images()[name], 7), 1, 1, 1, "none", "relu")


@on_cpu_paths
@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 0, 5, 5)], ids=str)
def test_empty(isa: str, shape: tuple[int, ...]) -> None:
    for x, outputs in product((images(*shape), images(*shape, layout="nhwc")), (0, 4)):
        assert_same_bits(operands(x, outputs), 1, 0, 1, "none", "none")


@on_cpu_paths
def test_nan_and_infinity_pass(isa: str) -> None:
    x = images(1, 20, 6, 6)
    x[0, 2, 1, 1], x[0, 19, 4, 4] = torch.nan, torch.inf
    tensors = operands(x, 5)
    out = ops.depthwise_separable_conv2d(*tensors, 1, 1)
    expected = depthwise_separable_conv2d_reference(*tensors, 1, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activations", [("none", "none"), ("relu", "relu6"), ("relu6", "none")])
def test_gradients_are_torch_s(activations: tuple[str, str], bias: bool, layout: str) -> None:
    tensors = operands(3 * images(2, 6, 8, 7, layout=layout), 5, 2, (3, 3), bias)
    given = [i for i, tensor in enumerate(tensors) if tensor is not None]
    for wanted in (given, *([i] for i in given)):  # all at once, and each alone
        found = []
        for op in (ops.depthwise_separable_conv2d, depthwise_separable_conv2d_reference):
            leaves = [None if t is None else t.clone() for t in tensors]
            for i in wanted:
                leaves[i].requires_grad_()
            out = op(*leaves, 2, 1, (1, 2), *activations)
            loss = (out * torch.arange(out.numel()).view(out.shape).cos()).sum()
            found.append(torch.autograd.grad(loss, [leaves[i] for i in wanted]))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_second_gradient() -> None:
    tensors = [t.requires_grad_() for t in operands(images(1, 4, 5, 5), 3)]
    second = []
    for op in (ops.depthwise_separable_conv2d, depthwise_separable_conv2d_reference):
        (first,) = torch.autograd.grad(op(*tensors).pow(3).sum(), tensors[0], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), tensors[:4]))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.1)


def test_gradcheck_in_double() -> None:
    tensors = operands(images(2, 3, 5, 4).double(), 2, 2)
    leaves = [t.requires_grad_() for t in tensors]
    geometry = ((2, 1), 1, 1, "relu", "none")
    assert torch.autograd.gradcheck(
        lambda *t: ops.depthwise_separable_conv2d(*t, *geometry), leaves
    )


def test_doubles_are_checked_alike() -> None:
    x, *weights = operands(images(1, 6, 8, 8), 4)
    with pytest.raises(RuntimeError, match="depthwise_separable.*depthwise_weight must be float64"):
        ops.depthwise_separable_conv2d(x.double(), *weights)
