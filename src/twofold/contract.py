"""All that crosses between the engine and its ranks. Nothing else does, and it never leaves the machine.

    engine ──► every rank                      each rank ──► engine
    RankStart                                  RankReport
    Allocate                                   Allocated
    Step, Step, ...  (a second one may follow  StepResult, StepResult, ...  (in the order of steps)
                      before the first answer)
    Masks            (of a Step that has
                      masked requests)
    Profile                                    Profiled
                                               Failure, in place of any of these: its last message

All ranks receive the same messages in the same order. From a `Step` each rank derives the plan of all ranks
(`parallel/plan.py`), so planning needs no communication.

Requests are known here by a number, which is never used twice, and by the place at which every rank keeps their state.
Ids that users choose stay in the engine.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twofold.config import RuntimeConfig
from twofold.sampling_params import SamplingParams

# --- Steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The requests of a step, the same on every rank. R requests; every array is [R]."""

    numbers: NDArray[np.int64]
    state_idx: NDArray[np.int64]  # request -> its place among the ranks' request states
    num_computed_tokens: NDArray[np.int64]
    num_scheduled_tokens: NDArray[np.int64]  # at least 1 each
    num_sampled_tokens: NDArray[np.int64]  # the last scheduled tokens after which a token is sampled; 0 or 1 today
    prompt_logprobs: NDArray[np.bool_]  # whether log-probabilities of prompt tokens are made in this step

    @classmethod
    def of(cls, num_computed_tokens: ArrayLike, num_scheduled_tokens: ArrayLike) -> Self:
        """Requests 0, 1, ...; each gets a token. For callers without a scheduler: start-up, `explain`, tests."""
        computed, scheduled = np.array(num_computed_tokens, np.int64), np.array(num_scheduled_tokens, np.int64)
        numbers = np.arange(len(scheduled))
        return cls(numbers, numbers, computed, scheduled, np.ones_like(numbers), np.zeros(len(numbers), bool))

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request that is scheduled for the first time, or again after a preemption."""

    number: int
    state_idx: int
    token_ids: NDArray[np.int32]  # prompt, then what was generated before a preemption
    num_prompt_tokens: int
    block_ids: list[int]
    sampling_params: SamplingParams
    seed: int  # always set: the user's, or one drawn by the engine


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of all ranks. Applied in the order of the fields."""

    step_id: int
    removed: tuple[int, ...]  # state_idx of requests that ended or were preempted since the last step: forget them
    new: tuple[NewRequest, ...]
    new_block_ids: dict[int, list[int]]  # state_idx of a continuing request -> blocks appended to its table
    batch: ScheduledBatch
    by_heads: bool = False  # the layout: by heads, or by tokens
    masked: tuple[int, ...] = ()  # index in the batch of requests whose next token is masked; `Masks` follow


@dataclass(frozen=True, slots=True)
class Masks:
    """Which tokens the masked requests of a step may get. Comes while the ranks compute the step, before the next one.

    Token i is bit i % 32 of word i // 32.
    """

    step_id: int
    words: NDArray[np.int32]  # [M, W]; W * 32 tokens or more


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at N positions. K is the largest number asked for in the step; rows hold K + 1 entries.

    Column 0 is the token that was sampled (or, for a prompt, that stands there). Columns 1 to K are the K most likely
    tokens, best first.
    """

    token_ids: NDArray[np.int32]  # [N, K + 1]
    logprobs: NDArray[np.float32]  # [N, K + 1]
    ranks: NDArray[np.int32]  # [N], of column 0 in the whole vocabulary; the most likely token has rank 1


@dataclass(frozen=True, slots=True)
class PromptTokenLogprobs:
    """Log-probabilities of consecutive prompt tokens of one request, the first at `position`."""

    number: int
    position: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class StepResult:
    """One rank's answer: the tokens that it owns and so sampled, S of them. A request may have several, in order."""

    step_id: int
    rank: int
    numbers: NDArray[np.int64]  # [S] sampled token -> number of its request
    token_ids: NDArray[np.int32]  # [S]
    logprobs: TokenLogprobs | None = None  # N = S; None where no request of the step asked
    prompt_logprobs: tuple[PromptTokenLogprobs, ...] = ()
    num_pairs: int = 0  # (query, key) pairs that this rank attended to in the step
    exchange_bytes: int = 0  # received from other ranks in the step
    node_bytes: int = 0  # those of them that came from other nodes
    exchange_seconds: float = 0.0


