"""save and load: a model in one file, rebuilt from a closed list of layers, without any pickle.

The tensors of the state dict stand beside the architecture, a JSON tree of nodes:

    {"type": "torch.nn.Conv2d", "config": {...}, "frozen": true, "children": {"name": node, ...}}
    {"type": "my.package.Net", "foreign": true, "children": {...}}      a class not on the list
    {"same_as": "path.of.a.node"}                                       a module with two names
    null                                                                a child that is None

`config` holds the constructor's arguments, without those at their default. The children in the file
are the truth: they override those that the constructor makes, which is how a converted network
comes back. A foreign class can stand inside a network of `nncx.models`, whose constructor makes it;
elsewhere `load` needs `into`.
A parameter with two names is stored once; "tied" in the metadata says who shares it.

A file is untrusted: nothing in it names code to run, modules are built on the meta device, their
number is bounded, and their tensors are compared with those of the file before anything is changed.
Should a user's class raise while it is filled, the user's model gets all it had back.
"""

import functools
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

import nncx.models
from nncx import _files
from nncx.compress._rewire import REMOVABLE_MODULES
from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    PackedLayer,
    XNORConv2d,
    XNORLinear,
)

# Layers whose constructor's arguments are attributes of the same name (`bias`: is there one?).
_TORCH_TYPES = """
    Sequential ModuleList ModuleDict Identity
    Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    Embedding EmbeddingBag RNN LSTM GRU RNNCell LSTMCell GRUCell
    BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d
    GroupNorm LayerNorm RMSNorm LocalResponseNorm
    CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax
    Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink
    Softsign Tanh Tanhshrink Threshold
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d
    AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout
    ChannelShuffle Flatten Fold PixelShuffle PixelUnshuffle Unflatten Unfold
    Upsample UpsamplingBilinear2d UpsamplingNearest2d CosineSimilarity
    CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d
    ReflectionPad1d ReflectionPad2d ReflectionPad3d
    ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
""".split()
_MODELS = ("LeNet300100", "LeNet4", "LeNet5", "MLP", "NiN", "ResNet", "VGG9")

TYPES: dict[str, type[nn.Module]] = {
    **{f"torch.nn.{name}": getattr(nn, name) for name in _TORCH_TYPES},
    **{f"nncx.models.{name}": getattr(nncx.models, name) for name in _MODELS},
    "nncx.BinaryConnectConv2d": BinaryConnectConv2d,
    "nncx.BinaryConnectLinear": BinaryConnectLinear,
    "nncx.XNORConv2d": XNORConv2d,
    "nncx.XNORLinear": XNORLinear,
}
_NAMES = {cls: name for name, cls in TYPES.items()}

# Device, dtype and an embedding's weight are those of the tensors; children come from the tree;
# Hardtanh's old spellings.
_NOT_CONFIG = {"device", "dtype", "modules", "min_value", "max_value", "_weight", "_freeze"}

