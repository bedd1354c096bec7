"""How grouped_conv2d is cut into blocks on CUDA."""

from typing import Any

import pytest
from gpu_shapes import A100, EMULATED_GPUS, H200, RTX4090, T4, Shape

from nncx import _C


def plan(
    shape: Shape,
    shuffle: int = 1,
    path: str = "sm90",
    gpu: tuple[int, int] = H200,
    *,
    is_float32: bool = False,
    channels_last: bool = True,
) -> dict[str, Any]:
    return _C.grouped_plan(shuffle, is_float32, channels_last, *shape, path, *gpu)


def pointwise(channels: int, outputs: int, size: int, groups: int = 3, batch: int = 128) -> Shape:
    return Shape((batch, channels, size, size), outputs, groups=groups)


def test_shufflenet_writes_whole_pixels() -> None:
    """The first convolutions of its units are shuffled, the last are not."""
    for channels, size in ((240, 28), (480, 14)):
        first = plan(pointwise(channels, channels // 4, size), 3)
        assert first["interleaved"] and first["tiles"] == (128 * size**2 // 64, 1)
        assert first["outputs"] * 3 == channels // 4 and first["chunks"][1] == 160
    last = plan(pointwise(60, 240, 28))
    assert (last["groups"], last["outputs"], last["pass_outputs"]) == (3, 80, 80)
    assert (last["piece"], last["tiles"][1]) == (8, 1)
    last = plan(pointwise(240, 960, 7))
    assert (last["groups"], last["outputs"], last["tiles"]) == (1, 160, (98, 6))


def test_a_small_output_is_cut_until_the_gpu_is_busy() -> None:
    large = plan(pointwise(960, 240, 7), 3, gpu=(98, H200[1]))
    assert (large["outputs"], large["tiles"]) == (80, (98, 1))
    cut = plan(pointwise(960, 240, 7), 3)
    assert cut["interleaved"] and (cut["outputs"], cut["tiles"]) == (40, (98, 2))


def test_what_a_block_writes_is_shuffled_only_by_its_groups() -> None:
    assert not plan(pointwise(240, 60, 28), 6)["interleaved"]
    assert not plan(pointwise(240, 60, 28), 3, channels_last=False)["interleaved"]
    assert not plan(pointwise(300, 600, 28, 300), 300)["interleaved"]  # no room for one of each


@pytest.mark.parametrize(
    ("channels", "piece"), [(48, 16), (60, 8), (6, 4), (9, 0)], ids=lambda n: f"{n}"
)
def test_pieces(channels: int, piece: int) -> None:
    assert plan(pointwise(channels, 60, 9))["piece"] == piece
    assert plan(pointwise(channels, 60, 9), channels_last=False)["piece"] == 0


@pytest.mark.parametrize("is_float32", [False, True])
@pytest.mark.parametrize("gpu", [T4, RTX4090, A100, H200, *EMULATED_GPUS.values()])
def test_shared_memory_suffices(gpu: tuple[int, int], is_float32: bool) -> None:
    """Three chunks where the GPU copies asynchronously."""
    path = "cuda_cores" if gpu[1] == T4[1] else "sm80"
    for outputs in (1, 20, 96, 97, 1000):
        for channels in (1, 7, 80, 500):
            shape = Shape((8, 2 * channels, 30, 30), 2 * outputs, (3, 3), groups=2)
            chosen = plan(shape, 2, path, gpu, is_float32=is_float32)
            assert chosen["shared_bytes"] <= gpu[1]
            assert chosen["stages"] == 1 if path == "cuda_cores" else chosen["stages"] >= 1
            assert chosen["pass_outputs"] <= 96
            chunks, chunk_bytes = chosen["chunks"]
            k_bytes = 9 * channels * (4 if is_float32 else 2)
            assert chunk_bytes % 32 == 0 and chunk_bytes <= 160
            assert (chunks - 1) * chunk_bytes < k_bytes <= chunks * chunk_bytes
