"""Finds out what a loaded model's attention computes, by running the model with a stand-in for attention.

Tokens may affect each other in attention only. The stand-in gives each token its own value, so a token's hidden state
must depend on its id and position only. To check this, the model runs a second time, with the tokens in another order
and with other neighbours. The same runs show what each layer's attention computes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from twofold.attention import mla
from twofold.attention.op import ATTENTION_NAME
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.errors import ModelError

PROBE_NAME = "twofold_probe"
# Arguments of attention besides q, k, v: those that we compute, and those that do not change the result.
UNDERSTOOD = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal", "dropout"}
HARMLESS = {
    "attention_mask", "position_ids", "position_embeddings", "cache_position", "past_key_values", "past_key_value",
    "use_cache", "output_attentions", "output_router_logits", "output_hidden_states", "return_dict", "logits_to_keep",
    "layer_type", "layer_idx", "attn_implementation", "shared_kv_states", "per_layer_input", "input_ids",
    "deterministic", "head_mask", "layer_head_mask",
}  # fmt: skip

Attention = Callable[..., tuple[torch.Tensor, None]]  # what Transformers calls: module, query, key, value, mask, ...


class Recorder:
    """Stands in for attention: gives each token its own value, and keeps each layer's queries, keys and values.

    It has the parts of a `ForwardContext` that `last_layer.py` uses: `publish` with its hook, `select_last_tokens`.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        last_token_idx: torch.Tensor | None = None,
        answers: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """`answers`: each layer's values [T, Hk, Dv] to return, so that rounding does not add up over layers."""
        self.specs = specs
        self.queries: list[torch.Tensor] = []  # of each layer [T, H, D]
        self.keys: list[torch.Tensor] = []  # [T, Hk, D]
        self.values: list[torch.Tensor] = []  # [T, Hk, Dv]
        self.on_publish: Callable[[torch.Tensor], None] | None = None
        self._last_token_idx, self._answers = last_token_idx, answers
        self._answers_last_tokens = False

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """query [1, H, T, D], key and value of heads or of latents → [1, T, H, Dv]."""
        entries = AttentionSpec.pack(key[0].transpose(0, 1), value[0].transpose(0, 1))
        (self.on_publish or self.publish)(entries)
        self.queries.append(query[0].transpose(0, 1))
        values = (self._answers or self.values)[len(self.queries) - 1]
        if self._answers_last_tokens:
            values = values[self._last_token_idx]
        return values.repeat_interleave(query.shape[1] // values.shape[1], dim=1).unsqueeze(0), None

    def publish(self, entries: torch.Tensor) -> None:
        """KV entries [T, entry_width] of the next layer."""
        spec = self.specs[len(self.keys)]
        if isinstance(spec, LatentSpec):
            keys, values = spec.expanded.unpack(mla.expand(entries, spec))
        else:
            keys, values = spec.unpack(entries)
        self.keys.append(keys)
        self.values.append(values)

    def select_last_tokens(self) -> torch.Tensor:
        """Queries are those of the last tokens from now on; → [V] row -> its last token."""
        assert self._last_token_idx is not None
        self._answers_last_tokens = True
        return self._last_token_idx

    @property
    def tokens(self) -> list[torch.Tensor]:
        """Each layer's queries, keys and values, each [T, X]."""
        layers = zip(self.queries, self.keys, self.values, strict=True)
        return [part.flatten(1) for layer in layers for part in layer]


class _Examiner(Recorder):
    """Reads each layer's spec from its call of attention, and refuses arguments that we do not know."""

    def __init__(self, max_position: int | None) -> None:
        self.examined: list[AttentionSpec] = []
        super().__init__(self.examined)
        self.modules: list[torch.nn.Module] = []
        self._max_position = max_position  # None where masks are not looked at
        self._mask_functions: dict[int, Callable[..., torch.Tensor]] = {}  # id of a mask -> what it was made from
        self._masks: list[torch.Tensor] = []  # kept, so that no id comes twice

    def make_mask(
        self, batch_size: int, q_length: int, kv_length: int, *, mask_function: Callable[..., torch.Tensor], **_: Any
    ) -> torch.Tensor:
        """What Transformers calls to make a mask of [1, 1, q_length, kv_length] from a function of positions."""
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)
        self._mask_functions[id(mask)] = mask_function
        self._masks.append(mask)
        return mask

    def _window(self, mask: torch.Tensor, declared: int | None, last: int) -> int | None:
        """The sliding window of a layer's mask, which must be causal, within a window or not, and nothing else."""
        if (visible := self._mask_functions.get(id(mask))) is None:
            raise ModelError("it masks attention in a way of its own")
        zero = torch.zeros(1, dtype=torch.long)

        def keys_of(query: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
            keys = torch.arange(last + 1)
            seen = visible(zero, zero, torch.full_like(keys, query), keys)
            return seen.expand(last + 1), (keys <= query) & (keys > query - (window or last + 1))

        count = int(keys_of(last, None)[0].sum())
        window = count if count <= last else None
        for query in {0, min(5, last), last // 3, last // 2, last - 1, last}:
            seen, expected = keys_of(query, window)
            if not torch.equal(seen, expected):
                raise ModelError("its attention is neither causal nor causal within a sliding window")
        if declared is not None and window is not None and declared != window:
            raise ModelError(f"a layer's mask has a window of {window}, its attention one of {declared}")
        return window if window is not None else declared

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        window = kwargs.get("sliding_window")
        if attention_mask is not None and self._max_position is not None:
            window = self._window(attention_mask, window, self._max_position)
        if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise ModelError("its attention is not causal")
        for name, given in kwargs.items():
            if given is not None and name not in UNDERSTOOD | HARMLESS:
                raise ModelError(f"its attention takes {name!r}, which is not known here")
        scaling = kwargs.get("scaling")
        self.modules.append(module)
        self.examined.append(
            AttentionSpec(
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                qk_head_dim=query.shape[-1],
                v_head_dim=value.shape[-1],
                scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
                sliding_window=window,
                softcap=kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
        )
        return super().__call__(module, query, key, value)


def probe(model: PreTrainedModel) -> list[tuple[torch.nn.Module, AttentionSpec]]:
    """Each layer's attention module and what it computes, in the order of the forward pass.

    Raises:
        ModelError: its tokens affect each other outside attention, or its attention has arguments that we do not know.
    """
    name = type(model).__name__
    device = next(model.parameters()).device
    ids, positions = example_ids(model.base_model, 8), torch.arange(8, device=device)
    shuffled = torch.tensor([5, 0, 3, 7, 1, 2, 6, 4], device=device)  # place in the second run -> position
    kept = torch.tensor([2, 3, 5], device=device)  # positions of the tokens that are the same in both runs
    others = torch.where(torch.isin(positions, kept), ids, (ids + 3) % model.get_input_embeddings().num_embeddings)
    max_position = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 8192
    first, second = _Examiner(max_position), _Examiner(None)
    try:
        # Without positions, as the family numbers them itself; then with those that a rank gives.
        hidden = run(model.base_model, first, ids, None, first.make_mask)
        mixed = run(model.base_model, second, others[shuffled], shuffled, first.make_mask)
    except ModelError as error:
        raise ModelError(f"{name} is not served: {error}") from None
    except Exception as error:
        raise ModelError(f"{name} is not served: its forward pass failed on token ids ({error})") from error
    specs = first.examined
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    # Some families run a layer more than once, some attend more than once in a layer.
    num_attending = len(set(first.modules))
    if not specs or (num_layers is not None and num_layers not in (len(specs), num_attending)):
        raise ModelError(
            f"{name} is not served: {num_attending} of its {num_layers} layers attend through the attention interface"
        )
    places = shuffled.argsort()[kept]
    change = largest_change(
        [part[places] for part in (*second.tokens, mixed)], [part[kept] for part in (*first.tokens, hidden)]
    )
    if not change < (1e-3 if hidden.dtype == torch.float32 else 0.1):
        raise ModelError(
            f"{name} is not served: its tokens see each other outside attention, or are numbered in a way of its own "
            f"(change {change:.1e})"
        )
    layer_types = getattr(model.config, "layer_types", None)
    for layer, spec in enumerate(specs):
        declared = layer_types[layer] if layer_types and len(layer_types) == len(specs) else None
        if declared == "sliding_attention" and spec.sliding_window is None:
            raise ModelError(f"{name} is not served: layer {layer} hides its sliding window from the interface")
    return list(zip(first.modules, specs, strict=True))


@torch.inference_mode()
def run(
    body: torch.nn.Module,
    attention: Attention,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    make_mask: Callable[..., torch.Tensor | None] = lambda *_, **__: None,
) -> torch.Tensor:
    """Hidden states [T, hidden_size] of tokens [T], with these functions in the place of attention and its masks."""
    _stand_ins.attention, _stand_ins.make_mask = attention, make_mask
    _use_attention(body, PROBE_NAME)
    positions = {} if position_ids is None else {"position_ids": position_ids[None]}
    try:
        hidden_states: torch.Tensor = body(input_ids=input_ids[None], use_cache=False, **positions)[0][0]
    finally:
        _use_attention(body, ATTENTION_NAME)
    return hidden_states


@contextmanager
def in_float32(body: torch.nn.Module) -> Iterator[None]:
    """Modules compute in float32 meanwhile. No more than one module's own weights are there in float32 at a time."""
    kept: dict[torch.nn.Module, dict[str, torch.nn.Parameter | None]] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        kept[module] = dict(module._parameters)
        for name, parameter in kept[module].items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.float(), requires_grad=False)

    def narrow(module: torch.nn.Module, *_: Any) -> None:
        module._parameters.update(kept.pop(module))

    owners = [module for module in body.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(widen) for module in owners]
    hooks += [module.register_forward_hook(narrow, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_stand_ins = threading.local()  # of the run in this thread
AttentionInterface.register(PROBE_NAME, lambda *args, **kwargs: _stand_ins.attention(*args, **kwargs))
AttentionMaskInterface.register(PROBE_NAME, lambda *args, **kwargs: _stand_ins.make_mask(*args, **kwargs))


def example_ids(body: torch.nn.Module, num_tokens: int) -> torch.Tensor:
    """Ids [T] of the model's vocabulary."""
    embeddings = body.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(num_tokens, device=embeddings.weight.device) * 5 + 5
    return ids % int(embeddings.num_embeddings)


def largest_change(now: Sequence[torch.Tensor], then: Sequence[torch.Tensor]) -> float:
    """The largest change of a tensor, relative to its norm; infinite if a shape differs, NaN if any number is NaN."""
    changes = [
        float((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-30)) if x.shape == y.shape else np.inf
        for x, y in zip(now, then, strict=True)
    ]
    return float(np.max(changes))  # unlike `max`, it returns NaN if there is one


def _use_attention(body: torch.nn.Module, name: str) -> None:
    for module in body.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation = name
