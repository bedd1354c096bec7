"""Layers on a GPU: whatever moves them there, they run its kernels, with what the CPU gives.

With the device "cpu" the tests only show that they are sound themselves.
"""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_families import FAMILIES, Family, evaluate, images
from places import EMULATED, GPU, at
from torch import Tensor, nn

import nncx
from nncx.compress import freeze, repack
from nncx.nn.packed import has_kernel

NATIVE = {
    name: FAMILIES[name]
    for name in (
        *("XNOR", "XNOR with K", "BinaryConnect", "TTQ with a mask", "INQ", "int8"),
        *("shared", "shared with a mask"),
    )
}


@pytest.fixture(params=["cpu", *GPU])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _whole_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own convolutions round their inputs to 10 bits on a GPU, unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=NATIVE)
def family(request: pytest.FixtureRequest) -> Family:
    return NATIVE[request.param]


def network(family: Family, frozen: bool) -> nn.Sequential:
    model = family.network().eval()
    return freeze(model) if frozen else model


def assert_like(actual: Tensor, expected: Tensor) -> None:
    """To rounding: means of floats, such as alpha, are summed in another order on a GPU."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


frozen_or_not = pytest.mark.parametrize("frozen", [True, False])


def test_every_layer_has_its_kernel(device: str, family: Family) -> None:
    for layer in family.network()[::2]:
        assert has_kernel(layer.op, torch.device(device))


@frozen_or_not
def test_moving_there_and_back(device: str, frozen: bool, family: Family) -> None:
    model, x = network(family, frozen), images()
    expected = evaluate(model, x)
    there = evaluate(model.to(device), x.to(device))
    assert there.device.type == device
    assert_like(there, expected)
    assert all(layer._prepacked.device.type == device for layer in model[::2])
    assert torch.equal(evaluate(model.to("cpu"), x), expected)


def test_integers_are_exact(device: str) -> None:
    """No float is added up on the way: the same bits as the CPU's."""
    for name in ("XNOR", "int8"):
        model, x = network(NATIVE[name], frozen=True), images()
        expected = evaluate(model, x)
        assert torch.equal(evaluate(model.to(device), x.to(device)).cpu(), expected)


@pytest.mark.parametrize("place", EMULATED)
def test_a_network_of_emulated_kernels(place: str, family: Family) -> None:
    model, x = network(family, frozen=True), images()
    expected = evaluate(model, x)
    with at(place):
        repack(model)
        family.assert_equal(evaluate(model, x), expected)


def _loaded_state(model: nn.Module, device: str, folder: Path) -> nn.Module:
    fresh = copy.deepcopy(model).to(device)
    fresh.load_state_dict(model.state_dict())
    return fresh


def _pickled(model: nn.Module, device: str, folder: Path) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.to(device), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _mapped(model: nn.Module, device: str, folder: Path) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False, map_location=device)


def _saved(model: nn.Module, device: str, folder: Path) -> nn.Module:
    nncx.save(model, folder / "model.safetensors")
    return nncx.load(folder / "model.safetensors", device=device)


def _repacked(model: nn.Module, device: str, folder: Path) -> nn.Module:
    repack(model.to(device))
    return model


def _compiled(model: nn.Module, device: str, folder: Path) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model.to(device), fullgraph=True, backend="aot_eager")


@frozen_or_not
@pytest.mark.parametrize(
    "bring",
    [
        _loaded_state,
        _pickled,
        _mapped,
        _saved,
        _repacked,
        _compiled,
        lambda model, device, folder: copy.deepcopy(model.to(device)),
        lambda model, device, folder: copy.deepcopy(model).to(device),
    ],
)
def test_whatever_brings_it_there(
    device: str, bring: Callable, frozen: bool, family: Family, tmp_path: Path
) -> None:
    model, x = network(family, frozen), images()
    expected = evaluate(model, x)
    there = bring(model, device, tmp_path)
    assert_like(evaluate(there, x.to(device)), expected)
    with torch.inference_mode():
        assert_like(there(x.to(device)), expected)


def test_trains_and_evaluates_there_alike(device: str, family: Family) -> None:
    model, x = family.network().to(device), images().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = model(x)
    assert_like(evaluate(model, x), trained)
    assert_like(evaluate(freeze(model), x), trained)


@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_16_bit_inputs(
    device: str, dtype: torch.dtype, frozen: bool, family: Family
) -> None:
    layer, x = family.conv(padding=1).eval(), images().to(dtype)
    if frozen:
        layer.freeze()
    with torch.autocast("cpu", dtype=dtype):
        expected = evaluate(layer, x)
    layer.to(device)
    with torch.autocast(device, dtype=dtype):
        out = evaluate(layer, x.to(device))
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)


def test_folded_signs(device: str) -> None:
    layer, norm = nncx.XNORLinear(100, 9).eval(), nn.BatchNorm1d(9).eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(5, 100)
    with torch.no_grad():
        expected = norm(layer(x)) >= 0
    layer.freeze().to(device)
    threshold, flip = nncx.nn.fold_sign(layer, norm.to(device))
    signs = nncx.ops.binary_linear_sign(
        nncx.ops.pack_signs(x.to(device)), layer._prepacked, threshold, flip, 100, 9
    )
    assert torch.equal(signs.cpu(), nncx.ops.pack_signs(expected.float() - 0.5))


def test_report(device: str, family: Family) -> None:
    model = network(family, frozen=True).to(device)
    report = nncx.report(model, images().to(device), repeats=2)
    assert report.total.latency_ms > 0
    assert report.total.bytes == nncx.report(model.to("cpu"), images(), repeats=1).total.bytes


# ---------------------------------------------------------------------------------------------
# what only a GPU has


@pytest.mark.cuda
@frozen_or_not
def test_a_graph_replays_a_network(cuda: str, frozen: bool, family: Family) -> None:
    model = network(family, frozen).to(cuda)
    x, other = images().to(cuda), images().flip(0).to(cuda)
    with torch.no_grad():
        expected = model(other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(other)
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.cuda
@frozen_or_not
def test_forward_does_not_wait_for_the_gpu(cuda: str, frozen: bool, family: Family) -> None:
    model, x = network(family, frozen).to(cuda), images().to(cuda)
    expected = evaluate(model, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            out = model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@pytest.mark.cuda
def test_each_gpu_has_its_own(cuda: str, family: Family) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = images()
    models = [network(family, frozen=True).to(f"cuda:{i}") for i in range(2)]
    first, second = (evaluate(m, x.to(f"cuda:{i}")) for i, m in enumerate(models))
    assert second.device.index == 1 and torch.equal(first.cpu(), second.cpu())
    with pytest.raises(RuntimeError, match="on the input's device"):
        models[0](x.to("cuda:1"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is missing")
def test_data_parallel(cuda: str, family: Family, tmp_path: Path) -> None:
    model, x = family.network().to(cuda), images().to(cuda)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x).square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert_like(evaluate(parallel, x), evaluate(model, x))
    finally:
        torch.distributed.destroy_process_group()
