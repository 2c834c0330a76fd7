"""Which tokens of which requests are computed in the next step.

Requests run in the order of their arrival. Prompts enter in chunks, in the same steps as the decodes of other
requests. When blocks run out, the latest arrival returns all of its blocks, and starts over when it fits. So no request
overtakes another, with one exception: a request waits if the next block of its prompt is being computed for another
request now, and lets later ones pass. That delays no other request.

A step may be scheduled before the tokens of the one before it are known: its sampled tokens are *placeholders* until
they are appended. Ranks run steps in order, so a block may change hands, or be offered to others, as soon as the step
that writes it is scheduled.

When a step fails, the ranks and their caches are lost, but nothing that users sent or received: `restart` makes every
request wait again, in its place. A rank that somebody killed looks like one that a request killed. So the requests of
the step become a group of suspects, and stay suspects until each is past the point at which it failed. A group runs
together, since most failures are nobody's fault. If its step fails again, the group is halved, and the halves run one
after the other. A suspect is ended when it has failed twice without another suspect:

    step of a b c d fails    [a b c d]      groups of suspects; only the first group may run
    it fails again           [a b] [c d]
    a and b get past it      [c d]          a and b run on, beside c and d
    step of a b c d fails    [a b] [c] [d]  a and b are suspects again, but first failed at this point
    a and b get past it      [c] [d]
    step of a b c fails      [a b] [c] [d]  the first time that c failed without d
    a and b get past it      [c] [d]
    step of a b c fails      [a b] [d]      the second time; c is ended

While there are suspects, no other request enters. So a group of N in which one makes every step fail costs about
3 + log2(N) restarts, and nothing that came later is drawn in.
"""

from bisect import insort
from collections import deque
from collections.abc import Collection
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
    masked: list[Request]  # those of `sampled` whose token is masked; empty once the masks are taken


