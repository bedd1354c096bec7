"""save(entropy=True) and load: the same bits again, from a smaller file."""

import pytest
import torch
from stored import METHODS, MyNet, compressed, output, rewrite
from torch import nn

from nncx import _entropy, _files
from nncx._store import load, save
from nncx.compress import (
    BinaryConnect,
    DeepCompression,
    convert,
    freeze,
)
from nncx.models import MLP
from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    Int8Linear,
    PrunedLinear,
    XNORConv2d,
    XNORLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:nncx.save. load will not do without into=")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


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
    assert repr(loaded) == repr(model.eval()) and torch.equal(output(loaded, x), output(model, x))
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
    model = compressed(MLP(width=20, depth=2), method)
    save(model, tmp_path / "plain")
    save(model, file, entropy=True)
    if "coded" not in _files.read(file)[1]:
        assert file.read_bytes() == (tmp_path / "plain").read_bytes()
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(output(load(file), x), output(model, x))


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
    assert torch.equal(output(load(file, into=MyNet()), x), output(model, x))


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
    rewrite(file, change)
    with pytest.raises(ValueError, match=f"model.safetensors cannot be loaded: .*{message}"):
        load(file)


def test_codes_are_compared_with_their_layer_before_they_are_decoded(file, monkeypatch):
    save(_skewed(), file, entropy=True)
    rewrite(file, _claim(2**16))
    monkeypatch.setattr(_entropy, "decode", None)
    with pytest.raises(ValueError, match=r"must be torch.uint8 \[2560\], got .* \[65536\]"):
        load(file)
