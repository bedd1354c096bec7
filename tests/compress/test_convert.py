"""convert: what it swaps, what it removes, what it refuses."""

import ast
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nncx.compress import XNOR, convert
from nncx.graph import trace
from nncx.models import MLP, VGG9, LeNet5, NiN, ResNet
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
    """first -> other -> bn -> (forward given) -> last, with the parts that the cases need."""

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
        return self.last(self.run_middle(self, self.bn(self.other(self.first(x)))))


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


@pytest.mark.parametrize(
    "model",
    [ResNet(8, width=4), LeNet5(), LeNet5(norm=True), MLP(width=8), VGG9(width=4, hidden=8)],
    ids=lambda model: type(model).__name__,
)
def test_models_of_nncx_convert_and_train(model):
    count = sum(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())
    convert(model, XNOR())
    assert sum(isinstance(m, (XNORConv2d, XNORLinear)) for m in model.modules()) == count - 2
    size = getattr(model, "image_size", 28)
    model(torch.randn(2, model.in_channels, size, size)).sum().backward()


def test_the_signs_of_lenet5_with_norm_are_of_its_batchnorms():
    model, x = convert(LeNet5(norm=True), XNOR()), torch.randn(4, 1, 28, 28)
    seen = {}
    for name in ("norm1.0", "norm2.0"):
        model.get_submodule(name).register_forward_hook(
            lambda module, _, output, name=name: seen.update({name: output})
        )
    for name in ("conv2", "fc1"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0]})
        )
    model(x)
    assert torch.equal(seen["conv2"], seen["norm1.0"])
    assert torch.equal(seen["fc1"], seen["norm2.0"].flatten(1))
    assert isinstance(model.relu1, nn.ReLU), "the last layer is float"


def test_a_graph_is_converted_as_its_model():
    """In order of execution; and what is refused is found there, too."""
    model = _Net(lambda self, x: self.middle(F.relu(x))).eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(copy.deepcopy(model), images)
    with pytest.raises(ValueError, match="never negative"):
        convert(graph, XNOR())  # in a graph the ReLU is no layer that could go
    kinds = _types(convert(graph, XNOR(), skip=["first", "middle", "last"]))
    assert [name for name, kind in kinds.items() if kind is XNORConv2d] == ["other"]
    convert(model, XNOR(), skip=["first", "middle", "last"])
    with torch.no_grad():
        assert torch.equal(graph(images), model(images))


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


def _functional_dropout(net, x):
    return net.middle(F.dropout(x, 0.1))


def _dropped_residual(net, x):
    x = net.dropout(x)
    return x + net.middle(x)


CANNOT = {
    "residual": (_residual, "'relu' before it .* also feeds 'add'"),
    "pooled residual": (_pooled_residual, "'relu' before it .* also feeds 'add'"),
    "shared": (_shared, "'relu' before it .* also feeds 'last'"),
    "F.relu": (_functional, "'relu' before it .* is a function call"),
    "torch.relu": (_torch_function, "'relu' before it .* is a function call"),
    ".relu()": (_method, "'relu' before it .* is a function call"),
    "cat": (_concatenated, "'relu' before it .* is a function call"),
    "in place": (_inplace, "'relu_' before it .* changes in place"),
    "F.dropout": (_functional_dropout, "'dropout' before it .* is a function call"),
    "dropped residual": (_dropped_residual, "'dropout' before it .* also feeds 'add'"),
}


def _cannot(middle):
    return _Net(
        middle,
        relu=nn.ReLU(),
        relu_=nn.ReLU(inplace=True),
        dropout=nn.Dropout(0.1),
    )


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_rewired_is_refused_before_anything_changes(case):
    middle, reason = CANNOT[case]
    net = _cannot(middle)
    net(torch.zeros(1, 3, 8, 8))
    before = list(net.modules())
    with pytest.raises(ValueError, match=f"binary layer 'middle' would see .*{reason}") as error:
        convert(net, XNOR())
    assert list(net.modules()) == before
    advice = "skip=['first', 'last', 'middle']"
    assert advice in str(error.value)
    convert(net, XNOR(), skip=["first", "last", "middle"])  # as advised
    convert(_cannot(middle), XNOR(), rewire=False)


