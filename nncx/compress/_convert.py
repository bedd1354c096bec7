"""convert: swaps layers of a model for those of a compression method."""

from typing import ClassVar, Protocol

from torch import fx, nn

from nncx.compress._behind import modules_behind
from nncx.compress._counterpart import WEIGHTED, check_no_hooks, check_weight
from nncx.compress._rewire import modules_to_remove
from nncx.compress._skip import Skip, names_of, skipped
from nncx.compress._trace import called_module, read_value, trace


class Method(Protocol):
    """What a compression method tells `convert`.

    One whose settings name layers also has `for_layers(names)`: itself for a model whose modules
    have these names, with the modules in their place.
    """

    keeps_first_and_last: ClassVar[bool]
    """Whether the first and last layer with weights stay as they are by default."""

    binarizes_input: ClassVar[bool]
    """Whether its layers see only the sign of their input, so that a ReLU before them must go."""

    folds: ClassVar[bool]
    """Whether its layers do in eval mode what stands behind them. Then it has `absorbs(layer,
    behind, module)`: whether the layer for `layer`, with the modules `behind` it, does `module`
    too; and `replace` takes `behind` as well."""

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`."""

    def replace(self, module: nn.Module) -> nn.Module:
        """That layer, with the mode of `module` and, where they still fit, its Parameters.

        Of a method with a true `numbers_layers`, which others need not have, it takes as well how
        many layers are replaced before this one.
        """


def convert(
    model: nn.Module, method: Method, skip: Skip | None = None, *, rewire: bool = True
) -> nn.Module:
    """Swap every layer that `method` has a counterpart for, in place; all of it or nothing.

    The new layers hold the old layers' Parameters, so optimizers stay valid (but for
    `nncx.DeepCompression`, `nncx.Hashed` and `nncx.LowRank`, whose layers have others, and
    `nncx.TTQ`, whose layers have two more). A method that binarises inputs also removes each ReLU
    (or another activation that is never negative) and each dropout that feeds only its layers: the
    sign of what a ReLU gives, and of the zeros of a dropout, is +1. A method that folds replaces
    what its layers do of what is behind them, if the model is in eval mode.

    Layers inside torch's own blocks, as `nn.TransformerEncoderLayer`, stay as they are: such a
    block reads their weights itself.

    Args:
        model: any module; the layers are found by type, exactly: subclasses are left alone.
        method: for example `nncx.XNOR()`.
        skip: layers to leave as they are, by name (of a layer, or of a block for all inside), or a
            predicate of (name, layer). Default: the first and last layer with weights, in order of
            execution, where the method says so, else none.
        rewire: look at the graph of the model. False converts a model that torch.fx cannot trace;
            then nothing is removed or folded, first and last are those in order of registration,
            and whether forward calls the layers is not known.

    Returns:
        `model`.

    Raises:
        ValueError: for an unknown name in `skip`, if nothing is left to convert, if the model
            cannot be traced, if forward does not call a layer as a module, if the input of a binary
            layer is never negative and that cannot be removed, if a swap would lose hooks, or for a
            compiled model.
    """
    _check_arguments(model, method)
    names = names_of(model)
    if hasattr(method, "for_layers"):
        method = method.for_layers(names)
    by_order = skip is None and method.keeps_first_and_last
    folds = rewire and method.folds and not model.training
    looks = rewire and (method.binarizes_input or by_order)
    graph = trace(model) if looks or folds else None
    kept = _first_and_last(names, graph) if by_order else skipped(names, skip or (), "convert")
    inside = {m for block in names if _is_torch_block(block) for m in block.modules()}
    free = [m for m in names if m not in kept | inside]
    behind = modules_behind(graph, free, method.absorbs) if folds else {}
    removed = {module for absorbed in behind.values() for module in absorbed}
    targets = [m for m in free if (method.replaces(m) or m in behind) and m not in removed]
    if not targets:
        raise ValueError(
            f"convert: {type(model).__name__} has no layer for {method} that is not skipped; pass"
            " another skip"
        )
    for module in targets:
        _check_replaceable(module, names[module])
        check_weight(module, names[module][0], "convert")
    kept_names = [names[m][0] for m in names if m in kept and method.replaces(m)]
    if looks:
        _check_called(graph, {m: names[m][0] for m in targets}, kept_names)
    if rewire and method.binarizes_input:
        removed |= modules_to_remove(graph, set(targets), kept_names)
    for module in (*targets, *removed):
        check_no_hooks(module, names[module][0], "convert")
    _check_held_once(names, {*targets, *removed})
    swaps = {
        module: method.replace(module, *_particulars(method, number, behind.get(module)))
        for number, module in enumerate(targets)
    }
    swaps |= {module: nn.Identity() for module in removed}
    for module, new in swaps.items():
        for name in names[module]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
    return model


def _particulars(
    method: Method, number: int, behind: tuple[nn.Module, ...] | None
) -> tuple[object, ...]:
    """What else the method wants to know of a layer."""
    if getattr(method, "numbers_layers", False):
        return (number,)
    return () if behind is None else (behind,)


def _check_arguments(model: nn.Module, method: Method) -> None:
    if isinstance(method, type) or not callable(getattr(method, "replaces", None)):
        got = method.__name__ if isinstance(method, type) else repr(method)
        raise ValueError(
            f"convert: method must be an object such as nncx.XNOR(), got {got}; pass convert(model,"
            " nncx.XNOR())"
        )
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError(
            "convert: the model must not be compiled yet, got the result of torch.compile; convert"
            " before torch.compile"
        )


def _first_and_last(names: dict[nn.Module, list[str]], graph: fx.Graph | None) -> set[nn.Module]:
    """The first and last layer with weights, by execution if there is a graph."""
    weighted = [module for module in names if isinstance(module, WEIGHTED)]
    if graph is not None:
        called = (called_module(node) for node in graph.nodes)
        weighted = [module for module in called if isinstance(module, WEIGHTED)]
    return {weighted[0], weighted[-1]} if weighted else set()


def _is_torch_block(module: nn.Module) -> bool:
    """Whether it is a module of torch with a forward of its own, which may read its layers."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn.modules.") and not (
        isinstance(module, containers)
        or type(module) is nn.Module  # in a graph
        or next(module.children(), None) is None
    )


def _check_called(graph: fx.Graph, targets: dict[nn.Module, str], kept: list[str]) -> None:
    """Refuse layers whose swap forward would not see, as when it uses the weight of one itself."""
    called = {called_module(node) for node in graph.nodes}
    read = {id(read_value(node)) for node in graph.nodes if node.op == "get_attr"}
    unseen = {
        module: name
        for module, name in targets.items()
        if module not in called or any(id(p) in read for p in module.parameters())
    }
    if not unseen:
        return
    module, name = next(iter(unseen.items()))
    fault = (
        f"forward reads the parameters of '{name}' itself"
        if module in called
        else f"'{name}' is never called as a module in forward"
    )
    advice = f"pass skip={[*kept, *unseen.values()]}"
    if len(unseen) == len(targets):
        advice = "call it as a module there"
    raise ValueError(f"convert: {fault}; {advice}")


def _check_replaceable(module: nn.Module, names: list[str]) -> None:
    if "" in names:
        raise ValueError(
            f"convert: the model must contain the layers to swap, got a bare {module}; wrap it in"
            " nn.Sequential"
        )


def _check_held_once(names: dict[nn.Module, list[str]], swapped: set[nn.Module]) -> None:
    """Refuse modules that a model also holds outside the tree of modules, as in a list."""
    for owner in names:
        for attribute, value in vars(owner).items():
            if attribute == "_modules":
                continue
            held = value.values() if isinstance(value, dict) else value
            held = held if isinstance(value, list | tuple | set | dict) else (value,)
            for module in held:
                if isinstance(module, nn.Module) and module in swapped:
                    raise ValueError(
                        f"convert: '{names[module][0]}' must be held as a submodule only, got it in"
                        f" {type(owner).__name__}.{attribute} as well, which the swap would not"
                        " reach; use an nn.ModuleList or the submodule itself"
                    )
