"""Outputs of a request, with vLLM's names."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token by the model's raw logits, and its rank in the vocabulary, from 1.

    In float32 it differs by about 3e-5 at most between batches, numbers of ranks, and before and after a recovery.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob]]  # for each generated token: token id -> Logprob, the generated token first
PromptLogprobs = list[dict[int, Logprob] | None]  # for each prompt token; None for the first


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds since the epoch, None until they are known, and its numbers of tokens."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_output_tokens: int = 0  # of all answers, when they are finished

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from the arrival of the request."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def e2e(self) -> float | None:
        """End-to-end latency: seconds from the arrival of the request to its end."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` answers to a request. `stop_reason` is the stop string or stop token id that ended it, if any."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and its answers: all of them so far, or what is new of them (see RequestOutputKind)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache


@dataclass(slots=True)
class BeamSearchSequence:
    """One answer of a beam search."""

    tokens: list[int]  # of prompt and answer
    cum_logprob: float  # of the answer
    text: str | None = None  # of prompt and answer, without special tokens
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The answers to a prompt, the best one first."""

    sequences: list[BeamSearchSequence]
