"""Each native op against its reference, in milliseconds: what `nncx doctor` runs on every path.

A self-test is a function of a device that yields what the ops give there and what they must give.
Which ops it covers is seen while it runs; a new op needs a few lines here, and `SELF_TESTS` names
them. These are no substitute for tests/ops: they find a library that does not fit its machine.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nncx import ops
from nncx._native import _C
from nncx.nn.codes import pack_codes
from nncx.ops.binary_conv2d import binary_conv2d_reference
from nncx.ops.binary_conv2d_sign import binary_conv2d_sign_reference
from nncx.ops.binary_linear import binary_linear_reference
from nncx.ops.binary_linear_sign import binary_linear_sign_reference
from nncx.ops.channel_shuffle import channel_shuffle_reference
from nncx.ops.codebook_conv2d import codebook_conv2d_reference
from nncx.ops.codebook_linear import codebook_linear_reference
from nncx.ops.depthwise_conv2d import depthwise_conv2d_reference
from nncx.ops.depthwise_separable_conv2d import depthwise_separable_conv2d_reference
from nncx.ops.grouped_conv2d import grouped_conv2d_reference
from nncx.ops.hashed_linear import hashed_linear_reference
from nncx.ops.hashed_weight import hashed_bucket_sums_reference, hashed_weight_reference
from nncx.ops.int8_conv2d import int8_conv2d_reference
from nncx.ops.int8_linear import int8_linear_reference
from nncx.ops.max_pool2d_signs import max_pool2d_signs_reference
from nncx.ops.pack_signs import pack_signs_reference
from nncx.ops.quantize_int8 import quantize_int8_reference
from nncx.ops.sign_int8 import sign_int8_reference

# Channels, kernel, stride, padding, dilation, groups of the binary convolutions.
CONVOLUTION = (134, 70, (3, 3), (2, 1), (1, 2), (1, 2), 2)
FLOAT_SUMS = 1e-5  # float32 sums of some hundred terms, in another order than the reference's


class Check(NamedTuple):
    """What an op gave, what it must give, and by how much of the largest value they may differ."""

    actual: Tensor
    expected: Tensor
    tolerance: float = 0.0


SelfTest = Callable[[str], Iterator[Check]]


def _pack_signs(device: str) -> Iterator[Check]:
    for x, groups in ((torch.randn(7, 131), 1), (torch.randn(2, 134, 5, 3), 2)):
        yield Check(ops.pack_signs(x.to(device), groups), pack_signs_reference(x, groups))


def _binary_linear(device: str) -> Iterator[Check]:
    weight = ops.pack_signs(torch.randn(70, 131))
    prepacked = ops.binary_linear_prepack(weight.to(device), 131)
    for rows in (9, 300):  # few rows have a kernel of their own on a GPU
        x = ops.pack_signs(torch.randn(rows, 131))
        epilogue = {
            "scale": torch.rand(70),
            "bias": torch.randn(70),
            "input_scale": torch.rand(rows),
        }
        expected = binary_linear_reference(x, weight, 131, 70, **epilogue)
        epilogue = {name: tensor.to(device) for name, tensor in epilogue.items()}
        yield Check(ops.binary_linear(x.to(device), prepacked, 131, 70, **epilogue), expected)


def _binary_conv2d(device: str) -> Iterator[Check]:
    x = ops.pack_signs(torch.randn(2, 134, 9, 11), 2)
    weight = ops.pack_signs(torch.randn(70, 67, 3, 3))
    scale = torch.rand(70)
    prepacked = ops.binary_conv2d_prepack(weight.to(device), 134, 2)
    for pad_value in (-1, 0, 1):
        expected = binary_conv2d_reference(x, weight, *CONVOLUTION, pad_value, scale=scale)
        y = ops.binary_conv2d(
            x.to(device), prepacked, *CONVOLUTION, pad_value, scale=scale.to(device)
        )
        yield Check(y, expected)


def _binary_linear_sign(device: str) -> Iterator[Check]:
    x, weight = ops.pack_signs(torch.randn(9, 131)), ops.pack_signs(torch.randn(70, 131))
    threshold = torch.randint(-20, 20, (70,), dtype=torch.int32)
    flip = torch.rand(70) < 0.5
    expected = binary_linear_sign_reference(x, weight, threshold, flip, 131, 70)
    prepacked = ops.binary_linear_prepack(weight.to(device), 131)
    epilogue = (threshold.to(device), flip.to(device))
    yield Check(ops.binary_linear_sign(x.to(device), prepacked, *epilogue, 131, 70), expected)


def _binary_conv2d_sign(device: str) -> Iterator[Check]:
    x = ops.pack_signs(torch.randn(2, 134, 9, 11), 2)
    weight = ops.pack_signs(torch.randn(70, 67, 3, 3))
    threshold = torch.randint(-20, 20, (70,), dtype=torch.int32)
    flip = torch.rand(70) < 0.5
    expected = binary_conv2d_sign_reference(
        x, weight, threshold, flip, *CONVOLUTION, -1, out_groups=2
    )
    prepacked = ops.binary_conv2d_prepack(weight.to(device), 134, 2)
    epilogue = (threshold.to(device), flip.to(device))
    y = ops.binary_conv2d_sign(x.to(device), prepacked, *epilogue, *CONVOLUTION, -1, out_groups=2)
    yield Check(y, expected)


def _max_pool2d_signs(device: str) -> Iterator[Check]:
    x = ops.pack_signs(torch.randn(2, 134, 9, 11), 2)
    geometry = ((3, 2), (2, 1), (1, 0), (1, 2), True)
    expected = max_pool2d_signs_reference(x, *geometry)
    yield Check(ops.max_pool2d_signs(x.to(device), *geometry), expected)


def _channel_shuffle(device: str) -> Iterator[Check]:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 30, 5, 7).to(memory_format=layout)
        yield Check(ops.channel_shuffle(x.to(device), 3), channel_shuffle_reference(x, 3))


def _grouped_conv2d(device: str) -> Iterator[Check]:
    geometry = ((2, 1), (1, 2), (1, 2), 2, 7, "relu6")
    for layout, kernel in ((torch.contiguous_format, 3), (torch.channels_last, 1)):
        x = torch.randn(2, 26, 9, 11).to(memory_format=layout)
        tensors = (x, torch.randn(70, 13, kernel, kernel), torch.randn(70))
        for dtype, tolerance in ((torch.float32, FLOAT_SUMS), (torch.float16, 1e-3)):
            tensors = tuple(tensor.to(dtype) for tensor in tensors)  # halves on tensor cores
            expected = grouped_conv2d_reference(*(t.float() for t in tensors), *geometry)
            y = ops.grouped_conv2d(*(t.to(device) for t in tensors), *geometry)
            yield Check(y, expected.to(dtype), tolerance)


def _codebook_linear(device: str) -> Iterator[Check]:
    for rows, bits in itertools.product((1, 70), (1, 2, 4, 8)):
        x, codebook = torch.randn(rows, 131), torch.randn(2**bits)
        codes = pack_codes(torch.randint(2**bits, (70, 131), dtype=torch.uint8), bits)
        geometry = (bits, 131, 70)
        expected = codebook_linear_reference(x, codes, codebook, *geometry)
        prepacked = ops.codebook_linear_prepack(codes.to(device), *geometry)
        y = ops.codebook_linear(x.to(device), prepacked, codebook.to(device), *geometry)
        yield Check(y, expected, FLOAT_SUMS)


def _codebook_conv2d(device: str) -> Iterator[Check]:
    x = torch.randn(2, 38, 9, 11)
    for bits in (1, 4):
        codebook = torch.randn(22, 2**bits)  # one for each filter
        codes = pack_codes(torch.randint(2**bits, (22, 19, 3, 3), dtype=torch.uint8), bits)
        geometry = (bits, 38, 22, (3, 3), (2, 1), (1, 2), (1, 2), 2)
        expected = codebook_conv2d_reference(x, codes, codebook, *geometry)
        prepacked = ops.codebook_conv2d_prepack(codes.to(device), bits, 38, 22, (3, 3), 2)
        y = ops.codebook_conv2d(x.to(device), prepacked, codebook.to(device), *geometry)
        yield Check(y, expected, FLOAT_SUMS)


def _hashed_linear(device: str) -> Iterator[Check]:
    for rows in (1, 70):
        x, buckets, bias = torch.randn(rows, 131), torch.randn(500), torch.randn(70)
        expected = hashed_linear_reference(x, buckets, 3, 131, 70, bias=bias)
        x, buckets, bias = x.to(device), buckets.to(device), bias.to(device)
        yield Check(ops.hashed_linear(x, buckets, 3, 131, 70, bias=bias), expected, FLOAT_SUMS)


def _hashed_weight(device: str) -> Iterator[Check]:
    buckets = torch.randn(500)
    expected = hashed_weight_reference(buckets, 3, 131, 70)
    yield Check(ops.hashed_weight(buckets.to(device), 3, 131, 70), expected)


def _hashed_bucket_sums(device: str) -> Iterator[Check]:
    values = torch.randn(70, 131)
    expected = hashed_bucket_sums_reference(values, 3, 500)
    yield Check(ops.hashed_bucket_sums(values.to(device), 3, 500), expected)


def _depthwise_conv2d(device: str) -> Iterator[Check]:
    x, weight, bias = torch.randn(2, 38, 9, 11), torch.randn(76, 1, 3, 3), torch.randn(76)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        arguments = (x.to(memory_format=memory_format), weight, bias)
        expected = depthwise_conv2d_reference(*arguments, 1, 1, 1, "relu6")
        y = ops.depthwise_conv2d(*(t.to(device) for t in arguments), 1, 1, 1, "relu6")
        yield Check(y, expected, FLOAT_SUMS)


def _depthwise_separable_conv2d(device: str) -> Iterator[Check]:
    weights = torch.randn(38, 1, 3, 3), torch.randn(70, 38, 1, 1), torch.randn(38), torch.randn(70)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 38, 9, 11).to(memory_format=memory_format)
        arguments = (2, 1, 1, "relu6", "relu")
        expected = depthwise_separable_conv2d_reference(x, *weights, *arguments)
        operands = (each.to(device) for each in (x, *weights))
        yield Check(ops.depthwise_separable_conv2d(*operands, *arguments), expected, FLOAT_SUMS)


def _quantize_int8(device: str) -> Iterator[Check]:
    scale, zero_point = torch.tensor(0.02), torch.tensor(-7, dtype=torch.int8)
    for x in (torch.randn(9, 131), torch.randn(2, 38, 9, 11)):
        y = ops.quantize_int8(x.to(device), scale.to(device), zero_point.to(device))
        yield Check(y, quantize_int8_reference(x, scale, zero_point))


def _sign_int8(device: str) -> Iterator[Check]:
    for x in (torch.randn(9, 131), torch.randn(2, 38, 9, 11)):
        yield Check(ops.sign_int8(x.to(device)), sign_int8_reference(x))


def _int8_linear(device: str) -> Iterator[Check]:
    for rows, lowest in itertools.product((1, 70), (-128, 0)):
        x, weight = _codes((rows, 131), lowest), _codes((70, 131))
        epilogue = {
            "scale": torch.rand(70),
            "bias": torch.randn(70),
            "input_scale": torch.rand(rows),
        }
        expected = int8_linear_reference(x, weight, 131, 70, **epilogue)
        prepacked = ops.int8_linear_prepack(weight.to(device))
        epilogue = {name: tensor.to(device) for name, tensor in epilogue.items()}
        yield Check(ops.int8_linear(x.to(device), prepacked, 131, 70, **epilogue), expected)


def _int8_conv2d(device: str) -> Iterator[Check]:
    weight = _codes((70, 67, 3, 3)) // 3
    zero_point, scale = torch.tensor(3, dtype=torch.int8), torch.rand(70)
    prepacked = ops.int8_conv2d_prepack(weight.to(device), 2)
    for lowest in (-128, 0):
        x = _codes((2, 134, 9, 11), lowest)
        epilogue = {"input_zero_point": zero_point, "scale": scale}
        expected = int8_conv2d_reference(x, weight, *CONVOLUTION, **epilogue)
        epilogue = {name: tensor.to(device) for name, tensor in epilogue.items()}
        yield Check(ops.int8_conv2d(x.to(device), prepacked, *CONVOLUTION, **epilogue), expected)


def _codes(shape: tuple[int, ...], lowest: int = -128) -> Tensor:
    return torch.randint(lowest, 128, shape).to(torch.int8)


SELF_TESTS: tuple[SelfTest, ...] = (
    _pack_signs,
    _binary_linear,
    _binary_conv2d,
    _binary_linear_sign,
    _binary_conv2d_sign,
    _max_pool2d_signs,
    _channel_shuffle,
    _grouped_conv2d,
    _codebook_linear,
    _codebook_conv2d,
    _hashed_linear,
    _hashed_weight,
    _hashed_bucket_sums,
    _depthwise_conv2d,
    _depthwise_separable_conv2d,
    _quantize_int8,
    _sign_int8,
    _int8_linear,
    _int8_conv2d,
)


def registered_ops(dispatch_key: str | None = None) -> list[str]:
    """The ops of nncx in torch's dispatcher, sorted; those with a kernel under a key, if given."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nncx::"))
    return sorted(
        name.removeprefix("nncx::")
        for name in names
        if dispatch_key is None
        or torch._C._dispatch_has_kernel_for_dispatch_key(name, dispatch_key)
    )


