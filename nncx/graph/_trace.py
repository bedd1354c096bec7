"""Model -> graph, by torch.export.

torch.export runs the model on fake tensors and notes every operator that it calls, with the module
that it was in; `run_decompositions({})` turns in-place operators and views into plain ones. Here
the operators inside one call of a layer become one node, and the others must be of the closed list.
"""

import operator
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind

from nncx._modes import evaluated
from nncx.graph._graph import Graph, Node
from nncx.graph._operations import GETITEM, LAYER, OPERATIONS
from nncx.nn import NativeLayer

LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU, nn.Embedding),
)

_RESHAPES = {"view.default", "_unsafe_view.default", "squeeze.dims"}
_IDENTITIES = {"clone.default", "contiguous.default", "alias.default", "lift_fresh_copy.default"}
_END = 2**63 - 1  # how torch writes the end of a slice that is left open


def trace(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graph:
    """The network that `model` is in eval mode, as a `Graph` of the same layers.

    Args:
        model: any module that torch.export can trace; not changed. Its convolutions, linear layers,
            norms and nncx's own layers are those of the graph too, the very same modules under the
            same names; `copy.deepcopy` the graph to part them. A convolution or linear function of
            a bare parameter becomes a layer, which holds that parameter. Dropout is gone.
        example: an input, or a tuple of several, each with the batch in front. The graph takes any
            batch size. Other dimensions may stand in operations, as in a reshape.

    Returns:
        The graph, in the mode of `model`.

    Raises:
        ValueError: if torch.export cannot trace the model, or it calls an operator that is not on
            the list of `nncx.graph._operations`, changes its buffers, or returns anything but
            tensors.
        TypeError: if the arguments are no module and tensors.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    inputs = samples(model, example)
    with evaluated(model), torch.no_grad():
        program = _exported(model, inputs)
        graph = _Builder(model, program).graph()
    graph.training = model.training  # the layers are in their modes
    return graph


def samples(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two samples of each input: of a single one torch would conclude that there is always one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"trace: model must be an nn.Module, got {type(model).__name__}")
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(each, Tensor) for each in inputs):
        raise TypeError(
            f"trace: example must be a tensor or a tuple of tensors, got {type(example).__name__};"
            " pass one input of the model"
        )
    if any(each.dim() == 0 or each.shape[0] == 0 for each in inputs):
        raise ValueError(
            "trace: example must be a batch of at least one sample, got"
            f" {[list(each.shape) for each in inputs]}; add a batch dimension"
        )
    return tuple(torch.cat((each[:1], each[:1])) for each in inputs)


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch")
    for each in inputs:
        shapes[each] = {0: batch}
    try:
        with warnings.catch_warnings():  # torch 2.13 warns of what it does itself
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
            return program.run_decompositions({})
    except Exception as error:  # the model's own code runs here and may raise anything
        raise ValueError(
            f"trace: torch.export must be able to trace {type(model).__name__} for any batch size,"
            f" got {type(error).__name__} ({str(error).strip().partition(chr(10))[0]:.300});"
            " see torch.export's guide on what a forward may do"
        ) from error


class _Builder:
    """Reads an exported program from front to back and makes nodes of it."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self._model = model
        self._program = program
        signature = program.graph_signature
        self._parameters = signature.inputs_to_parameters
        self._user_inputs = set(signature.user_inputs)
        self._live = _live(program.graph, self._user_inputs)
        self._names: dict[fx.Node, str] = {}  # of values that the graph knows
        self._taken: set[str] = set()
        self._nodes: list[Node] = []
        self._layers: dict[str, nn.Module] = {}
        self._input_names: list[str] = []
        self._short = {each.function: name for name, each in OPERATIONS.items()}
        self._short[operator.getitem] = GETITEM

    def graph(self) -> Graph:
        self._check_pure()
        nodes = [node for node in self._program.graph.nodes if node in self._live]
        at = 0
        while at < len(nodes):
            node = nodes[at]
            layer = self._layer_around(node)
            if layer is not None:
                call = [node]
                while self._layer_around(nodes[at + len(call)]) == layer:
                    call.append(nodes[at + len(call)])
                self._add_layer_call(layer[1], call)
                at += len(call)
                continue
            if node.op == "placeholder" and node.name in self._user_inputs:
                self._names[node] = self._unique(node.name)
                self._input_names.append(self._names[node])
            elif node.op == "call_function":
                self._add_operation(node)
            at += 1
        graph = Graph(self._nodes, self._input_names, self._outputs())
        for path, layer in self._layers.items():
            graph.put_layer(path, layer)
        return graph

    def _layer_around(self, node: fx.Node) -> tuple[str, str] | None:
        """The call of a layer that an operator belongs to: the call's key and the layer's path."""
        if node.op != "call_function":
            return None
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            try:
                module = self._model.get_submodule(path)
            except AttributeError:  # what is in no module has an entry too
                continue
            if _is_layer(module):
                if not path:
                    raise ValueError(
                        f"trace: the model must contain its layers, got a bare {module}; wrap it in"
                        " nn.Sequential"
                    )
                return key, path
        return None

    def _add_layer_call(self, path: str, call: list[fx.Node]) -> None:
        inside = set(call)
        read = [each for node in call for each in node.all_input_nodes if each not in inside]
        inputs = list(dict.fromkeys(each for each in read if each in self._names))
        outputs = [node for node in call if not inside.issuperset(self._live & {*node.users})]
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(
                f"trace: layer '{path}' must map one tensor to one, got {len(inputs)} inputs and"
                f" {len(outputs)} outputs; call it on an input of the network, once at a time"
            )
        self._layers[path] = self._model.get_submodule(path)
        self._add(outputs[0], path, LAYER, inputs, {"path": path})

    def _add_operation(self, node: fx.Node) -> None:
        name = str(node.target).removeprefix("aten.")
        if _is_open(node.meta.get("val")):
            return  # the batch size; whoever reads it is asked
        if name in _IDENTITIES:
            self._names[node] = self._read(node.args[0], node)
            return
        if name in ("conv2d.default", "conv2d.padding", "linear.default"):
            self._add_functional(node, nn.Linear if name == "linear.default" else nn.Conv2d)
            return
        short = "reshape" if name in _RESHAPES else self._short.get(node.target)
        if short is None:
            raise ValueError(
                f"trace: {name} in {_place(node)} is not an operation that a graph knows; replace"
                " it, or trace the parts of the model around it"
            )
        inputs, arguments = self._bound(node, short)
        if short == "reshape":
            short, arguments = _reshape(node)
        if short == "slice" and not arguments.keys() - {"dim"}:
            self._names[node] = self._read(inputs[0], node)
            return
        self._add(node, short, short, inputs, arguments)

    def _bound(self, node: fx.Node, short: str) -> tuple[list[fx.Node], dict[str, Any]]:
        """The tensors that an operator reads, and its other arguments but those at the default."""
        if short == GETITEM:
            return [node.args[0]], {"index": node.args[1]}
        operation = OPERATIONS[short]
        order = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(order, node.args, strict=False)) | node.kwargs
        inputs: list[fx.Node] = []
        arguments: dict[str, Any] = {}
        for name, value in given.items():
            if _is_tensor(value) and name in operation.tensors:
                inputs.append(value)
            elif operation.takes_list and name in operation.tensors:
                inputs.extend(value)
            elif short == "reshape":
                continue  # its sizes are those of its value
            elif short == "slice" and name in ("start", "end") and value in (0, _END):
                continue
            elif name not in operation.defaults or operation.defaults[name] != value:
                arguments[name] = _plain(value, name, node)
        return inputs, arguments

    def _add_functional(self, node: fx.Node, cls: type[nn.Module]) -> None:
        """A layer for a convolution or linear function of a parameter."""
        order = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(order, node.args, strict=False)) | node.kwargs
        source, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
        fields = (weight, *([] if bias is None else [bias]))
        names = [self._parameters.get(getattr(field, "name", None)) for field in fields]
        if isinstance(source, fx.Node) and source not in self._names:
            names.append(None)
        if None in names:
            raise ValueError(
                f"trace: {node.target.name().removeprefix('aten::')} in {_place(node)} must be of"
                " an input and of parameters as they are, got others; use a layer"
            )
        parameters = [self._model.get_parameter(name) for name in names]
        layer = _layer(cls, parameters, given).train(self._model.training)
        path = next((p for p, other in self._layers.items() if _equal(layer, other)), None)
        if path is None:
            path = self._path(names, cls)
            self._layers[path] = layer
        self._add(node, path, LAYER, [source], {"path": path})

    def _path(self, names: list[str], cls: type[nn.Module]) -> str:
        """Where a new layer stands: at the module with these parameters if it has no others."""
        owner = names[0].rpartition(".")[0]
        wanted = [f"{owner}.{name}" for name, _ in zip(("weight", "bias"), names, strict=False)]
        if owner and names == wanted and owner not in self._layers:
            module = self._model.get_submodule(owner)
            if not (module._modules or _is_layer(module)):  # whose own call may come later
                return owner
        taken = {path.partition(".")[0] for path in self._layers} | {*self._model._modules}
        return _first_free(cls.__name__.lower(), taken)

    def _add(
        self,
        node: fx.Node,
        name: str,
        operation: str,
        inputs: Iterable[fx.Node],
        arguments: dict[str, Any],
    ) -> None:
        read = tuple(self._read(each, node) for each in inputs)
        self._names[node] = self._unique(name)
        self._nodes.append(Node(self._names[node], operation, read, arguments))

    def _read(self, value: fx.Node, reader: fx.Node) -> str:
        if value not in self._names:
            raise ValueError(
                f"trace: {str(reader.target).removeprefix('aten.')} in {_place(reader)} must read"
                f" what the network computes, got a parameter, a buffer or a constant"
                f" ('{value.name}'); use a layer"
            )
        return self._names[value]

    def _check_pure(self) -> None:
        specs = self._program.graph_signature.output_specs
        if any(spec.kind != OutputKind.USER_OUTPUT for spec in specs):
            raise ValueError(
                "trace: forward must not change buffers or inputs in eval mode, got"
                f" {type(self._model).__name__} that does; keep such a state outside of the model"
            )

    def _outputs(self) -> list[str]:
        outputs = self._program.graph.output_node().args[0]
        spec = self._program.call_spec.out_spec
        flat = spec.num_children in (0, spec.num_leaves) and spec.type in (None, tuple, list)
        if not flat or not outputs or not all(isinstance(each, fx.Node) for each in outputs):
            raise ValueError(
                f"trace: forward must return a tensor or a tuple of tensors, got {spec.type}; wrap"
                " the model in one that does"
            )
        return [self._read(each, self._program.graph.output_node()) for each in outputs]

    def _unique(self, name: str) -> str:
        free = _first_free(name, self._taken)
        self._taken.add(free)
        return free


