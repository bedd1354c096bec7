"""save and load: the same bits again, from a small file."""

import copy

import numpy as np
import pytest
import torch
from stored import METHODS, MyBlock, MyNet, compressed, output, plain
from torch import nn

from nncx import _describe, _files, _store
from nncx import models as nncx_models
from nncx._store import load, save
from nncx.compress import (
    XNOR,
    BinaryConnect,
    convert,
    freeze,
)
from nncx.graph import Graph
from nncx.models import MLP, VGG9, LeNet5, LeNet300100, MobileNet, NiN, ResNet, ShuffleNetV2
from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    ChannelShuffle,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    GroupedConv2d,
    HalfConv2d,
    HalfLinear,
    HashedLinear,
    INQConv2d,
    INQLinear,
    Int8Conv2d,
    Int8Linear,
    PrunedConv2d,
    PrunedLinear,
    SharedConv2d,
    SharedLinear,
    TTQConv2d,
    TTQLinear,
    XNORConv2d,
    XNORLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:nncx.save. load will not do without into=")


MODELS = {
    "Sequential": (plain, (2, 3, 10, 10)),
    "LeNet300100": (LeNet300100, (2, 1, 28, 28)),
    "LeNet5": (LeNet5, (2, 1, 28, 28)),
    "LeNet5 with norm": (lambda: LeNet5(norm=True), (2, 1, 28, 28)),
    "MLP": (lambda: MLP(width=20, depth=2, dropout=0.5), (2, 1, 28, 28)),
    "MobileNet": (lambda: MobileNet(width=0.25, small_images=True), (2, 3, 16, 16)),
    "NiN": (lambda: NiN(widths=(9, 8, 7, 6, 5, 4, 3, 2), kernels=(1, 3, 5)), (2, 3, 32, 32)),
    "ResNet": (lambda: ResNet(8, width=4), (2, 3, 16, 16)),
    "ShuffleNetV2": (lambda: ShuffleNetV2(width=0.5, small_images=True), (2, 3, 16, 16)),
    "VGG9": (lambda: VGG9(width=4, hidden=8), (2, 3, 32, 32)),
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


# ---------------------------------------------------------------------------------------------
# there and back


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_gives_the_same_bits(name, method, file):
    build, shape = MODELS[name]
    model, x = compressed(build(), method), torch.randn(shape)
    expected = output(model, x)
    save(model, file)
    loaded = load(file)
    assert type(loaded) is type(model) and not loaded.training
    assert repr(loaded) == repr(model.eval())
    assert torch.equal(output(loaded, x), expected)
    assert [p.requires_grad for p in loaded.parameters()] == [
        not method.startswith("frozen") for _ in loaded.parameters()
    ]


def test_an_unfrozen_model_trains_on(file):
    model = convert(plain(), XNOR())
    save(model, file)
    loaded, x = load(file).train(), torch.randn(2, 3, 10, 10)
    loaded(x).sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert not torch.equal(loaded[3].weight, model[3].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_those_of_the_tensors(dtype, file):
    model = freeze(nn.Sequential(XNORLinear(70, 8), nn.Linear(8, 4))).to(dtype)
    save(model, file)
    loaded, x = load(file), torch.randn(3, 70, dtype=dtype)
    assert loaded[1].weight.dtype == dtype and loaded[0].alpha.dtype == torch.float32
    assert torch.equal(loaded(x), model(x))


def test_saving_changes_nothing(file):
    model = convert(plain(), XNOR())
    before = copy.deepcopy(model.state_dict())
    save(model, file)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shared_modules_and_tied_parameters_stay_so(file):
    shared, first, second = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    model = nn.Sequential(shared, nn.Sequential(first, shared), second, XNORLinear(5, 5))
    model[3].weight = first.weight
    save(model, file)
    tensors, _ = _files.read(file)
    assert sum(name.endswith("weight") for name in tensors) == 2
    loaded, x = load(file), torch.randn(2, 5)
    assert loaded[0] is loaded[1][1]
    assert loaded[1][0].weight is loaded[2].weight is loaded[3].weight
    assert torch.equal(output(loaded, x), output(model, x))


def test_children_in_the_file_override_the_constructors(file):
    model = ResNet(8, width=4)
    del model.relu
    model.relu = nn.Tanh()
    model.extra = nn.Linear(2, 2)
    model.stage1.append(nn.BatchNorm2d(4))
    model.stage2[0].shortcut = nn.AvgPool2d(2)
    model.pool = None
    save(model, file)
    assert repr(load(file)) == repr(model.eval())


def test_a_frozen_layer_costs_one_bit_a_weight_and_less_than_2_kb(file):
    def size(depth):
        layers = [XNORConv2d(64, 64, 3, padding=1).freeze() for _ in range(depth)]
        save(nn.Sequential(*layers), file)
        return file.stat().st_size

    packed_bytes = 64 * 64 * 9 // 8 + 64 * 4 * 2  # signs, alpha, bias
    overhead = (size(21) - size(1)) / 20 - packed_bytes
    assert 0 < overhead < 2048
    assert size(1) - packed_bytes < 2048


def test_a_frozen_vgg9_is_at_most_a_thirtieth_of_the_float_file(file, tmp_path):
    model, float_file = VGG9(), tmp_path / "float.safetensors"
    save(model, float_file)
    save(freeze(convert(model, BinaryConnect())), file)
    assert 14_022_016 / 8 < file.stat().st_size < float_file.stat().st_size / 30


@pytest.mark.parametrize(
    "module, config",
    [
        (nn.BatchNorm2d(3), {"num_features": 3}),
        (nn.BatchNorm1d(3, affine=False), {"num_features": 3, "affine": False}),
        (nn.LayerNorm(3, elementwise_affine=False), {"elementwise_affine": False}),
        (nn.GroupNorm(2, 4, eps=0.5), {"num_groups": 2, "num_channels": 4, "eps": 0.5}),
        (nn.Linear(3, 4, bias=False), {"in_features": 3, "out_features": 4, "bias": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_defaults_are_not_stored_so_a_torch_without_the_argument_can_read(module, config, file):
    save(module, file)
    stored = _files.read(file)[1]["architecture"]["config"]
    assert stored | config == stored and "device" not in stored
    assert ("bias" in stored) == ("bias" in config)


@pytest.mark.parametrize(
    "module, name, value",
    [
        (nn.Linear(np.prod((3, 4)), 10), "in_features", 12),
        (nn.Dropout(np.float32(0.25)), "p", 0.25),
        (nn.Flatten(np.int16(2)), "start_dim", 2),
        (nn.ReLU(np.bool_(True)), "inplace", True),
        (nn.ConstantPad2d(1, -float("inf")), "value", -float("inf")),
        (nn.Hardtanh(-float("inf"), np.float64("inf")), "max_val", float("inf")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_numpy_and_infinity_are_stored(module, name, value, file):
    save(nn.Sequential(module), file)
    rebuilt = getattr(load(file)[0], name)
    assert rebuilt == value and type(rebuilt) is type(value)


def test_nan_is_stored(file):
    save(nn.Sequential(nn.ConstantPad1d(1, float("nan"))), file)
    into = nn.Sequential(nn.ConstantPad1d(1, float("nan")))
    assert load(file, into=into)(torch.ones(1, 1)).isnan().tolist() == [[True, False, True]]


def test_a_compiled_model_is_saved_as_the_model(file):
    model, x = plain(), torch.randn(2, 3, 10, 10)
    expected = output(model, x)
    save(torch.compile(model), file)
    loaded = load(file)
    assert type(loaded) is nn.Sequential and torch.equal(output(loaded, x), expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(4, 3, 2, bidirectional=True, proj_size=2, batch_first=True),
        nn.GRU(4, 3, bias=False),
        nn.RNN(4, 3, nonlinearity="relu"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_recurrent_layers_compute_the_same(module, file):
    save(module, file)
    x = torch.randn(2, 5, 4)
    assert torch.equal(output(load(file), x)[0], output(module, x)[0])


# ---------------------------------------------------------------------------------------------
# the list of types

SAMPLES = [
    *(nn.Sequential(nn.ReLU()), nn.ModuleList([nn.Tanh()]), nn.ModuleDict({"a": nn.ReLU6(True)})),
    *(nn.Module(), nn.Identity(3), nn.Linear(3, 4, bias=False), nn.Bilinear(2, 3, 4)),
    *(nn.Conv1d(2, 4, 3, 2, 1, 2, 2), nn.Conv2d(2, 4, (3, 1), padding="same", bias=False)),
    *(nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular"), nn.ConvTranspose1d(2, 4, 3)),
    *(nn.ConvTranspose2d(2, 4, 3, 2, 1, 1), nn.ConvTranspose3d(2, 4, 3, dilation=2)),
    *(nn.BatchNorm1d(3), nn.BatchNorm2d(3, 0.1, None, False), nn.BatchNorm3d(3, affine=False)),
    *(nn.InstanceNorm1d(3), nn.InstanceNorm2d(3, affine=True), nn.InstanceNorm3d(3)),
    *(nn.GroupNorm(2, 4, 1e-3), nn.LayerNorm([3, 4], bias=False), nn.RMSNorm(3)),
    *(nn.LocalResponseNorm(3, k=2.0), nn.CELU(0.5), nn.ELU(0.5, True), nn.GELU("tanh")),
    *(nn.GLU(1), nn.Hardshrink(0.1), nn.Hardsigmoid(True), nn.Hardswish(), nn.Hardtanh(-2, 2)),
    *(nn.LeakyReLU(0.2), nn.LogSigmoid(), nn.LogSoftmax(1), nn.Mish(), nn.PReLU(3)),
    *(nn.ReLU(True), nn.ReLU6(), nn.SELU(), nn.SiLU(), nn.Sigmoid(), nn.Softmax(1)),
    *(nn.Softplus(2, 10), nn.Softshrink(0.1), nn.Softsign(), nn.Tanh(), nn.Tanhshrink()),
    *(nn.Threshold(0.1, 20), nn.AdaptiveAvgPool1d(2), nn.AdaptiveAvgPool2d((None, 3))),
    *(nn.AdaptiveAvgPool3d(2), nn.AdaptiveMaxPool1d(2, True), nn.AdaptiveMaxPool2d((2, 3))),
    *(nn.AdaptiveMaxPool3d(2), nn.AvgPool1d(2), nn.AvgPool2d(2, 1, 1, True, False, 3)),
    *(nn.AvgPool3d(2), nn.LPPool1d(2, 3), nn.LPPool2d(2, 3, 1, True), nn.MaxPool1d(2)),
    *(nn.MaxPool2d(3, 2, 1, 2, True, True), nn.MaxPool3d(2), nn.AlphaDropout(0.1)),
    *(nn.Dropout(0.2, True), nn.Dropout1d(0.1), nn.Dropout2d(), nn.Dropout3d()),
    *(nn.FeatureAlphaDropout(), nn.ChannelShuffle(2), nn.Flatten(2, 3), nn.PixelShuffle(2)),
    *(nn.PixelUnshuffle(2), nn.Unflatten(1, (2, 3)), nn.Upsample(None, (2.0, 1.0), "bilinear")),
    *(nn.UpsamplingBilinear2d(4), nn.UpsamplingNearest2d(scale_factor=2), nn.CircularPad1d(1)),
    *(nn.CircularPad2d((1, 0, 2, 1)), nn.ConstantPad1d(1, 0.5), nn.ConstantPad2d(1, -1)),
    *(nn.ReflectionPad1d(1), nn.ReflectionPad2d(1), nn.ReplicationPad1d(1)),
    *(nn.ReplicationPad2d((1, 2, 3, 4)), nn.ZeroPad1d(1), nn.ZeroPad2d((1, 2, 0, 0))),
    *(nn.Embedding(5, 3, padding_idx=1, max_norm=2.0), nn.EmbeddingBag(5, 3, mode="sum")),
    *(nn.RNN(3, 4, nonlinearity="relu"), nn.LSTM(3, 4, 2, False), nn.GRU(3, 4, dropout=0.0)),
    *(nn.RNNCell(3, 4, False, "relu"), nn.LSTMCell(3, 4), nn.GRUCell(3, 4, bias=False)),
    *(nn.RReLU(0.1, 0.2), nn.Softmax2d(), nn.Softmin(1), nn.CosineSimilarity(0, 1e-3)),
    *(nn.LPPool3d(2, 3), nn.MaxUnpool1d(2), nn.MaxUnpool2d((2, 3), 2), nn.MaxUnpool3d(2)),
    *(nn.Fold((4, 5), 2, padding=1), nn.Unfold((2, 3), stride=2), nn.CircularPad3d(1)),
    *(nn.ConstantPad3d(1, 2.5), nn.ReflectionPad3d(1), nn.ReplicationPad3d(1), nn.ZeroPad3d(1)),
    *(XNORConv2d(4, 6, 3, scale="none", pad_value=1), XNORLinear(3, 4, scale="alpha_k")),
    *(BinaryConnectConv2d(4, 6, (3, 2), 2, groups=2, stochastic=True), BinaryConnectLinear(3, 4)),
    *(Int8Conv2d(4, 6, 3, padding="same", symmetric=True), Int8Linear(3, 4, per_channel=False)),
    *(HalfConv2d(4, 6, 3, storage="bfloat16"), HalfLinear(3, 4)),
    *(TTQConv2d(4, 6, 3, threshold=0.1, masked=True), TTQLinear(3, 4)),
    *(INQConv2d(4, 6, 3, bits=3), INQLinear(3, 4, masked=True)),
    *(PrunedConv2d(4, 6, 3, padding="same", gap_bits=3), PrunedLinear(3, 4)),
    *(SharedConv2d(4, 6, 3, bits=3, masked=True), SharedLinear(3, 4, bits=2)),
    HashedLinear(8, 6, compression=0.25, seed=3),
    *(DepthwiseConv2d(4, 3, 2, padding=1, multiplier=2, activation="relu6"), ChannelShuffle(2)),
    GroupedConv2d(6, 4, 1, groups=2, bias=False, shuffle=2, activation="relu"),
    DepthwiseSeparableConv2d(4, 6, (3, 5), padding="same", depthwise_activation="relu", bias=False),
    Graph([("y", "hardtanh", ("x",), {"max_val": float("inf")})], ["x"], ["y"]),
]


@pytest.mark.parametrize("module", SAMPLES, ids=lambda module: type(module).__name__)
def test_every_listed_layer_is_rebuilt_as_it_was(module, file):
    save(nn.Sequential(module), file)
    rebuilt = load(file)[0]
    assert type(rebuilt) is type(module) and repr(rebuilt) == repr(module)
    for name in _describe.arguments(type(module)):
        if name != "bias":
            assert getattr(rebuilt, name) == getattr(module, name), name
    theirs = module.state_dict()
    assert {name: t.shape for name, t in rebuilt.state_dict().items()} == {
        name: t.shape for name, t in theirs.items()
    }


def test_every_listed_type_has_a_sample():
    others = {nncx_models.FitNet19, nncx_models.LeNet4, nncx_models.ShuffleNet}
    models = {type(build()) for build, _ in MODELS.values()} | others
    assert {type(module) for module in SAMPLES} | models == set(_store.TYPES.values())


# ---------------------------------------------------------------------------------------------
# classes that nncx cannot rebuild


@pytest.mark.parametrize("method", ["float", "xnor", "frozen xnor"])
def test_foreign_model_is_filled_into_a_new_one(method, file):
    model = MyNet()
    if method != "float":
        convert(model, XNOR(), skip=["stem", "head"])
    if method == "frozen xnor":
        freeze(model)
    x = torch.randn(2, 3, 8, 8)
    expected = output(model, x)
    save(model, file)
    fresh = MyNet()
    loaded = load(file, into=fresh)
    assert loaded is fresh and not loaded.training and repr(loaded) == repr(model)
    assert torch.equal(output(loaded, x), expected)

    if method != "float":  # a model that was converted already will do as well
        other = load(file, into=convert(MyNet(), XNOR(), skip=["stem", "head"]))
        assert torch.equal(output(other, x), expected)


def test_foreign_model_needs_into(file):
    save(MyNet(), file)
    with pytest.raises(ValueError, match=r"class MyNet, which nncx cannot rebuild; pass into="):
        load(file)
    save(nn.Sequential(MyBlock(3)), file)
    with pytest.raises(ValueError, match="holds the class MyBlock as '0', .* pass a new model"):
        load(file)


class _Wider(MyNet):
    def __init__(self):
        super().__init__(width=9)


class _Deeper(MyNet):
    def __init__(self):
        super().__init__()
        self.blocks.append(MyBlock(8))


class _OtherActivation(MyNet):
    def __init__(self):
        super().__init__()
        self.blocks[0].relu = nn.Tanh()


class _WithLayerForNone(MyNet):
    def __init__(self):
        super().__init__()
        self.nothing = nn.Dropout()


class _OtherParameter(MyNet):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "other, message",
    [
        (
            _Wider,
            r"'stem' is Conv2d\(out_channels=8\) in the file and Conv2d\(out_channels=9\) in into=",
        ),
        (_Deeper, "differ in modules of 'blocks': 2"),
        (_OtherActivation, "'blocks.0.relu' is Identity in the file and Tanh in into="),
        (_WithLayerForNone, "'nothing' is None in the file and Dropout in into="),
        (_OtherParameter, r"'gain' must be torch.float32 \[3\], got torch.float32 \[\]"),
        (lambda: nn.Linear(2, 2), "the model is .*MyNet in the file and Linear"),
        (lambda: ResNet(8), "in the file and ResNet"),
    ],
)
def test_what_does_not_fit_leaves_the_users_model_alone(other, message, file):
    save(freeze(convert(MyNet(), XNOR(), skip=["stem", "head"])), file)
    into = other()
    before, values = repr(into), copy.deepcopy(into.state_dict())
    with pytest.raises(ValueError, match=message):
        load(file, into=into)
    assert repr(into) == before and into.training
    assert all(torch.equal(value, values[name]) for name, value in into.state_dict().items())


def test_into_also_takes_a_model_that_nncx_could_rebuild(file):
    model, x = freeze(convert(plain(), XNOR())), torch.randn(2, 3, 10, 10)
    save(model, file)
    assert torch.equal(output(load(file, into=plain()), x), output(model, x))


def test_into_must_share_what_the_file_shares(file):
    def net(shared):
        model = MyNet()
        model.blocks[1].relu = model.blocks[0].relu if shared else nn.ReLU()
        return model

    save(net(True), file)
    load(file, into=net(True))
    with pytest.raises(ValueError, match="are one module in it, but not in into="):
        load(file, into=net(False))
