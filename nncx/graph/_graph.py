"""Graph: layers, and the list of nodes that says in which order they and other operations run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nncx._table import text_table
from nncx.graph._operations import GETITEM, LAYER, OPERATIONS, run, why_unsound

_MAX_NAME = 500  # letters
_MAX_NODES = 20_000
_MAX_SHOWN = 44  # letters of a layer in a table


class Node(NamedTuple):
    """One step of a graph.

    Attributes:
        name: of the value that it makes; unique in the graph.
        operation: a name of the closed list in `nncx.graph._operations`, or "layer".
        inputs: names of the values it reads, each an input of the graph or an earlier node.
        arguments: numbers, strings, None and tuples of those; of a layer only its "path".
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    arguments: dict[str, Any]

    @property
    def layer(self) -> str | None:
        """The path of the layer that it calls, None for an operation."""
        return self.arguments["path"] if self.operation == LAYER else None


class Graph(nn.Module):
    """A network as a list of nodes in order of execution, made by `nncx.graph.trace`.

    It is a module like any other: its layers stand under their paths, in bare modules where the
    path has dots, so its state dict has the names of the model's; gradients flow, and it can be
    compiled, exported, copied and pickled. Its inputs have the batch in front, of any size; other
    dimensions are those of the example that was traced wherever an operation names them.

    Args:
        nodes: `Node`s, or tuples of the same four values.
        input_names: of what `forward` takes, in order.
        output_names: of what `forward` returns: one tensor for one name, else a tuple.

    Raises:
        ValueError: if the nodes are not sound: an unknown operation, an argument of a wrong type or
            out of range, a name that is not made before it is read, or made twice.
    """

    def __init__(
        self,
        nodes: Iterable[Node | Sequence[Any]],
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> None:
        super().__init__()
        self._nodes: dict[str, Node] = {}
        self.input_names: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ()
        self._set(nodes, input_names, output_names)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """In order of execution."""
        return tuple(self._nodes.values())

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if len(inputs) != len(self.input_names):
            raise TypeError(
                f"Graph: inputs must be {len(self.input_names)} ({', '.join(self.input_names)}),"
                f" got {len(inputs)}; pass as many as the model takes"
            )
        values: dict[str, Any] = dict(zip(self.input_names, inputs, strict=True))
        for node in self._nodes.values():
            values[node.name] = self.value(node, [values[name] for name in node.inputs])
            for name in self._last_read[node.name]:
                del values[name]
        outputs = tuple(values[name] for name in self.output_names)
        return outputs[0] if len(outputs) == 1 else outputs

    def value(self, node: Node, read: Sequence[Any]) -> Any:
        """What `node` makes of the values of its inputs."""
        if node.operation == LAYER:
            return self._layer(node.arguments["path"])(*read)
        return run(node.operation, read, node.arguments)

    def node(self, name: str) -> Node:
        """The node that makes the value `name`.

        Raises:
            KeyError: if there is none, as for an input of the graph.
        """
        return self._nodes[name]

    def readers(self, name: str) -> list[Node]:
        """The nodes that read the value `name`, in order; the graph's outputs are not among them.

        `name in graph.output_names` tells whether it is one of those.
        """
        return [node for node in self._nodes.values() if name in node.inputs]

    def is_only_read_by(self, name: str, reader: Node) -> bool:
        """Whether nothing but `reader` sees the value `name`, so that both can become one."""
        return name not in self.output_names and self.readers(name) == [reader]

    def calls(self, path: str) -> list[Node]:
        """The nodes that call the layer `path`: more than one where it is shared."""
        return [node for node in self._nodes.values() if node.layer == path]

    def named_layers(self) -> dict[str, nn.Module]:
        """The layers that the nodes call, by path, in order of execution."""
        paths = dict.fromkeys(node.layer for node in self._nodes.values() if node.layer)
        return {path: self.get_submodule(path) for path in paths}

    def put_layer(self, path: str, layer: nn.Module) -> None:
        """Put `layer` at `path`, in the place of what stood there.

        Raises:
            ValueError: for a path that has no room for a layer, as within another layer.
        """
        parent: nn.Module = self
        *containers, last = path.split(".")
        for name in containers:
            if name not in parent._modules:
                _register(parent, name, nn.Module(), path)
            parent = parent._modules[name]
            if type(parent) is not nn.Module:
                raise ValueError(f"Graph: '{path}' must not lie in another layer; rename it")
        if type(parent._modules.get(last)) is nn.Module:
            raise ValueError(f"Graph: '{path}' must not be what other layers lie in; rename it")
        _register(parent, last, layer, path)

    def insert(self, node: Node, *, after: str) -> None:
        """Put `node` right behind the node or input `after`, whose other readers now read it.

        Raises:
            ValueError: if the graph would not be sound; it stays as it was.
        """
        renamed = {after: node.name}
        nodes = [_rewired(each, renamed) for each in self._nodes.values()]
        if after not in self._nodes and after not in self.input_names:
            raise ValueError(f"Graph: a node must be inserted after another, got '{after}'")
        at = [*self._nodes].index(after) + 1 if after in self._nodes else 0
        outputs = [renamed.get(name, name) for name in self.output_names]
        self._set([*nodes[:at], node, *nodes[at:]], self.input_names, outputs)

    def replace(self, node: Node) -> None:
        """Put `node` in the place of the one that makes the value of its name.

        Raises:
            ValueError: if the graph would not be sound; it stays as it was.
            KeyError: if there is no such node.
        """
        nodes = {**self._nodes, self._nodes[node.name].name: node}
        self._set(nodes.values(), self.input_names, self.output_names)

    def remove(self, name: str) -> None:
        """Take out a node with one input: what read its value now reads that input.

        A layer that no node calls any more goes too.

        Raises:
            ValueError: if it has several inputs.
            KeyError: if there is no such node.
        """
        node = self._nodes[name]
        if len(node.inputs) != 1:
            raise ValueError(
                f"Graph: a node to remove must have one input, got '{name}' with"
                f" {len(node.inputs)}; rewire its readers instead"
            )
        renamed = {name: node.inputs[0]}
        nodes = [_rewired(each, renamed) for each in self._nodes.values() if each.name != name]
        outputs = [renamed.get(each, each) for each in self.output_names]
        self._set(nodes, self.input_names, outputs)
        if node.layer and not self.calls(node.layer):
            self._drop_layer(node.layer)

    def check_layers(self) -> None:
        """Make sure that every layer is there.

        Raises:
            ValueError: if a node calls a layer that the graph does not hold.
        """
        for path in {node.layer for node in self._nodes.values() if node.layer}:
            try:
                found = self.get_submodule(path)
            except AttributeError:
                found = None
            if found is None or type(found) is nn.Module:
                raise ValueError(f"its graph calls a layer '{path}', which it does not hold")

    def __str__(self) -> str:
        """One line a node; `repr` has the layers, as of every module."""
        lines = [["node", "operation", "inputs"]]
        for node in self._nodes.values():
            what = str(self.get_submodule(node.layer)) if node.layer else _call(node)
            lines.append([node.name, _begin(what), ", ".join(node.inputs)])
        ends = f"{', '.join(self.input_names)} -> {', '.join(self.output_names)}"
        return f"{text_table(lines, texts=3, shrinks=2)}\n\n{ends}"

    def _layer(self, path: str) -> nn.Module:
        """`get_submodule`, which takes as long as a small layer, without its checks."""
        module: nn.Module = self
        for name in path.split("."):
            module = module._modules[name]
        return module

    def _set(
        self,
        nodes: Iterable[Node | Sequence[Any]],
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> None:
        """Take these nodes if they are sound."""
        checked = _checked(nodes, input_names, output_names)
        last: dict[str, str] = {}  # the node after which a value is of no use
        for node in checked.values():
            last |= dict.fromkeys((node.name, *node.inputs), node.name)
        self._last_read: dict[str, list[str]] = {name: [] for name in checked}
        for name, node_name in last.items():
            if name not in output_names:
                self._last_read[node_name].append(name)
        self._nodes = checked
        self.input_names, self.output_names = tuple(input_names), tuple(output_names)

    def _drop_layer(self, path: str) -> None:
        """With the containers that hold nothing else."""
        while path:
            parent, _, name = path.rpartition(".")
            delattr(self.get_submodule(parent), name)
            path = parent if not self.get_submodule(parent)._modules else ""


def _checked(
    nodes: Iterable[Node | Sequence[Any]], input_names: Sequence[str], output_names: Sequence[str]
) -> dict[str, Node]:
    """The nodes by name, if they make a sound graph."""
    is_list = {name: False for name in map(_checked_name, input_names)}  # of every value so far
    if len(is_list) != len(input_names) or not input_names or not output_names:
        raise ValueError("Graph: inputs and outputs must have names, inputs different ones")
    result: dict[str, Node] = {}
    for each in nodes:
        name, operation, inputs, arguments = each
        node = Node(_checked_name(name), operation, tuple(inputs), arguments)
        if name in is_list:
            raise ValueError(f"Graph: names must differ, got '{name}' twice; rename one")
        if len(result) == _MAX_NODES:
            raise ValueError(f"Graph: nodes must be at most {_MAX_NODES}, got more")
        for source in node.inputs:
            if source not in is_list:
                raise ValueError(
                    f"Graph: '{name}' must read what was made before it, got '{source}'"
                )
            if is_list[source] != (operation == GETITEM):
                raise ValueError(f"Graph: '{name}' cannot read '{source}': lists are for getitem")
        is_list[name] = _gives_list(node)
        result[name] = node
    for name in output_names:
        if is_list.get(name, True):
            raise ValueError(f"Graph: outputs must be tensors that it makes, got '{name}'")
    return result


def _gives_list(node: Node) -> bool:
    """Whether the value of a node is a list; refuses a node that no operation fits."""
    if node.operation == LAYER:
        given = node.arguments
        path = given.get("path") if isinstance(given, dict) and len(given) == 1 else None
        if not path or not isinstance(path, str) or not node.inputs:
            raise ValueError(f"Graph: '{node.name}' must have an input and the path of a layer")
        return False
    operation = OPERATIONS.get(node.operation) if isinstance(node.operation, str) else None
    if operation is None:
        raise ValueError(
            f"Graph: the operation of '{node.name}' must be one that this nncx knows, got"
            f" {str(node.operation)[:80]!r}; upgrade nncx"
        )
    if reason := why_unsound(operation, len(node.inputs), node.arguments):
        raise ValueError(f"Graph: '{node.name}' ({node.operation}) {reason}")
    return operation.gives_list


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name or len(name) > _MAX_NAME:
        raise ValueError(f"Graph: names must be short strings, got {str(name)[:80]!r}")
    return name


def _rewired(node: Node, renamed: Mapping[str, str]) -> Node:
    return node._replace(inputs=tuple(renamed.get(name, name) for name in node.inputs))


def _register(parent: nn.Module, name: str, module: nn.Module, path: str) -> None:
    try:
        parent.register_module(name, module)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"Graph: '{path}' must not have the name of something that a module has anyway"
            f" ({error}); rename that layer of the model"
        ) from error


def _begin(text: str) -> str:
    """Of a layer's description, what tells most."""
    text = text.partition("\n")[0]
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _call(node: Node) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in node.arguments.items())
    return f"{node.operation}({arguments})"
