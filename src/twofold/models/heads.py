"""A model by heads (tensor parallelism): the same modules once more, their weights views of the whole ones.

    module          of rank r, by heads                                               after it
    column-wise     rows r of its weight: some heads of q, k, v; some of gate, up     nothing: outputs stay divided
    row-wise        columns r of its weight: o, down                                  the sum over ranks
    experts         both, of every expert                                             the sum over ranks
    head            rows r: some words of the vocabulary                              see `worker/sampler.py`

Transformers' plans (`base_model_tp_plan`) say which projections are which. What does not divide, and what a plan
gathers between its two halves, is computed whole on every rank, which needs no sum. Names prove nothing: queries, keys,
values, hidden states and logits of both ways are compared when a model is loaded.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Linear, Parameter

from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.errors import ModelError
from twofold.models.decoder import DecoderModel
from twofold.models.probe import Recorder, example_ids, in_float32, largest_change, run
from twofold.models.transforms.base import is_same, sample_input
from twofold.models.transforms.experts import divide_experts, expert_width
from twofold.models.transforms.last_layer import LastLayer
from twofold.models.transforms.packing import Part
from twofold.parallel.mesh import Mesh
from twofold.parallel.sums import Sum, summing

NUM_TOKENS = 8  # of the forward passes that are compared
MORE_ROUNDING = 1.5  # times what the whole model loses to rounding may be lost by heads
MOST_ROUNDING = 0.3  # of a result; that of another head differs by about 1
STYLES = {"colwise", "rowwise", "packed"}
WHOLE = {"replicated_with_grad_allreduce", "mla_kv_a_proj"}  # computed on every rank, also in the plan's own meaning
# Of modules that a plan leaves out, or that have none: usual names, as good as a plan's where the results agree.
ATTENTION_PLAN = dict.fromkeys(["q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "gate_proj"], "colwise")
ATTENTION_PLAN |= dict.fromkeys(["o_proj", "out_proj"], "rowwise")
MLP_PLAN = {"fc1": "colwise", "fc2": "rowwise"}
# A plan gathers what comes of these, since it cannot tell their parts apart; divided apart, they need no gathering.
PACKED = {"qkv_proj", "gate_up_proj"}
OF_PACKED = {"colwise_gather_output": "packed", "rowwise_split_input": "rowwise"}
COUNTS = re.compile(r"(num|n)_(attention_|key_value_|kv_)?heads?")  # attributes with a number of heads


class SummedLinear(torch.nn.Module):
    """A row-wise Linear: its inputs are divided over the ranks, so products are summed. The bias is added once."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = Parameter(weight, requires_grad=False)
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features], the same on every rank."""
        total: torch.Tensor = torch.ops.twofold.sum_over_ranks(torch.nn.functional.linear(x, self.weight))
        return total if self.bias is None else total + self.bias


class PackedLinear(torch.nn.Module):
    """This rank's rows of each part of a packed projection, as views: of q, k and v, or of gate and up."""

    def __init__(self, linear: Linear, sizes: list[int], mesh: Mesh) -> None:
        """`sizes` of the parts, in rows of the whole weight."""
        super().__init__()
        self.weights = [_part(part, 0, mesh) for part in linear.weight.split(sizes)]
        biases = [None] * len(sizes) if linear.bias is None else linear.bias.split(sizes)
        self.biases = [None if part is None else _part(part, 0, mesh) for part in biases]
        self.in_features, self.out_features = linear.in_features, linear.out_features // mesh.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features]."""
        parts = zip(self.weights, self.biases, strict=True)
        return torch.cat([torch.nn.functional.linear(x, weight, bias) for weight, bias in parts], dim=-1)


@dataclass(slots=True)
class _Group:
    """Projections of one parent module that are divided together or not at all."""

    parent: torch.nn.Module
    styles: dict[str, str]  # name of a child -> its style


