"""A network whose channels are to become fewer."""

from typing import NamedTuple

from torch import Tensor, nn

from nncx.compress._counterpart import check_no_hooks, check_weight
from nncx.graph import Graph, trace
from nncx.graph._channels import Channels, follow
from nncx.graph._trace import samples

Example = Tensor | tuple[Tensor, ...]


class Network(NamedTuple):
    """A graph, which is the user's if a graph was passed, and what its channels depend on.

    Attributes:
        paths: of its layers; of one with several the first.
    """

    graph: Graph
    channels: Channels
    inputs: tuple[Tensor, ...]
    paths: dict[nn.Module, str]


def network_of(model: nn.Module, example: Example, task: str) -> Network:
    """Trace `model`, if it is no graph; `task` is the function that was called with it.

    Raises:
        ValueError, TypeError: as `nncx.graph.trace`; or if a layer has hooks or a reparametrised
            weight.
    """
    graph = model if isinstance(model, Graph) else trace(model, example)
    layers = graph.named_layers()
    for name, layer in layers.items():
        check_weight(layer, name, task)
        check_no_hooks(layer, name, task)
    inputs = samples(model, example)
    paths = {layer: path for path, layer in reversed(layers.items())}
    return Network(graph, follow(graph, inputs), inputs, paths)
