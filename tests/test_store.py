"""save and load: the same bits again, from a small file, or one clear refusal."""

import copy
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nncx import _describe, _entropy, _files, _rebuild, _store
from nncx import models as nncx_models
from nncx._store import load, save
from nncx.compress import (
    INQ,
    TTQ,
    XNOR,
    BinaryConnect,
    DeepCompression,
    Half,
    Int8,
    Pruning,
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


def _plain():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding="same", groups=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


class MyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.relu(self.norm(x)))


class MyNet(nn.Module):
    """A user's class, with a shared activation, a None child and a bare parameter."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.blocks = nn.ModuleList([MyBlock(width), MyBlock(width)])
        self.extra = None
        self.register_module("nothing", None)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(x)) * self.gain


MODELS = {
    "Sequential": (_plain, (2, 3, 10, 10)),
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
METHODS = {
    "float": lambda model: model,
    "xnor": lambda model: convert(model, XNOR(scale="alpha_k")),
    "frozen xnor": lambda model: freeze(convert(model, XNOR())),
    "binary connect": lambda model: convert(model, BinaryConnect(stochastic=True)),
    "frozen binary connect": lambda model: freeze(convert(model, BinaryConnect())),
    "ttq": lambda model: convert(model, TTQ()),
    "inq in the middle": lambda model: _quantized(convert(model, INQ()), 0.5),
    "frozen inq": lambda model: freeze(_quantized(convert(model, INQ(bits=4)), 1)),
    "deep compression": lambda model: convert(model, DeepCompression(4, 3)),
    "frozen deep compression": lambda model: freeze(convert(model, DeepCompression(4, 3))),
    "frozen half": lambda model: freeze(convert(model, Half())),
    "pruned": lambda model: _pruned(model),
    "frozen pruned": lambda model: freeze(_pruned(model)),
    "int8": lambda model: _calibrated(convert(model, Int8(symmetric=True))),
    "frozen int8": lambda model: freeze(_calibrated(convert(model, Int8(per_channel=False)))),
}


def _quantized(model, fraction):
    for layer in model.modules():
        if hasattr(layer, "quantize_largest"):
            layer.quantize_largest(fraction)
    return model


def _calibrated(model):
    for layer in model.modules():
        if hasattr(layer, "set_input_range"):
            layer.set_input_range(-1, 2)
    return model


def _pruned(model):
    method = Pruning(sparsity=0.8)
    list(method.steps(convert(model, method)))
    return model


def _compressed(model, method):
    """With BatchNorm statistics and affine parameters that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    return METHODS[method](model)


def _output(model, x):
    with torch.no_grad():
        return model.eval()(x)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def _rewrite(file, change):
    """A file with other metadata or tensors and a valid hash."""
    tensors, metadata = _files.read(file)
    change(tensors, metadata)
    _files.write(file, tensors, metadata)


# ---------------------------------------------------------------------------------------------
# there and back


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_gives_the_same_bits(name, method, file):
    build, shape = MODELS[name]
    model, x = _compressed(build(), method), torch.randn(shape)
    expected = _output(model, x)
    save(model, file)
    loaded = load(file)
    assert type(loaded) is type(model) and not loaded.training
    assert repr(loaded) == repr(model.eval())
    assert torch.equal(_output(loaded, x), expected)
    assert [p.requires_grad for p in loaded.parameters()] == [
        not method.startswith("frozen") for _ in loaded.parameters()
    ]


def test_an_unfrozen_model_trains_on(file):
    model = convert(_plain(), XNOR())
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
    model = convert(_plain(), XNOR())
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
    assert torch.equal(_output(loaded, x), _output(model, x))


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
    model, x = _plain(), torch.randn(2, 3, 10, 10)
    expected = _output(model, x)
    save(torch.compile(model), file)
    loaded = load(file)
    assert type(loaded) is nn.Sequential and torch.equal(_output(loaded, x), expected)


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
    assert torch.equal(_output(load(file), x)[0], _output(module, x)[0])


# ---------------------------------------------------------------------------------------------
# entropy coding


