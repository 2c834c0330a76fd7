"""Which tokens of which requests are computed in the next step.

Requests run in the order of their arrival. Prompts enter in chunks, beside the decodes of the others, and leave the
rest of a step's tokens to those behind them. When blocks run out, the latest arrival gives all of its own back and
starts over when it fits; so `running`, then `waiting`, is always in order of arrival, and nobody is overtaken.

A step may be scheduled before the tokens of the one before it are known: its sampled tokens are *placeholders* until
`update`. Ranks run steps in order, so a block may change hands, or be offered to others, as soon as the step that
writes it is scheduled.

When a step fails, the ranks and their caches are lost, but nothing that users sent or got: `restart` makes every
request wait again, in its place. Those that were in the step are suspects until they are past the point at which it
failed, and no step has two of them. So a suspect whose step fails again has brought the ranks down twice, and of no
other can that be said.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np

from twofold.contract import NewRequest, ScheduledBatch, Step
from twofold.engine.block_pool import BlockPool
from twofold.engine.request import Request, RequestStatus
from twofold.errors import EngineError, RequestError


@dataclass(slots=True)
class StepInFlight:
    """A step that was scheduled and not yet answered."""

    step_id: int
    requests: list[Request]
    num_computed_tokens: list[int]  # of each of them, with this step
    sampled: list[Request]  # those of `requests` that get a token


class Scheduler:
    """Continuous batching with chunked prefill, prefix caching, and preemption by recomputation.

    A step has at most `max_num_batched_tokens` tokens, of at most `max_num_seqs` running requests. A request ends,
    prompt and output together, at `max_model_len` tokens, or where it alone has filled `block_pool`.
    """

    def __init__(
        self, block_pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        self.block_pool = block_pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        # The last token of a request is never computed, so it needs no slot.
        self.max_num_tokens = min(max_model_len, block_pool.capacity_tokens + 1)
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._removed: list[str] = []  # ranks know them still
        self._in_flight: deque[StepInFlight] = deque()
        self._step_ids = count()
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens looked up in the prefix cache
        self.num_prefix_hits = 0  # and found there

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def is_idle(self) -> bool:
        """Whether no request, no step in flight and no referenced block is left."""
        return not self._requests and not self._in_flight and self.block_pool.is_idle()

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._in_flight)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def prefilling(self) -> list[Request]:
        """Running requests that have no token of their answer yet."""
        return [request for request in self._running if not request.num_output_tokens]

    def add(self, request: Request) -> None:
        """Queue a new request behind all others.

        Raises RequestError for an id in use, and for a prompt that is empty or leaves no room for an output token.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another", field="request_id")
        if not 1 <= request.num_prompt_tokens < self.max_num_tokens:
            raise RequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; it must have 1 to {self.max_num_tokens - 1}, "
                "for max_model_len and the cache to hold one more",
                field="prompt",
            )
        request.max_num_tokens = min(request.max_num_tokens, self.max_num_tokens)
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """Finish a request as aborted; None if there is no such request, or it has finished."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, RequestStatus.FINISHED_ABORTED)
        return request

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request with a FINISHED status, and drop its tokens in flight.

        One that has finished already changes its status only: a stop string outranks a length.
        """
        if self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
            if request.status is RequestStatus.RUNNING:
                self._running.remove(request)
                self._release(request)
            else:
                self._waiting.remove(request)
        request.status = status

    def schedule(self) -> Step | None:
        """The next step, or None if nothing can run before the next `update` or `add`.

        Every step must be given to `update`, in order. Ranks learn of requests removed while nothing runs with the next
        step.
        """
        budget = self.max_num_batched_tokens
        scheduled: list[tuple[Request, int]] = []
        new_block_ids: dict[str, list[int]] = {}
        blocked = False

        i = 0
        while i < len(self._running) and budget:  # whoever is preempted is behind i
            request = self._running[i]
            i += 1
            num_new = min(self._num_ready(request), budget)
            if not num_new:
                continue
            blocks = self._extend(request, num_new)
            if blocks is None:  # it keeps what it has: those before it will finish, or take it
                blocked = True
                break
            if blocks:
                new_block_ids[request.request_id] = blocks
            scheduled.append((request, num_new))
            budget -= num_new

        new: list[NewRequest] = []
        while budget and self._waiting and len(self._running) < self.max_num_seqs and not blocked:
            request = self._waiting[0]
            if request.is_suspect and any(other.is_suspect for other in self._running):
                break
            num_new = self._admit(request, budget)
            if not num_new:
                break
            new.append(
                NewRequest(
                    request_id=request.request_id,
                    token_ids=request.token_ids,
                    num_prompt_tokens=request.num_prompt_tokens,
                    block_ids=request.block_ids.copy(),
                    sampling_params=request.sampling_params,
                    seed=request.seed,
                )
            )
            scheduled.append((request, num_new))
            budget -= num_new

        return self._step(scheduled, new, new_block_ids) if scheduled else None

    def update(self, step_id: int, tokens: Mapping[str, int]) -> list[tuple[Request, int]]:
        """Take the sampled tokens of the oldest step in flight, by request id; finish requests that they end.

        Returns the requests that got a token, and the token. Tokens of requests that have finished since are dropped; a
        preempted one keeps its token. Raises EngineError, and changes nothing, if the step is not the oldest in flight
        or a token is missing.
        """
        if not self._in_flight or self._in_flight[0].step_id != step_id:
            oldest = self._in_flight[0].step_id if self._in_flight else "none"
            raise EngineError(f"step {step_id} was answered, but the oldest step in flight is {oldest}")
        step = self._in_flight[0]
        sampled = [request for request in step.sampled if not request.finished]
        missing = [request.request_id for request in sampled if request.request_id not in tokens]
        if missing:
            raise EngineError(f"step {step_id} came back without a token for {', '.join(missing)}")
        self._in_flight.popleft()
        for request, num_computed in zip(step.requests, step.num_computed_tokens, strict=True):
            if num_computed >= request.suspect_until:
                request.suspect_until = 0

        accepted = []
        for request in sampled:
            token = int(tokens[request.request_id])
            status = request.append_token(token)
            request.num_placeholders -= 1
            self._share_full_blocks(request)
            if status is not None:
                self.finish(request, status)
            accepted.append((request, token))
        return accepted

    def restart(self, block_pool: BlockPool) -> list[Request]:
        """Start over with ranks that know nothing; every request waits again, in its place, for blocks of `block_pool`.

        The steps in flight are dropped. Of their requests those that were suspects already finish with an error, and
        are returned; the others become suspects.
        """
        failed = {  # the last step decides where
            request.request_id: (request, num_computed)
            for step in self._in_flight
            for request, num_computed in zip(step.requests, step.num_computed_tokens, strict=True)
            if self._requests.get(request.request_id) is request
        }
        self._in_flight.clear()
        self._removed.clear()
        self.block_pool = block_pool
        for request in self._running:
            self._rewind(request)
        self._waiting.extendleft(reversed(self._running))
        self._running.clear()
        for request in self._waiting:
            request.num_placeholders = 0
        guilty = [request for request, _ in failed.values() if request.is_suspect]
        for request, num_computed in failed.values():
            request.suspect_until = num_computed
        for request in guilty:
            self.finish(request, RequestStatus.FINISHED_ERROR)
        return guilty

    def _num_ready(self, request: Request) -> int:
        """Tokens of a running request that could be computed now; the last one may be a placeholder."""
        num_tokens = request.num_tokens + request.num_placeholders
        if request.num_placeholders and num_tokens >= request.max_num_tokens:  # the placeholder is its last token
            return 0
        return num_tokens - request.num_computed_tokens

    def _extend(self, request: Request, num_new: int) -> list[int] | None:
        """Blocks for a running request's next tokens, taken from later arrivals if need be; None if still too few."""
        num_tokens = request.num_computed_tokens + num_new
        needed = self.block_pool.blocks_needed(num_tokens) - len(request.block_ids)
        while (blocks := self.block_pool.allocate(needed)) is None:
            latest = self._running[-1]
            if latest is request:
                return None
            self._preempt(latest)
        request.block_ids += blocks
        return blocks

    def _preempt(self, request: Request) -> None:
        """Put the latest running request in front of all waiting ones, without blocks."""
        self._running.remove(request)
        self._release(request)
        self._rewind(request)
        self._waiting.appendleft(request)
        self.num_preemptions += 1

    def _rewind(self, request: Request) -> None:
        """Whatever the ranks have of a request is of no use any more."""
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        request.num_computed_tokens = 0
        request.num_shared_blocks = 0
        request.block_ids = []

    def _admit(self, request: Request, budget: int) -> int:
        """Let the first waiting request run; how many of its tokens, or 0 if there is no room for it yet."""
        pool = self.block_pool
        if request.num_placeholders or not pool.num_free:
            return 0
        hits = self._find_prefix(request)
        pool.touch(hits)
        num_computed = len(hits) * pool.block_size
        num_new = min(request.num_tokens - num_computed, budget)
        # One that was preempted comes back when all of it fits, lest those before it preempt it over and over.
        num_tokens = request.num_tokens if request.num_preemptions else num_computed + num_new
        if pool.blocks_needed(num_tokens) - len(hits) > pool.num_free:
            pool.free(hits)
            return 0
        blocks = pool.allocate(pool.blocks_needed(num_computed + num_new) - len(hits))
        assert blocks is not None
        if not request.num_preemptions:
            request.num_cached_tokens = num_computed
        request.block_ids = hits + blocks
        request.num_shared_blocks = len(hits)
        request.num_computed_tokens = num_computed
        if pool.enable_prefix_caching:
            self.num_prefix_queries += request.num_tokens
            self.num_prefix_hits += num_computed
        request.status = RequestStatus.RUNNING
        self._running.append(self._waiting.popleft())
        return num_new

    def _find_prefix(self, request: Request) -> list[int]:
        """Cached blocks to start from. One token at least is left to run; prompt log-probabilities need all of them."""
        if not self.block_pool.enable_prefix_caching or request.sampling_params.prompt_logprobs is not None:
            return []
        block_size = self.block_pool.block_size
        request.update_block_hashes(block_size)
        return self.block_pool.find_prefix(request.block_hashes[: (request.num_tokens - 1) // block_size])

    def _step(
        self, scheduled: list[tuple[Request, int]], new: list[NewRequest], new_block_ids: dict[str, list[int]]
    ) -> Step:
        """Count the tokens of a step as computed, and put it in flight."""
        requests = [request for request, _ in scheduled]
        num_computed = np.array([request.num_computed_tokens for request in requests], np.int64)
        num_scheduled = np.array([num_new for _, num_new in scheduled], np.int64)
        num_tokens = np.array([request.num_tokens + request.num_placeholders for request in requests], np.int64)
        samples = num_computed + num_scheduled == num_tokens
        step = Step(
            step_id=next(self._step_ids),
            removed=tuple(self._removed),
            new=tuple(new),
            new_block_ids=new_block_ids,
            batch=ScheduledBatch(
                request_ids=tuple(request.request_id for request in requests),
                num_computed_tokens=num_computed,
                num_scheduled_tokens=num_scheduled,
                samples=samples,
            ),
        )
        self._removed.clear()
        # Blocks are offered to others from the next step on: within one step no row may rely on another's writes.
        for (request, num_new), does_sample in zip(scheduled, samples.tolist(), strict=True):
            request.num_computed_tokens += num_new
            request.num_placeholders += does_sample
            self._share_full_blocks(request)
        sampled = [request for request, does_sample in zip(requests, samples, strict=True) if does_sample]
        ends = (num_computed + num_scheduled).tolist()
        self._in_flight.append(StepInFlight(step.step_id, requests, ends, sampled))
        return step

    def _share_full_blocks(self, request: Request) -> None:
        """Offer the prefix cache each full block of known tokens whose computation is scheduled."""
        pool = self.block_pool
        num_full = min(request.num_computed_tokens, request.num_tokens) // pool.block_size
        if not pool.enable_prefix_caching or num_full <= request.num_shared_blocks:
            return
        request.update_block_hashes(pool.block_size)
        for i in range(request.num_shared_blocks, num_full):
            pool.cache_block(request.block_ids[i], request.block_hashes[i])
        request.num_shared_blocks = num_full

    def _release(self, request: Request) -> None:
        self.block_pool.free(request.block_ids)
        request.block_ids = []
        self._removed.append(request.request_id)