@dataclass(frozen=True, slots=True)
class FetchLimit:
    """Where ranks keep shares of the KV cache: they have room for so many blocks of other ranks' shares in a step."""

    num_blocks: int  # of all requests of a step, at least those of the longest request
    decodes_too: bool  # whether it holds for steps of decodes; else these fetch nothing


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
        self._requests: dict[int, Request] = {}  # number -> request
        self._running: list[Request] = []  # in order of arrival, as those that wait
        self._waiting: list[Request] = []
        self._free_states = list(range(max_num_seqs - 1, -1, -1))
        self._removed: list[int] = []  # state_idx of requests that the ranks still know
        self._computing: dict[bytes, Request] = {}  # hash of a full block -> running request that will compute it
        self._in_flight: deque[StepInFlight] = deque()
        self._suspects: list[list[Request]] = []  # groups, each in order of arrival; only the first one may run
        self.fetch_limit: FetchLimit | None = None
        self._last_were_decodes = False  # the step scheduled last, where there is a limit
        self._numbers, self._step_ids = count(), count()
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

        Raises RequestError for a prompt that is empty or leaves no room for an output token.
        """
        if not 1 <= request.num_prompt_tokens < self.max_num_tokens:
            raise RequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; it must have 1 to {self.max_num_tokens - 1}, "
                "for max_model_len and the cache to hold one more",
                field="prompt",
            )
        request.number = next(self._numbers)
        request.max_num_tokens = min(request.max_num_tokens, self.max_num_tokens)
        self._requests[request.number] = request
        self._waiting.append(request)
        self.block_pool.refresh(self._find_prefix(request))  # else those before it may take what it will read

    def abort(self, request: Request) -> None:
        """Finish a request as aborted, unless it has finished."""
        if not request.finished:
            self.finish(request, RequestStatus.FINISHED_ABORTED)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request with a FINISHED status, and drop its tokens in flight.

        One that has finished already changes its status only: a stop string outranks a length.
        """
        if self._requests.pop(request.number, None) is not None:
            if request.status is RequestStatus.RUNNING:
                self._running.remove(request)
                self._release(request)
            else:
                self._waiting.remove(request)
        request.status = status

    def schedule(self) -> Step | None:
        """The next step, or None if nothing can run before the next `complete` or `add`.

        Every step must be given to `complete`, in order. The next step tells the ranks about requests that were
        removed while nothing ran.

        With a fetch limit a step has either decodes or longer parts of prompts, in turn where there are both: contexts
        of decodes would be fetched for the sake of a few tokens.
        """
        if self.fetch_limit is None:
            return self._schedule(None, None)
        for decodes in (not self._last_were_decodes, self._last_were_decodes):
            limit = self.fetch_limit.num_blocks if self.fetch_limit.decodes_too or not decodes else None
            if step := self._schedule(decodes, limit):
                self._last_were_decodes = decodes
                return step
        return None

    def _schedule(self, decodes: bool | None, max_num_blocks: int | None) -> Step | None:
        """A step of requests with at most `max_num_blocks` blocks in all, but of one request in any case.

        Of those with one token left to compute, if `decodes`, or of the others; of all if it is None.
        """
        budget, num_blocks = self.max_num_batched_tokens, 0
        scheduled: list[tuple[Request, int]] = []
        new_block_ids: dict[int, list[int]] = {}
        blocked = False

        i = 0
        while i < len(self._running) and budget:  # preempted requests are behind i
            request = self._running[i]
            i += 1
            num_new = min(self._num_ready(request), budget)
            if not num_new or decodes is (self._num_ready(request) > 1):
                continue
            num_blocks += self.block_pool.blocks_needed(request.num_computed_tokens + num_new)
            if max_num_blocks is not None and scheduled and num_blocks > max_num_blocks:
                blocked = True
                break
            blocks = self._extend(request, num_new)
            if blocks is None:  # it keeps its blocks: earlier requests will finish, or preempt it
                blocked = True
                break
            if blocks:
                new_block_ids[request.state_idx] = blocks
            scheduled.append((request, num_new))
            budget -= num_new

        new: list[NewRequest] = []
        for request in [] if blocked or decodes else self._candidates():
            if not budget or len(self._running) == self.max_num_seqs:
                break
            if self._awaits_prefix(request):
                continue
            left = max_num_blocks - num_blocks if max_num_blocks is not None and scheduled else None
            num_new = self._admit(request, budget, left)
            if not num_new:
                break
            num_blocks += len(request.block_ids)
            new.append(
                NewRequest(
                    number=request.number,
                    state_idx=request.state_idx,
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

    def complete(self, step_id: int, sampled: Collection[int]) -> list[Request]:
        """Take the oldest step in flight as answered; the requests that its tokens are for, in the order of the batch.

        `sampled` are the numbers of requests that tokens came for. Tokens of requests that have finished since are not
        wanted; a preempted one keeps its token. Give each token to `append`.

        Raises EngineError, and changes nothing, if the step is not the oldest in flight or a token is missing.
        """
        if not self._in_flight or self._in_flight[0].step_id != step_id:
            oldest = self._in_flight[0].step_id if self._in_flight else "none"
            raise EngineError(f"step {step_id} was answered, but the oldest step in flight is {oldest}")
        step = self._in_flight[0]
        wanted = [request for request in step.sampled if not request.finished]
        missing = [str(request.number) for request in wanted if request.number not in sampled]
        if missing:
            raise EngineError(f"step {step_id} came back without a token for request {', '.join(missing)}")
        self._in_flight.popleft()
        for request, num_computed in zip(step.requests, step.num_computed_tokens, strict=True):
            if num_computed >= request.suspect_until:
                request.suspect_until, request.failed_alone = 0, False
        for request in wanted:
            request.num_placeholders -= 1
        return wanted

    def take_masked(self) -> tuple[int, list[Request]] | None:
        """The oldest step in flight and its masked requests, once; None if it has none.

        All tokens before those of this step are known.
        """
        if not self._in_flight or not self._in_flight[0].masked:
            return None
        step = self._in_flight[0]
        masked, step.masked = step.masked, []
        return step.step_id, masked

    def append(self, request: Request, token: int) -> None:
        """Append a sampled token to its request, which may end with it."""
        status = request.append_token(token)
        self._share_full_blocks(request)
        if status is not None:
            self.finish(request, status)

    def restart(self, block_pool: BlockPool) -> list[Request]:
        """Start over with ranks that know nothing; every request waits again, in its place, for blocks of `block_pool`.

        The steps in flight are dropped, and their requests become suspects. Those that are to blame finish with an
        error, and are returned.
        """
        failed = {  # the last step decides how far
            request: num_computed
            for step in self._in_flight
            for request, num_computed in zip(step.requests, step.num_computed_tokens, strict=True)
            if request.number in self._requests
        }
        self._in_flight.clear()
        self._removed.clear()
        self._computing.clear()
        self._free_states = list(range(self.max_num_seqs - 1, -1, -1))
        self.block_pool = block_pool
        for request in self._running:
            self._rewind(request)
        self._waiting = sorted(self._running + self._waiting, key=_arrival)
        self._running.clear()
        for request in self._waiting:
            request.num_placeholders = 0
        guilty = self._accuse(sorted(failed, key=_arrival))
        for request, num_computed in failed.items():
            request.suspect_until = max(request.suspect_until, num_computed)
        for request in guilty:
            self.finish(request, RequestStatus.FINISHED_ERROR)
        return guilty

    def _accuse(self, failed: list[Request]) -> list[Request]:
        """Group the suspects anew after a step of these requests failed → those to blame: one or none."""
        again = [request for request in failed if request.is_suspect]  # all of one group
        others = [request for request in failed if not request.is_suspect]
        absent = [[request for request in group if request not in again] for group in self._suspects]
        half = len(again) // 2
        self._suspects = [group for group in (others, again[:half], again[half:], *absent) if group]
        if len(again) != 1:
            return []
        alone = again[0]
        guilty = [alone] if alone.failed_alone else []
        alone.failed_alone = True
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
        """Let the latest running request wait again, without blocks."""
        self._running.remove(request)
        self._release(request)
        self._rewind(request)
        insort(self._waiting, request, key=_arrival)
        self.num_preemptions += 1

    def _rewind(self, request: Request) -> None:
        """Forget what the ranks computed for a request."""
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        request.num_computed_tokens = 0
        request.num_shared_blocks = 0
        request.block_ids = []

    def _candidates(self) -> list[Request]:
        """Waiting requests that may enter the next step, in order of arrival: if there are suspects, one group only."""
        in_flight = {request for step in self._in_flight for request in step.requests} if self._suspects else set()
        while self._suspects:
            group = self._suspects[0]  # one that was aborted counts until its last step is answered
            group[:] = [r for r in group if r.is_suspect and (not r.finished or r in in_flight)]
            if group:
                return [request for request in group if request.status is RequestStatus.PREEMPTED]
            del self._suspects[0]
        return self._waiting[: self.max_num_seqs]

    def _awaits_prefix(self, request: Request) -> bool:
        """Whether the first block of a request's prompt that is not cached is being computed for another request."""
        if not self._computing or request.num_placeholders:
            return False
        num_hits = len(self._find_prefix(request))
        num_useful = (request.num_tokens - 1) // self.block_pool.block_size if self._uses_cache(request) else 0
        return num_hits < num_useful and request.block_hashes[num_hits] in self._computing

    def _admit(self, request: Request, budget: int, max_num_blocks: int | None) -> int:
        """Let a waiting request run → how many of its tokens, or 0 if there is no room for it yet.

        There is none either if these tokens and those before them have more than `max_num_blocks` blocks.
        """
        pool = self.block_pool
        if request.num_placeholders or not pool.num_free:
            return 0
        hits = self._find_prefix(request)
        pool.touch(hits)
        num_computed = len(hits) * pool.block_size
        num_new = min(request.num_tokens - num_computed, budget)
        # A preempted request comes back only when all of it fits, to avoid preemption thrashing.
        num_tokens = request.num_tokens if request.num_preemptions else num_computed + num_new
        is_too_long = max_num_blocks is not None and pool.blocks_needed(num_computed + num_new) > max_num_blocks
        if is_too_long or pool.blocks_needed(num_tokens) - len(hits) > pool.num_free:
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
            request.update_block_hashes(pool.block_size)
            self._computing.update((block_hash, request) for block_hash in request.block_hashes[len(hits) :])
        request.status = RequestStatus.RUNNING
        request.state_idx = self._free_states.pop()
        self._waiting.remove(request)
        insort(self._running, request, key=_arrival)
        return num_new

    def _find_prefix(self, request: Request) -> list[int]:
        """Cached blocks to start from. At least one token is left, all of them if prompt_logprobs is set."""
        if not self._uses_cache(request):
            return []
        block_size = self.block_pool.block_size
        request.update_block_hashes(block_size)
        return self.block_pool.find_prefix(request.block_hashes[: (request.num_tokens - 1) // block_size])

    def _uses_cache(self, request: Request) -> bool:
        return self.block_pool.enable_prefix_caching and request.sampling_params.prompt_logprobs is None

    def _step(
        self, scheduled: list[tuple[Request, int]], new: list[NewRequest], new_block_ids: dict[int, list[int]]
    ) -> Step:
        """Count the tokens of a step as computed, and put it in flight."""
        scheduled.sort(key=lambda entry: _arrival(entry[0]))
        requests = [request for request, _ in scheduled]
        num_computed = np.array([request.num_computed_tokens for request in requests], np.int64)
        num_scheduled = np.array([num_new for _, num_new in scheduled], np.int64)
        num_tokens = np.array([request.num_tokens + request.num_placeholders for request in requests], np.int64)
        samples = num_computed + num_scheduled == num_tokens
        num_asked = [r.num_prompt_tokens if r.sampling_params.prompt_logprobs is not None else 0 for r in requests]
        step = Step(
            step_id=next(self._step_ids),
            removed=tuple(self._removed),
            new=tuple(new),
            new_block_ids=new_block_ids,
            batch=ScheduledBatch(
                numbers=np.array([request.number for request in requests], np.int64),
                state_idx=np.array([request.state_idx for request in requests], np.int64),
                num_computed_tokens=num_computed,
                num_scheduled_tokens=num_scheduled,
                num_sampled_tokens=samples.astype(np.int64),
                prompt_logprobs=num_computed + 1 < np.array(num_asked, np.int64),
            ),
            masked=tuple(i for i in np.flatnonzero(samples).tolist() if requests[i].next_tokens is not None),
        )
        self._removed.clear()
        # Blocks are offered to others from the next step on: within one step no row may rely on another's writes.
        for (request, num_new), does_sample in zip(scheduled, samples.tolist(), strict=True):
            request.num_computed_tokens += num_new
            request.num_placeholders += does_sample
            self._share_full_blocks(request)
        sampled = [request for request, does_sample in zip(requests, samples, strict=True) if does_sample]
        ends = (num_computed + num_scheduled).tolist()
        masked = [requests[i] for i in step.masked]
        self._in_flight.append(StepInFlight(step.step_id, requests, ends, sampled, masked))
        return step

    def _share_full_blocks(self, request: Request) -> None:
        """Offer to the prefix cache each full block of known tokens that is computed, or scheduled to be."""
        pool = self.block_pool
        num_full = min(request.num_computed_tokens, request.num_tokens) // pool.block_size
        if not pool.enable_prefix_caching or num_full <= request.num_shared_blocks:
            return
        request.update_block_hashes(pool.block_size)
        for i in range(request.num_shared_blocks, num_full):
            pool.cache_block(request.block_ids[i], request.block_hashes[i])
            self._computes_no_more(request, request.block_hashes[i])
        request.num_shared_blocks = num_full

    def _computes_no_more(self, request: Request, block_hash: bytes) -> None:
        if self._computing.get(block_hash) is request:
            del self._computing[block_hash]

    def _release(self, request: Request) -> None:
        """Take a running request's blocks and state. The next step tells the ranks."""
        for block_hash in request.block_hashes[request.num_shared_blocks :]:
            self._computes_no_more(request, block_hash)
        self.block_pool.free(request.block_ids)
        request.block_ids = []
        self._removed.append(request.state_idx)
        self._free_states.append(request.state_idx)


def _arrival(request: Request) -> int:
    return request.number