# Each gives what is never negative, of a signed x or of y = relu(x).
NEVER_NEGATIVE = {
    "clamp(min=0)": lambda x, y: x.clamp(min=0),
    "torch.clamp": lambda x, y: torch.clamp(x, 0, 6),
    "clamp_min": lambda x, y: x.clamp_min(0),
    "F.hardtanh": lambda x, y: F.hardtanh(x, 0, 6),
    "F.threshold": lambda x, y: F.threshold(x, 0, 0),
    "abs": lambda x, y: abs(x),
    "torch.abs": lambda x, y: torch.abs(x),
    "square": lambda x, y: x.square(),
    "**": lambda x, y: x**2,
    "x * x": lambda x, y: x * x,
    "exp": lambda x, y: x.exp(),
    "softmax": lambda x, y: F.softmax(x, 1),
    "maximum": lambda x, y: torch.maximum(x, torch.zeros(1)),
    "max": lambda x, y: torch.max(x, torch.zeros_like(x)),
    "relu + relu": lambda x, y: y + F.relu(x),
    "+=": lambda x, y: y.clone().add_(y),
    "+ 1": lambda x, y: y + 1,
    "* 0.5": lambda x, y: y * 0.5,
    "0.5 *": lambda x, y: 0.5 * y,
    "/ 2": lambda x, y: y / 2,
    "gate": lambda x, y: y * x.mean((2, 3), keepdim=True).sigmoid(),
    "minimum": lambda x, y: torch.minimum(y, x.abs()),
    "cat and add": lambda x, y: torch.cat([y[:, :4], y[:, 4:]], 1) + y,
}


@pytest.mark.parametrize("case", NEVER_NEGATIVE)
def test_whatever_is_never_negative_is_refused(case):
    def middle(net, x):
        return net.middle(NEVER_NEGATIVE[case](x, net.relu(x)))

    x = torch.randn(2, 8, 4, 4)
    assert NEVER_NEGATIVE[case](x, x.relu()).min() >= 0
    with pytest.raises(ValueError, match="'middle' would see [+]1 everywhere.*is never negative"):
        convert(_Net(middle, relu=nn.ReLU()), XNOR())


