"""convert: what it swaps, what it removes, what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nncx.compress import XNOR, convert
from nncx.models import LeNet5, ResNet
from nncx.nn import XNORConv2d, XNORLinear


def _chain(*between, activation=nn.ReLU):
    """Four convolutions; `between` stands before the third, behind the activation."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), activation()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), activation(), *between),
        *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), activation()),
        nn.Conv2d(8, 4, 1),
    )


class _Net(nn.Module):
    """first -> bn -> (forward given) -> last, with the parts that the cases need."""

    def __init__(self, middle, **modules):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.last = nn.Conv2d(8, 2, 1)
        self.run_middle = middle

    def forward(self, x):
        return self.last(self.run_middle(self, self.bn(self.first(x))))


def _types(model):
    return {name: type(module) for name, module in model.named_modules() if name}


# ---------------------------------------------------------------------------------------------
# swapping


def test_swaps_all_but_first_and_last_and_removes_their_relus():
    model = _chain()
    assert convert(model, XNOR()) is model
    kinds = [type(module).__name__ for module in model]
    assert kinds == [
        *("Conv2d", "Identity", "XNORConv2d", "BatchNorm2d", "Identity"),
        *("XNORConv2d", "BatchNorm2d", "ReLU", "Conv2d"),
    ]


def test_layers_keep_geometry_settings_and_parameters():
    old = nn.Conv2d(4, 6, (3, 5), 2, (1, 2), 2, 2, bias=False)
    old_linear = nn.Linear(6, 5)
    model = nn.Sequential(old, nn.Flatten(), old_linear)
    convert(model, XNOR(scale="alpha_k", pad_value=-1), skip=[])
    conv, linear = model[0], model[2]
    assert conv.weight is old.weight and linear.weight is old_linear.weight
    assert conv.bias is None and linear.bias is old_linear.bias
    expected = repr(old)[:-1] + ", scale=alpha_k, pad_value=-1)"
    assert repr(conv) == f"XNOR{expected}"
    assert (linear.scale, conv.training) == ("alpha_k", True)


def test_a_border_of_own_values_needs_no_pad_value():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))
    assert convert(model, XNOR(pad_value=1), skip=[])[0].pad_value == 0


def test_optimizer_made_before_trains_the_new_layers():
    model = _chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, XNOR())
    before = model[2].weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


def test_eval_mode_is_kept_and_runs():
    model = convert(_chain().eval(), XNOR())
    assert not model[2].training
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))


def test_subclasses_are_left_alone():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4))
    convert(model, XNOR(), skip=[])
    assert [type(module) for module in model] == [Mine, XNORLinear]


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    convert(model, XNOR(), skip=[])
    assert isinstance(model[0], XNORLinear) and model[0] is model[2]


def test_first_and_last_are_those_of_execution():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 2)
            self.middle = nn.Linear(4, 4)
            self.stem = nn.Linear(3, 4)

        def forward(self, x):
            return self.out(self.middle(self.stem(x)))

    assert _types(convert(Reversed(), XNOR())) == {
        "out": nn.Linear,
        "middle": XNORLinear,
        "stem": nn.Linear,
    }


def test_second_convert_sees_the_binary_layers_of_the_first():
    model = convert(_chain(), XNOR(), skip=["0", "2", "8"])
    assert isinstance(model[4], nn.Identity) and isinstance(model[1], nn.ReLU)
    convert(model, XNOR())
    assert isinstance(model[2], XNORConv2d) and isinstance(model[1], nn.Identity)


@pytest.mark.parametrize("model", [ResNet(8, width=4), LeNet5()])
def test_models_of_nncx_convert_and_train(model):
    count = sum(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())
    convert(model, XNOR())
    assert sum(isinstance(m, (XNORConv2d, XNORLinear)) for m in model.modules()) == count - 2
    x = torch.randn(2, getattr(model, "in_channels", 1), 28, 28)
    model(x).sum().backward()


# ---------------------------------------------------------------------------------------------
# skip


@pytest.mark.parametrize(
    "skip, swapped",
    [
        (["0", "2", "8"], {"5"}),
        ({"0", "5", "2"}, {"8"}),
        (lambda name, module: name == "5" or module.out_channels == 4, {"0", "2"}),
        (iter(["8"]), {"0", "2", "5"}),
        ([], {"0", "2", "5", "8"}),
    ],
)
def test_skip(skip, swapped):
    if callable(skip):
        predicate = skip
        skip = lambda name, module: isinstance(module, nn.Conv2d) and predicate(name, module)  # noqa: E731
    model = convert(_chain(), XNOR(), skip=skip)
    assert {name for name, kind in _types(model).items() if kind is XNORConv2d} == swapped


def test_skip_of_a_block_covers_what_is_inside():
    model = nn.ModuleDict({"a": _chain(), "ab": _chain()})
    with pytest.raises(ValueError, match="torch.fx must be able to trace ModuleDict"):
        convert(model, XNOR(), skip=["a"])
    convert(model, XNOR(), skip=["a"], rewire=False)
    kinds = _types(model)
    assert kinds["a.2"] is nn.Conv2d and kinds["ab.2"] is XNORConv2d


