"""BinaryConnect's layers: their arithmetic, the clipping of real weights, stochastic training."""

import pytest
import torch
import torch.nn.functional as F
from layer_families import FAMILIES, evaluate, expected_output, images, signs
from torch import nn
from torch.utils.checkpoint import checkpoint

from nncx.compress import freeze
from nncx.nn.quantizers import binary_connect_sample, binary_connect_sign

_conv, _linear = FAMILIES["BinaryConnect"].conv, FAMILIES["BinaryConnect"].linear


# ---------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("features", [1, 63, 64, 65, 4999])
def test_widths_around_the_word(features):
    x = images(2, features)
    for layer, inputs in [
        (_linear(features, 3), x),
        (_conv(features, 3, kernel_size=1), x[:, :, None, None]),
    ]:
        expected = expected_output(layer, inputs, signs(layer.weight))
        evaluated = evaluate(layer, inputs).double()
        torch.testing.assert_close(evaluated, expected, rtol=1e-5, atol=1e-4)


def test_integers_sum_exactly_and_zero_is_plus_one():
    layer = _linear(100, 2, bias=False)
    layer.weight.data[0] = 0.0
    layer.weight.data[1] = -0.0
    x = torch.arange(300.0).view(3, 100)
    assert torch.equal(evaluate(layer, x), x.sum(1, keepdim=True).expand(3, 2))


@pytest.mark.parametrize("stochastic", [True, False])
def test_gradients_are_those_of_the_binary_weight(stochastic):
    layer = _conv(padding=1, groups=3, stochastic=stochastic).double()
    layer.weight.data = 2 * torch.randn_like(layer.weight)  # on both sides of 1
    x = images(dtype=torch.float64).requires_grad_()
    weights_of_loss = images(2, 9, 9, 8, dtype=torch.float64)
    torch.manual_seed(5)
    (layer(x) * weights_of_loss).sum().backward()

    torch.manual_seed(5)
    binarize = binary_connect_sample if stochastic else binary_connect_sign
    binary = binarize(layer.weight.detach()).requires_grad_()
    x_twin = x.detach().requires_grad_()
    (F.conv2d(x_twin, binary, layer.bias, padding=1, groups=3) * weights_of_loss).sum().backward()
    torch.testing.assert_close(layer.weight.grad, binary.grad)
    torch.testing.assert_close(x.grad, x_twin.grad)


