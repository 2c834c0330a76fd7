"""The last layer, of which most tokens are read by nobody.

Later tokens attend to keys and values of all tokens, in every layer. What the last layer makes of a token beside them
is read only where the next token is sampled, and a row samples after its last token at most. So it runs twice:

    all tokens of my rows [N]      norm, keys, values, what comes before them ──publish──► on their way, and no further
    each row's last token [V']     the whole layer, with attention over everyone's keys ──► hidden states

Of a prefill with L layers that leaves out almost a part in L. Where prompt log-probabilities are asked for, all tokens
are read, and the layer runs as its family wrote it; so it does in steps of decodes, where each row is its last token.

No layer's forward is written again: `publish` ends the first run by an exception (`attention/op.py`), and the second
one is given the same arguments with fewer tokens. Names prove nothing: both ways are compared when a model is loaded.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.op import ForwardContext, StopAfterPublish, forward_context
from twofold.attention.spec import AttentionSpec
from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.kv.cache import KVCache
from twofold.models.support import largest_change
from twofold.parallel.exchange import AllGatherExchange
from twofold.parallel.mesh import SingleRank
from twofold.sampling_params import SamplingParams
from twofold.worker.input_batch import InputBatch, prepare
from twofold.worker.request_states import RequestStates

logger = logging.getLogger(__name__)

TOLERANCE = 0.05  # above what bfloat16 rounds; those of another token are off by about 1
BLOCK_SIZE = 8  # of the step that both ways are compared in


class LastLayer(torch.nn.Module):
    """Stands in for a decoder layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.training = layer, layer.training
        self.read: torch.Tensor | None = None  # [V] places of the tokens that are read; None if all are

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [1, T, X] → what the layer returns, of T tokens or of V."""
        if self.read is None:
            return self.layer(hidden_states, *args, **kwargs)
        with suppress(StopAfterPublish):
            self.layer(hidden_states, *args, **kwargs)
        args, kwargs = _of_tokens((args, kwargs), hidden_states.shape[1], self.read)
        return self.layer(hidden_states[:, self.read], *args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        self.layer.compile(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Families look at what kind of layer it is."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def _of_tokens(given: Any, num_tokens: int, read: torch.Tensor) -> Any:
    """Positions, rotations and whatever else is [1, T, ...], as [1, V, ...]."""
    if isinstance(given, torch.Tensor):
        return given[:, read] if given.shape[:2] == (1, num_tokens) else given
    if isinstance(given, dict):
        return {name: _of_tokens(value, num_tokens, read) for name, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_of_tokens(value, num_tokens, read) for value in given)
    return given


class _NotingBackend(SDPABackend):
    """Keeps the queries of the layer that attended last."""

    def __init__(self) -> None:
        self.queries: list[torch.Tensor] = []

    def attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.queries = [query]
        return super().attend(query, kv_cache, spec, metadata)

    def attend_keys(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.queries = [*self.queries[-1:], query]  # of latents: a call for each of the two prompts
        return super().attend_keys(query, keys, values, spec, causal)


@torch.inference_mode()
def use_last_layer(
    layers: torch.nn.ModuleList,
    specs: Sequence[AttentionSpec],
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> LastLayer | None:
    """Puts a LastLayer in the place of the last one, if its queries and hidden states come out the same.

    `run` is the forward pass: ids [T], positions [T] → hidden states [T, hidden_size].
    """
    last = LastLayer(layers[-1])
    parameter = next(last.parameters())
    device, dtype = parameter.device, parameter.dtype
    batch = _two_prompts(device)

    def run_step(last_tokens: AttentionMetadata | None) -> tuple[torch.Tensor, torch.Tensor]:
        cache = KVCache([spec.entry_width for spec in specs], 3, BLOCK_SIZE, dtype, device)
        exchange, backend = AllGatherExchange(SingleRank(), device), _NotingBackend()
        exchange.begin(batch.exchange)
        with forward_context(ForwardContext(specs, cache, exchange, backend, batch.metadata, last_tokens)):
            hidden_states = run(batch.input_ids, batch.position_ids)
        return torch.cat(backend.queries), hidden_states

    try:
        read, last_tokens = batch.metadata.last_token_idx(), batch.metadata.of_last_tokens()
        expected = [part[read] for part in run_step(None)]
        layers[-1], last.read = last, read
        found = run_step(replace(last_tokens, num_decode_rows=0))  # latents' queries are then those of heads
        change = largest_change(found, expected)
        if change < (1e-3 if dtype == torch.float32 else TOLERANCE):
            return last
        logger.info("the last layer runs for all tokens: for some, they would come out differently (%.1e)", change)
    except Exception as error:  # the family does more around its layers than to call one after the other
        logger.info("the last layer runs for all tokens: for some, it fails (%s)", error)
    finally:
        last.read = None
    layers[-1] = last.layer
    return None


def _two_prompts(device: torch.device) -> InputBatch:
    """A step of two prompts, of 5 and 3 tokens, each in a block of 8."""
    prompts = {"first": [5, 1, 4, 2, 3], "second": [3, 5, 2]}
    new = tuple(
        NewRequest(name, np.array(ids, np.int32), len(ids), [block], SamplingParams(), 0)
        for block, (name, ids) in enumerate(prompts.items(), 1)
    )
    lengths = np.array([len(ids) for ids in prompts.values()])
    batch = ScheduledBatch(tuple(prompts), np.zeros_like(lengths), lengths, np.zeros(len(prompts), bool))
    states = RequestStates(len(prompts), BLOCK_SIZE, BLOCK_SIZE, device)
    states.apply(Step(0, (), new, {}, batch))
    return prepare(batch, states, 0, 1, "dual_chunk_swap", BLOCK_SIZE)
