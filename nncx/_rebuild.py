"""File -> model: finds the module for every node of an architecture, and fills it with tensors.

`nncx._store` has the format. A file is untrusted: only listed layers are built, on the meta device
and without initial values; how many is bounded, whatever their arguments say; and their tensors are
compared with those of the file before anything is changed. Should a user's class raise while it is
filled, the user's model gets all it had back.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from nncx._describe import MAX_DEPTH, argument, arguments, config, foreign_name, join
from nncx.compress._counterpart import GEOMETRY
from nncx.compress._rewire import REMOVABLE_MODULES
from nncx.compress.low_rank import expansion_like
from nncx.compress.mobile import may_have_made
from nncx.graph import Graph
from nncx.nn import PackedLayer

_MAX_PATH = 2_000  # letters
_MAX_MODULES = 6_100  # a binary ResNet-1202 counts 6,010: freezing takes as long as building
_MAX_PARAMETERS = 5_500
_MAX_PARAMETERS_A_LAYER = 500  # torch's LSTM takes a time quadratic in them


class RefusalError(Exception):
    """Why a model cannot be rebuilt: the end of a sentence about the file."""


class ForeignError(RefusalError):
    """It has a class that is not on the list."""


def whole_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a file, with the tensors that have two names under both.

    Raises:
        RefusalError: if it is not the file of a model.
    """
    tied = metadata.get("tied")
    has_model = metadata.get("kind") == "model" and isinstance(metadata.get("architecture"), dict)
    if not has_model or not isinstance(tied, dict):
        raise RefusalError("it holds no model; pass a file of nncx.save")
    for name, source in tied.items():
        if name in tensors or not isinstance(source, str) or source not in tensors:
            raise RefusalError(f"its tensor '{name}' cannot be that of '{source}'")
    return {**tensors, **{name: tensors[source] for name, source in tied.items()}}


def plan(
    architecture: Any,
    state: Mapping[str, Tensor],
    into: nn.Module | None,
    types: Mapping[str, type[nn.Module]],
) -> "_Plan":
    """How to make a model of `architecture`, which has the tensors of `state`.

    Args:
        architecture: of `nncx._describe`, or anything that JSON can say.
        state: only dtypes and shapes are looked at.
        into: the user's model, which stays as it is; None if the file shall do alone.
        types: the closed list of layers.

    Raises:
        RefusalError: if the architecture is not sound, or does not fit `into` or `state`.
    """
    result = _Plan(state, into, types)
    with torch.device("meta"), _WithoutValues(), result.bounded():
        result.resolve(architecture, into, "", users=into is not None)
    result.compare()
    return result


class _Resolved(NamedTuple):
    module: nn.Module
    before: nn.Module | None  # what stood there
    size: int  # modules made for it and what is inside
    tensors: slice  # where those of the subtree are among the names that the model will have