_MAX_DEPTH = 100
_MAX_MODULES = 20_000
_MAX_PARAMETERS = 20_000  # torch's LSTM takes a time quadratic in them


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the tensors and the architecture of `model` to one safetensors file.

    Layers of `nncx.freeze` are stored at their packed size. A model of any class can be saved, but
    `load` rebuilds only networks of `nncx.models`, nncx layers, and of torch.nn: containers but
    ParameterList and ParameterDict; linear, convolution, embedding, recurrent, batch, instance,
    group, layer and RMS norm, dropout, padding, pooling (but for fractional) and upsampling
    layers; activations but MultiheadAttention (`nncx._store.TYPES` lists all). With any other class
    in it, `save` warns that `load` will want a new model of that class as `into`.

    Args:
        model: on any device; not changed.
        path: replaced as a whole or, should anything fail, not at all.

    Raises:
        ValueError: if a layer holds something that the format has no place for, or was changed
            since its construction, so that its attributes do not describe its tensors.
        TypeError: if `model` is no nn.Module.
        OSError: if the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"save: model must be an nn.Module, got {type(model).__name__}; pass the model itself"
        )
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    architecture = _describe(model, "", {})
    tensors, tied = _stored_tensors(model)
    _check_rebuildable(architecture, model)
    metadata = {"kind": "model", "architecture": architecture, "tied": tied}
    _files.write(path, tensors, metadata)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    into: nn.Module | None = None,
) -> nn.Module:
    """Read a model of `save`; it computes the same bits.

    Args:
        path: the file.
        device: where the model shall be.
        into: a new model of the class that was saved, needed if nncx cannot rebuild that class.
            Its layers are swapped for those of the file (packed instead of float ones, removed
            activations), and filled; if anything does not fit, it stays as it was.

    Returns:
        The model in eval mode. If it has frozen layers, no parameter requires a gradient.

    Raises:
        ValueError: if the file is damaged, holds no model, or does not fit `into` or itself.
        TypeError: if `into` is no nn.Module, as if its class were passed.
        OSError: if it cannot be opened.
    """
    if into is not None and not isinstance(into, nn.Module):
        raise TypeError(_not_a_model(into))
    tensors, metadata = _files.read(path)
    try:
        tensors = _untied(tensors, metadata)
        plan = _Plan()
        model = plan.resolve(metadata["architecture"], into, "", users=into is not None)
        _compare(plan.expected, tensors)
    except _RefusalError as reason:
        raise ValueError(f"{os.fspath(path)} cannot be loaded: {reason}") from reason
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with _restored_on_error(model):
        plan.apply()
        model.eval()
        model.load_state_dict(tensors, assign=True)
        for name, source in metadata["tied"].items():
            setattr(*_owner(model, name), getattr(*_owner(model, source)))
    if any(isinstance(module, PackedLayer) and module.frozen for module in model.modules()):
        model.requires_grad_(False)
    return model if into is None else model.to(device)


class _RefusalError(Exception):
    """Why a model cannot be rebuilt: the end of a sentence about the file."""


class _ForeignError(_RefusalError):
    """It has a class that is not on the list."""


# ---------------------------------------------------------------------------------------------
# model -> file


def _stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict without repetitions, and for each repeated name the name it repeats."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == "_extra_state":
            raise ValueError(
                f"save: a state dict must hold parameters and buffers, got '{name}'; keep it in a"
                " buffer and drop get_extra_state"
            )
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, tied


def _check_rebuildable(architecture: dict[str, Any], model: nn.Module) -> None:
    """Find out now, while the model is still there."""
    try:
        try:
            _check_plan(_Plan(), architecture, None, model)
        except _ForeignError as reason:
            _check_plan(_Plan(), architecture, model, model)  # load will ask for `into`
            _warn_of_into(reason)
    except _RefusalError as reason:
        raise ValueError(f"save: the file could not be loaded again: {reason}") from reason


def _check_plan(
    plan: "_Plan", architecture: dict[str, Any], into: nn.Module | None, model: nn.Module
) -> None:
    plan.resolve(architecture, into, "", users=into is not None)
    _compare(plan.expected, model.state_dict())


def _warn_of_into(reason: _ForeignError) -> None:
    warnings.warn(f"nncx.save: load will not do without into=, because {reason}", stacklevel=4)


def _describe(
    module: nn.Module | None, path: str, seen: dict[nn.Module, str]
) -> dict[str, Any] | None:
    """The node of `module`, which stands at `path`; `seen` has the paths of those before."""
    if module is None:
        return None
    if path.count(".") >= _MAX_DEPTH:
        raise ValueError(
            f"save: modules must be nested at most {_MAX_DEPTH} deep, got more at '{path[:40]}...';"
            " flatten the model"
        )
    if module in seen:
        return {"same_as": seen[module]}
    seen[module] = path
    node: dict[str, Any]
    if type(module) in _NAMES:
        node = {"type": _NAMES[type(module)], "config": _config(module)}
        if isinstance(module, PackedLayer) and module.frozen:
            node["frozen"] = True
    else:
        node = {"type": _foreign_name(module), "foreign": True}
    node["children"] = {
        name: _describe(child, _join(path, name), seen) for name, child in module._modules.items()
    }
    return node