@pytest.mark.parametrize(
    "skip, message",
    [
        (["0", "9"], "skip names '9', which the model does not have"),
        ("0", r"must be a list of names, got '0'; pass \['0'\]"),
        (["0", "2", "5", "8"], "no layer for XNOR.* that is not skipped"),
    ],
)
def test_skip_refuses(skip, message):
    with pytest.raises(ValueError, match=message):
        convert(_chain(), XNOR(), skip=skip)


# ---------------------------------------------------------------------------------------------
# rewiring


@pytest.mark.parametrize(
    "between",
    [
        [nn.MaxPool2d(2)],
        [nn.AvgPool2d(2), nn.Dropout(0.1)],
        [nn.Identity(), nn.ZeroPad2d(1)],
        [nn.AdaptiveAvgPool2d(3), nn.Flatten(2), nn.Unflatten(2, (3, 3))],
    ],
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softplus])
def test_activations_are_found_behind_pools_and_reshapes(activation, between):
    model = convert(_chain(*between, activation=activation), XNOR())
    kinds = [type(module) for module in model]
    assert kinds.count(activation) == 1 and isinstance(model[4], nn.Identity)


def test_signed_activations_stay():
    model = convert(_chain(activation=nn.Hardtanh), XNOR())
    assert sum(isinstance(m, nn.Hardtanh) for m in model) == 3


def test_a_norm_between_makes_the_relu_harmless():
    model = convert(_chain(nn.BatchNorm2d(8)), XNOR())
    assert isinstance(model[4], nn.ReLU)


def test_one_relu_before_two_binary_layers_goes():
    def fork(net, x):
        x = net.relu(x)
        return torch.cat([net.middle(x), net.other(x)], 1)[:, : x.shape[1]]

    net = convert(_Net(fork, relu=nn.ReLU()), XNOR())
    assert isinstance(net.relu, nn.Identity)


def _residual(net, x):
    x = net.relu(x)
    return x + net.middle(x)


def _pooled_residual(net, x):
    x = F.max_pool2d(net.relu(x), 3, 1, 1)
    return x + net.middle(x)


def _shared(net, x):
    return net.relu(net.middle(net.relu(x)))


def _functional(net, x):
    return net.middle(F.relu(x))


def _torch_function(net, x):
    return net.middle(F.dropout(torch.relu(x), 0.1))


def _method(net, x):
    return net.middle(x.relu().flatten(2).view(-1, 8, 6, 6))


def _concatenated(net, x):
    return net.middle(torch.cat([x[:, :4], F.relu(x[:, 4:])], 1))


def _inplace(net, x):
    return net.middle(net.relu_(x)) + x


CANNOT = {
    "residual": (_residual, "'relu' before it .* also feeds 'add'"),
    "pooled residual": (_pooled_residual, "'relu' before it .* also feeds 'add'"),
    "shared": (_shared, "'relu' before it .* also feeds 'last'"),
    "F.relu": (_functional, "'relu' before it .* is a function call"),
    "torch.relu": (_torch_function, "'relu' before it .* is a function call"),
    ".relu()": (_method, "'relu' before it .* is a function call"),
    "cat": (_concatenated, "'relu' before it .* is a function call"),
    "in place": (_inplace, "'relu_' before it .* changes in place"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_rewired_is_refused_before_anything_changes(case):
    middle, reason = CANNOT[case]
    net = _Net(middle, relu=nn.ReLU(), relu_=nn.ReLU(inplace=True))
    net(torch.zeros(1, 3, 8, 8))
    before = list(net.modules())
    with pytest.raises(ValueError, match=f"binary layer 'middle' would see .*{reason}") as error:
        convert(net, XNOR())
    assert list(net.modules()) == before
    advice = "skip=['first', 'last', 'middle']"
    assert advice in str(error.value)
    convert(net, XNOR(), skip=["first", "last", "middle"])  # as advised
    convert(_Net(middle, relu=nn.ReLU(), relu_=nn.ReLU(True)), XNOR(), rewire=False)


def test_all_or_nothing_also_for_a_layer_that_cannot_be_swapped():
    model = _chain()
    model[5].register_forward_hook(lambda *_: None)
    before = list(model)
    with pytest.raises(ValueError, match="'5' must be a plain layer, got one with hooks"):
        convert(model, XNOR())
    assert list(model) == before


def test_untraceable_models_need_rewire_false():
    def branches(net, x):
        return net.middle(x) if x.sum() > 0 else net.other(x)

    net = _Net(branches)
    with pytest.raises(ValueError, match="trace _Net, got TraceError .*rewire=False"):
        convert(net, XNOR())
    convert(net, XNOR(), rewire=False)
    kinds = _types(net)
    assert kinds["middle"] is kinds["other"] is XNORConv2d
    assert kinds["first"] is kinds["last"] is nn.Conv2d


def test_a_bare_layer_cannot_be_swapped_in_place():
    with pytest.raises(ValueError, match="wrap it in nn.Sequential"):
        convert(nn.Linear(4, 4), XNOR(), skip=[])


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(3, 3))])
def test_nothing_to_convert(model):
    with pytest.raises(ValueError, match="Sequential has no layer for XNOR"):
        convert(model, XNOR())


@pytest.mark.parametrize("arguments", [{"scale": "beta"}, {"pad_value": 2}])
def test_method_refuses(arguments):
    with pytest.raises(ValueError, match="must be .*, got ('beta'|2)"):
        XNOR(**arguments)


def test_a_converted_model_copies():
    model = convert(_chain(), XNOR()).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
