"""What only a GPU has: streams, graphs, several devices, a host that need not wait.

That the ops are exact there, say the other tests of this folder, which run at the place "cuda" too.
"""

import os
from collections.abc import Callable

import pytest
import torch
from samples import every_sample, samples
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)

A_WHILE = 200_000_000  # cycles of a GPU: about a tenth of a second


def call_on(device: str, index: int) -> tuple[Callable, list]:
    """A sample and its (args, kwargs), its weights prepacked there."""
    with torch.device(device):
        op, *arguments = samples()[index]
    return op, arguments


def tensors(arguments: list) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def turned(arguments: list) -> list:
    """Others of the same shapes; of prepacked weights the same, so that they stay what they are."""
    return tree_map_only(Tensor, lambda t: t.flip(0) if t.dim() > 1 else t.clone(), arguments)


@every_sample
def test_runs_on_the_current_stream(index: int) -> None:
    """Which has its operands late: on any other stream the op would read zeros."""
    op, (args, kwargs) = call_on("cuda", index)
    expected = op(*args, **kwargs)
    late = tree_map_only(Tensor, torch.zeros_like, [args, kwargs])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        for to, source in zip(tensors(late), tensors([args, kwargs]), strict=True):
            to.copy_(source)
        out = op(*late[0], **late[1])
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(
    "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="each allocation waits for the GPU then"
)
@every_sample
def test_the_host_does_not_wait(index: int) -> None:
    op, (args, kwargs) = call_on("cuda", index)
    expected = op(*args, **kwargs)  # loads the kernels and fills torch's memory pool
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        out = op(*args, **kwargs)
        still_asleep = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert still_asleep
    assert torch.equal(out, expected)


@every_sample
def test_a_graph_replays_it_on_other_operands(index: int) -> None:
    op, (args, kwargs) = call_on("cuda", index)
    other = turned([args, kwargs])
    expected = op(*other[0], **other[1])
    static = tree_map_only(Tensor, torch.clone, [args, kwargs])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*static[0], **static[1])
    for to, source in zip(tensors(static), tensors(other), strict=True):
        to.copy_(source)
    graph.replay()
    assert torch.equal(out, expected)


@every_sample
def test_runs_on_a_device_that_is_not_the_current_one(index: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    op, (args, kwargs) = call_on("cuda:1", index)
    assert torch.cuda.current_device() == 0
    out = op(*args, **kwargs)
    assert torch.cuda.current_device() == 0 and out.device == torch.device("cuda:1")
    on_first = tree_map_only(Tensor, lambda t: t.to("cuda:0"), [args, kwargs])
    assert torch.equal(out.cpu(), op(*on_first[0], **on_first[1]).cpu())


@every_sample
def test_runs_are_repeatable(index: int) -> None:
    op, (args, kwargs) = call_on("cuda", index)
    expected = op(*args, **kwargs)
    assert all(torch.equal(op(*args, **kwargs), expected) for _ in range(20))


@every_sample
def test_weights_of_a_cpu_are_refused(index: int) -> None:
    """Their size tells, since a GPU's memory is not read."""
    op, (args, kwargs) = call_on("cpu", index)
    if len(args) < 2 or not isinstance(args[1], Tensor) or args[1].dtype != torch.uint8:
        pytest.skip("no prepacked weight")
    moved = tree_map_only(Tensor, lambda t: t.to("cuda"), [args, kwargs])
    with pytest.raises(RuntimeError, match=f"{op.__name__}: weight must be prepacked for groups="):
        op(*moved[0], **moved[1])
    from_gpu = call_on("cuda", index)[1][0][1].cpu()
    with pytest.raises(RuntimeError, match="for the path of this process, .*, got '.*/cuda'"):
        op(args[0], from_gpu, *args[2:], **kwargs)
