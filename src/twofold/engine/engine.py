"""The step loop: schedule, submit, collect. The engine starts the ranks and keeps all that users sent.

So no request is lost with the ranks: `recover` starts new ones, and every request continues from its tokens so far.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from twofold.config import RuntimeConfig
from twofold.contract import Breakdown, Masks, RankReport, ScheduledBatch, ShardedRoom, StepResult
from twofold.engine.block_pool import BlockPool
from twofold.engine.masks import MaskMaker, NextTokens
from twofold.engine.output_processor import OutputProcessor
from twofold.engine.prompts import Prompt, PromptReader
from twofold.engine.request import Request, RequestStatus
from twofold.engine.scheduler import FetchLimit, Scheduler
from twofold.engine.stats import EngineSnapshot, EngineStats, Progress
from twofold.engine.watchdog import Watchdog
from twofold.errors import ConfigError, EngineError, RequestError, TwofoldError, UnavailableError
from twofold.executor.base import Executor, MakeExecutor, Waits
from twofold.interrupts import held_back
from twofold.outputs import RequestOutput
from twofold.parallel.costs import StepCosts
from twofold.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0)  # seconds before each try to start new ranks
START_SLACK = 10.0  # new ranks may take this much longer to load the model than the first ones

logger = logging.getLogger(__name__)


class LLMEngine:
    """Takes requests at any time; each `step` moves all of them on and returns those that changed.

    Not for several threads at once.

    Raises:
        ConfigError: the cache has no room for one request of max_model_len tokens.
    """

    def __init__(
        self,
        runtime: RuntimeConfig,
        tokenizer: "PreTrainedTokenizerBase | None",
        make_executor: MakeExecutor,
        waits: Waits | None = None,
    ) -> None:
        """`waits`: where `make_executor` says what it waits for."""
        self.runtime, self.tokenizer = runtime, tokenizer
        self.waits = waits or Waits()
        self._make_executor: MakeExecutor | None = make_executor
        costs = runtime.engine.step_costs  # measured by the first ranks where they are not given; kept for later ones
        self.step_costs = None if costs is None else StepCosts.from_json(costs)
        self.runs_by_heads: Callable[[ScheduledBatch], bool] = partial(_always, False)  # a step's layout
        start = time.monotonic()
        executor = make_executor(None)
        seconds = time.monotonic() - start - self.waits.seconds
        self._start_timeout = runtime.engine.step_timeout + START_SLACK * seconds
        self.watchdog = Watchdog(runtime.engine.step_timeout, runtime.device, executor.reports[0].num_parameters)
        self.block_pool = self._open(executor)
        self.vocab_size = executor.reports[0].vocab_size
        self.max_steps_in_flight = 1 if runtime.device == "cpu" else 2
        self.scheduler = Scheduler(
            self.block_pool, runtime.engine.max_num_seqs, runtime.max_num_batched_tokens, runtime.max_model_len
        )
        self.scheduler.fetch_limit = self._fetch_limit() if self.is_sharded else None
        self.prompts = PromptReader(tokenizer, self.vocab_size, self.scheduler.max_num_tokens, runtime.max_model_len)
        self.masks = MaskMaker(tokenizer, self.vocab_size, runtime.eos_token_ids)
        self.outputs = OutputProcessor(tokenizer)
        self.stats = EngineStats()
        self._in_flight: deque[tuple[ScheduledBatch, float | None]] = deque()  # and when the step could begin, if known
        self._undelivered: list[RequestOutput] = []  # of a step at whose end an interrupt came
        self._num_seeds = 0

    def _open(self, executor: Executor) -> BlockPool:
        """Has new ranks allocate their caches → the pool of their blocks."""
        if executor.runtime.num_ranks != self.runtime.num_ranks and self.runtime.engine.step_costs is None:
            self.step_costs = None  # of other ranks
        self.executor, self.runtime = executor, executor.runtime
        try:
            self.is_sharded, num_blocks = self._choose_holding(self.runtime)
            self.holdings = _holdings(self.runtime, executor.reports, self.is_sharded, num_blocks)  # for people
            logger.info("%s", self.holdings)
            self._choose_layouts(num_blocks)
            sizes = [report.memory_bytes for report in executor.reports if report.memory_bytes is not None]
            if sizes:
                logger.info("ranks take %.2f GB of this machine's memory now, caches are empty", sum(sizes) / 1e9)
        except BaseException:
            executor.shutdown()
            raise
        return self._make_pool(num_blocks)

    def _choose_layouts(self, num_blocks: int) -> None:
        layout, only_by_tokens = self.runtime.engine.step_layout, self.executor.reports[0].only_by_tokens
        is_auto = layout == "auto" and only_by_tokens is None
        measured = self.executor.allocate(num_blocks, self.is_sharded, is_auto and self.step_costs is None)
        if measured is not None:
            self.step_costs = StepCosts.from_json(measured)
            logger.info("costs of steps: %s", measured)
        if is_auto and self.step_costs is not None:
            self.runs_by_heads = self.step_costs.by_heads
        elif only_by_tokens is None:
            self.runs_by_heads = partial(_always, layout == "heads")
        elif self.runtime.num_ranks > 1 and layout != "tokens":
            logger.info("all steps run by tokens: %s", only_by_tokens)
        room = self.executor.reports[0].sharded
        self._decodes_fetch = False  # all of their contexts
        if self.is_sharded and room is not None:
            by_tokens, by_heads = room.decodes_fetch_by_tokens, room.decodes_fetch_by_heads
            if is_auto and (by_tokens or by_heads):  # costs do not tell what is fetched
                self.runs_by_heads = partial(_sharded, self.runs_by_heads, not by_heads)
            in_layout = {"tokens": by_tokens, "heads": by_heads, "auto": by_tokens and by_heads}
            self._decodes_fetch = in_layout[layout if only_by_tokens is None else "tokens"]

    def in_each_layout(self) -> Iterator[str]:
        """First "auto", then each layout's name while steps run in that one, if steps can. For benchmarks."""
        chosen, can_choose = self.runs_by_heads, self.step_costs is not None and not self.is_sharded
        yield self.runtime.engine.step_layout
        try:
            for name in ("tokens", "heads") if can_choose else ():
                self.runs_by_heads = partial(_always, name == "heads")
                yield name
        finally:
            self.runs_by_heads = chosen

    def _fetch_limit(self) -> FetchLimit:
        room = self.executor.reports[0].sharded
        assert room is not None
        return FetchLimit(room.max_fetch_blocks, self._decodes_fetch)

    def _make_pool(self, num_blocks: int) -> BlockPool:
        return BlockPool(num_blocks, self.runtime.block_size, self.runtime.engine.enable_prefix_caching)

    def _choose_holding(self, runtime: RuntimeConfig) -> tuple[bool, int]:
        """Whether each rank keeps a share of the cache, and its number of blocks, over all ranks."""
        reports, num_ranks = self.executor.reports, runtime.num_ranks
        rooms = [report.sharded for report in reports if report.sharded is not None]
        if runtime.kv_cache == "sharded" and len(rooms) < num_ranks:
            raise ConfigError(
                "kv_cache='sharded' needs ranks that read each other's memory: not these GPUs, nor ranks on several "
                "machines; use kv_cache='replicated'",
                field="kv_cache",
            )
        # A request's last token is never computed; one block is the null block.
        needed = -(-(runtime.max_model_len - 1) // runtime.block_size) + 1
        fits = min(report.num_blocks for report in reports) >= needed
        if runtime.kv_cache == "replicated" or len(rooms) < num_ranks or (runtime.kv_cache == "auto" and fits):
            return False, self._num_blocks(runtime, needed, reports)
        return True, self._num_blocks(runtime, needed, rooms)

    def _num_blocks(self, runtime: RuntimeConfig, needed: int, rooms: Sequence[RankReport | ShardedRoom]) -> int:
        """What the rank with the least memory has room for; `needed` are those of one request."""
        wanted = runtime.engine.kv_cache_memory_bytes
        room = min(room.max_cache_bytes for room in rooms)
        if wanted is not None and wanted > room:
            raise ConfigError(
                f"kv_cache_memory_bytes={wanted} is more than the {room} bytes that a rank has room for; lower it, or "
                "leave it out to use what there is",
                field="kv_cache_memory_bytes",
            )
        report = min(rooms, key=lambda report: report.num_blocks)
        spare = 2 * runtime.num_ranks + 1 if isinstance(report, ShardedRoom) else 0  # null blocks, and what is rounded
        if report.num_blocks < needed:
            held = max(report.num_blocks - 1, 0) * runtime.block_size
            enough = (needed + spare) * report.bytes_per_block
            raise ConfigError(
                f"the cache holds {held} tokens, fewer than max_model_len={runtime.max_model_len}; lower "
                f"max_model_len, or raise kv_cache_memory_bytes to at least {enough}",
                field="max_model_len",
            )
        return report.num_blocks

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        output_kind: RequestOutputKind | None = None,
    ) -> None:
        """Queues a prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.

        Args:
            output_kind: in place of the one in `params`.

        Raises:
            RequestError: the prompt or its parameters cannot be served; nothing else is touched.
        """
        params = self.checked(params)
        text, token_ids = self.tokenize(prompt, params.truncate_prompt_tokens)
        restriction = self.masks.compile(params)
        if request_id in self.outputs.user_requests:
            raise RequestError(f"request id {request_id!r} is in use; choose another", field="request_id")
        requests = []
        for index in range(params.n):
            seed = self._draw_seed() if params.seed is None else params.seed + index
            # The first answer computes the prompt. The others find it in the cache; prompt_logprobs would prevent that.
            own = params if index == 0 else replace(params, prompt_logprobs=None)
            request = Request(token_ids, own, seed=seed, eos_token_ids=self.runtime.eos_token_ids)
            if restriction is not None:
                form = params.structured_outputs
                request.next_tokens = NextTokens(restriction, None if form is None else form.reasoning)
            requests.append(request)
        with held_back():
            for request in requests:
                self.scheduler.add(request)
            self.outputs.add(request_id, text, params, requests, output_kind or params.output_kind)

    def tokenize(self, prompt: Prompt, truncate_prompt_tokens: int | None = None) -> tuple[str | None, list[int]]:
        """→ text if there was one, checked token ids; raises RequestError where the prompt cannot be served."""
        return self.prompts.read(prompt, truncate_prompt_tokens)

    def checked(self, params: SamplingParams) -> SamplingParams:
        """A copy of what a user gave, with the size of the vocabulary where all of its log-probabilities are asked for.

        Raises:
            RequestError: a value is wrong, or more log-probabilities are asked for than `max_logprobs`.
        """
        params, limit = params.clone(), self.runtime.engine.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked: int | None = getattr(params, name)
            if asked is None:
                continue
            if limit != -1 and (asked > limit or asked == -1):
                raise RequestError(
                    f"{name} must be at most the engine's max_logprobs={limit}, got {asked}"
                    f"{' (all)' * (asked == -1)}; ask for fewer, or raise max_logprobs (-1 is no limit)",
                    field=name,
                )
            setattr(params, name, self.vocab_size if asked == -1 else min(asked, self.vocab_size))
        return params

    def _draw_seed(self) -> int:
        """The same requests in the same order draw the same seeds."""
        self._num_seeds += 1
        digest = hashlib.blake2b(f"{self.runtime.engine.seed} {self._num_seeds}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def step(self) -> list[RequestOutput]:
        """One step of all ranks; the outputs that are due of requests that got a token.

        An interrupt (Ctrl-C) comes only while the ranks compute, when no result is half taken, or at the end: then the
        next call returns these outputs.
        """
        with held_back():
            self._undelivered += self._step()
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def _step(self) -> list[RequestOutput]:
        while self.scheduler.num_in_flight < self.max_steps_in_flight and (step := self.scheduler.schedule()):
            self._in_flight.append((step.batch, time.monotonic()))
            self.executor.submit(replace(step, by_heads=self.runs_by_heads(step.batch)))
            self._submit_masks()
        if not self._in_flight:
            return []
        batch, start = self._in_flight[0]
        try:
            results = self.executor.collect(self.watchdog.limit(batch))
        except BaseException:  # how long a pause follows says nothing of the ranks' pace
            self._in_flight = deque((batch, None) for batch, _ in self._in_flight)
            raise
        now = time.monotonic()
        self._in_flight.popleft()
        if self._in_flight:  # the next step waited for this one
            self._in_flight[0] = (self._in_flight[0][0], now)
        if len(step_ids := {result.step_id for result in results}) > 1:
            raise EngineError(f"ranks answered different steps: {', '.join(map(str, sorted(step_ids)))}")
        seconds = None if start is None else now - start
        if seconds is not None:
            self.watchdog.observe(batch, seconds)
        self.stats.take_step(batch, results, seconds)
        outputs = self._update(results)
        self._submit_masks()
        return outputs

    def _submit_masks(self) -> None:
        """Makes the masks of the oldest step in flight, which ranks compute meanwhile, unless they have them."""
        if (taken := self.scheduler.take_masked()) is not None:
            step_id, requests = taken
            answers = [None if request.finished else request.next_tokens for request in requests]
            self.executor.submit_masks(Masks(step_id, self.masks.make(answers)))

    def step_or_recover(self) -> list[RequestOutput]:
        """`step`, or `recover` if the ranks were lost; after `shutdown` it raises."""
        try:
            return self.step()
        except EngineError as error:
            if self._make_executor is None:
                raise
            logger.warning("%s; starting new ranks", error)
            return self.recover()

    def recover(self) -> list[RequestOutput]:
        """After `step` raised an EngineError: `rewind`, then `restart`."""
        outputs = self.rewind()
        self.restart()
        return outputs

    def rewind(self) -> list[RequestOutput]:
        """Ends the ranks and takes back the steps in flight; their requests wait again, and lose no token.

        A request that is found to make every step fail ends with an error: its output.
        """
        self.executor.shutdown()
        self._in_flight.clear()
        self.block_pool = self._make_pool(self.block_pool.num_blocks)
        users = {
            (user := self.outputs.user_of(request)).request_id: user
            for request in self.scheduler.restart(self.block_pool)
        }
        for user in users.values():
            for sequence in user.sequences:
                self.scheduler.abort(sequence.request)
        return [self.outputs.output(request_id) for request_id in users]

    def restart(self, wait: Callable[[float], object] = time.sleep) -> bool:
        """Starts new ranks after `rewind`, in a few tries with waits between them; False if `wait` said to stop.

        Raises:
            EngineError: they did not come up.
            UnavailableError: there was no place for them for as long as the engine may wait.
        """
        if self._make_executor is None:
            raise EngineError("the engine was shut down; make a new one")
        for delay in RESTART_DELAYS:
            if wait(delay):
                return False
            start = time.monotonic()
            try:
                self.block_pool = self._open(self._make_executor(self._start_timeout))
            except UnavailableError:
                raise
            except TwofoldError as error:
                logger.error("the ranks did not start: %s", error)
                continue
            self.watchdog.restart()
            self.scheduler.restart(self.block_pool)
            self.scheduler.fetch_limit = self._fetch_limit() if self.is_sharded else None
            self.stats.take_restart(start)
            logger.warning("new ranks after %.1f s", self.stats.restart_seconds)
            return True
        raise EngineError(f"the ranks did not start in {len(RESTART_DELAYS)} tries")

    def check(self) -> None:
        """Checks the ranks while there is nothing to do.

        Raises:
            RankDiedError: a rank ended.
        """
        self.executor.check()

    def _update(self, results: list[StepResult]) -> list[RequestOutput]:
        """Takes every rank's answer to the oldest step."""
        places: dict[int, list[tuple[StepResult, int]]] = {}  # number -> where its tokens are: result, index
        for result in results:
            for piece in result.prompt_logprobs:
                self.outputs.add_prompt_logprobs(piece)
            for i, number in enumerate(result.numbers.tolist()):
                places.setdefault(number, []).append((result, i))
        changed: dict[str, None] = {}
        for request in self.scheduler.complete(results[0].step_id, places.keys()):
            changed[self.outputs.user_of(request).request_id] = None
            for result, i in places[request.number]:
                token, next_tokens = int(result.token_ids[i]), request.next_tokens
                if next_tokens is not None and not next_tokens.take(token):
                    self._end_early(request, next_tokens)
                    break
                self.scheduler.append(request, token)
                stop = self.outputs.add_token(request, token, result.logprobs, i)
                if stop is not None or (next_tokens is not None and next_tokens.is_complete):
                    request.stop_reason = request.stop_reason if stop is None else stop
                    self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
                if request.finished:
                    break
        outputs = [self.outputs.output(request_id) for request_id in changed if self.outputs.is_due(request_id)]
        for output in outputs:
            if output.finished and output.metrics is not None:
                self.stats.take_finished(output.metrics)
        return outputs

    def _end_early(self, request: Request, next_tokens: NextTokens) -> None:
        """Ends a request that no token may continue."""
        if next_tokens.may_end:
            self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
        else:
            request.stop_reason = next_tokens.fault
            self.scheduler.finish(request, RequestStatus.FINISHED_ERROR)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request → its output so far, or None if there is no request of that id."""
        self._undelivered = [output for output in self._undelivered if output.request_id != request_id]
        user = self.outputs.user_requests.get(request_id)
        if user is None:
            return None
        with held_back():
            for sequence in user.sequences:
                self.scheduler.abort(sequence.request)
            return self.outputs.output(request_id)

    def profile(self, start: bool) -> list[Breakdown | None]:
        """Starts timing the kernels of every rank, or stops → each rank's breakdown."""
        with held_back():
            return self.executor.profile(start)

    @property
    def reports(self) -> list[RankReport]:
        """What each rank said when it started, in the order of ranks."""
        return self.executor.reports

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: a request that is not finished, or a step in flight."""
        return self.scheduler.has_unfinished or bool(self.scheduler.num_in_flight or self._undelivered)

    @property
    def is_idle(self) -> bool:
        """No request, no step in flight, and every block free or in the prefix cache."""
        return self.scheduler.is_idle and not self.outputs.user_requests

    @property
    def kv_cache_capacity(self) -> int:
        """Tokens that the KV cache holds."""
        return self.block_pool.capacity_tokens

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False, and nothing is forgotten, while requests hold blocks."""
        return self.block_pool.reset_prefix_cache()

    def progress(self) -> Progress:
        """How far the requests under way are."""
        users = self.outputs.user_requests.values()
        requests = [sequence.request for user in users for sequence in user.sequences]
        return Progress(
            num_requests=len(users),
            num_prompt_tokens=sum(request.num_prompt_tokens for request in requests),
            num_computed_tokens=sum(
                min(request.num_computed_tokens, request.num_prompt_tokens) for request in requests
            ),
            num_output_tokens=sum(request.num_output_tokens for request in requests),
        )

    def snapshot(self) -> EngineSnapshot:
        """What metrics show. May be called from any thread; numbers may come from two neighbouring steps."""
        scheduler, pool = self.scheduler, self.block_pool
        return EngineSnapshot(
            num_running=scheduler.num_running,
            num_prefilling=len(scheduler.prefilling()),
            num_waiting=scheduler.num_waiting,
            num_blocks=pool.num_blocks - 1,
            num_blocks_in_use=pool.num_blocks - 1 - pool.num_free,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            stats=self.stats,
        )

    def prefill_progress(self) -> dict[str, tuple[int, int]]:
        """For each request that runs and has no token yet: prompt tokens computed, and how many there are."""
        progress: dict[str, tuple[int, int]] = {}
        for request in self.scheduler.prefilling():
            done = (request.num_computed_tokens, request.num_prompt_tokens)
            progress.setdefault(self.outputs.user_of(request).request_id, done)
        return progress

    def kill(self) -> None:
        """Ends the ranks at once. Any thread may call it, while another waits for them in `step`."""
        self.executor.kill()

    def shutdown(self) -> None:
        """Ends the ranks for good."""
        self._make_executor = None
        self.executor.shutdown()


def _always(by_heads: bool, batch: ScheduledBatch) -> bool:
    return by_heads


def _sharded(choose: Callable[[ScheduledBatch], bool], decodes_by_heads: bool, batch: ScheduledBatch) -> bool:
    """Decodes run by heads if then nothing is fetched, else by tokens: a rank fetches for its own rows only."""
    return decodes_by_heads if (batch.num_scheduled_tokens == 1).all() else choose(batch)


def _holdings(runtime: RuntimeConfig, reports: Sequence[RankReport], is_sharded: bool, num_blocks: int) -> str:
    """One line: what each rank keeps, how many tokens fit, and what a longer context would take."""
    report, room, num_ranks = reports[0], reports[0].sharded, len(reports)
    of_block = room.bytes_per_block if is_sharded and room is not None else report.bytes_per_block
    weights = f"{'a part of' if runtime.weights == 'sharded' else 'all'} weights ({report.weight_bytes / 1e9:.2f} GB)"
    size = f"{num_blocks * of_block / 2**30:.2f} GiB"
    if is_sharded and room is not None:
        cache = f"a share of the KV cache ({size}, and {room.workspace_bytes / 2**30:.2f} GiB for what it fetches)"
    else:
        cache = f"all of the KV cache ({size})"
    tokens = (num_blocks - 1) * runtime.block_size
    more = f"100,000 more take {of_block / runtime.block_size * 1e5 / 2**30:.2f} GiB of each"
    rooms = [report.sharded for report in reports if report.sharded is not None]
    if num_ranks > 1 and not is_sharded and len(rooms) == num_ranks:
        held = max(0, min(one.num_blocks for one in rooms) - 1) * runtime.block_size
        more += f", and kv_cache='sharded' would hold {held:,}" if held > tokens else ""
    keeps = "the rank keeps" if num_ranks == 1 else f"each of {num_ranks} ranks keeps"
    return (
        f"{keeps} {weights} and {cache}: {tokens:,} tokens fit, {tokens / runtime.max_model_len:.1f} requests of "
        f"max_model_len={runtime.max_model_len}; {more}"
    )
