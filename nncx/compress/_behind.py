"""Which modules stand right behind a layer, and may become part of it?"""

from collections.abc import Callable, Iterable

from torch import fx, nn

from nncx.compress._trace import called_module, read_value

Behind = dict[nn.Module, tuple[nn.Module, ...]]


def modules_behind(
    graph: fx.Graph,
    candidates: Iterable[nn.Module],
    absorbs: Callable[[nn.Module, tuple[nn.Module, ...], nn.Module], bool],
) -> Behind:
    """For each layer that absorbs anything: the modules behind it that it does, in order.

    Each of them is called once, as the layer is; alone reads what is before it; and has no
    parameters that forward reads itself. What is behind one layer absorbs nothing itself.

    Args:
        graph: from `trace`.
        candidates: the modules that may change.
        absorbs: of (layer, modules behind it that it absorbs, the next one).
    """
    free = set(candidates)
    read = {id(read_value(node)) for node in graph.nodes if node.op == "get_attr"}
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        module = called_module(node)
        if module in free and not any(id(p) in read for p in module.parameters()):
            calls.setdefault(module, []).append(node)
    behind: Behind = {}
    taken: set[nn.Module] = set()
    for layer in calls:  # in order of execution
        found = () if layer in taken else _absorbed(layer, calls, absorbs)
        if found:
            behind[layer] = found
            taken.update(found)
    return behind


def _absorbed(
    layer: nn.Module,
    calls: dict[nn.Module, list[fx.Node]],
    absorbs: Callable[[nn.Module, tuple[nn.Module, ...], nn.Module], bool],
) -> tuple[nn.Module, ...]:
    found: tuple[nn.Module, ...] = ()
    last = layer
    while len(calls[last]) == 1 and len(calls[last][0].users) == 1:
        reader = next(iter(calls[last][0].users))
        module = called_module(reader)
        once = len(calls.get(module, ())) == 1
        if not once or len(reader.args) != 1 or not absorbs(layer, found, module):
            break
        found += (module,)
        last = module
    return found