# --- A rank's start and end ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """Descriptors of files in memory, of the same files on every rank of a node.

    They have no name and end with the ranks.
    """

    store: int  # in which the collectives find each other, if there is no `StoreAddress`
    weights: int  # CPU only
    entries: int  # KV entries that travel; CPU only
    sums: int  # partial results that are added up; CPU only
    cache: int  # KV entries of all ranks, where each keeps a share; CPU only


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the collectives of several machines find each other: a `TCPStore`.

    Which network interface leads there, the executor says in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME.
    """

    host: str
    port: int
    listener: int | None = None  # of the rank that serves it: a descriptor of the port, which is open already


@dataclass(frozen=True, slots=True)
class RankStart:
    """The first message to a rank."""

    rank: int
    runtime: RuntimeConfig
    files: SharedFiles
    store: StoreAddress | None = None  # None: ranks of one machine, which have a file


@dataclass(frozen=True, slots=True)
class ShardedRoom:
    """What a rank would have room for if it kept a share of the cache. Blocks are those of all ranks together."""

    num_blocks: int
    max_cache_bytes: int  # that there is room for, beside the workspaces
    bytes_per_block: int  # of this rank
    workspace_bytes: int  # of memory for what steps fetch from other ranks
    max_fetch_blocks: int  # of all requests in a step that fetches
    decodes_fetch_by_tokens: bool  # whether steps of decodes do, in either layout
    decodes_fetch_by_heads: bool


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank says once its model is loaded and its memory is measured."""

    rank: int
    num_blocks: int  # of the cache that it would make
    max_cache_bytes: int  # that there is room for
    bytes_per_block: int
    vocab_size: int
    num_parameters: int
    weight_bytes: int  # that this rank keeps; those that it fetches from other ranks not included
    sharded: ShardedRoom | None = None  # None where ranks cannot read each other's memory
    only_by_tokens: str | None = None  # why no step can run by heads; None if steps can
    seconds: dict[str, float] = field(default_factory=dict)  # start-up phase -> its time
    memory_bytes: int | None = None  # of the machine, once it takes steps; of what processes share, its part


@dataclass(frozen=True, slots=True)
class Allocate:
    """Asks for the KV cache, the same on every rank."""

    num_blocks: int
    is_sharded: bool  # whether each rank has a share of them; else each has all
    times_layouts: bool  # whether costs of steps are wanted


@dataclass(frozen=True, slots=True)
class Allocated:
    """The answer to `Allocate`: from now on the rank takes steps."""

    seconds: dict[str, float]  # start-up phase -> its time
    step_costs: str | None = None  # JSON of `StepCosts`, the same from every rank, if they were wanted
    memory_bytes: int | None = None  # as in `RankReport`; None where the system does not tell


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank's last message when it raised."""

    message: str
    is_model_error: bool
    field: str | None = None  # the engine argument that it is about


# --- Profiles --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Profile:
    """Asks a rank to start timing its kernels, or to stop. The answer may come before that of a step in flight."""

    start: bool


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Milliseconds of one or more steps, as one rank saw them. The kinds overlap where streams do."""

    kinds: dict[str, float]  # projections, attention, exchange, rest: time in which a kernel of the kind ran
    exposed_exchange: float  # time in which nothing else ran, waits for slower ranks included
    busy: float  # time in which any kernel ran
    kernels: list[tuple[str, float, int]]  # the longest: name, total time, launches


@dataclass(frozen=True, slots=True)
class Profiled:
    """The answer to `Profile`."""

    breakdown: Breakdown | None  # None where it was asked to start


RankMessage = RankStart | Allocate | Step | Masks | Profile
