"""What a call does before the kernel: autograd, modes and transforms see it as they should."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nncx import ops
from nncx.ops.channel_shuffle import channel_shuffle_reference


class Seen(TorchDispatchMode):
    """Notes the ops that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes_see_the_op_once(mode: type) -> None:
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(6, 2, 1, 1)
    with mode(), Seen() as seen, FlopCounterMode(display=False) as counter:
        y = ops.grouped_conv2d(x, weight, None, groups=2, shuffle=3)
    assert seen.ops.count("nncx.grouped_conv2d.default") == 1
    assert counter.get_total_flops() == 2 * 9 * 6 * 2
    assert not y.requires_grad


def test_no_python_runs_behind_the_call_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where autograd's part of the op would run, it would fail."""
    called = []
    below = torch._C._AutoDispatchBelowAutograd
    monkeypatch.setattr(
        torch._C, "_AutoDispatchBelowAutograd", lambda: called.append(None) or below()
    )
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        ops.channel_shuffle(x, 2)
    assert len(called) == 1  # call_op's own, none of the op's backward


def test_gradients_reach_inputs_that_ask_for_them() -> None:
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(6, 2, 1, 1, requires_grad=True)
    ops.grouped_conv2d(x, weight, None, groups=2).square().sum().backward()
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, groups=2).square().sum(), weight)
    torch.testing.assert_close(weight.grad, expected)


def test_transforms_of_torch_func() -> None:
    """vmap runs; torch has no grad of an op whose backward is in Python, and has to say so."""
    x = torch.randn(3, 1, 4, 5)
    shuffled = vmap(lambda x: ops.channel_shuffle(x, 2))(x)
    assert torch.equal(shuffled, vmap(lambda x: channel_shuffle_reference(x, 2))(x))
    with pytest.raises(RuntimeError, match="torch.func|functorch"):
        grad(lambda x: vmap(lambda x: ops.channel_shuffle(x, 2))(x).sum())(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_forward_mode_is_refused(mode: type) -> None:
    """torch alone would return no tangent, and say nothing."""
    x = torch.randn(1, 4, 3, 3)
    with mode(), forward_ad.dual_level():
        ops.channel_shuffle(x, 2)
        with pytest.raises(RuntimeError, match="channel_shuffle: derivatives must be asked for in"):
            ops.channel_shuffle(forward_ad.make_dual(x, x), 2)
    with pytest.raises(RuntimeError, match="channel_shuffle: derivatives must be asked for in"):
        jvp(lambda x: ops.channel_shuffle(x, 2), (x,), (x,))
