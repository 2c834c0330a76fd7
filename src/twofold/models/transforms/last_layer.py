"""Skip the last layer where its output is unused.

The last layer's output is needed only at sampled positions; its keys and values are needed everywhere. A row samples
after its last token at most. So the last layer runs twice:

    all tokens of my rows [T]      norm, keys, values ──publish──► on their way; stop here
    each row's last token [V]      the whole layer, with attention over everyone's keys ──► hidden states

This saves almost 1/L of a prefill with L layers. Steps with prompt log-probabilities need all hidden states: then the
layer runs once, as its family wrote it. It also runs once in steps of decodes, where each row is its last token.

The first run is ended by an exception when the layer publishes its KV entries. The second run gets the same arguments
with fewer tokens. The token dim of each argument is found once, by running at two lengths: it is the dim that
changes with the length. Shapes in a later step decide nothing, because a constant argument may be as long as the step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from twofold.attention.op import ForwardContext
from twofold.attention.spec import AttentionSpec
from twofold.errors import ModelError
from twofold.models.probe import Recorder, example_ids, largest_change, run
from twofold.models.transforms.base import Transform
from twofold.models.transforms.stand_in import StandIn

PROMPT_LENS = ((5, 3), (4, 3, 4))  # of the two steps that are compared


class StopAfterPublish(Exception):  # noqa: N818  (nothing went wrong)
    """The last layer's KV entries are on their way; the rest of its output is unused for these tokens."""


class LastLayer(StandIn):
    """Stands in for the last decoder layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__(layer)
        self.token_dims: Any = None  # in the structure of (args, kwargs): each tensor's token dim, or None
        self._attention: ForwardContext | Recorder | None = None  # of the forward pass that is cut now

    @contextmanager
    def of_last_tokens(self, attention: ForwardContext | Recorder) -> Iterator[None]:
        """Forward passes return hidden states of each row's last token."""
        self._attention = attention
        try:
            yield
        finally:
            self._attention = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns, of all T tokens or of the last ones of V rows."""
        attention = self._attention
        if attention is None:
            return self.layer(*args, **kwargs)
        sent: list[torch.Tensor] = []  # kept: they travel while the layer runs again

        def publish_and_stop(entries: torch.Tensor) -> None:
            attention.publish(entries)
            sent.append(entries)
            raise StopAfterPublish

        attention.on_publish = publish_and_stop
        with suppress(StopAfterPublish):
            self.layer(*args, **kwargs)
        attention.on_publish = lambda entries: None
        args, kwargs = _select((args, kwargs), self.token_dims, attention.select_last_tokens())
        return self.layer(*args, **kwargs)


def _token_dims(short: Any, long: Any, num_tokens: tuple[int, int]) -> Any:
    """The token dim of each tensor, given the arguments of two steps; None where no dim changed."""
    if isinstance(short, torch.Tensor):
        sizes = list(zip(short.shape, long.shape, strict=True))
        changed = [dim for dim, (before, after) in enumerate(sizes) if before != after]
        if not changed:
            return None
        if len(changed) > 1 or sizes[changed[0]] != num_tokens:
            raise ModelError(f"of {num_tokens} tokens it gets an argument of {tuple(short.shape)}, {tuple(long.shape)}")
        return changed[0]
    if isinstance(short, dict):
        return {name: _token_dims(value, long[name], num_tokens) for name, value in short.items()}
    if isinstance(short, tuple | list):
        return [_token_dims(*pair, num_tokens) for pair in zip(short, long, strict=True)]
    return None


def _select(given: Any, dims: Any, tokens: torch.Tensor) -> Any:
    """The arguments with only these tokens [V], along the token dims `dims`."""
    if isinstance(given, torch.Tensor):
        return given if dims is None else given.index_select(dims, tokens)
    if isinstance(given, dict):
        return {name: _select(value, dims[name], tokens) for name, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(_select(*pair, tokens) for pair in zip(given, dims, strict=True))
    return given


class CutLastLayer(Transform):
    """The last layer's queries, keys and values and the hidden states must be the same, in steps of two lengths."""

    name = "last layer"

    def __init__(
        self, model: PreTrainedModel, layers: torch.nn.ModuleList | None, specs: Sequence[AttentionSpec]
    ) -> None:
        """`layers`: one for each spec; None if they were not found."""
        self.model, self.layers, self.specs = model, layers, specs

    def find(self) -> str | None:
        if self.layers is None:
            return "the list of layers was not found"
        self.last = LastLayer(self.layers[-1])
        given: list[tuple[Any, Any]] = []
        hook = self.last.layer.register_forward_pre_hook(
            lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
        try:
            self._expected = [part for step in self._steps() for part in self._whole(*step)]
        finally:
            hook.remove()
        if len(given) != len(PROMPT_LENS):
            return "it runs more than once in a forward pass"
        (short, long), (few, many) = given, (sum(lens) for lens in PROMPT_LENS)
        self.last.token_dims = _token_dims(short, long, (few, many))
        return None

    def apply(self) -> None:
        assert self.layers is not None
        self.layers[-1] = self.last

    def verify(self) -> float:
        return largest_change([part for step in self._steps() for part in self._cut(*step)], self._expected)

    def undo(self) -> None:
        assert self.layers is not None
        self.layers[-1] = self.last.layer

    def _steps(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Ids [T] and positions [T] of several prompts, and which tokens are their last ones [V]."""
        for lens in PROMPT_LENS:
            ids = example_ids(self.model.base_model, sum(lens))
            positions = torch.cat([torch.arange(length, device=ids.device) for length in lens])
            yield ids, positions, torch.tensor(lens, device=ids.device).cumsum(0) - 1

    def _whole(self, ids: torch.Tensor, positions: torch.Tensor, last_token_idx: torch.Tensor) -> list[torch.Tensor]:
        """The last layer's keys and values of all tokens, queries and hidden states of the last ones."""
        recorder = Recorder(self.specs)
        hidden = run(self.model.base_model, recorder, ids, positions)
        queries, keys, values = recorder.tokens[-3:]
        return [keys, values, queries[last_token_idx], hidden[last_token_idx]]

    def _cut(self, ids: torch.Tensor, positions: torch.Tensor, last_token_idx: torch.Tensor) -> list[torch.Tensor]:
        """The same of a forward pass that is cut."""
        recorder = Recorder(self.specs, last_token_idx)
        with self.last.of_last_tokens(recorder):
            hidden = run(self.model.base_model, recorder, ids, positions)
        queries, keys, values = recorder.tokens[-3:]
        return [keys, values, queries, hidden]
