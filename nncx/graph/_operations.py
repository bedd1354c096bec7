"""The operations of a graph that have no tensors of their own: a closed list.

They are operators of ATen, by short names that stand for one overload each, and their arguments
have ATen's names, defaults and types. A file is untrusted: `check` knows every argument's type and
range, so that nothing but a listed operator runs, on numbers that it can mean.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYER = "layer"
GETITEM = "getitem"

_ATEN = """
    relu.default hardtanh.default leaky_relu.default elu.default sigmoid.default tanh.default
    hardswish.default hardsigmoid.default silu.default gelu.default mish.default selu.default
    softplus.default clamp.default
    softmax.int log_softmax.int
    add.Tensor sub.Tensor rsub.Scalar mul.Tensor div.Tensor
    cat.default chunk.default split.Tensor split_with_sizes.default
    max_pool2d.default avg_pool2d.default adaptive_avg_pool2d.default
    adaptive_max_pool2d.default mean.dim
    flatten.using_ints reshape.default permute.default transpose.int unsqueeze.default squeeze.dim
    select.int slice.Tensor pad.default channel_shuffle.default pixel_shuffle.default
    pixel_unshuffle.default upsample_nearest2d.vec upsample_bilinear2d.vec
""".split()

_MAX_INT = 2**31 - 1
_ANY = (-1e300, 1e300)
_MAX_LIST = 1_000  # of numbers in an argument
_MAX_PARTS = 10_000
_RANGES = {
    "dim": (-8, 8),
    "dim0": (-8, 8),
    "dim1": (-8, 8),
    "dims": (-8, 8),
    "start_dim": (-8, 8),
    "end_dim": (-8, 8),
    "index": (-_MAX_PARTS, _MAX_PARTS),
    "chunks": (1, _MAX_PARTS),
    "split_size": (1, _MAX_INT),
    "split_sizes": (0, _MAX_INT),
    "groups": (1, 2**20),
    "kernel_size": (1, 2**16),
    "stride": (1, 2**16),
    "dilation": (1, 2**16),
    "padding": (0, 2**16),
    "pad": (-(2**16), 2**16),
    "step": (1, _MAX_INT),
    "shape": (-1, _MAX_INT),
    "output_size": (1, 2**16),
    "scale_factors": (0, 2**16),
    "upscale_factor": (1, 2**16),
    "downscale_factor": (1, 2**16),
    "divisor_override": (1, _MAX_INT),
}
_WORDS = {
    "mode": ("constant", "reflect", "replicate", "circular"),
    "approximate": ("none", "tanh"),
}


class Operation(NamedTuple):
    """An operator, called by `run`.

    Attributes:
        tensors: names of the arguments that take the inputs, in order; the single name of a list of
            tensors takes them all.
        takes_list: whether they come as one list.
        gives_list: whether the result is several tensors, which only `getitem` reads.
        arguments: type, as ATen's schema says it, of every other argument.
        defaults: of those that may be left out.
        scalars: names of tensors that may be a number instead, as in `x + 1`.
    """

    function: Callable[..., Any]
    tensors: tuple[str, ...]
    takes_list: bool
    gives_list: bool
    arguments: dict[str, str]
    defaults: dict[str, Any]
    scalars: frozenset[str]


def run(name: str, inputs: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    """The value of a listed operation: a tensor, or several that `getitem` reads."""
    operation = OPERATIONS[name]
    if operation.takes_list:
        return operation.function(list(inputs), **arguments)
    return operation.function(*inputs, **arguments)


def _of_aten(overload: torch._ops.OpOverload) -> Operation:
    schema = overload._schema
    types = {each.name: str(each.type) for each in schema.arguments if each.name != "dtype"}
    tensors = tuple(name for name, kind in types.items() if kind in ("Tensor", "List[Tensor]"))
    return Operation(
        function=overload,
        tensors=tensors,
        takes_list=types[tensors[0]] == "List[Tensor]",
        gives_list=len(schema.returns) > 1 or str(schema.returns[0].type) == "List[Tensor]",
        arguments={name: kind for name, kind in types.items() if name not in tensors},
        defaults={a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        scalars=frozenset(tensors[1:]),
    )


def _getitem(parts: Sequence[Tensor], index: int) -> Tensor:
    return operator.getitem(parts, index)


def _listed() -> dict[str, Operation]:
    listed = {
        GETITEM: Operation(_getitem, ("parts",), False, False, {"index": "int"}, {}, frozenset())
    }
    for name in _ATEN:
        short, _, overload = name.partition(".")
        listed[short] = _of_aten(getattr(getattr(torch.ops.aten, short), overload))
    return listed


OPERATIONS = _listed()


def why_unsound(operation: Operation, inputs: int, arguments: Any) -> str | None:
    """What is wrong with a call of `operation` with so many inputs, the end of a sentence.

    None if it is sound: every argument is one that the operator has, of the right type and within
    the range that makes sense, and none is missing.
    """
    if not isinstance(arguments, dict):
        return "has no arguments by name"
    rest = operation.tensors[inputs:]
    if inputs < 1 or (inputs > len(operation.tensors) and not operation.takes_list):
        return f"cannot have {inputs} inputs"
    kinds = operation.arguments | {name: "number" for name in rest if name in operation.scalars}
    for name in (*rest, *operation.arguments):
        if name not in arguments and name not in operation.defaults:
            return f"lacks {name}"
    for name, value in arguments.items():
        if name not in kinds or not _fits(value, kinds[name], name):
            return f"cannot have {name}={str(value)[:80]}"
    return None


def _fits(value: Any, kind: str, name: str) -> bool:
    """Whether `value` is of the type `kind` and in the range of arguments called `name`."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1], name)
    if kind.startswith("List["):
        items = isinstance(value, (tuple, list)) and len(value) <= _MAX_LIST
        return items and all(_fits(item, kind[len("List[") : -1], name) for item in value)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return value in _WORDS[name]
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
        return False
    if isinstance(value, float) and math.isinf(value):
        return name not in _RANGES  # a limit, or the padding of a maximum
    low, high = _RANGES.get(name, (-_MAX_INT, _MAX_INT) if kind == "int" else _ANY)
    return low <= value <= high