def divide(whole: DecoderModel, mesh: Mesh, total: Sum) -> DecoderModel:
    """The part of `whole` that this rank computes in steps by heads. All ranks call it together.

    Raises:
        ModelError: the model has no plan, nothing of it divides, or results would differ; the same on every rank.
    """
    try:
        part, num_divided = _divided(whole, mesh)
    except Exception as error:  # a family may do anything with its modules
        raise ModelError(f"it cannot be divided ({error})") from error
    if not num_divided:
        raise ModelError("no projection of it is known to divide")
    part.sum = total
    verify(whole, part, mesh)
    _divide_head(whole, part, mesh)
    return part


def _divided(whole: DecoderModel, mesh: Mesh) -> tuple[DecoderModel, int]:
    """A copy of `whole` with what divides divided, and how much that is, in groups of projections and experts."""
    part = _copy(whole)
    layers = [spec.num_heads % mesh.size == spec.num_kv_heads % mesh.size == 0 for spec in part.specs]
    attentions = {id(module): layer for layer, module in enumerate(part.attentions)}
    divided_layers: set[int] = set()
    num_divided = 0
    for group in _groups(part):
        layer = attentions.get(id(group.parent))
        if _divides(group, mesh.size) and (layer is None or layers[layer]):
            for name, style in group.styles.items():
                _divide_child(group.parent, name, style, None if layer is None else part.specs[layer], mesh)
            num_divided += 1
            if layer is not None:
                divided_layers.add(layer)
    for layer in divided_layers:
        part.specs[layer] = _divide_attention(part.attentions[layer], part.specs[layer], mesh)
    return part, num_divided + divide_experts(part.body, mesh)


def _copy(whole: DecoderModel) -> DecoderModel:
    """The same modules with the same weights: only what is no tensor is copied."""
    models = (whole.model, whole.body)
    shared = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(whole, shared)


def _groups(part: DecoderModel) -> list[_Group]:
    plan: dict[str, str] = getattr(part.body, "_tp_plan", None) or {}
    attentions = {id(module) for module in part.attentions}
    groups = []
    for name, parent in part.body.named_modules():
        if isinstance(parent, LastLayer | Part):
            continue
        usual = ATTENTION_PLAN if id(parent) in attentions else MLP_PLAN
        if (group := _group(parent, _without_stand_in(part, name), plan, usual)) is not None:
            groups.append(group)
    return groups


def _group(parent: torch.nn.Module, name: str, plan: dict[str, str], usual: dict[str, str]) -> _Group | None:
    prefix = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    children = [child for child, module in parent.named_children() if isinstance(module, Linear | Part)]
    styles = {child: plan[key] for child in children if (key := f"{prefix}.{child}") in plan}
    if not styles:
        styles = {child: usual[child] for child in children if child in usual}
    styles = {child: style for child, style in styles.items() if style not in WHOLE}
    if PACKED & set(styles):
        styles = {child: OF_PACKED.get(style, style) for child, style in styles.items()}
    return _Group(parent, styles) if styles else None


def _without_stand_in(part: DecoderModel, name: str) -> str:
    """A module's name as it is without `LastLayer`."""
    if part.last_layer is None:
        return name
    stand_in = next(path for path, module in part.body.named_modules() if module is part.last_layer)
    inside = f"{stand_in}.layer"
    return stand_in + name.removeprefix(inside) if name.startswith(inside) else name


def _divides(group: _Group, num_ranks: int) -> bool:
    parts = [module for name in group.styles if type(module := group.parent.get_submodule(name)) is Part]
    counts = _counts(group)
    if counts is None or any(part.num_parts != num_ranks for part in parts):
        return False
    return all(count % num_ranks == 0 for count in counts)