def run(self_tests: Sequence[SelfTest] = SELF_TESTS) -> dict[str, dict[str, str | None]]:
    """Run them on every CPU path that this CPU has, and on the GPU where the ops have kernels.

    Returns:
        For each op a result by place ("scalar", "avx2", ..., "cuda"): None where it gave what its
        reference gives, else what was wrong. An op is judged by the first self-test that calls it;
        one that no self-test calls has no places.
    """
    results: dict[str, dict[str, str | None]] = {op: {} for op in registered_ops()}
    on_cuda = set(registered_ops("CUDA")) if torch.cuda.is_available() else set()
    active, threads = _C.isa(), torch.get_num_threads()
    torch.set_num_threads(1)  # so small are the tensors that more only wait for one another
    try:
        for self_test in self_tests:
            for path in _C.supported_isas():
                _C.set_isa(path)
                called = _judge(results, self_test, path, "cpu")
            if called <= on_cuda:
                _judge(results, self_test, "cuda", "cuda")
    finally:
        _C.set_isa(active)
        torch.set_num_threads(threads)
    return results


def _judge(
    results: dict[str, dict[str, str | None]], self_test: SelfTest, place: str, device: str
) -> set[str]:
    """Enter what a self-test finds for the ops that it is the first to call; all that it calls."""
    fault = None
    with torch.random.fork_rng(devices=()), _Recorder() as recorder:
        torch.manual_seed(0)
        try:
            for check in self_test(device):
                fault = fault or _difference(check)
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
    for op in recorder.called:
        results[op].setdefault(place, fault)
    return recorder.called


def _difference(check: Check) -> str | None:
    actual, expected = check.actual.cpu(), check.expected
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return (
            f"gave {actual.dtype} {list(actual.shape)}, its reference {expected.dtype} "
            f"{list(expected.shape)}"
        )
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = check.tolerance * expected.double().abs().max().item()
    return None if error <= allowed else f"differs from its reference by {error:.3g}"


class _Recorder(TorchFunctionMode):
    """Which ops of nncx are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        namespace, *rest = str(func).split(".")  # an op's is "nncx.pack_signs.default"
        if namespace == "nncx":
            self.called.add(rest[0])
        return func(*args, **(kwargs or {}))