def _is_layer(module: nn.Module) -> bool:
    """Whether a call of it becomes one node."""
    return isinstance(module, NativeLayer) or type(module) in LAYERS


def _live(graph: fx.Graph, inputs: set[str]) -> set[fx.Node]:
    """What the output needs, and the inputs; assertions are needed by nothing."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in live or node.op == "output" or node.name in inputs:
            live |= {node, *node.all_input_nodes}
    return live


def _layer(
    cls: type[nn.Module], parameters: list[nn.Parameter], given: dict[str, Any]
) -> nn.Module:
    """A `cls` that holds these very parameters."""
    out_features, in_features, *kernel = parameters[0].shape
    bias = len(parameters) > 1
    if cls is nn.Conv2d:
        in_features *= given.get("groups", 1)
        layer = cls(in_features, out_features, tuple(kernel), bias=bias, device="meta", **given)
    else:
        layer = cls(in_features, out_features, bias=bias, device="meta")
    layer.weight = parameters[0]
    layer.bias = parameters[1] if bias else None
    return layer


def _is_open(size: Any) -> bool:
    """Whether it depends on the batch size."""
    return isinstance(size, torch.SymInt)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and not _is_open(value.meta.get("val"))


def _equal(layer: nn.Module, other: nn.Module) -> bool:
    """Whether they are of one kind and geometry and hold the same parameters."""
    same = repr(layer) == repr(other) and type(layer) is type(other)
    return same and layer.weight is other.weight and layer.bias is other.bias


def _reshape(node: fx.Node) -> tuple[str, dict[str, Any]]:
    """A reshape to the sizes of its value, the batch left open; best said as a flatten."""
    shape = tuple(node.meta["val"].shape)
    before = node.args[0].meta["val"].shape
    if sum(map(_is_open, shape)) > 1:
        raise ValueError(
            f"trace: a reshape in {_place(node)} must leave the batch size in one dimension, got"
            f" {list(shape)}; keep the batch apart"
        )
    if len(shape) == 2 <= len(before) and _is_open(shape[0]) and str(shape[0]) == str(before[0]):
        return "flatten", {"start_dim": 1}
    return "reshape", {"shape": tuple(-1 if _is_open(size) else size for size in shape)}


def _plain(value: Any, name: str, node: fx.Node) -> Any:
    """An argument as a file can hold it."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, name, node) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"trace: {name} of {str(node.target).removeprefix('aten.')} in {_place(node)} must be a"
        f" constant, got {value}, which may depend on the batch size; use a number"
    )


def _place(node: fx.Node) -> str:
    """The module that an operator is in."""
    for path, kind in reversed(node.meta.get("nn_module_stack", {}).values()):
        kind = kind if isinstance(kind, str) else kind.__name__
        return f"'{path}' ({kind.rpartition('.')[2]})" if path else kind.rpartition(".")[2]
    return "forward"


def _first_free(name: str, taken: Iterable[str]) -> str:
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free
