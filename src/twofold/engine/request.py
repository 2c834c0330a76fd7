"""One request: what a user sent, and how far it has come."""

import sys
import time
from enum import Enum, auto

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twofold.engine.block_pool import hash_blocks
from twofold.engine.masks import NextTokens
from twofold.sampling_params import SamplingParams


class RequestStatus(Enum):
    """Where a request is. It enters as WAITING and leaves by one of the FINISHED ones."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()  # waits again, without blocks; what it computed is computed again
    FINISHED_STOPPED = auto()
    FINISHED_LENGTH = auto()
    FINISHED_ABORTED = auto()
    FINISHED_ERROR = auto()

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "abort" or "error"; None while unfinished."""
        return _FINISH_REASONS.get(self)

    @property
    def finished(self) -> bool:
        return self in _FINISH_REASONS


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}


class Request:
    """One answer to a prompt: its sampling parameters and its state, which the scheduler owns.

    `arrival_time` is in seconds since the epoch, now by default. `max_num_tokens` bounds prompt and output together; it
    follows from `max_tokens`, and the scheduler lowers it to what the model and the cache can hold.
    """

    def __init__(
        self,
        prompt_token_ids: ArrayLike,
        sampling_params: SamplingParams,
        *,
        seed: int,
        eos_token_ids: frozenset[int] = frozenset(),
        arrival_time: float | None = None,
    ) -> None:
        prompt = np.asarray(prompt_token_ids, np.int32)
        self.sampling_params = sampling_params
        self.seed = seed
        self.eos_token_ids = eos_token_ids
        self.arrival_time = time.time() if arrival_time is None else arrival_time
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = len(prompt)  # known ones: prompt and output
        self.max_num_tokens = sys.maxsize
        if sampling_params.max_tokens is not None:
            self.max_num_tokens = self.num_prompt_tokens + sampling_params.max_tokens

        self.number = -1  # given by the scheduler, in order of arrival, and never twice
        self.state_idx = -1  # while it runs, its place among the ranks' request states
        self.status = RequestStatus.WAITING
        self.next_tokens: NextTokens | None = None  # what may come next; None: anything
        self.stop_reason: int | str | None = None  # the stop token or stop string that ended it
        self.num_computed_tokens = 0  # of all steps scheduled, run or not
        self.num_placeholders = 0  # tokens that steps in flight will sample
        self.num_cached_tokens = 0  # found in the prefix cache when first scheduled
        self.num_preemptions = 0
        self.suspect_until = 0  # computed tokens at which a step with it failed; 0: none has, or it is past that point
        self.failed_alone = False  # while it is a suspect: whether a step failed that had no other suspect
        self.block_ids: list[int] = []
        self.num_shared_blocks = 0  # the first of `block_ids`, those offered to the prefix cache or found there
        self.block_hashes: list[bytes] = []

        self._stop_token_ids = frozenset(sampling_params.stop_token_ids or ())
        self._tokens = np.empty(len(prompt) + 64, np.int32)
        self._tokens[: len(prompt)] = prompt

    def __repr__(self) -> str:
        return f"Request({self.number}, {self.status.name}, {self.num_computed_tokens}/{self.num_tokens} tokens)"

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Prompt and output, a read-only view that later tokens do not change. [num_tokens]"""
        return self._view(0, self.num_tokens)

    @property
    def prompt_token_ids(self) -> NDArray[np.int32]:
        """A read-only view. [num_prompt_tokens]"""
        return self._view(0, self.num_prompt_tokens)

    @property
    def output_token_ids(self) -> NDArray[np.int32]:
        """A read-only view that later tokens do not change. [num_output_tokens]"""
        return self._view(self.num_prompt_tokens, self.num_tokens)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what made a step fail."""
        return self.suspect_until > 0

    @property
    def finished(self) -> bool:
        return self.status.finished

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "abort" or "error"; None while unfinished."""
        return self.status.finish_reason

    def append_token(self, token: int) -> RequestStatus | None:
        """Append a sampled token; the status to finish with, or None to go on. The token that ends a request is kept.

        Sets `stop_reason` for a stop token; it stays None for an end-of-sequence token, as in vLLM.
        """
        if self.num_tokens == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty(len(self._tokens) // 2 + 1, np.int32)])
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1
        if self.num_output_tokens >= self.sampling_params.min_tokens:
            if token in self.eos_token_ids and not self.sampling_params.ignore_eos:
                return RequestStatus.FINISHED_STOPPED
            if token in self._stop_token_ids:
                self.stop_reason = token
                return RequestStatus.FINISHED_STOPPED
        return RequestStatus.FINISHED_LENGTH if self.num_tokens >= self.max_num_tokens else None

    def update_block_hashes(self, block_size: int) -> None:
        """Bring `block_hashes` up to every full block of known tokens; only new ones are hashed."""
        start = len(self.block_hashes) * block_size
        if self.num_tokens - start >= block_size:
            parent = self.block_hashes[-1] if self.block_hashes else b""
            self.block_hashes += hash_blocks(self._tokens[start : self.num_tokens], block_size, parent)

    def _view(self, start: int, end: int) -> NDArray[np.int32]:
        view = self._tokens[start:end]
        view.flags.writeable = False
        return view