def _counts(group: _Group) -> list[int] | None:
    """Columns and rows, each of which must be a multiple of the number of ranks; None if no number will do."""
    if not set(group.styles.values()) <= STYLES or "rowwise" not in group.styles.values():
        return None
    counts = []
    for name, style in group.styles.items():
        module: Any = group.parent.get_submodule(name)
        if type(module) not in ((Linear, Part) if style == "colwise" else (Linear,)):
            return None  # a subclass may compute something else
        width = {"colwise": module.out_features, "packed": module.out_features // 2, "rowwise": module.in_features}
        counts.append(width[style])
    return counts


def divisible_groups(body: torch.nn.Module) -> Iterator[tuple[str, bool, int, list[int]]]:
    """What divides of a model that was not probed and may have no memory: for each module with projections or experts
    its path, whether it is attention, the bytes of what divides, and the counts that must be multiples of the ranks."""
    plan: dict[str, str] = getattr(body, "_tp_plan", None) or {}
    for name, module in body.named_modules():
        children = {child for child, _ in module.named_children()}
        is_attention = bool(children & (set(ATTENTION_PLAN) - {"gate_proj"} | {"qkv_proj"}))
        if hasattr(module, "is_concatenated"):
            divided = [p for key, p in module.named_parameters() if p.dim() > 2 or key.endswith("up_proj_bias")]
            yield name, False, sum(parameter.nbytes for parameter in divided), [expert_width(module)]
        elif (group := _group(module, name, plan, ATTENTION_PLAN if is_attention else MLP_PLAN)) is not None:
            weights: list[Any] = [module.get_submodule(child) for child in group.styles]
            if (counts := _counts(group)) is not None:
                yield name, is_attention, sum(linear.weight.nbytes for linear in weights), counts


def _divide_child(parent: torch.nn.Module, name: str, style: str, spec: AttentionSpec | None, mesh: Mesh) -> None:
    """`spec` of the layer's attention, if the parent is an attention module."""
    module: Any = parent.get_submodule(name)
    if isinstance(module, Part):
        module.keep_rank(mesh.rank)
    elif style == "colwise":
        for field, tensor in module.named_parameters():
            setattr(module, field, _part(tensor, 0, mesh))
        module.out_features = len(module.weight)
    elif style == "packed":
        sizes = [module.out_features // 2] * 2
        if spec is not None:
            num_keys = spec.num_kv_heads * spec.qk_head_dim
            sizes = [spec.num_heads * spec.qk_head_dim, num_keys, spec.num_kv_heads * spec.v_head_dim]
        setattr(parent, name, PackedLinear(module, sizes, mesh))
    else:
        setattr(parent, name, SummedLinear(_part(module.weight, 1, mesh), module.bias))


def _part(tensor: torch.Tensor, dim: int, mesh: Mesh) -> Parameter:
    """A view."""
    size = tensor.shape[dim] // mesh.size
    return Parameter(tensor.narrow(dim, mesh.rank * size, size), requires_grad=False)


def _divide_attention(module: torch.nn.Module, spec: AttentionSpec, mesh: Mesh) -> AttentionSpec:
    """The spec of this rank's heads; the module's own counts of heads become those of the rank."""
    counting: list[Any] = [module]
    if hasattr(module, "config"):
        module.config = copy.copy(module.config)
        counting.append(module.config)
    for owner in counting:
        for name, value in list(vars(owner).items()):
            if COUNTS.fullmatch(name) and value in (spec.num_heads, spec.num_kv_heads):
                setattr(owner, name, value // mesh.size)
    if spec.sinks is not None:
        own = [name for name, tensor in module.named_parameters(recurse=False) if len(tensor) == spec.num_heads]
        for name in own:
            setattr(module, name, _part(module.get_parameter(name), 0, mesh))
    changes: dict[str, Any] = {
        "num_heads": spec.num_heads // mesh.size,
        "num_kv_heads": spec.num_kv_heads // mesh.size,
        "sinks": None if spec.sinks is None else _part(spec.sinks, 0, mesh),
    }
    if isinstance(spec, LatentSpec):
        changes["weight"] = _part(spec.weight, 0, mesh)
    return replace(spec, **changes)


def verify(whole: DecoderModel, part: DecoderModel, mesh: Mesh) -> None:
    """Compares both ways. All ranks call it together.

    Raises:
        ModelError: results differ; the same on every rank.
    """
    ids = example_ids(whole.body, NUM_TOKENS)
    positions = torch.arange(NUM_TOKENS, device=ids.device)
    expected = Recorder(whole.specs)
    hidden = run(whole.body, expected, ids, positions)

    def mine(tensors: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
        """Of each layer [T, H, D] those heads that this rank has."""
        return [
            x if x.shape[1] == count else x[:, mesh.rank * count : (mesh.rank + 1) * count]
            for x, count in zip(tensors, counts, strict=True)
        ]

    heads, kv_heads = ([getattr(spec, name) for spec in part.specs] for name in ("num_heads", "num_kv_heads"))
    values = mine(expected.values, kv_heads)
    found = Recorder(part.specs, answers=values)
    try:
        with summing(part.sum):
            hidden_by_heads = run(part.body, found, ids, positions)
        by_heads = [*found.queries, *found.keys, *found.values, hidden_by_heads]
        as_whole = [*mine(expected.queries, heads), *mine(expected.keys, kv_heads), *values, hidden]
        change = largest_change(by_heads, as_whole)
    except Exception as error:
        raise ModelError(f"it fails by heads ({error})") from error
    # Ranks must agree, and a rank's rounding is its own.
    change = _largest(change, mesh, ids.device)
    if is_same(change, whole.dtype):
        return
    # Deep models lose more to rounding. Both are compared with float32: by heads about as much may be lost.
    excess = float("inf")
    with suppress(Exception):  # weights that are elsewhere
        exact = Recorder(whole.specs, answers=[x.float() for x in expected.values])
        with in_float32(whole.body):
            hidden = run(whole.body, exact, ids, positions)
        in_full = [*mine(exact.queries, heads), *mine(exact.keys, kv_heads), *mine(exact.values, kv_heads), hidden]
        excess = largest_change(by_heads, in_full) / largest_change(as_whole, in_full)
    excess = _largest(excess, mesh, ids.device)
    if not (excess < MORE_ROUNDING and change < MOST_ROUNDING):
        raise ModelError(f"results would change by {change:.1e}")


def _largest(mine: float, mesh: Mesh, device: torch.device) -> float:
    """Of all ranks; NaN if one has that."""
    everyones = torch.empty(mesh.size, device=device)
    mesh.all_gather(everyones, torch.tensor([mine], device=device))
    return float(everyones.max())


def _divide_head(whole: DecoderModel, part: DecoderModel, mesh: Mesh) -> None:
    """Divides the words of the vocabulary, if the head is a Linear and what follows it needs no other words."""
    head = part.head
    if type(head) is not Linear:
        return
    num_words, parameters = len(head.weight), dict(head.named_parameters())
    size = -(-num_words // mesh.size)
    if size * (mesh.size - 1) >= num_words:
        return
    words = range(mesh.rank * size, min((mesh.rank + 1) * size, num_words))
    hidden = sample_input(NUM_TOKENS, head.weight.shape[1], like=head.weight)
    expected = whole.logits(hidden)
    try:
        for field, tensor in parameters.items():
            setattr(head, field, Parameter(tensor[words.start : words.stop], requires_grad=False))
        change = largest_change([part.logits(hidden)], [expected[:, words.start : words.stop]])
    except Exception:
        change = float("nan")
    changes = torch.empty(mesh.size, device=hidden.device)
    mesh.all_gather(changes, torch.tensor([change], device=hidden.device))
    if is_same(float(changes.max()), whole.dtype) and expected.shape[1] == num_words:
        part.words = words
        return
    for field, tensor in parameters.items():
        setattr(head, field, tensor)