def _skewed():
    """Frozen layers most of whose signs are equal, in one of them nearly all; and one of int8."""
    model = nn.Sequential(
        *(XNORConv2d(1, 32, 3), nn.Flatten(), BinaryConnectLinear(32 * 16, 40), XNORLinear(40, 9)),
        *(nn.Linear(9, 4), Int8Linear(4, 2)),
    )
    with torch.no_grad():
        model[0].weight.abs_()
        model[2].weight.copy_(torch.rand(40, 512) - 0.995)
        model[3].weight.sub_(0.1)
    model[5].set_input_range(-1, 1)
    return freeze(model)


def test_entropy_coded_models_are_the_same_to_the_bit_in_a_smaller_file(file, tmp_path):
    model, x, plain_file = _skewed(), torch.randn(3, 1, 6, 6), tmp_path / "plain"
    save(model, plain_file)
    save(model, file, entropy=True)
    tensors, metadata = _files.read(file)
    coded = metadata["coded"]
    assert coded == ["0.packed_weight", "2.packed_weight"]  # the other one is no smaller
    assert [int(tensors[name][0]) for name in coded] == [1, 2]
    saved = sum(len(model.state_dict()[name]) - len(tensors[name]) for name in coded)
    assert file.stat().st_size < plain_file.stat().st_size - saved
    loaded = load(file)
    assert repr(loaded) == repr(model.eval()) and torch.equal(_output(loaded, x), _output(model, x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_same_model_gives_the_same_coded_file(file):
    model, contents = _skewed(), set()
    for _ in range(2):
        save(model, file, entropy=True)
        contents.add(file.read_bytes())
        model = load(file)
    assert len(contents) == 1


@pytest.mark.parametrize("method", METHODS)
def test_what_entropy_coding_brings_nothing_for_is_stored_as_without(method, file, tmp_path):
    model = _compressed(MLP(width=20, depth=2), method)
    save(model, tmp_path / "plain")
    save(model, file, entropy=True)
    if "coded" not in _files.read(file)[1]:
        assert file.read_bytes() == (tmp_path / "plain").read_bytes()
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(_output(load(file), x), _output(model, x))


def test_the_gaps_of_pruned_layers_are_coded(file):
    layer = PrunedLinear(300, 20, gap_bits=8)
    layer.mask.copy_(torch.rand(20, 300) < 0.1)
    model, x = freeze(nn.Sequential(layer)), torch.randn(2, 300)
    save(model, file, entropy=True)
    tensors, metadata = _files.read(file)
    assert metadata["coded"] == ["0.gaps"] and len(tensors["0.gaps"]) < len(layer.gaps)
    assert torch.equal(load(file)(x), model(x))


def test_codes_of_a_codebook_are_coded_by_the_gaps_between_zeros(file):
    model, x = nn.Sequential(PrunedLinear(300, 20)), torch.randn(2, 300)
    model[0].mask.copy_(torch.rand(20, 300) < 0.05)
    freeze(convert(model, DeepCompression()))
    save(model, file, entropy=True)
    tensors, metadata = _files.read(file)
    assert metadata["coded"] == ["0.packed_weight"] and tensors["0.packed_weight"][0] == 2
    assert len(tensors["0.packed_weight"]) < model[0].packed_weight.numel() / 6
    assert torch.equal(load(file)(x), model(x))


def test_tied_codes_are_coded_once(file):
    layer = BinaryConnectLinear(100, 100)
    nn.init.constant_(layer.weight, 1.0)
    other = BinaryConnectLinear(100, 100).freeze()
    model = nn.Sequential(layer.freeze(), layer, other)
    other.packed_weight = layer.packed_weight
    save(model, file, entropy=True)
    tensors, metadata = _files.read(file)
    assert metadata["coded"] == ["0.packed_weight"] and "2.packed_weight" not in tensors
    loaded = load(file)
    assert loaded[0] is loaded[1] and loaded[2].packed_weight is loaded[0].packed_weight
    assert torch.equal(loaded[2].packed_weight, layer.packed_weight)


def test_coded_tensors_fill_a_class_of_the_user(file):
    model = convert(MyNet(), BinaryConnect())
    for layer in model.modules():
        if isinstance(layer, BinaryConnectConv2d):
            nn.init.constant_(layer.weight, -1.0)
    save(freeze(model), file, entropy=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(_output(load(file, into=MyNet()), x), _output(model, x))


def test_a_width_that_no_code_has_is_refused_by_save(file):
    layer = BinaryConnectLinear(8, 8).freeze()
    layer.bits = 9
    with pytest.raises(ValueError, match="width of a code must be 1 to 8 bits, got 9"):
        save(nn.Sequential(layer), file, entropy=True)
    assert not file.exists()


def _claim(size):
    def change(tensors, metadata):
        tensors["2.packed_weight"][2:10] = torch.tensor(list(size.to_bytes(8, "little")))

    return change


def _payload_for_all(tensors, metadata):
    """That of one layer as that of another."""
    tensors["0.packed_weight"] = tensors["2.packed_weight"].clone()


FORGED_CODES = {
    "no list": (lambda t, m: m.update(coded={}), "does not say which"),
    "no name": (lambda t, m: m.update(coded=[["x"]]), "cannot be a coded one"),
    "no tensor": (lambda t, m: m.update(coded=["x"]), "'x' cannot be a coded one"),
    "floats": (lambda t, m: m.update(coded=["4.weight"]), "'4.weight' cannot be a coded one"),
    "int8": (lambda t, m: m.update(coded=["5.packed_weight"]), "cannot be a coded one"),
    "not coded": (lambda t, m: m["coded"].append("3.packed_weight"), "cannot be decoded: it"),
    "not said": (lambda t, m: m.update(coded=[]), "must be torch.uint8"),
    "one byte more": (_claim(2561), r"must be torch.uint8 \[2560\], got torch.uint8 \[2561\]"),
    "one byte less": (_claim(2559), r"must be torch.uint8 \[2560\], got torch.uint8 \[2559\]"),
    "huge": (_claim(2**62), f"it cannot hold {2**62} bytes"),
    "of another layer": (_payload_for_all, r"must be torch.uint8 \[36\], got .* \[2560\]"),
    "empty": (lambda t, m: t.update({"0.packed_weight": t["0.packed_weight"][:0]}), "cut short"),
    "cut": (lambda t, m: t.update({"0.packed_weight": t["0.packed_weight"][:-1]}), "ends early"),
    "image": (
        lambda t, m: t.update({"0.packed_weight": t["0.packed_weight"][None]}),
        "cannot be a coded one",
    ),
}


@pytest.mark.parametrize("case", FORGED_CODES)
def test_forged_codes_are_refused(case, file):
    change, message = FORGED_CODES[case]
    save(_skewed(), file, entropy=True)
    _rewrite(file, change)
    with pytest.raises(ValueError, match=f"model.safetensors cannot be loaded: .*{message}"):
        load(file)


def test_codes_are_compared_with_their_layer_before_they_are_decoded(file, monkeypatch):
    save(_skewed(), file, entropy=True)
    _rewrite(file, _claim(2**16))
    monkeypatch.setattr(_entropy, "decode", None)
    with pytest.raises(ValueError, match=r"must be torch.uint8 \[2560\], got .* \[65536\]"):
        load(file)


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
    expected = _output(model, x)
    save(model, file)
    fresh = MyNet()
    loaded = load(file, into=fresh)
    assert loaded is fresh and not loaded.training and repr(loaded) == repr(model)
    assert torch.equal(_output(loaded, x), expected)

    if method != "float":  # a model that was converted already will do as well
        other = load(file, into=convert(MyNet(), XNOR(), skip=["stem", "head"]))
        assert torch.equal(_output(other, x), expected)


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
    model, x = freeze(convert(_plain(), XNOR())), torch.randn(2, 3, 10, 10)
    save(model, file)
    assert torch.equal(_output(load(file, into=_plain()), x), _output(model, x))


def test_into_must_share_what_the_file_shares(file):
    def net(shared):
        model = MyNet()
        model.blocks[1].relu = model.blocks[0].relu if shared else nn.ReLU()
        return model

    save(net(True), file)
    load(file, into=net(True))
    with pytest.raises(ValueError, match="are one module in it, but not in into="):
        load(file, into=net(False))


# ---------------------------------------------------------------------------------------------
# refusals


def test_damaged_files_are_refused(file):
    save(freeze(convert(_plain(), XNOR())), file)
    whole = file.read_bytes()
    for at in (9, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="is not a whole nncx file"):
            load(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is not a whole nncx file"):
        load(file)


def test_a_failed_save_leaves_the_old_file(file, monkeypatch):
    save(_plain(), file)
    old = file.read_bytes()
    broken = _plain()
    broken[0].register_forward_hook(lambda *_: None)
    broken[12].in_features = {3}
    with pytest.raises(ValueError, match="Linear.in_features must be made of numbers and strings"):
        save(broken, file)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(_plain(), file)
    assert file.read_bytes() == old and list(file.parent.iterdir()) == [file]


def test_save_refuses_what_could_not_be_loaded(file):
    pruned = nn.Linear(4, 4)
    pruned.weight = nn.Parameter(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"'0.weight' must be .* \[4, 4\], got .* \[2, 4\]"):
        save(nn.Sequential(pruned), file)

    assert not file.exists()


@pytest.mark.parametrize("state", [{"a": 1}, torch.ones(2)], ids=["dict", "tensor"])
def test_save_refuses_extra_state(state, file):
    class Stateful(nn.Module):
        def get_extra_state(self):
            return state

    with pytest.raises(ValueError, match="must hold parameters and buffers, got '0._extra_state'"):
        save(nn.Sequential(Stateful()), file)
    assert not file.exists()


def test_save_refuses_of_foreign_classes_what_could_not_be_loaded(file):
    pruned = MyNet()
    pruned.head.weight = nn.Parameter(torch.ones(2, 8, 1, 1))
    with pytest.raises(ValueError, match=r"'head.weight' must be .* \[4, 8, 1, 1\], got .* \[2, 8"):
        save(pruned, file)

    class Renaming(MyNet):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "more"] = torch.ones(1)

    with pytest.raises(ValueError, match="holds the tensor 'more', which its layers do not have"):
        save(Renaming(), file)
    assert not file.exists()


@pytest.mark.parametrize("innermost", [nn.ReLU, MyNet])
def test_save_refuses_what_is_nested_too_deep(innermost, file):
    def nested(depth):
        model = innermost()
        for _ in range(depth):
            model = nn.Sequential(model)
        return model

    save(nested(90), file)
    for depth in (150, 2000):
        with pytest.raises(ValueError, match="nested at most 100 deep, got more at '0.0.*'; flat"):
            save(nested(depth), file)


@pytest.mark.parametrize("module", [nn.ReLU, {}, MyNet().state_dict()], ids=["type", "dict", "st"])
def test_save_refuses_what_is_no_model(module, file):
    with pytest.raises(TypeError, match="save: model must be an nn.Module, got .*; pass the model"):
        save(module, file)


def test_load_refuses_an_into_that_is_no_model(file):
    save(MyNet(), file)
    with pytest.raises(TypeError, match=r"got the class MyNet; pass MyNet\(...\)"):
        load(file, into=MyNet)
    with pytest.raises(TypeError, match="into must be a model, got dict; pass an nn.Module"):
        load(file, into={})


def test_save_says_when_load_will_need_into(file):
    with pytest.warns(UserWarning, match="without into=, because it holds the class MyNet") as said:
        save(MyNet(), file)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(_plain(), file)
        save(ResNet(8, width=4), file)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_error_of_the_users_class_leaves_into_alone(frozen, file):
    class Refusing(MyNet):
        refusing = False

        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            if self.refusing:
                raise KeyError("mine")

    def build():
        return convert(Refusing(), XNOR(), skip=["stem", "head"])

    save(freeze(build()) if frozen else build(), file)
    into = build()
    into.blocks[1].eval()
    into.refusing, x = True, torch.randn(2, 3, 8, 8)
    before, state = repr(into), {k: v.clone() for k, v in into.state_dict().items()}
    parameters, modes = list(into.parameters()), [m.training for m in into.modules()]
    with pytest.raises(KeyError, match="mine"):
        load(file, into=into)
    assert repr(into) == before and [m.training for m in into.modules()] == modes
    assert all(a is b for a, b in zip(into.parameters(), parameters, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in into.state_dict().items())
    with torch.no_grad():
        expected = copy.deepcopy(into).eval()(x)
    assert torch.equal(_output(into, x), expected)


def _root(metadata):
    return metadata["architecture"]


def _linear(metadata):
    return _root(metadata)["children"]["0"]


def _deep(tensors, metadata):
    node = _root(metadata)
    for _ in range(150):
        node["children"]["0"] = {"type": "torch.nn.Sequential", "config": {}, "children": {}}
        node = node["children"]["0"]


def _bomb(tensors, metadata):
    """Each level repeats the one before twice: 2**60 modules in a few lines."""
    node = _root(metadata)
    tensors.clear()
    node["children"] = {"a0": {"type": "torch.nn.ReLU", "config": {}, "children": {}}}
    for level in range(60):
        twice = {"x": {"same_as": f"a{level}"}, "y": {"same_as": f"a{level}"}}
        pair = {"type": "torch.nn.Sequential", "config": {}, "children": twice}
        node["children"][f"a{level + 1}"] = pair


HOSTILE = {
    "no architecture": (lambda t, m: m.pop("architecture"), "holds no model"),
    "a checkpoint": (lambda t, m: m.update(kind="checkpoint"), "holds no model"),
    "unknown type": (lambda t, m: _linear(m).update(type="os.system"), "layer type 'os.system'"),
    "type of torch, not listed": (
        lambda t, m: _linear(m).update(type="torch.nn.Transformer"),
        "does not know its layer type",
    ),
    "no type": (lambda t, m: _linear(m).pop("type"), "does not know its layer type None"),
    "node is a list": (lambda t, m: _root(m)["children"].update({"0": []}), "not sound at '0'"),
    "children are a list": (lambda t, m: _linear(m).update(children=[]), "not sound at '0'"),
    "device": (
        lambda t, m: _linear(m)["config"].update(device="cpu"),
        "arguments that Linear does not take",
    ),
    "argument": (
        lambda t, m: _linear(m)["config"].update(foo=1),
        "arguments that Linear does not take",
    ),
    "wrong kind of argument": (
        lambda t, m: _linear(m)["config"].update(in_features="x"),
        "Linear cannot be built from its arguments",
    ),
    "huge layer": (
        lambda t, m: _linear(m)["config"].update(in_features=10**11),
        r"must be torch.float32 \[4, 100000000000\], got torch.float32 \[4, 3\]",
    ),
    "overflowing layer": (lambda t, m: _linear(m)["config"].update(in_features=10**30), "built"),
    "endless network": (
        lambda t, m: _linear(m).update(type="nncx.models.ResNet", config={"depth": 6 * 10**9 + 2}),
        "more than 6100 modules",
    ),
    "endless layer": (
        lambda t, m: _linear(m).update(
            type="torch.nn.LSTM",
            config={"input_size": 1, "hidden_size": 1, "num_layers": 10**9},
        ),
        "a layer of it has more than 500 parameters",
    ),
    "not a number": (
        lambda t, m: _linear(m)["config"].update(in_features={"double": "inf"}),
        "Linear cannot be built",
    ),
    "deep": (_deep, "not sound"),
    "bomb": (_bomb, "more than 6100 modules"),
    "frozen Linear": (lambda t, m: _linear(m).update(frozen=True), "says that Linear is frozen"),
    "missing tensor": (lambda t, m: t.pop("0.bias"), "lacks the tensor '0.bias'"),
    "spare tensor": (lambda t, m: t.update(x=torch.ones(1)), "holds the tensor 'x'"),
    "shape": (lambda t, m: t.update({"0.bias": torch.ones(5)}), r"'0.bias' must be .*\[4\], got"),
    "dtype": (
        lambda t, m: t.update({"0.bias": torch.ones(4, dtype=torch.int32)}),
        "must be torch.float32 .* got torch.int32",
    ),
    "tied to nothing": (lambda t, m: m["tied"].update({"a": "b"}), "'a' cannot be that of 'b'"),
    "tied to itself": (lambda t, m: m["tied"].update({"0.bias": []}), "'0.bias' cannot be that"),
    "repeats itself": (lambda t, m: _root(m)["children"].update({"0": {"same_as": ""}}), "repeats"),
    "name of a method": (
        lambda t, m: _root(m)["children"].update(forward=_linear(m)),
        "cannot have a module named 'forward'",
    ),
    "endless name": (
        lambda t, m: _linear(m)["children"].update({"a" * 3000: {"type": "torch.nn.ReLU"}}),
        "not sound at '0.aaa",
    ),
    "name with a dot": (
        lambda t, m: _root(m)["children"].update({"a.b": _linear(m)}),
        "cannot have a module named 'a.b'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case, file):
    change, message = HOSTILE[case]
    save(nn.Sequential(nn.Linear(3, 4)), file)
    _rewrite(file, change)
    with pytest.raises(ValueError, match=f"model.safetensors cannot be loaded: .*{message}"):
        load(file)


def test_tensors_that_a_layer_cannot_take_are_refused(file):
    """One that is a parameter here and a buffer there; alpha in a dtype that the kernel lacks."""
    save(nn.Sequential(nn.BatchNorm1d(4)), file)
    _rewrite(file, lambda t, m: (t.pop("0.weight"), m["tied"].update({"0.weight": "0.bias"})))
    loaded = load(file)[0]
    assert loaded.weight is loaded.bias
    _rewrite(file, lambda t, m: m["tied"].update({"0.weight": "0.running_var"}))
    with pytest.raises(ValueError, match="'0.weight' cannot be that of '0.running_var'"):
        load(file)

    save(nn.Sequential(XNORLinear(3, 4).freeze()), file)
    _rewrite(file, lambda t, m: t.update({"0.bias": t["0.bias"].half()}))
    assert load(file)[0].bias.dtype == torch.float16
    _rewrite(file, lambda t, m: t.update({"0.alpha": t["0.alpha"].half()}))
    with pytest.raises(
        ValueError, match=r"'0.alpha' must be torch.float32 \[4\], got torch.float16"
    ):
        load(file)


def test_a_repeated_layer_is_compared_as_strictly(file):
    layer = XNORLinear(3, 4).freeze()
    save(nn.Sequential(layer, layer), file)

    def forge(tensors, metadata):
        del metadata["tied"]["1.alpha"]
        tensors["1.alpha"] = tensors["0.alpha"].half()

    _rewrite(file, forge)
    with pytest.raises(ValueError, match="'1.alpha' must be torch.float32 .* got torch.float16"):
        load(file)


def test_a_shape_that_no_kernel_takes_is_refused(file):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = XNORLinear(2**31, 0, bias=False).freeze()
    layer.packed_weight = torch.zeros(0, dtype=torch.uint8)
    layer.alpha = torch.zeros(0)
    save(nn.Sequential(layer), file)
    with pytest.raises(ValueError, match="cannot be loaded: its tensors do not suit its layers"):
        load(file)


def test_a_message_about_a_file_stays_short(file):
    save(nn.Sequential(nn.ReLU()), file)
    _rewrite(file, lambda t, m: _linear(m).update(type="x" * 100_000))
    with pytest.raises(ValueError, match="cannot be loaded") as refusal:
        load(file)
    assert len(str(refusal.value)) < 1000


def test_models_made_meanwhile_by_other_threads_are_not_counted(file, monkeypatch):
    save(nn.Sequential(nn.Linear(3, 4)), file)
    made, construct = [], _rebuild._Plan._construct

    def slow(plan, *arguments):
        thread = threading.Thread(target=lambda: made.append(ResNet(8, width=1)))
        thread.start()
        thread.join()
        return construct(plan, *arguments)

    monkeypatch.setattr(_rebuild, "_MAX_MODULES", 3)
    monkeypatch.setattr(_rebuild._Plan, "_construct", slow)
    load(file)
    assert len(made) == 2


def test_a_packed_tensor_of_another_size_is_refused(file):
    save(freeze(convert(nn.Sequential(nn.Linear(70, 4)), XNOR(), skip=[])), file)
    _rewrite(file, lambda t, m: t.update({"0.packed_weight": torch.zeros(36, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=r"must be torch.uint8 \[35\], got torch.uint8 \[36\]"):
        load(file)