class _Plan:
    """Finds the module for every node of a file, and notes what must change for that.

    Nothing of a user's model changes before `fill`.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        into: nn.Module | None,
        types: Mapping[str, type[nn.Module]],
    ) -> None:
        self._state = state
        self._into = into
        self._types = types
        self._expected: dict[str, Tensor] = {}  # the state dict of the model to be
        self._names: list[str] = []  # its keys
        self._exact: set[str] = set()  # those that no other dtype may have
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
            RefusalError: if the node is not sound or does not fit.
        """
        if node is None:
            if users and present is not None:
                raise RefusalError(_misfit(path, "None", _name_of(present)))
            return None
        too_deep = path.count(".") >= MAX_DEPTH or len(path) > _MAX_PATH
        if too_deep or not isinstance(node, dict):
            raise RefusalError(f"its architecture is not sound at '{path}'")
        if "same_as" in node:
            return self._repeat(node["same_as"], present, path, users)
        made, first = self._made, len(self._names)
        before = present
        if users and (expansion := self._expansion(node, present)):
            present = expansion
        module = self._choose(node, present, path, users)
        users = users and module is present
        children = node.get("children", {})
        if not isinstance(children, dict):
            raise RefusalError(f"its architecture is not sound at '{path}'")
        if users and children.keys() != module._modules.keys():
            names = ", ".join(sorted(children.keys() ^ module._modules.keys()))
            raise RefusalError(f"into= and the file differ in modules of '{path}': {names}")
        if not users:  # the children in the file, and in their order
            self._drops += [(module, name) for name in module._modules]
        for name, child in children.items():
            _check_name(module, name)
            now = module._modules.get(name)
            new = self.resolve(child, now, join(path, name), users=users)
            if not users or new is not now:
                self._swaps.append((module, name, new))
        inside = slice(first, len(self._names))
        self._resolved[path] = _Resolved(module, before, self._made - made, inside)
        return module

    def compare(self) -> None:
        """Refuse a state dict that is not the one of the model to be."""
        for name in sorted(self._state.keys() - self._expected.keys()):
            raise RefusalError(f"it holds the tensor '{name}', which its layers do not have")
        for name, tensor in self._state.items():
            want = self._expected[name]
            # Any floating dtype will do: the model takes the one of the file.
            floats = tensor.is_floating_point() and want.is_floating_point()
            fits = tensor.dtype == want.dtype or (floats and name not in self._exact)
            if tensor.shape != want.shape or not fits:
                raise RefusalError(
                    f"its tensor '{name}' must be {want.dtype} {list(want.shape)}, got"
                    f" {tensor.dtype} {list(tensor.shape)}"
                )

    def fill(
        self, state: Mapping[str, Tensor], tied: Mapping[str, str], device: torch.device | str
    ) -> nn.Module:
        """The model, in eval mode, with its tensors on `device`.

        Args:
            state: of the shapes and dtypes that were planned for.
            tied: the names whose tensors are those of others.

        Raises:
            RefusalError: if a layer of nncx or torch does not take its tensors.
        """
        for name, source in tied.items():
            if _is_parameter(self._expected[name]) != _is_parameter(self._expected[source]):
                raise RefusalError(f"its tensor '{name}' cannot be that of '{source}'")
        model = self._resolved[""].module
        state = {name: tensor.to(device) for name, tensor in state.items()}
        try:
            with _restored_on_error(model):
                self._swap()
                for module in model.modules():
                    if isinstance(module, Graph):
                        module.check_layers()
                model.eval()
                model.load_state_dict(state, assign=True)
                for name, source in tied.items():
                    setattr(*_owner(model, name), getattr(*_owner(model, source)))
        except Exception as error:
            if self._into is not None:
                raise  # by a class of the user, who shall see it
            raise RefusalError(f"its tensors do not suit its layers ({error})") from error
        return model

    def _swap(self) -> None:
        for parent, name in self._drops:
            delattr(parent, name)
        for parent, name, module in self._swaps:
            parent.register_module(name, module)

    def _repeat(self, source: Any, present: nn.Module | None, path: str, users: bool) -> nn.Module:
        if not isinstance(source, str) or source not in self._resolved:
            raise RefusalError(f"'{path}' repeats '{source}', which is not before it")
        module, before, size, tensors = self._resolved[source]
        if users and present is not before:
            raise RefusalError(f"'{path}' and '{source}' are one module in it, but not in into=")
        self._count(size)
        for name in self._names[tensors]:
            again = path + name.removeprefix(source)
            self._expect_tensor(again, self._expected[name], name in self._exact)
        return module

    def _choose(
        self, node: dict[str, Any], present: nn.Module | None, path: str, users: bool
    ) -> nn.Module:
        name = node.get("type")
        if node.get("foreign"):
            known = present is not None and (users or foreign_name(present) == name)
            if not known:
                raise ForeignError(_call_for_into(str(name), path))
            if type(present) in self._types.values():
                raise RefusalError(_misfit(path, str(name), _name_of(present)))
            self._expect(path, present)
            return present
        if not isinstance(name, str) or name not in self._types:
            raise RefusalError(f"this nncx does not know its layer type {name!r}; upgrade nncx")
        cls, frozen = self._types[name], bool(node.get("frozen"))
        if type(present) is cls and not (users or frozen) and node.get("config") == config(present):
            self._expect(path, present)
            return present
        fresh = self._construct(cls, node.get("config"), frozen)
        self._expect(path, fresh)  # not `present`, whose tensors may have been replaced since
        if present is not None and _same(present, fresh):
            return present
        if users and not (path and self._may_become(present, fresh)):
            raise RefusalError(_misfit(path, *_difference(fresh, present)))
        return fresh

    def _expect(self, path: str, module: nn.Module) -> None:
        frozen = isinstance(module, PackedLayer) and module.frozen
        if frozen:
            module.adopt_sizes(self._state, join(path, ""))
        for name, tensor in _own_tensors(module):
            exact = frozen and not _is_parameter(tensor)  # its kernel takes no other dtype
            self._expect_tensor(join(path, name), tensor, exact)

    def _expect_tensor(self, name: str, tensor: Tensor, exact: bool) -> None:
        if name not in self._state:  # said at once: the work must not exceed what the file holds
            raise RefusalError(f"it lacks the tensor '{name}', which its layers need")
        self._expected[name] = tensor
        self._names.append(name)
        if exact:
            self._exact.add(name)

    def _construct(self, cls: type[nn.Module], config: Any, frozen: bool) -> nn.Module:
        """A module on the meta device, of whatever size."""
        name = cls.__name__
        if not isinstance(config, dict) or not config.keys() <= arguments(cls).keys():
            raise RefusalError(f"it has arguments that {name} does not take")
        if frozen and not issubclass(cls, PackedLayer):
            raise RefusalError(f"it says that {name} is frozen, which cannot be")
        self._count()
        try:
            module = cls(**{key: _decoded(value) for key, value in config.items()})
            if frozen:
                self._count()
                module.freeze()
            return module
        except RefusalError:
            raise
        except Exception as error:  # the constructor may raise anything on nonsense
            raise RefusalError(f"{name} cannot be built from its arguments ({error})") from error

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Stop a constructor that would run on for hours, as of a ResNet or LSTM 10**9 deep."""
        thread = threading.get_ident()

        def count(module: nn.Module, name: str, made: nn.Module | nn.Parameter | None) -> None:
            if threading.get_ident() != thread:
                return  # hooks hear of every module in the process
            if isinstance(made, nn.Module):
                self._count()
            else:
                self._count_parameter(module)

        hooks = (
            register_module_module_registration_hook(count),
            register_module_parameter_registration_hook(count),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count_parameter(self, module: nn.Module) -> None:
        self._parameters += 1
        if self._parameters > _MAX_PARAMETERS:
            raise RefusalError(f"it has more than {_MAX_PARAMETERS} parameters")
        if len(module._parameters) > _MAX_PARAMETERS_A_LAYER:
            raise RefusalError(f"a layer of it has more than {_MAX_PARAMETERS_A_LAYER} parameters")

    def _count(self, modules: int = 1) -> None:
        self._made += modules
        if self._made > _MAX_MODULES:
            raise RefusalError(f"it has more than {_MAX_MODULES} modules")

    def _expansion(self, node: dict[str, Any], present: nn.Module | None) -> nn.Module | None:
        """The layers that low rank could have put in the place of `present`, if those of `node` may
        be such, or what other methods made of such."""
        factors = node.get("children")
        is_block = node.get("type") == "torch.nn.Sequential" and isinstance(factors, dict)
        if type(present) not in GEOMETRY or not is_block:
            return None
        first = factors.get("0")
        name = first.get("type") if isinstance(first, dict) else None
        if not isinstance(name, str) or name not in self._types:
            return None
        like = self._construct(self._types[name], first.get("config"), frozen=False)
        return expansion_like(present, len(factors), like)

    def _may_become(self, present: nn.Module, fresh: nn.Module) -> bool:
        """Whether `convert` or `freeze` could have made `fresh` of `present`."""
        if may_have_made(present, fresh):
            return True
        if type(fresh) is nn.Identity:
            return isinstance(present, REMOVABLE_MODULES)
        if not isinstance(fresh, PackedLayer) or type(present) not in self._types.values():
            return False
        known = arguments(type(present))
        shared = {name: value for name, value in config(fresh).items() if name in known}
        return isinstance(fresh, type(present)) and shared == config(present)


class _WithoutValues(TorchFunctionMode):
    """Leaves out what fills tensors with first values: on meta it does nothing, and slowly."""

    _FILLS = (
        *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_),
        *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _decoded(value: Any) -> Any:
    """Undo `_encoded`, but for lists, which become tuples."""
    if isinstance(value, dict) and "dict" in value:
        return {key: _decoded(item) for key, item in value["dict"].items()}
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


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _same(present: nn.Module, fresh: nn.Module) -> bool:
    return type(present) is type(fresh) and _traits(present) == _traits(fresh)


def _traits(module: nn.Module) -> dict[str, Any]:
    """What a module of its type must have in common with another to take its place."""
    return config(module) | {"frozen": getattr(module, "frozen", False)}


def _trait(module: nn.Module, name: str) -> Any:
    return module.frozen if name == "frozen" else argument(module, name)


def _check_name(module: nn.Module, name: str) -> None:
    """Refuse what register_module would refuse, before anything is changed."""
    if not name or "." in name or (hasattr(module, name) and name not in module._modules):
        raise RefusalError(f"{type(module).__name__} cannot have a module named '{name}'")


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


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