def _config(module: nn.Module) -> dict[str, Any]:
    """The arguments that construct `module`, as JSON has them.

    Defaults are left out: a torch whose layer has one argument more writes what others can read.
    """
    config = {
        name: _encoded(_argument(module, name), module, name) for name in _arguments(type(module))
    }
    return {
        name: value
        for name, value in config.items()
        if value != _arguments(type(module))[name].default
    }


def _argument(module: nn.Module, name: str) -> Any:
    """What the constructor of `module` was given as `name`."""
    value = getattr(module, name)
    if name != "bias" or isinstance(value, bool):
        return value
    affine = getattr(module, "affine", True) and getattr(module, "elementwise_affine", True)
    return value is not None or not affine  # a norm without a weight has no bias anyway


@functools.cache
def _arguments(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor that `config` may hold."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = dict(inspect.signature(cls).parameters)
    if issubclass(cls, nn.RNNBase):  # they take *args and hand them on
        parameters = dict(inspect.signature(nn.RNNBase).parameters)
        del parameters["mode"]
    if cls is nn.RNN:
        parameters["nonlinearity"] = inspect.signature(nn.RNNCell).parameters["nonlinearity"]
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind not in variadic and name not in _NOT_CONFIG
    }


def _encoded(value: Any, module: nn.Module, name: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        value = float(value)
        return value if math.isfinite(value) else {"float": str(value)}  # JSON has no such numbers
    if isinstance(value, (tuple, list)):
        return [_encoded(item, module, name) for item in value]
    raise ValueError(
        f"save: {type(module).__name__}.{name} must be made of numbers and strings, got"
        f" {value!r}; set it to what the constructor takes"
    )


def _foreign_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---------------------------------------------------------------------------------------------
# file -> model


class _Resolved(NamedTuple):
    module: nn.Module
    before: nn.Module | None  # what stood there
    size: int  # modules made for it and what is inside


class _Plan:
    """Finds the module for every node of a file, and notes what must change for that.

    Nothing of a user's model changes before `apply`.
    """

    def __init__(self) -> None:
        self.expected: dict[str, Tensor] = {}  # the state dict of the model to be
        self._swaps: list[tuple[nn.Module, str, nn.Module | None]] = []
        self._drops: list[tuple[nn.Module, str]] = []
        self._resolved: dict[str, _Resolved] = {}
        self._made = 0
        self._parameters = 0

    def resolve(
        self, node: Any, present: nn.Module | None, path: str, *, users: bool
    ) -> nn.Module | None:
        """The module for `node`.

        Args:
            node: from the file.
            present: what stands at `path` so far, made by the parent's constructor.
            path: the name of the module in the model.
            users: whether `present` is part of the user's model, so that it may only become what
                `convert` and `freeze` make of it.

        Raises:
            _RefusalError: if the node is not sound or does not fit.
        """
        if node is None:
            if users and present is not None:
                raise _RefusalError(_misfit(path, "None", _name_of(present)))
            return None
        if path.count(".") >= _MAX_DEPTH or not isinstance(node, dict):
            raise _RefusalError(f"its architecture is not sound at '{path}'")
        if "same_as" in node:
            return self._repeat(node["same_as"], present, path, users)
        made = self._made
        self._count()
        module = self._choose(node, present, path, users)
        users = users and module is present
        children = node.get("children", {})
        if not isinstance(children, dict):
            raise _RefusalError(f"its architecture is not sound at '{path}'")
        if users and children.keys() != module._modules.keys():
            names = ", ".join(sorted(children.keys() ^ module._modules.keys()))
            raise _RefusalError(f"into= and the file differ in modules of '{path}': {names}")
        if not users:  # the children in the file, and in their order
            self._drops += [(module, name) for name in module._modules]
        for name, child in children.items():
            _check_name(module, name)
            now = module._modules.get(name)
            new = self.resolve(child, now, _join(path, name), users=users)
            if not users or new is not now:
                self._swaps.append((module, name, new))
        self._resolved[path] = _Resolved(module, present, self._made - made)
        return module

    def apply(self) -> None:
        for parent, name in self._drops:
            delattr(parent, name)
        for parent, name, module in self._swaps:
            parent.register_module(name, module)

    def _repeat(self, source: Any, present: nn.Module | None, path: str, users: bool) -> nn.Module:
        if not isinstance(source, str) or source not in self._resolved:
            raise _RefusalError(f"'{path}' repeats '{source}', which is not before it")
        module, before, size = self._resolved[source]
        if users and present is not before:
            raise _RefusalError(f"'{path}' and '{source}' are one module in it, but not in into=")
        self._count(size)
        inside = f"{source}."
        for name in [name for name in self.expected if name.startswith(inside)]:
            self.expected[_join(path, name.removeprefix(inside))] = self.expected[name]
        return module

    def _choose(
        self, node: dict[str, Any], present: nn.Module | None, path: str, users: bool
    ) -> nn.Module:
        name = node.get("type")
        if node.get("foreign"):
            known = present is not None and (users or _foreign_name(present) == name)
            if not known:
                raise _ForeignError(_call_for_into(str(name), path))
            if type(present) in _NAMES:
                raise _RefusalError(_misfit(path, str(name), _name_of(present)))
            self._expect(path, present)
            return present
        if not isinstance(name, str) or name not in TYPES:
            raise _RefusalError(f"this nncx does not know its layer type {name!r}; upgrade nncx")
        fresh = self._construct(TYPES[name], node.get("config"), bool(node.get("frozen")))
        self._expect(path, fresh)  # not `present`, whose tensors may have been replaced since
        if present is not None and _same(present, fresh):
            return present
        if users and not (path and _may_become(present, fresh)):
            raise _RefusalError(_misfit(path, *_difference(fresh, present)))
        return fresh

    def _expect(self, path: str, module: nn.Module) -> None:
        for name, tensor in _own_tensors(module):
            self.expected[_join(path, name)] = tensor

    def _construct(self, cls: type[nn.Module], config: Any, frozen: bool) -> nn.Module:
        """A module on the meta device, of whatever size."""
        name = cls.__name__
        if not isinstance(config, dict) or not config.keys() <= _arguments(cls).keys():
            raise _RefusalError(f"it has arguments that {name} does not take")
        if frozen and not issubclass(cls, PackedLayer):
            raise _RefusalError(f"it says that {name} is frozen, which cannot be")
        try:
            with torch.device("meta"), self._bounded():
                module = cls(**{key: _decoded(value) for key, value in config.items()})
                return module.freeze() if frozen else module
        except _RefusalError:
            raise
        except Exception as error:  # the constructor may raise anything on nonsense
            raise _RefusalError(f"{name} cannot be built from its arguments ({error})") from error

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Stop a constructor that would run on for hours, as of a ResNet or LSTM 10**9 deep."""
        hooks = (
            register_module_module_registration_hook(lambda *_: self._count()),
            register_module_parameter_registration_hook(lambda *_: self._count_parameter()),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count_parameter(self) -> None:
        self._parameters += 1
        if self._parameters > _MAX_PARAMETERS:
            raise _RefusalError(f"it has more than {_MAX_PARAMETERS} parameters")

    def _count(self, modules: int = 1) -> None:
        self._made += modules
        if self._made > _MAX_MODULES:
            raise _RefusalError(f"it has more than {_MAX_MODULES} modules")


def _decoded(value: Any) -> Any:
    """Undo `_encoded`, but for lists, which become tuples."""
    if isinstance(value, dict):
        return float(value["float"])
    return tuple(_decoded(item) for item in value) if isinstance(value, list) else value


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Entries of the state dict that belong to `module` and not to its children."""
    buffers = {
        name: buffer
        for name, buffer in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }
    for name, tensor in {**module._parameters, **buffers}.items():
        if tensor is not None:
            yield name, tensor


def _same(present: nn.Module, fresh: nn.Module) -> bool:
    return type(present) is type(fresh) and _traits(present) == _traits(fresh)


def _traits(module: nn.Module) -> dict[str, Any]:
    """What a module of its type must have in common with another to take its place."""
    return _config(module) | {"frozen": getattr(module, "frozen", False)}


def _trait(module: nn.Module, name: str) -> Any:
    return module.frozen if name == "frozen" else _argument(module, name)


def _may_become(present: nn.Module, fresh: nn.Module) -> bool:
    """Whether `convert` or `freeze` could have made `fresh` of `present`."""
    if type(fresh) is nn.Identity:
        return isinstance(present, REMOVABLE_MODULES)
    if not isinstance(fresh, PackedLayer) or type(present) not in _NAMES:
        return False
    known = _arguments(type(present))
    config = {name: value for name, value in _config(fresh).items() if name in known}
    return isinstance(fresh, type(present)) and config == _config(present)


def _check_name(module: nn.Module, name: str) -> None:
    """Refuse what register_module would refuse, before anything is changed."""
    if not name or "." in name or (hasattr(module, name) and name not in module._modules):
        raise _RefusalError(f"{type(module).__name__} cannot have a module named '{name}'")


def _call_for_into(name: str, path: str) -> str:
    short = name.rpartition(".")[2]
    if not path:
        return f"it holds the class {short}, which nncx cannot rebuild; pass into={short}(...)"
    return (
        f"it holds the class {short} as '{path}', which nncx cannot rebuild; pass a new model of"
        " the class that was saved as into="
    )


def _misfit(path: str, stored: str, present: str) -> str:
    where = f"'{path}'" if path else "the model"
    return (
        f"{where} is {stored} in the file and {present} in into=; pass a model built with the"
        " arguments of the one that was saved"
    )


def _difference(fresh: nn.Module, present: nn.Module | None) -> tuple[str, str]:
    """What tells the two apart, as short as can be: their types, else one argument."""
    if type(fresh) is not type(present):
        return _name_of(fresh), _name_of(present)
    ours, theirs = _traits(fresh), _traits(present)
    name = next(name for name in ours | theirs if ours.get(name, ...) != theirs.get(name, ...))
    return (
        f"{_name_of(fresh)}({name}={_trait(fresh, name)})",
        f"{_name_of(present)}({name}={_trait(present, name)})",
    )


def _name_of(module: nn.Module | None) -> str:
    return "None" if module is None else type(module).__name__


def _untied(tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole state dict."""
    tied = metadata.get("tied")
    has_model = metadata.get("kind") == "model" and isinstance(metadata.get("architecture"), dict)
    if not has_model or not isinstance(tied, dict):
        raise _RefusalError("it holds no model; pass a file of nncx.save")
    for name, source in tied.items():
        if name in tensors or not isinstance(source, str) or source not in tensors:
            raise _RefusalError(f"its tensor '{name}' cannot be that of '{source}'")
    return tensors | {name: tensors[source] for name, source in tied.items()}


def _compare(expected: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() ^ stored.keys()):
        holder = "its layers need" if name in expected else "its layers do not have"
        verb = "lacks" if name in expected else "holds"
        raise _RefusalError(f"it {verb} the tensor '{name}', which {holder}")
    for name, tensor in stored.items():
        want = expected[name]
        # Any floating dtype will do: the model takes the one of the file.
        floats = tensor.is_floating_point() and want.is_floating_point()
        if tensor.shape != want.shape or not (floats or tensor.dtype == want.dtype):
            raise _RefusalError(
                f"its tensor '{name}' must be {want.dtype} {list(want.shape)}, got {tensor.dtype}"
                f" {list(tensor.shape)}"
            )


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module its children, tensors and mode back if a user's class raises."""
    kinds = ("_modules", "_parameters", "_buffers")
    before = [
        (module, module.training, [dict(getattr(module, kind)) for kind in kinds])
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, training, contents in before:
            module.training = training
            for kind, content in zip(kinds, contents, strict=True):
                getattr(module, kind).clear()
                getattr(module, kind).update(content)
        for module, *_ in before:
            if isinstance(module, PackedLayer):
                module.repack()
        raise


def _not_a_model(into: Any) -> str:
    if isinstance(into, type):
        return (
            f"load: into must be a model, got the class {into.__name__}; pass {into.__name__}(...)"
        )
    return f"load: into must be a model, got {type(into).__name__}; pass an nn.Module"


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
