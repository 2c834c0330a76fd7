"""What the engine hands back for a request, under vLLM's names."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


class OutputKind(Enum):
    """Which outputs a request gives while it runs."""

    CUMULATIVE = auto()  # after each of its steps, all tokens so far
    DELTA = auto()  # after each of its steps, what is new since the last output
    FINAL_ONLY = auto()  # one, when it ends


@dataclass(slots=True)
class Logprob:
    """A token's log-probability under the model's raw logits, and its rank among all tokens (the most likely: 1)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob]]  # per generated token: token id -> Logprob, the generated one first
PromptLogprobs = list[dict[int, Logprob] | None]  # per prompt token; None for the first, which nothing precedes


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds since the epoch; None is not yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from arrival to the first generated token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def e2e(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` answers. `stop_reason` is the stop string or stop token id that ended it, if one did."""

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
    """A request's state: all answers so far, and when `finished` the final ones."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