PASSING = {
    "slice": lambda y: y[:, :, ::2, ::2],
    "chunk": lambda y: torch.cat([y.chunk(2, 1)[0]] * 2, 1),
    "split": lambda y: torch.cat(torch.split(y, [4, 4], 1)[::-1], 1),
    "stack": lambda y: torch.stack([y, y]).sum(0),
    "interpolate": lambda y: F.interpolate(y, scale_factor=2),
    "pad": lambda y: F.pad(y, (1, 1, 1, 1)),
    "reflect": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "pools": lambda y: F.adaptive_max_pool2d(F.avg_pool2d(F.max_pool2d(y, 2, 1), 2, 1), 3),
    "lrn": lambda y: F.local_response_norm(y, 2),
    "shuffle": lambda y: F.channel_shuffle(y, 2).permute(0, 2, 3, 1).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("case", PASSING)
def test_a_relu_goes_through_what_passes_signs_on(case):
    def middle(net, x):
        return net.middle(PASSING[case](net.relu(x)))

    net = convert(_Net(middle, relu=nn.ReLU()), XNOR())
    assert isinstance(net.relu, nn.Identity) and isinstance(net.middle, XNORConv2d)


@pytest.mark.parametrize(
    "between", [nn.Upsample(scale_factor=2), nn.LocalResponseNorm(2), nn.ReflectionPad2d(1)]
)
def test_a_relu_goes_through_modules_that_pass_signs_on(between):
    assert isinstance(convert(_chain(between), XNOR())[4], nn.Identity)


SIGNED = {
    "x": lambda x, y: x,
    "clamp": lambda x, y: x.clamp(-1, 1),
    "hardtanh": lambda x, y: F.hardtanh(x),
    "residual": lambda x, y: x + y,
    "difference": lambda x, y: y - 1,
    "negative scale": lambda x, y: y * -0.5,
    "cube": lambda x, y: x**3,
    "normed": lambda x, y: F.layer_norm(y, y.shape[1:]),
}


@pytest.mark.parametrize("case", SIGNED)
def test_signed_inputs_are_left_alone(case):
    def middle(net, x):
        return net.middle(SIGNED[case](x, net.relu(x)))

    net = convert(_Net(middle, relu=nn.ReLU()), XNOR())
    assert isinstance(net.relu, nn.ReLU) and isinstance(net.middle, XNORConv2d)


@pytest.mark.parametrize("activation", [nn.Hardtanh(0, 6), nn.Softmax(1), nn.Threshold(0, 0)])
def test_a_non_negative_module_that_is_no_relu_is_refused(activation):
    message = f"'1' before it .* is a {type(activation).__name__}, not a ReLU; put a BatchNorm"
    with pytest.raises(ValueError, match=message):
        convert(_chain(activation=lambda: activation), XNOR())


def test_activations_one_behind_the_other_all_go():
    model = convert(_chain(nn.Dropout(0.1), nn.ReLU6()), XNOR())
    assert [type(model[i]) for i in (4, 5, 6)] == [nn.Identity] * 3


def test_a_graph_of_many_paths_takes_linear_time():
    def middle(net, x):
        x = net.relu(x)
        for _ in range(60):
            x = torch.cat([F.max_pool2d(x, 1), F.avg_pool2d(x, 1)], 1)[:, :8]
        return net.middle(x)

    assert isinstance(convert(_Net(middle, relu=nn.ReLU()), XNOR()).relu, nn.Identity)


def test_dropout_goes_as_its_zeros_would_have_a_sign():
    model = convert(NiN(), XNOR())
    assert isinstance(model.dropout1, nn.Identity) and isinstance(model.dropout2, nn.Identity)
    model = convert(_chain(nn.BatchNorm2d(8), nn.Dropout2d(), nn.Identity()), XNOR())
    assert isinstance(model[4], nn.ReLU) and isinstance(model[6], nn.Identity)


def test_dropout_before_a_float_layer_stays():
    model = _chain()
    model.insert(8, nn.Dropout())
    assert isinstance(convert(model, XNOR())[8], nn.Dropout)


def _post_activation(block):
    """As torchvision's ResNet: each ReLU feeds a layer and the shortcut around it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.relu = nn.ReLU()

        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(x + self.bn2(self.conv2(y)))

    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Block(), Block(), block, nn.Conv2d(8, 4, 1))


def test_no_skip_is_advised_that_leaves_nothing():
    with pytest.raises(ValueError, match="give each ReLU .* as nncx.models.ResNet") as error:
        convert(_post_activation(nn.Identity()), XNOR())
    assert "skip" not in str(error.value)


def test_the_advised_skip_is_enough():
    model = _post_activation(
        nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    )
    with pytest.raises(ValueError, match="pass skip=") as error:
        convert(model, XNOR())
    skip = ast.literal_eval(str(error.value).partition("skip=")[2].partition("]")[0] + "]")
    assert isinstance(convert(model, XNOR(), skip=skip)[4][1], XNORConv2d)


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


# ---------------------------------------------------------------------------------------------
# what a swap would not reach, or would lose


def _reads_weight(net, x):
    return F.conv2d(net.middle(x), net.extra.weight)


def _calls_and_reads_weight(net, x):
    return F.conv2d(net.extra(net.middle(x)), net.extra.weight)


@pytest.mark.parametrize(
    "middle, message",
    [
        (lambda net, x: net.middle(x), "'extra' is never called as a module in forward"),
        (_reads_weight, "'extra' is never called as a module in forward"),
        (_calls_and_reads_weight, "forward reads the parameters of 'extra' itself"),
    ],
)
def test_layers_that_forward_does_not_call_are_refused(middle, message):
    net = _Net(middle, extra=nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=f"{message}; pass skip=.'first', 'last', 'extra'."):
        convert(net, XNOR())
    assert type(net.extra) is type(net.middle) is nn.Conv2d
    convert(net, XNOR(), skip=["first", "last", "extra"])
    assert isinstance(net.middle, XNORConv2d) and type(net.extra) is nn.Conv2d


def test_no_skip_is_advised_if_forward_calls_no_layer():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.a.weight)

    with pytest.raises(ValueError, match="'a' is never called .*; call it as a module there"):
        convert(Reads(), XNOR(), skip=[])


@pytest.mark.parametrize("hold", [lambda m: m, lambda m: [m], lambda m: {"key": m}])
@pytest.mark.parametrize("rewire", [True, False])
def test_layers_held_outside_the_tree_are_refused(hold, rewire):
    net = _Net(lambda net, x: net.middle(x))
    object.__setattr__(net, "path", hold(net.middle))
    with pytest.raises(ValueError, match="'middle' must be held as a submodule only.*_Net.path"):
        convert(net, XNOR(), rewire=rewire)
    assert type(net.other) is nn.Conv2d


@pytest.mark.parametrize("rewire", [True, False])
def test_layers_inside_blocks_of_torch_stay(rewire):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 8), nn.Linear(8, 2))
    convert(model, XNOR(), rewire=rewire)
    assert [n for n, kind in _types(model).items() if kind is XNORLinear] == ["2"]
    model(torch.randn(2, 3, 8)).sum().backward()


def test_hooks_on_a_removed_relu_are_refused():
    model = _chain()
    model[4].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'4' must be a plain layer, got one with hooks"):
        convert(model, XNOR())
    assert type(model[2]) is nn.Conv2d


def test_a_trace_leaves_nothing_behind():
    def middle(net, x):
        net.feature = x
        net.calls += 1
        return net.middle(x) * torch.ones(1)

    net = _Net(middle)
    net.calls = 0
    before = set(vars(net))
    convert(net, XNOR())
    assert set(vars(net)) == before and net.calls == 0
    net.feature = torch.zeros(1)
    with pytest.raises(ValueError, match="no layer for XNOR"):
        convert(net, XNOR())
    assert torch.equal(net.feature, torch.zeros(1))


@pytest.mark.parametrize("method, got", [(XNOR, "XNOR"), ("xnor", "'xnor'"), (None, "None")])
def test_a_method_is_an_object(method, got):
    with pytest.raises(ValueError, match=f"such as nncx.XNOR.., got {got};"):
        convert(_chain(), method)


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="convert before torch.compile"):
        convert(torch.compile(_chain()), XNOR())
