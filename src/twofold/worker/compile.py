"""Decoder layers under `torch.compile`: one graph serves all layers that look alike, whatever the number of tokens."""

import hashlib
import inspect

import torch
import torch._inductor.config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass

from twofold.models.loader import DecoderModel


def compile_layers(model: DecoderModel) -> bool:
    """Compiles each decoder layer in place at its first call; False if the model's layers cannot be told apart."""
    layers = decoder_layers(model)
    if layers is None:
        return False
    inductor.post_grad_custom_post_pass = PublishEarly()
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


class PublishEarly(CustomGraphPass):
    """Moves `publish`, and all that it needs, before the rest: queries are then projected while rows travel."""

    def __call__(self, graph: torch.fx.Graph) -> None:
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

    def uuid(self) -> bytes:
        return hashlib.sha256(inspect.getsource(type(self)).encode()).digest()