def test_new_weights_are_uniform():
    for layer in (_linear(300, 400), _conv(64, 64)):
        weight = layer.weight.detach().flatten()
        quantiles = torch.quantile(weight, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        assert (quantiles - torch.tensor([-1, -0.5, 0, 0.5, 1])).abs().max() < 0.02
        assert layer.bias.abs().max() < 0.1, "as torch's"


# ---------------------------------------------------------------------------------------------
# clipping


def test_training_clips_the_real_weights_and_nothing_else_does():
    layer, x = _conv(), images()
    wide = 3 * torch.randn_like(layer.weight)
    layer.weight.data = wide.clone()
    evaluate(layer, x)
    with torch.no_grad():  # as for the statistics of a BatchNorm
        layer.train()(x)
    layer.weight.requires_grad_(False)
    layer(x)  # trains the bias
    assert torch.equal(layer.weight, wide)
    layer.weight.requires_grad_(True)
    layer(x)
    assert torch.equal(layer.weight, wide.clamp(-1, 1))


@pytest.mark.parametrize("stochastic", [True, False])
def test_no_output_depends_on_clipping(stochastic):
    layer, x = _linear(50, 20, stochastic=stochastic), images(3, 50)
    layer.weight.data.mul_(3)
    outputs = []
    for _ in range(2):  # the second time with weights that the first has clipped
        torch.manual_seed(4)
        outputs.append(layer(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("stochastic", [True, False])
def test_two_forwards_before_one_backward(stochastic):
    x, other = images(), images().flip(0) * 2
    grads = []
    for together in (True, False):
        layer = _conv(stochastic=stochastic)
        layer.weight.data.mul_(3)
        torch.manual_seed(4)
        if together:
            (layer(x).square().mean() + layer(other).square().mean()).backward()
        else:
            layer(x).square().mean().backward()
            layer(other).square().mean().backward()
        grads.append(layer.weight.grad)
    torch.testing.assert_close(*grads)


def _network(stochastic=False):
    network = FAMILIES["BinaryConnect"].network()
    for layer in (network[0], network[2]):
        layer.stochastic = stochastic
    return network.append(nn.BatchNorm1d(3))


def _train(model, call, steps=3):
    """Large steps, so that each forward has something to clip; the losses."""
    optimizer, x = torch.optim.SGD(model.parameters(), lr=300.0), images()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = (call(x) - x[:, :3, 0, 0]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model[2].weight.abs().max() > 1.1
    return losses


def _checkpointed(model, use_reentrant):
    return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
        lambda model: _checkpointed(model, True),
        lambda model: _checkpointed(model, False),
        lambda model: nn.parallel.DistributedDataParallel(model),
    ],
    ids=["compile", "checkpoint, reentrant", "checkpoint", "ddp"],
)
def test_training_is_the_same_under_wrappers(wrap, stochastic, process_group):
    plain, wrapped = _network(stochastic), _network(stochastic)
    torch.compiler.reset()
    losses = _train(plain, plain)
    assert losses[0] != losses[1]
    torch.testing.assert_close(_train(wrapped, wrap(wrapped)), losses)
    for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# stochastic


def test_the_mean_of_stochastic_training_is_the_forward_of_the_real_weights():
    count = 4000
    for layer, x in [(_conv(stochastic=True), images(1, 6, 5, 5)), (_linear(40, 7), images(2, 40))]:
        layer.stochastic = True
        with torch.no_grad():
            outputs = torch.stack([layer(x) for _ in range(count)]).double()
        expected = expected_output(layer, x, layer.weight)
        deviation = outputs.std(0) / count**0.5
        assert deviation.min() > 0
        assert ((outputs.mean(0) - expected).abs() < 5 * deviation).all()


def test_evaluation_of_a_stochastic_layer_is_deterministic():
    sampled, signed, x = _conv(stochastic=True), _conv(), images()
    assert not torch.equal(sampled(x), sampled(x))
    assert torch.equal(evaluate(sampled, x), evaluate(signed, x))
    assert torch.equal(evaluate(sampled.freeze(), x), evaluate(signed, x))
    assert repr(sampled).endswith("stochastic=True, frozen=True)")


@pytest.mark.filterwarnings("ignore:an nncx layer in eval mode was called with gradients")
def test_the_float_path_of_evaluation_is_deterministic_too():
    layer, x = _conv(stochastic=True), images()
    torch.testing.assert_close(layer.eval()(x).detach(), evaluate(layer, x))


# ---------------------------------------------------------------------------------------------
# dtypes, freezing


@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_under_autocast_compiles_into_one_graph(frozen):
    torch.compiler.reset()
    network, x = _network().eval(), images()
    if frozen:
        freeze(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network(x)
        assert expected.dtype == torch.bfloat16
        assert torch.equal(compiled(x), expected)


def test_frozen_state_dict_is_one_bit_a_weight():
    layer = _conv()
    positive = (layer.weight >= 0).flatten().tolist()
    state = layer.freeze().state_dict()
    assert set(state) == {"packed_weight", "bias"} and layer.weight is None
    assert state["packed_weight"].dtype == torch.uint8
    assert state["packed_weight"].shape == (-(-9 * 6 * 9 // 8),)
    bits = [byte >> i & 1 for byte in state["packed_weight"].tolist() for i in range(8)]
    assert bits[: len(positive)] == positive
    assert layer.freeze() is layer
