"""The last layer, of which most tokens are read by nobody.

Later tokens attend to keys and values of all tokens, in every layer. What the last layer makes of a token beside them
is read only where the next token is sampled, and a row samples after its last token at most. So it runs twice:

    all tokens of my rows [N]      norm, keys and values ──publish──► on their way, and no further
    each row's last token [V']     norm, queries, attention over everyone's keys, projections ──► hidden states

Of a prefill with L layers that leaves out almost a part in L. Where prompt log-probabilities are asked for, all tokens
are read, and the layer runs as its family wrote it.

No layer's forward is written again: `publish` ends the first run by an exception (`attention/op.py`), and the second
one is given the same arguments with fewer tokens. Names prove nothing: both ways are compared when a model is loaded.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from twofold.attention.backends.sdpa import SDPABackend
from twofold.attention.metadata import AttentionMetadata
from twofold.attention.op import ForwardContext, Published, forward_context
from twofold.attention.spec import AttentionSpec
from twofold.parallel.exchange import AllGatherExchange, ExchangePlan
from twofold.parallel.mesh import SingleRank
from twofold.worker.kv_cache import KVCache

logger = logging.getLogger(__name__)

TOLERANCE = 0.05  # above what bfloat16 rounds; hidden states of another token are off by about 1


class LastLayer(torch.nn.Module):
    """Stands in for a decoder layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
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


@torch.inference_mode()
def use_last_layer(
    layers: torch.nn.ModuleList,
    specs: Sequence[AttentionSpec],
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> LastLayer | None:
    """Puts a LastLayer in the place of the last one, if what it leaves out changes nothing that is read.

    `run` is the forward pass: ids [T], positions [T] → hidden states [T, hidden_size].
    """
    last = LastLayer(layers[-1])
    layers[-1] = last
    parameter = next(last.parameters())
    step = _two_rows(parameter.device)
    cache = KVCache(specs, 3, 8, parameter.dtype, parameter.device)
    ids, positions = (
        torch.tensor(x, device=parameter.device) for x in ([5, 1, 4, 2, 3, 3, 5, 2], [*range(5), *range(3)])
    )
    slots = torch.tensor([*range(8, 13), *range(16, 19)], device=parameter.device)

    def run_step(last_tokens: AttentionMetadata | None) -> torch.Tensor:
        exchange = AllGatherExchange(SingleRank(), parameter.device)
        exchange.begin(ExchangePlan(slots, is_whole=False))
        with forward_context(ForwardContext(specs, cache, exchange, SDPABackend(), step, last_tokens)):
            return run(ids, positions).float()

    try:
        read = step.query_start[1:].long() - 1
        expected = run_step(None)[read]
        last.read = read
        change = (run_step(step.of_last_tokens()) - expected).norm() / expected.norm()
        if change < TOLERANCE:
            return last
        logger.info("the last layer runs for all tokens: for some, it would change what is read by %.1e", change)
    except Exception as error:  # the family does more around its layers than to call one after the other
        logger.info("the last layer runs for all tokens: for some, it fails (%s)", error)
    finally:
        last.read = None
    layers[-1] = last.layer
    return None


def _two_rows(device: torch.device) -> AttentionMetadata:
    """Prompts of 5 and 3 tokens, each in a block of its own."""
    query_start, seq_lens, block_tables = np.array([0, 5, 8]), np.array([5, 3]), np.array([[1], [2]], np.int32)
    return AttentionMetadata(
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
