"""Which activations and dropouts stand before binary layers, and can they go?

A binary layer reads signs, and the sign of what a ReLU gives is +1 everywhere. XNOR-Net therefore
puts the sign right behind the BatchNorm, where the ReLU was. The zeros of a dropout have the sign
+1 as well, which drops nothing.
"""

from torch import fx, nn

from nncx.compress._signs import (
    ACTIVATIONS,
    DROPOUTS,
    activates,
    drops,
    never_negative,
    passed_inputs,
)
from nncx.compress._trace import called_module

REMOVABLE_MODULES = (*ACTIVATIONS, *DROPOUTS)
_SHAPE_METHODS = {"size", "dim", "numel"}

_Fed = dict[fx.Node, list[fx.Node]]  # what cannot stay -> the binary layers behind it


def modules_to_remove(graph: fx.Graph, targets: set[nn.Module], kept: list[str]) -> set[nn.Module]:
    """Activations and dropouts to replace by `nn.Identity` once `targets` are binary.

    Args:
        graph: from `trace`.
        targets: the layers that will be binary, besides those that are.
        kept: names of the layers that will not be: what the error says to skip includes them.

    Raises:
        ValueError: if a binary layer is fed by one that cannot be removed, or by other values that
            are never negative.
    """
    rewiring = _Rewiring(graph)
    fed, obstacles = rewiring.examine(targets)
    if obstacles:
        node = min(obstacles, key=drops)
        does = "sets dropped values to zero" if drops(node) else "is never negative"
        where = "for every dropped value" if drops(node) else "everywhere"
        raise ValueError(
            f"convert: the binary layer '{fed[node][0].target}' would see +1 {where}, because"
            f" '{_label(node)}' before it {does}, and that cannot be removed, because it"
            f" {obstacles[node]};"
            f" {_remedy(rewiring, targets, kept, node)}"
        )
    return {called_module(node) for node in fed}


def _remedy(rewiring: "_Rewiring", targets: set[nn.Module], kept: list[str], node: fx.Node) -> str:
    """What to do, as the end of a sentence: a skip only where one leaves layers to convert."""
    if drops(node):
        change = "give the layer an nn.Dropout module of its own, or none"
    elif activates(node):
        change = (
            "give each ReLU before a binary layer its own nn.ReLU module on the branch, after the"
            " shortcut (pre-activation order, as nncx.models.ResNet)"
        )
    else:
        change = "put a BatchNorm between the two"
    remaining = rewiring.convertible(targets)
    if not remaining:
        return change
    stuck = (n.target for n in rewiring.graph.nodes if called_module(n) in targets - remaining)
    return f"pass skip={list(dict.fromkeys([*kept, *stuck]))}, or {change}"


class _Rewiring:
    """What is known of a graph, whichever of its layers become binary."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.never_negative = never_negative(graph)
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            self.calls.setdefault(called_module(node), []).append(node)

    def examine(self, targets: set[nn.Module]) -> tuple[_Fed, dict[fx.Node, str]]:
        """What cannot stay if `targets` are binary, and why some of it cannot go."""
        binary = [node for node in self.graph.nodes if _is_binary(called_module(node), targets)]
        fed: _Fed = {}
        for layer in binary:
            for node in self._harmful_before(layer):
                fed.setdefault(node, []).append(layer)
        readers = self._other_readers(set(binary))
        obstacles = {node: self._obstacle(node, readers) for node in fed}
        return fed, {node: reason for node, reason in obstacles.items() if reason}

    def convertible(self, targets: set[nn.Module]) -> set[nn.Module]:
        """Those of `targets` that can be binary if the others are not."""
        while True:
            fed, obstacles = self.examine(targets)
            stuck = {called_module(layer) for node in obstacles for layer in fed[node]}
            if not stuck:
                return targets
            if not stuck & targets:  # layers that are binary already
                return set()
            targets = targets - stuck

    def _harmful_before(self, layer: fx.Node) -> list[fx.Node]:
        """What makes the input of `layer`, or some channels of it, non-negative or dropped."""
        harmful, seen, waiting = [], set(), layer.all_input_nodes[:1]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            passed = _inputs_once_removed(node)
            computes = node.op != "get_attr" and not passed_inputs(node)
            if drops(node) or (computes and node in self.never_negative):
                harmful.append(node)
            waiting.extend(passed)
        return harmful

    def _other_readers(self, binary: set[fx.Node]) -> dict[fx.Node, fx.Node | None]:
        """For each node who reads its values, besides binary layers."""
        readers: dict[fx.Node, fx.Node | None] = {}
        for node in reversed(self.graph.nodes):
            others = (
                readers[user] if node in _inputs_once_removed(user) else user
                for user in node.users
                if user not in binary and not _reads_only_shape(user)
            )
            readers[node] = next((reader for reader in others if reader is not None), None)
        return readers

    def _obstacle(self, node: fx.Node, readers: dict[fx.Node, fx.Node | None]) -> str | None:
        """Why `node` cannot be removed, as the end of a sentence."""
        module = called_module(node)
        if module is None:
            return "is a function call, not a module"
        if not isinstance(module, REMOVABLE_MODULES):
            return f"is a {type(module).__name__}, not a ReLU"
        for call in self.calls[module]:
            if readers[call] is not None:
                return f"also feeds '{_label(readers[call])}'"
            if getattr(module, "inplace", False) and len(call.all_input_nodes[0].users) > 1:
                return "changes in place what others read"
        return None


def _inputs_once_removed(node: fx.Node) -> list[fx.Node]:
    """The inputs whose signs `node` passes on, now or as the `nn.Identity` it may become."""
    removable = isinstance(called_module(node), REMOVABLE_MODULES)
    return node.all_input_nodes[:1] if removable else passed_inputs(node)


def _is_binary(module: nn.Module | None, targets: set[nn.Module]) -> bool:
    return module in targets or getattr(module, "precision", None) == "binary"


def _reads_only_shape(node: fx.Node) -> bool:
    return (node.op == "call_method" and node.target in _SHAPE_METHODS) or (
        node.op == "call_function" and node.target is getattr and node.args[1] in {"shape", "ndim"}
    )


def _label(node: fx.Node) -> str:
    return node.target if node.op == "call_module" else node.name
