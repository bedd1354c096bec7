"""nncx layers inside what torch and Python put around a model: threads, copies, autocast, data
parallelism, compilers, export. A new family of layers is one more entry of `NETS`."""

import copy
import functools
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nncx.compress import freeze
from nncx.nn import (
    Int8Conv2d,
    Int8Linear,
    PrunedConv2d,
    PrunedLinear,
    SharedConv2d,
    SharedLinear,
    XNORConv2d,
    XNORLinear,
)


def _xnor() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        XNORConv2d(20, 70, 3, padding=1, groups=2),
        nn.Tanh(),
        XNORConv2d(70, 9, 3, stride=2),
        nn.Flatten(),
        XNORLinear(9 * 3 * 4, 5, scale="alpha_k"),
    )


def _int8() -> nn.Module:
    net = nn.Sequential(
        Int8Conv2d(3, 20, 3, padding=1),
        nn.ReLU(),
        Int8Conv2d(20, 9, 3, stride=2, symmetric=True),
        nn.Flatten(),
        Int8Linear(9 * 3 * 4, 5),
    )
    for index, low in ((0, -3), (2, 0), (4, -1)):
        net[index].set_input_range(low, 3)
        net[index].observe = False  # each process would see a share of the batch
    return net


def _pruned() -> nn.Module:
    net = nn.Sequential(
        PrunedConv2d(3, 9, 3, stride=2), nn.ReLU(), nn.Flatten(), PrunedLinear(9 * 3 * 4, 5)
    )
    for layer in net[::3]:
        layer.mask.copy_(torch.rand_like(layer.weight) < 0.3)
    return net


def _shared() -> nn.Module:
    net = nn.Sequential(
        *(SharedConv2d(3, 9, 3, stride=2, bits=4, masked=True), nn.ReLU(), nn.Flatten()),
        SharedLinear(9 * 3 * 4, 5),
    )
    net[0].mask.copy_(torch.rand(net[0].mask.shape) < 0.3)
    return net


# Without layers whose result for one image depends on the others, on images [N, 3, 8, 10].
NETS: dict[str, Callable[[], nn.Module]] = {
    "xnor": _xnor,
    "int8": _int8,
    "pruned": _pruned,
    "shared": _shared,
}
EXACT = {"xnor", "int8", "shared"}  # torch adds up floats in an order that depends on the threads


@pytest.fixture(params=NETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def _images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 10, generator=torch.Generator().manual_seed(batch))


def _evaluate(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(x)


def _gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    net.train()(x).square().mean().backward()
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("torch_threads", [1, 2])
def test_many_threads_call_one_model(isa: str, name: str, torch_threads: int, frozen: bool) -> None:
    net = _net(name).eval()
    if frozen:
        freeze(net)
    inputs = [_images(batch) for batch in (1, 2, 33, 64)]
    expected = [_evaluate(net, x) for x in inputs]
    same = torch.equal if name in EXACT else functools.partial(torch.allclose, atol=1e-5)
    start, wrong = threading.Barrier(4), []

    def call(first: int) -> None:
        torch.set_num_threads(torch_threads)
        start.wait()
        with torch.no_grad():
            for i in range(first, first + 12):
                if not same(net(inputs[i % 4]), expected[i % 4]):
                    wrong.append(i % 4)

    threads = [threading.Thread(target=call, args=[first]) for first in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(1)
    assert not start.broken and not wrong


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "around",
    [
        copy.deepcopy,
        copy.copy,
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: net.to("cpu"),
        lambda net: net.double().float(),
        lambda net: torch.optim.swa_utils.AveragedModel(net),
    ],
    ids=["deepcopy", "copy", "pickle", "to", "dtypes", "AveragedModel"],
)
def test_wrapped_models_give_the_same_bits(name: str, around: Callable, frozen: bool) -> None:
    net, x = _net(name).eval(), _images(3)
    if frozen:
        freeze(net)
    expected = _evaluate(net, x)
    with torch.no_grad():
        assert torch.equal(around(net)(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_evaluates_to_the_same(name: str, dtype: torch.dtype) -> None:
    net, x = _net(name), _images(3)
    with torch.autocast("cpu", dtype=dtype):
        trained = net(x)
        evaluated = _evaluate(net, x)
        frozen = _evaluate(freeze(copy.deepcopy(net)), x)
    assert trained.dtype == evaluated.dtype
    # Autocast rounds the values of a codebook, which the native kernel takes as they are.
    tolerance = 8 * torch.finfo(dtype).eps if name == "shared" else 0
    torch.testing.assert_close(trained.detach(), evaluated, rtol=tolerance, atol=tolerance)
    assert torch.equal(frozen, evaluated)
    trained.float().square().mean().backward()  # backward is outside of autocast, as torch asks
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


# ---------------------------------------------------------------------------------------------
# data parallelism


def _train_in_parallel(rank: int, size: int, name: str, folder: Path) -> None:
    """One step of SGD on this process's share of the batch; leaves gradients and an evaluation."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        net = _net(name)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(rank)  # DDP starts all from the first one's weights
        parallel = DistributedDataParallel(net)
        gradients = _gradients(parallel, _images(8).chunk(size)[rank])
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        torch.save((gradients, _evaluate(parallel, _images(5))), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_data_parallel_training_behind_a_frozen_layer(name: str, tmp_path: Path) -> None:
    """Its packed weights are buffers, which DistributedDataParallel copies in every forward."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        frozen = freeze(_net(name).requires_grad_(False))
        parallel = DistributedDataParallel(nn.Sequential(frozen, nn.Linear(5, 2)))
        for _ in range(2):
            parallel(_images(3)).sum().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("size", [1, 2])
def test_data_parallel_gradients_are_those_of_one_process(
    name: str, size: int, tmp_path: Path
) -> None:
    if size == 1:
        _train_in_parallel(0, size, name, tmp_path)
    else:
        torch.multiprocessing.spawn(_train_in_parallel, (size, name, tmp_path), nprocs=size)
    net = _net(name)
    expected = _gradients(net, _images(8))
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for gradients, evaluated in results:
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(evaluated, results[0][1])
    torch.testing.assert_close(results[0][1], _evaluate(net, _images(5)))


# ---------------------------------------------------------------------------------------------
# compilers


_needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler"
)


@pytest.mark.slow
@_needs_compiler
@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_compiles_with_inductor(name: str, frozen: bool) -> None:
    torch.compiler.reset()
    net = _net(name).eval()
    if frozen:
        freeze(net)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (3, 5):
            x = _images(batch)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@_needs_compiler
def test_training_compiles_with_inductor(name: str) -> None:
    """With scale="alpha_k" in a convolution only if H and W are static: inductor of torch 2.13
    fails on the gradient of K's windows ("Invalid ranges [0:-1]")."""
    torch.compiler.reset()
    net = _net(name)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, dynamic=True)
    for batch in (3, 5):
        compiled.zero_grad()
        net.zero_grad()
        x = _images(batch)
        for ours, theirs in zip(_gradients(compiled, x), _gradients(net, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_is_exported_with_a_dynamic_batch(name: str, frozen: bool) -> None:
    net = _net(name).eval()
    if frozen:
        freeze(net)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (_images(3),), dynamic_shapes=({0: batch},))
        for size in (2, 7):
            x = _images(size)
            assert torch.equal(program.module()(x), net(x))
