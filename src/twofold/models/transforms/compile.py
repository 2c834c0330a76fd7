"""Compile decoder layers: one graph serves all layers that look alike, whatever the number of tokens."""

import hashlib
import inspect
import operator
import warnings
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass

from twofold.models.transforms.base import Transform
from twofold.models.transforms.few_row_linear import DTYPES, MAX_WEIGHTS
from twofold.models.transforms.last_layer import LastLayer
from twofold.parallel import sums  # noqa: F401 (defines `sum_over_ranks`)

FEW_ROW_DEVICE = "cuda"  # whose products of few rows our kernel computes


class CompileLayers(Transform):
    """Each decoder layer is compiled in place at its first call.

    Nothing is compared when a model is loaded: kernels are compiled later, and round differently. Tests compare the
    rewriting of graphs (`test_compile.py`) and compiled models (`tests/gpu`).
    """

    name = "compiled layers"

    def __init__(self, layers: torch.nn.ModuleList) -> None:
        # The last layer's stand-in stays outside: it calls its layer twice.
        self.layers = [layer.layer if isinstance(layer, LastLayer) else layer for layer in layers]

    def find(self) -> str | None:
        return None

    def apply(self) -> None:
        inductor.post_grad_custom_post_pass = RewriteLayers()
        inductor.reorder_for_peak_memory = False  # it would move `publish` back (`_publish_early`)
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # float32 is asked for to be exact
        torch._dynamo.config.recompile_limit = 64  # kinds of layers × one token or more
        for layer in self.layers:
            layer.compile(dynamic=True)

    def verify(self) -> float:
        return 0.0

    def undo(self) -> None:
        for layer in self.layers:
            layer._compiled_call_impl = None


class RewriteLayers(CustomGraphPass):
    """Rewrites a layer's graph in four ways that the compiler does not know.

    One product serves all projections that were packed into it. RoPE by complex numbers becomes RoPE by real ones,
    which the compiler can fuse. Our kernel multiplies few rows. `publish`, with all that it needs, comes before the
    rest, so that queries are projected while KV entries travel.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        _keep_one_of_equals(graph)
        _rotate_by_reals(graph)
        _multiply_few_rows(graph)
        _publish_early(graph)

    def uuid(self) -> bytes:
        return hashlib.sha256(inspect.getsource(inspect.getmodule(type(self))).encode()).digest()  # type: ignore[arg-type]


def _emit(graph: torch.fx.Graph, before: torch.fx.Node, op: Any, *args: Any) -> torch.fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(op, args)
    node.meta["val"] = op(*torch.fx.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def _erase_unused(graph: torch.fx.Graph, *nodes: torch.fx.Node) -> None:
    for node in nodes:
        if not node.users:
            graph.erase_node(node)


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


def _rotate_by_reals(graph: torch.fx.Graph) -> None:
    aten = torch.ops.aten
    for out in graph.find_nodes(op="call_function", target=aten.view_as_real.default):
        product = out.args[0]
        if product.target is not aten.mul.Tensor or product.args[0].target is not aten.view_as_complex.default:
            continue
        (pairs,), angles = product.args[0].args, product.args[1]  # [..., 2] real, and complex

        emit = partial(_emit, graph, out)
        turns = emit(aten.view_as_real.default, angles)
        (x, y), (cos, sin) = ([emit(aten.select.int, node, -1, i) for i in (0, 1)] for node in (pairs, turns))
        (xc, xs), (yc, ys) = ([emit(aten.mul.Tensor, part, turn) for turn in (cos, sin)] for part in (x, y))
        turned = emit(aten.sub.Tensor, xc, ys), emit(aten.add.Tensor, xs, yc)
        out.replace_all_uses_with(
            emit(aten.cat.default, [emit(aten.unsqueeze.default, part, -1) for part in turned], -1)
        )
        _erase_unused(graph, out, product, product.args[0])


def _multiply_few_rows(graph: torch.fx.Graph) -> None:
    """Products of the same x become one call by heads. By tokens queries wait until KV entries travel."""
    aten, few_row_linear = torch.ops.aten, torch.ops.twofold.few_row_linear.default
    products: dict[torch.fx.Node, list[torch.fx.Node]] = {}  # x -> all of them
    for node in graph.nodes:
        if _is_projection(node):
            products.setdefault(node.args[-2], []).append(node)
    by_heads = any(node.target is torch.ops.twofold.sum_over_ranks.default for node in graph.nodes)
    width = MAX_WEIGHTS if by_heads else 1
    for x, all_of_x in products.items():
        for start in range(0, len(all_of_x), width):
            nodes = all_of_x[start : start + width]
            columns: list[Any] = [node.args[-1] for node in nodes]
            results = _emit(graph, nodes[0], few_row_linear, x, [column.args[0] for column in columns])
            for i, node in enumerate(nodes):
                result = _emit(graph, node, operator.getitem, results, i)
                if node.target is aten.addmm.default:
                    result = _emit(graph, node, aten.add.Tensor, result, node.args[0])
                node.replace_all_uses_with(result)
                _erase_unused(graph, node, columns[i])


def _is_projection(node: torch.fx.Node) -> bool:
    """Is it a product with a weight that our kernel can read? A bias may be added."""
    aten = torch.ops.aten
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return False
    columns: Any = node.args[-1]
    if columns.target is not aten.permute.default or columns.args[0].op != "placeholder":
        return False
    weight = columns.args[0].meta["val"]
    return weight.device.type == FEW_ROW_DEVICE and weight.dtype in DTYPES


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
