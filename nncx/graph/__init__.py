"""A network as a list of operations: traced from a model, edited, executed and stored.

graph = nncx.graph.trace(model, example)   # torch.export reads the model, which stays as it is
print(graph)                               # one line a node
graph(images)                              # runs it; trains, compiles and exports like any module
nncx.save(graph, "net.safetensors")        # and nncx.load runs it without the model's class
"""

from nncx.graph._graph import Graph, Node
from nncx.graph._trace import trace

__all__ = ["Graph", "Node", "trace"]
