"""What the engine tells every rank about one step, and what each rank answers.

All ranks receive the same `Step`, in the same order. From it each derives every rank's rows (`parallel/partition.py`),
so planning needs no communication.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from twofold.config import RuntimeConfig
from twofold.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The step's requests, the same on every rank. R requests; every array is [R]."""

    request_ids: tuple[str, ...]
    num_computed_tokens: NDArray[np.int64]
    num_scheduled_tokens: NDArray[np.int64]  # at least 1 each
    samples: NDArray[np.bool_]  # whether the last scheduled token's logits are sampled

    def __len__(self) -> int:
        return len(self.request_ids)


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request scheduled for the first time, or again after a preemption."""

    request_id: str
    token_ids: NDArray[np.int32]  # prompt, then what was generated before a preemption
    num_prompt_tokens: int
    block_ids: list[int]
    sampling_params: SamplingParams
    seed: int  # always set: the user's, or one drawn by the engine


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of all ranks. Applied in the order of the fields."""

    step_id: int
    removed: tuple[str, ...]  # finished, aborted or preempted since the last step: forget them
    new: tuple[NewRequest, ...]
    new_block_ids: dict[str, list[int]]  # continuing request -> blocks appended to its table
    batch: ScheduledBatch


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at N positions. K is the largest number asked for in the step; rows hold K + 1 entries.

    Column 0 is the token that was sampled (or, for a prompt, that stands there); columns 1 to K are the K most likely
    tokens, best first.
    """

    token_ids: NDArray[np.int32]  # [N, K + 1]
    logprobs: NDArray[np.float32]  # [N, K + 1]
    ranks: NDArray[np.int32]  # [N], of column 0 in the whole vocabulary; the most likely token has rank 1


@dataclass(frozen=True, slots=True)
class StepResult:
    """One rank's answer: the tokens that it owns and so sampled. S of them."""

    step_id: int
    rank: int
    request_ids: tuple[str, ...] = ()
    token_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))  # [S]
    logprobs: TokenLogprobs | None = None  # N = S; None where no request of the step asked
    # request -> (position of the first entry's token, log-probabilities of consecutive prompt tokens), one a row
    prompt_logprobs: dict[str, list[tuple[int, TokenLogprobs]]] = field(default_factory=dict)
    num_pairs: int = 0  # (query, key) pairs that this rank attended to in the step
    exchange_bytes: int = 0  # received from other ranks since this one started
    exchange_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RankStart:
    """The first message to a rank."""

    rank: int
    runtime: RuntimeConfig


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank says once its model is loaded."""

    rank: int
    num_blocks: int  # that its memory has room for
    bytes_per_block: int
    vocab_size: int
    num_parameters: int
    seconds: dict[str, float] = field(default_factory=dict)  # start-up phase -> its time


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank's last message when it raised."""

    message: str
    is_model_error: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """Asks a rank to start noting its kernels, or to stop and answer with a `Breakdown`.

    The answer comes before that of a step in flight.
    """

    start: bool


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Milliseconds of one or more steps, as one rank saw them. The kinds overlap where streams do."""

    kinds: dict[str, float]  # projections, attention, exchange, rest: time in which a kernel of the kind ran
    exposed_exchange: float  # time in which nothing else ran, waits for slower ranks included
    busy: float  # time in which any kernel ran
    kernels: list[tuple[str, float, int]]  # the longest: name, total time, launches
