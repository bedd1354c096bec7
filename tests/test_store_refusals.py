"""save and load: what is refused, in one sentence, with nothing changed."""

import copy
import threading
import warnings

import pytest
import torch
from stored import MyNet, output, plain, rewrite
from torch import nn

from nncx import _rebuild
from nncx._store import load, save
from nncx.compress import (
    XNOR,
    convert,
    freeze,
)
from nncx.models import ResNet
from nncx.nn import (
    XNORLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:nncx.save. load will not do without into=")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def test_damaged_files_are_refused(file):
    save(freeze(convert(plain(), XNOR())), file)
    whole = file.read_bytes()
    for at in (9, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="is not a whole nncx file"):
            load(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is not a whole nncx file"):
        load(file)


def test_a_failed_save_leaves_the_old_file(file, monkeypatch):
    save(plain(), file)
    old = file.read_bytes()
    broken = plain()
    broken[0].register_forward_hook(lambda *_: None)
    broken[12].in_features = {3}
    with pytest.raises(ValueError, match="Linear.in_features must be made of numbers and strings"):
        save(broken, file)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(plain(), file)
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
        save(plain(), file)
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
    assert torch.equal(output(into, x), expected)


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
    rewrite(file, change)
    with pytest.raises(ValueError, match=f"model.safetensors cannot be loaded: .*{message}"):
        load(file)


def test_tensors_that_a_layer_cannot_take_are_refused(file):
    """One that is a parameter here and a buffer there; alpha in a dtype that the kernel lacks."""
    save(nn.Sequential(nn.BatchNorm1d(4)), file)
    rewrite(file, lambda t, m: (t.pop("0.weight"), m["tied"].update({"0.weight": "0.bias"})))
    loaded = load(file)[0]
    assert loaded.weight is loaded.bias
    rewrite(file, lambda t, m: m["tied"].update({"0.weight": "0.running_var"}))
    with pytest.raises(ValueError, match="'0.weight' cannot be that of '0.running_var'"):
        load(file)

    save(nn.Sequential(XNORLinear(3, 4).freeze()), file)
    rewrite(file, lambda t, m: t.update({"0.bias": t["0.bias"].half()}))
    assert load(file)[0].bias.dtype == torch.float16
    rewrite(file, lambda t, m: t.update({"0.alpha": t["0.alpha"].half()}))
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

    rewrite(file, forge)
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
    rewrite(file, lambda t, m: _linear(m).update(type="x" * 100_000))
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
    rewrite(file, lambda t, m: t.update({"0.packed_weight": torch.zeros(36, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=r"must be torch.uint8 \[35\], got torch.uint8 \[36\]"):
        load(file)
