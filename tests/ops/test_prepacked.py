"""Prepacked weights on a GPU: their size says what the header of a CPU's says."""

from collections.abc import Callable, Iterator

import pytest
import torch
from places import EMULATED, NO_CODE, at
from torch import Tensor
from torch._subclasses import FakeTensorMode

from nncx import _C, ops

SHAPES = [(5, 6, 3), (64, 64, 1), (1, 1, 1), (0, 7, 3), (9, 130, 2), (4, 0, 1)]  # O, C, kernel


def _signs(shape: tuple[int, ...]) -> Tensor:
    return torch.ops.nncx.pack_signs(torch.ones(shape), 1)


PREPACK: dict[str, Callable[[int, int, int], Tensor]] = {
    "binary_linear": lambda o, c, k: ops.binary_linear_prepack(_signs((o, c * k * k)), c * k * k),
    "binary_conv2d": lambda o, c, k: ops.binary_conv2d_prepack(_signs((o, c, k, k)), c),
    "int8_linear": lambda o, c, k: ops.int8_linear_prepack(
        torch.ones(o, c * k * k, dtype=torch.int8)
    ),
    "int8_conv2d": lambda o, c, k: ops.int8_conv2d_prepack(
        torch.ones(o, c, k, k, dtype=torch.int8)
    ),
    "codebook_linear": lambda o, c, k: ops.codebook_linear_prepack(
        torch.ones(-(-o * c * k * k * 3 // 8), dtype=torch.uint8), 3, c * k * k, o
    ),
    "codebook_conv2d": lambda o, c, k: ops.codebook_conv2d_prepack(
        torch.ones(-(-o * c * k * k * 3 // 8), dtype=torch.uint8), 3, c, o, k
    ),
}


@pytest.fixture
def emulated() -> Iterator[str]:
    """Any GPU: all have the same weights."""
    with at(EMULATED[0]) as place:
        yield place


@pytest.mark.parametrize("op", PREPACK)
def test_a_fake_has_the_size_of_the_weight_on_its_device(emulated: str, op: str) -> None:
    """Also where no CUDA was built: the library of the emulator is the tests' own."""
    for shape in SHAPES:
        weight = PREPACK[op](*shape)
        with at(_C.isa()):
            on_cpu = PREPACK[op](*shape)
            with FakeTensorMode(), torch.device("cuda"):
                fake = PREPACK[op](*shape)
            with torch.device("meta"):
                assert PREPACK[op](*shape).shape == on_cpu.shape
        assert fake.shape == weight.shape != on_cpu.shape and fake.device.type == "cuda"


@pytest.mark.parametrize("op", PREPACK)
def test_the_same_weights_prepack_to_the_same_bytes(emulated: str, op: str) -> None:
    """Unused ones too: a layer compares them to see whether its weight has changed."""
    before = PREPACK[op](5, 6, 3)
    torch.full((before.numel(),), 0xAB, dtype=torch.uint8)  # what the next one's memory may hold
    assert torch.equal(PREPACK[op](5, 6, 3), before)


def test_a_cpu_names_the_path_of_a_weight_from_a_gpu(emulated: str) -> None:
    weight, x = PREPACK["int8_linear"](5, 6, 1), torch.ones(2, 6, dtype=torch.int8)
    with at(_C.isa()), pytest.raises(RuntimeError, match=f"int8/{_C.isa()}, got 'int8/cuda'"):
        ops.int8_linear(x, weight, 6, 5)


def test_a_gpu_refuses_a_weight_of_the_cpu(emulated: str) -> None:
    with at(_C.isa()):
        weight = PREPACK["int8_linear"](5, 6, 1)
    with pytest.raises(
        RuntimeError, match=f"got {len(weight)} bytes instead of [0-9]+ on this GPU; "
    ):
        ops.int8_linear(torch.ones(2, 6, dtype=torch.int8), weight, 6, 5)


def test_shapes_of_equal_size_are_told_apart() -> None:
    """By 251 sizes: one of a hundred pairs may be taken for one another, not more."""
    sizes = [_C.binary_prepacked_numel(1, 8, 1, channels, "cuda") for channels in range(1, 65)]
    pairs = [(a, b) for i, a in enumerate(sizes) for b in sizes[:i]]
    assert sum(a == b for a, b in pairs) <= len(pairs) / 100
    kinds = _C.int8_prepacked_numel, _C.binary_prepacked_numel
    assert len({numel(1, 8, 1, 64, "cuda") for numel in kinds}) == 2


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("pack_signs", lambda: _signs((2, 3))),
        ("int8_conv2d_prepack", lambda: PREPACK["int8_conv2d"](2, 3, 3)),
    ],
)
def test_a_gpu_that_no_code_was_built_for_is_named(op: str, call: Callable[[], Tensor]) -> None:
    with at(NO_CODE), pytest.raises(RuntimeError) as error:
        call()
    assert str(error.value) == (
        f"{op}: the GPU must take its kernel, got an error of the emulator; build nncx for"
        " this GPU, with TORCH_CUDA_ARCH_LIST=7.0"
    )
