"""Compile decoder layers: one graph serves all layers that look alike, whatever the number of tokens."""

import hashlib
import inspect
import operator
import sys
import warnings
from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from twofold.models.transforms.base import Transform
from twofold.models.transforms.few_row_linear import DTYPES, MAX_WEIGHTS
from twofold.models.transforms.stand_in import bare
from twofold.parallel import sums  # noqa: F401 (defines `sum_over_ranks`)

FEW_ROW_DEVICE = "cuda"  # whose products of few rows our kernel computes


class CompileLayers(Transform):
    """Each decoder layer is compiled in place at its first call.

    Nothing is compared when a model is loaded: kernels are compiled later, and round differently. Tests compare the
    rewriting of graphs (`test_compile.py`) and compiled models (`tests/gpu`).
    """

    name = "compiled layers"

    def __init__(self, layers: torch.nn.ModuleList) -> None:
        self.layers = [bare(layer) for layer in layers]  # what stands in for a layer stays outside

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
    """Rewrites a layer's graph in ways that the compiler does not know.

    One product serves all projections that were packed into it. RoPE by complex numbers becomes RoPE by real ones,
    which the compiler can fuse. Our kernel multiplies few rows. A sum over ranks becomes one op with the residual and
    the norm that follow it. `publish`, with all that it needs, comes before the rest, so that queries are projected
    while KV entries travel.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        _keep_one_of_equals(graph)
        _rotate_by_reals(graph)
        _multiply_few_rows(graph)
        _fuse_sums(graph)
        _publish_early(graph)

    def uuid(self) -> bytes:
        return hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).digest()


def _emit(graph: torch.fx.Graph, before: torch.fx.Node, op: Any, *args: Any) -> torch.fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(op, args)
    node.meta["val"] = op(*torch.fx.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def _erase_unused(graph: torch.fx.Graph, *nodes: torch.fx.Node) -> None:
    """Erases nodes that have no users, and what is without users then."""
    for node in nodes:
        if not node.users and node.op == "call_function" and not node._erased:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            _erase_unused(graph, *inputs)


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


def _fuse_sums(graph: torch.fx.Graph) -> None:
    """sum_over_ranks(x) + residual  ->  sum_add, or sum_add_norm if a norm like Llama's follows."""
    aten, ops = torch.ops.aten, torch.ops.twofold
    views = {aten.view.default, aten.reshape.default, aten.unsqueeze.default}
    for total in graph.find_nodes(op="call_function", target=ops.sum_over_ranks.default):
        last = total
        while len(last.users) == 1 and (user := next(iter(last.users))).target in views:
            last = user
        added = _user(last, aten.add.Tensor)
        if added is None or added.kwargs or len(last.users) > 1:
            continue
        residual = next((arg for arg in added.args if arg is not last), None)
        if not isinstance(residual, torch.fx.Node) or not _are_alike(residual, last):
            continue
        norm = _find_norm(added)
        with graph.inserting_before(added):
            if norm is None:
                fused = graph.call_function(ops.sum_add.default, (total.args[0], residual))
                results = {added: fused}
            else:
                normed, weight, epsilon = norm
                op = ops.sum_add_norm.default if isinstance(epsilon, torch.fx.Node) else ops.sum_add_norm.constant
                fused = graph.call_function(op, (total.args[0], residual, weight, epsilon))
                fused.meta["val"] = (added.meta["val"], normed.meta["val"])
                results = {
                    old: graph.call_function(operator.getitem, (fused, i)) for i, old in enumerate([added, normed])
                }
        for old, new in results.items():
            new.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(new)
            _erase_unused(graph, old)


def _find_norm(added: Any) -> tuple[Any, Any, Any] | None:
    """Llama's norm of `added` → its result, its weight [W], and epsilon.

    Other families add to the weight, or round after they multiplied by it: theirs is not found. Epsilon is a number, or
    a tensor with one number on the CPU, because the compiler makes inputs of what modules keep as numbers.
    """
    aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default
    dtype = added.meta["val"].dtype
    is_wide = dtype == torch.float32
    wide = added if is_wide else _user(added, convert, torch.float32)
    mean = _user(_user(wide, aten.pow.Tensor_Scalar, 2), aten.mean.dim, [-1], True)
    shifted = _user(mean, aten.add.Tensor)
    unit = _user(_user(shifted, aten.rsqrt.default), aten.mul.Tensor)
    rounded = unit if is_wide else _user(unit, convert, dtype)
    normed = _user(rounded, aten.mul.Tensor)
    if normed is None or wide not in unit.args or shifted.args[0] is not mean:
        return None
    weight, epsilon = next(arg for arg in normed.args if arg is not rounded), shifted.args[1]
    while getattr(epsilon, "target", None) is convert:
        epsilon = epsilon.args[0]
    is_number = isinstance(epsilon, float) or (_is_input(epsilon, ndim=0) and epsilon.meta["val"].is_cpu)
    is_weight = _is_input(weight, ndim=1) and weight.meta["val"].dtype == dtype
    return (normed, weight, epsilon) if is_number and is_weight else None


def _is_input(node: Any, ndim: int) -> bool:
    return getattr(node, "op", None) == "placeholder" and node.meta["val"].ndim == ndim


def _user(node: Any, target: Any, *args: Any) -> Any:
    """A node that calls target(node, *args), if `node` has one; with any arguments if none are given."""
    users = () if node is None else node.users
    return next((user for user in users if user.target is target and (not args or user.args[1:] == args)), None)


def _are_alike(a: torch.fx.Node, b: torch.fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and statically_known_true(sym_eq(tuple(x.shape), tuple(y.shape)))


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
