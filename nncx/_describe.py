"""Model -> file: the architecture of a model as a JSON tree, and its tensors without repetitions.

`nncx._store` has the format. A layer is described by what its constructor was given, which nncx's
and torch's layers keep as attributes of the same names.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from nncx.nn import PackedLayer

MAX_DEPTH = 100  # of modules in modules

# Device, dtype and an embedding's weight are those of the tensors; children come from the tree;
# Hardtanh's old spellings.
_NOT_CONFIG = {"device", "dtype", "modules", "min_value", "max_value", "_weight", "_freeze"}


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def describe(model: nn.Module, names: Mapping[type[nn.Module], str]) -> dict[str, Any]:
    """The architecture of `model`.

    Args:
        names: of the layers that can be rebuilt; others are foreign.

    Raises:
        ValueError: for a layer that the format has no place for.
    """
    return _node(model, "", {}, names)


def _node(
    module: nn.Module | None,
    path: str,
    seen: dict[nn.Module, str],
    names: Mapping[type[nn.Module], str],
) -> dict[str, Any] | None:
    """The node of `module`, which stands at `path`; `seen` has the paths of those before."""
    if module is None:
        return None
    if path.count(".") >= MAX_DEPTH:
        raise ValueError(
            f"save: modules must be nested at most {MAX_DEPTH} deep, got more at '{path[:40]}...';"
            " flatten the model"
        )
    if module in seen:
        return {"same_as": seen[module]}
    seen[module] = path
    node: dict[str, Any]
    if type(module) in names:
        node = {"type": names[type(module)], "config": config(module)}
        if isinstance(module, PackedLayer) and module.frozen:
            node["frozen"] = True
    else:
        node = {"type": foreign_name(module), "foreign": True}
    node["children"] = {
        name: _node(child, join(path, name), seen, names) for name, child in module._modules.items()
    }
    return node


def config(module: nn.Module) -> dict[str, Any]:
    """The arguments that construct `module`, as JSON has them.

    Defaults are left out: a torch whose layer has one argument more writes what others can read.
    """
    values = {
        name: _encoded(argument(module, name), module, name) for name in arguments(type(module))
    }
    return {
        name: value
        for name, value in values.items()
        if value != arguments(type(module))[name].default
    }


def argument(module: nn.Module, name: str) -> Any:
    """What the constructor of `module` was given as `name`."""
    value = getattr(module, name)
    if name != "bias" or isinstance(value, bool):
        return value
    affine = getattr(module, "affine", True) and getattr(module, "elementwise_affine", True)
    return value is not None or not affine  # a norm without a weight has no bias anyway


@functools.cache
def arguments(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
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
    if isinstance(value, dict):
        return {"dict": {key: _encoded(item, module, name) for key, item in value.items()}}
    raise ValueError(
        f"save: {type(module).__name__}.{name} must be made of numbers and strings, got"
        f" {value!r}; set it to what the constructor takes"
    )


def foreign_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
