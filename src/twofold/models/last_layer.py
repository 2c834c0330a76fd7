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
from twofold.attention.op import ForwardContext, Published, forward_context
from twofold.attention.spec import AttentionSpec, LatentSpec
from twofold.parallel.exchange import AllGatherExchange, ExchangePlan
from twofold.parallel.mesh import SingleRank
from twofold.worker.kv_cache import KVCache

logger = logging.getLogger(__name__)

TOLERANCE = 0.05  # above what bfloat16 rounds; those of another token are off by about 1


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
        with suppress(Published):
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

    query: torch.Tensor

    def attend(
        self, query: torch.Tensor, pages: torch.Tensor, spec: AttentionSpec, metadata: AttentionMetadata
    ) -> torch.Tensor:
        self.query = query
        return super().attend(query, pages, spec, metadata)

    def attend_at_once(
        self, query: torch.Tensor, pages: torch.Tensor, spec: LatentSpec, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        self.query = query
        return None


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
    step, slots = _two_rows(device)
    ids = torch.tensor([5, 1, 4, 2, 3, 3, 5, 2], device=device)
    positions = torch.tensor([*range(5), *range(3)], device=device)

    def run_step(last_tokens: AttentionMetadata | None) -> tuple[torch.Tensor, torch.Tensor]:
        cache = KVCache(specs, 3, 8, dtype, device)
        exchange, backend = AllGatherExchange(SingleRank(), device), _NotingBackend()
        exchange.begin(ExchangePlan(slots, is_whole=False))
        with forward_context(ForwardContext(specs, cache, exchange, backend, step, last_tokens)):
            hidden_states = run(ids, positions)
        return backend.query.float(), hidden_states.float()

    try:
        read = step.query_start[1:].long() - 1
        expected = [part[read] for part in run_step(None)]
        layers[-1], last.read = last, read
        found = run_step(replace(step.of_last_tokens(), num_decode_rows=0))  # latents' queries are then those of heads
        changes = [float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
        if all(change < (1e-3 if dtype == torch.float32 else TOLERANCE) for change in changes):  # no NaN is
            return last
        logger.info("the last layer runs for all tokens: for some, they would come out differently (%s)", changes)
    except Exception as error:  # the family does more around its layers than to call one after the other
        logger.info("the last layer runs for all tokens: for some, it fails (%s)", error)
    finally:
        last.read = None
    layers[-1] = last.layer
    return None


def _two_rows(device: torch.device) -> tuple[AttentionMetadata, torch.Tensor]:
    """Prompts of 5 and 3 tokens, each in a block of 8, and the slots of their tokens."""
    query_start, seq_lens, block_tables = np.array([0, 5, 8]), np.array([5, 3]), np.array([[1], [2]], np.int32)
    metadata = AttentionMetadata(
        num_tokens=8,
        query_start_np=query_start,
        seq_lens_np=seq_lens,
        block_tables_np=block_tables,
        query_start=torch.from_numpy(query_start).int().to(device),
        seq_lens=torch.from_numpy(seq_lens).int().to(device),
        block_tables=torch.from_numpy(block_tables).to(device),
        max_query_len=5,
        max_seq_len=5,
        num_row_blocks=2,
        num_decode_rows=0,
    )
    return metadata, torch.tensor([*range(8, 13), *range(16, 19)], device=device)
