"""The calls that a model makes, in order of execution."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import fx, nn

from nncx.graph import Graph
from nncx.nn import NativeLayer


class _Tracer(fx.Tracer):
    """Sees through every module but torch's and our own layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NativeLayer) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list[Any]]:
        """A `Graph` takes any number of inputs, of which fx would make a single one."""
        if isinstance(self.root, Graph):
            names = self.root.input_names
            inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]
            return root_fn, [self.root, *inputs]
        return super().create_args_for_root(root_fn, is_module, concrete_args)


def trace(model: nn.Module) -> fx.Graph:
    """The calls of `model` in order of execution; the model stays as it was.

    Raises:
        ValueError: if torch.fx cannot trace it.
    """
    with _attributes_restored(model):
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # the model's own code runs here and may raise anything
            raise ValueError(
                f"convert: torch.fx must be able to trace {type(model).__name__}, got"
                f" {type(error).__name__} ({error}); pass rewire=False, which removes and"
                " folds nothing and takes layers in order of registration"
            ) from error
        for node in graph.nodes:
            if node.op == "call_module":
                node.meta["module"] = model.get_submodule(node.target)
            elif node.op == "get_attr":
                node.meta["value"] = attrgetter(node.target)(model)
    return graph


def called_module(node: fx.Node) -> nn.Module | None:
    """The module that a node of `trace` calls, None if it calls a function."""
    return node.meta.get("module")


def read_value(node: fx.Node) -> Any:
    """The parameter, buffer or constant that a node of `trace` reads, None if it calls."""
    return node.meta.get("value")


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """A forward that keeps a value on a module would leave a proxy there, fx leaves constants."""
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
