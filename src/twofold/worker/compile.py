"""Decoder layers under `torch.compile`: one graph serves all layers that look alike, whatever the number of tokens."""

import hashlib
import inspect
from typing import Any

import torch
import torch._inductor.config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass

from twofold.models.loader import DecoderModel
from twofold.models.packing import pack_projections


def compile_layers(model: DecoderModel, num_ranks: int) -> bool:
    """Compiles each decoder layer in place at its first call; False if the model's layers cannot be told apart."""
    layers = decoder_layers(model)
    if layers is None:
        return False
    # With several ranks queries stay apart: they are projected while keys and values travel.
    pack_projections(layers, with_queries=num_ranks == 1)
    inductor.post_grad_custom_post_pass = ReorderLayers()
    inductor.reorder_for_peak_memory = False  # it would undo that order
    torch._dynamo.config.recompile_limit = 64  # kinds of layers × one token or more
    for layer in layers:
        layer.compile(dynamic=True)
    return True


def decoder_layers(model: DecoderModel) -> torch.nn.ModuleList | None:
    """The list of modules that the forward pass goes through, one an attention layer."""
    for module in model.body.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == len(model.specs):
            return module
    return None


class ReorderLayers(CustomGraphPass):
    """What is ours to know of a layer's graph.

    One product serves all projections that were packed into it. And `publish`, with all that it needs, comes before the
    rest: queries are then projected while rows travel.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        _keep_one_of_equals(graph)
        _publish_early(graph)

    def uuid(self) -> bytes:
        functions = (_keep_one_of_equals, _publish_early)
        return hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).digest()


def _keep_one_of_equals(graph: torch.fx.Graph) -> None:
    aten = torch.ops.aten
    pure = {aten.mm.default, aten.addmm.default, aten.permute.default, aten.view.default, aten.reshape.default}
    seen: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in pure:
            first = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _publish_early(graph: torch.fx.Graph) -> None:
    needed: set[torch.fx.Node] = set()
    waiting = [node for node in graph.nodes if node.target is torch.ops.twofold.publish.default]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    later = next((node for node in nodes if node not in needed), None)
    if not needed or later is None:
        return
    for node in nodes[nodes.index(later) :]:
        if node in needed:
            later.prepend(node)
