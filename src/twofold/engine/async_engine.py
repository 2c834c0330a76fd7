"""Run an engine on a thread for the clients of one event loop.

    event loop                                   engine's thread
    submit ──tokenize (a third thread)──► inbox ──► LLMEngine.add_request
           ──grammar  (a fourth)
    Answer.close ───────────────────────► inbox ──► LLMEngine.abort_request
    Answer.read ◄── Answer.push ◄── call_soon ◄──── LLMEngine.step

The engine's thread never waits for a client: outputs that a client has not read yet are merged into one. If ranks are
lost, new ones are started and the requests go on. A request is given up if its steps fail again and again; no other
request is affected.
"""

import asyncio
import copy
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from itertools import count
from typing import Any, TypeVar

from twofold.engine.detokenizer import token_bytes
from twofold.engine.engine import LLMEngine
from twofold.engine.prompts import Prompt
from twofold.engine.stats import EngineSnapshot
from twofold.errors import GIVEN_UP, EngineError, OverloadedError, RequestError, TwofoldError, UnavailableError
from twofold.outputs import RequestOutput
from twofold.sampling_params import RequestOutputKind, SamplingParams

CHECK_SECONDS = 1.0  # between looks at idle ranks
STOP_SECONDS = 2.0  # wait for a thread that is starting new ranks; they end with this process anyway

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class State(StrEnum):
    """What /health says. Requests are accepted while RUNNING or RECOVERING."""

    STARTING = "starting"
    RUNNING = "ok"
    RECOVERING = "recovering"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True, eq=False)
class Part:
    """One prompt of an Answer. Only the engine's thread writes the times; they are monotonic seconds."""

    request_id: str
    index: int
    text: str | None
    token_ids: list[int]
    answer: "Answer"
    num_computed_tokens: int = 0  # of the prompt
    waits: bool = True  # until it has its first token
    finished: bool = False
    num_output_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None

    @property
    def num_waiting_tokens(self) -> int:
        return len(self.token_ids) * self.answer.params.n


@dataclass(slots=True, eq=False)
class Answer:
    """What a client reads: the outputs of its prompts since it last read. Used in the event loop only."""

    params: SamplingParams
    arrival_time: float
    engine: "AsyncEngine"
    parts: list[Part] = field(default_factory=list)
    _outputs: dict[int, RequestOutput] = field(default_factory=dict)
    _note: str | None = None
    _error: TwofoldError | None = None
    _bell: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> tuple[int, RequestOutput] | str | None:
        """Waits for news → a prompt's index and what is new of its output; or a note on progress; None at the end.

        Raises:
            EngineError: the request was given up.
        """
        while True:
            if self._outputs:
                index = next(iter(self._outputs))
                return index, self._outputs.pop(index)
            if self._error is not None:
                raise self._error
            if all(part.finished for part in self.parts):
                return None
            if self._note is not None:
                note, self._note = self._note, None
                return note
            self._bell.clear()
            await self._bell.wait()

    async def read_all(self, keep_alive: float) -> AsyncIterator[tuple[int, RequestOutput] | str]:
        """All that `read` gives, and a note after every `keep_alive` seconds without news."""
        while True:
            try:
                async with asyncio.timeout(keep_alive):
                    item = await self.read()
            except TimeoutError:
                item = "waiting"
            if item is None:
                return
            yield item

    def decode(self, token_ids: list[int]) -> str:
        tokenizer = self.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(token_ids)

    def bytes_of(self, token_id: int, text: str) -> bytes:
        """The bytes of a token. `text` is its text by itself, which is not enough where a character has many tokens."""
        tokenizer = self.engine.tokenizer
        return text.encode() if tokenizer is None else token_bytes(tokenizer, token_id, text)

    def close(self) -> None:
        """Aborts what is not finished: the client has gone, or has all that it wanted."""
        self.engine._close(self)

    def push(self, part: Part, output: RequestOutput) -> None:
        for completion in output.outputs:
            if completion.finish_reason == "error":
                reason = completion.stop_reason  # where no token may come next
                self.fail(
                    EngineError(GIVEN_UP) if reason is None else RequestError(f"{reason}", field="structured_outputs")
                )
                return
        part.num_computed_tokens = len(part.token_ids)
        part.finished = output.finished
        if (earlier := self._outputs.get(part.index)) is not None:
            output = merge(earlier, output)
        self._outputs[part.index] = output
        self._bell.set()

    def progress(self, part: Part, num_computed_tokens: int) -> None:
        part.num_computed_tokens = num_computed_tokens
        done = sum(part.num_computed_tokens for part in self.parts)
        self.note(f"prefill {done}/{sum(len(part.token_ids) for part in self.parts)}")

    def note(self, note: str) -> None:
        self._note = note
        self._bell.set()

    def fail(self, error: TwofoldError) -> None:
        self._error = error
        self._bell.set()


def merge(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """Joins two consecutive deltas of a request. Changes both."""
    for before, after in zip(earlier.outputs, later.outputs, strict=True):
        after.text = before.text + after.text
        before.token_ids += after.token_ids
        after.token_ids = before.token_ids
        if before.logprobs is not None and after.logprobs is not None:
            before.logprobs += after.logprobs
            after.logprobs = before.logprobs
    return later


class AsyncEngine:
    """Serves requests of an event loop with an engine on a thread of its own.

    Args:
        max_waiting_requests: prompts that may wait for their first token.
        max_waiting_tokens: tokens that these prompts may have in all; a prompt alone may have more.
        observe: called in the engine's thread with each output and the part that it belongs to.
    """

    def __init__(
        self,
        engine: LLMEngine,
        *,
        max_waiting_requests: int,
        max_waiting_tokens: int,
        observe: Callable[[Part, RequestOutput], None],
    ) -> None:
        self.engine = engine
        self.max_waiting_requests, self.max_waiting_tokens = max_waiting_requests, max_waiting_tokens
        self.observe = observe
        self.on_death: Callable[[], None] = lambda: None  # called in the event loop when the engine has failed for good
        self.state = State.STARTING
        self.num_waiting_requests = self.num_waiting_tokens = 0
        self._answers: set[Answer] = set()
        self._ids = count()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._parts: dict[str, Part] = {}  # request id -> part; for the engine's thread only
        self._closing = threading.Event()
        # A copy, since the engine's thread uses its own at the same time.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        longest = max(map(len, self.tokenizer.get_vocab())) if self.tokenizer is not None else 0
        self.max_chars = longest * engine.runtime.max_model_len
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")
        self._grammar_thread = ThreadPoolExecutor(1, "grammar")  # compiles what restricts tokens
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._num_idle_deaths = 0  # losses of idle ranks in a row, without a step in between
        self._idle_death_step = -1

    @property
    def max_model_len(self) -> int:
        return self.engine.runtime.max_model_len

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        return self.engine.runtime.sampling_defaults

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

    @property
    def waits_for(self) -> str | None:
        """What new ranks wait for, where others decide when they may start."""
        return self.engine.waits.reason

    def snapshot(self) -> EngineSnapshot:
        """The engine's; prompts that it has not been given yet count as waiting."""
        snapshot = self.engine.snapshot()
        num_waiting = max(self.num_waiting_requests - snapshot.num_prefilling, snapshot.num_waiting)
        return replace(snapshot, num_waiting=num_waiting)

    # In the event loop

    def start(self) -> None:
        """Starts the thread. Must be called in the event loop of the clients."""
        self._loop = asyncio.get_running_loop()
        self.state = State.RUNNING
        self._thread.start()

    async def submit(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, num_asked: int | None = None
    ) -> Answer:
        """Queues prompts with the same parameters.

        Args:
            num_asked: tokens of an answer for which there must be room; None asks for none.

        Raises:
            RequestError: a prompt or the parameters cannot be served. None of the prompts is then.
            OverloadedError: too many prompts or tokens are waiting.
            UnavailableError: the server is stopping, or its engine has failed.
        """
        self.check()
        params = self.engine.checked(params)
        self._check_room_for_prompts(len(prompts))
        answer = Answer(params, time.monotonic(), self)
        self.num_waiting_requests += len(prompts)
        try:
            await self._check_restrictions(params)
            texts_and_ids = [await self.in_tokenizer_thread(self._tokenize, prompt, params) for prompt in prompts]
            self.check()
            self._check_room_for_tokens([len(token_ids) for _, token_ids in texts_and_ids], params.n, num_asked)
        except BaseException:
            self.num_waiting_requests -= len(prompts)
            raise
        for index, (text, token_ids) in enumerate(texts_and_ids):
            answer.parts.append(Part(f"{next(self._ids)}", index, text, token_ids, answer))
        self.num_waiting_tokens += sum(part.num_waiting_tokens for part in answer.parts)
        self._answers.add(answer)
        for part in answer.parts:
            self._inbox.put(partial(self._add, part))
        return answer

    async def _check_restrictions(self, params: SamplingParams) -> None:
        """Compiles what restricts tokens, if anything does; the engine's thread finds it made."""
        if params.is_masked:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._grammar_thread, self.engine.masks.compile, params)
        else:
            self.engine.masks.compile(params)  # only looks at ids

    def _check_room_for_prompts(self, num_prompts: int) -> None:
        limit = self.max_waiting_requests
        if num_prompts > limit:
            message = f"prompt is a list of {num_prompts}, more than max_waiting_requests={limit}; send fewer at once"
            raise RequestError(message, field="prompt")
        if self.num_waiting_requests + num_prompts > limit:
            raise self._overloaded(f"{self.num_waiting_requests} prompts wait; at most {limit} may")

    def _check_room_for_tokens(self, lengths: Sequence[int], num_answers: int, num_asked: int | None) -> None:
        """Of prompts with these lengths, and `num_answers` to each."""
        for length in lengths:
            if num_asked is not None and length + num_asked > self.max_model_len:
                raise RequestError(
                    f"max_tokens={num_asked} and the prompt's {length} tokens are more than max_model_len="
                    f"{self.max_model_len}; ask for at most {self.max_model_len - length}",
                    field="max_tokens",
                )
        num_tokens, limit = num_answers * sum(lengths), self.max_waiting_tokens
        if len(lengths) > 1 and num_tokens > limit:
            raise RequestError(
                f"prompt is a list with {num_tokens} tokens for all answers, more than max_waiting_tokens={limit}; "
                "send fewer at once",
                field="prompt",
            )
        if self.num_waiting_tokens and self.num_waiting_tokens + num_tokens > limit:
            raise self._overloaded(
                f"{self.num_waiting_tokens} prompt tokens wait; with {num_tokens} more it would be more than {limit}"
            )

    async def in_engine_thread(self, function: Callable[[], Result]) -> Result:
        """Runs a function that uses the engine, between two steps.

        Raises:
            EngineError: ranks were lost meanwhile; new ones are started.
            UnavailableError: as `submit`.
        """
        done: Future[Result] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function())
                except Exception as error:
                    done.set_exception(error)

        self._inbox.put(run)
        waited = asyncio.wrap_future(done)
        while not waited.done():
            self.check()
            await asyncio.wait([waited], timeout=CHECK_SECONDS)
        return waited.result()

    async def in_tokenizer_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a function that uses `tokenizer`, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, partial(function, *args))

    def _tokenize(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str) and self.tokenizer is not None:
            prompt = {"prompt": prompt, "prompt_token_ids": self.encode(prompt)}
        return self.engine.tokenize(prompt, params.truncate_prompt_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Needs a tokenizer, and runs in its thread.

        Raises:
            RequestError: no prompt can have so many characters. They are not tokenized then.
        """
        if len(text) > self.max_chars:
            raise self.too_long(len(text))
        assert self.tokenizer is not None
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def too_long(self, num_chars: int) -> RequestError:
        return RequestError(
            f"the prompt has {num_chars} characters, more than max_model_len={self.max_model_len} tokens can hold; "
            "shorten it",
            field="prompt",
        )

    def check(self) -> None:
        """Raises an UnavailableError if no requests are accepted now."""
        if self.state is State.DEAD:
            raise UnavailableError("the engine has failed and could not be started again")
        if self.state not in (State.RUNNING, State.RECOVERING):
            raise UnavailableError(f"the server is {'starting' if self.state is State.STARTING else 'shutting down'}")

    def _overloaded(self, message: str) -> OverloadedError:
        rate = self.engine.stats.tokens_per_second
        seconds = self.num_waiting_tokens / rate if rate else 1.0
        return OverloadedError(f"the server is overloaded: {message}", retry_after=round(min(max(seconds, 1.0), 60.0)))

    def _deliver(self, outputs: Sequence[tuple[Part, RequestOutput]], progress: Sequence[tuple[Part, int]]) -> None:
        for part, num_computed_tokens in progress:
            if part.waits and num_computed_tokens != part.num_computed_tokens:
                part.answer.progress(part, num_computed_tokens)
        for part, output in outputs:
            self._no_longer_waits(part)
            part.answer.push(part, output)

    def _no_longer_waits(self, part: Part) -> None:
        if part.waits:
            part.waits = False
            self.num_waiting_requests -= 1
            self.num_waiting_tokens -= part.num_waiting_tokens

    def _close(self, answer: Answer) -> None:
        if answer not in self._answers:
            return
        self._answers.remove(answer)
        for part in answer.parts:
            self._no_longer_waits(part)
            if not part.finished:
                self._inbox.put(partial(self._abort, part))

    def _notify(self, note: str) -> None:
        for answer in self._answers:
            answer.note(note)

    async def drain(self, timeout: float) -> None:
        """Refuses new requests and waits for those under way. After `timeout` seconds they are given up."""
        if self.state is not State.DEAD:
            self.state = State.DRAINING
        deadline = time.monotonic() + timeout
        while self._answers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.give_up()

    def give_up(self) -> None:
        """Ends the answers under way with an error."""
        self._fail_all(UnavailableError("the server is shutting down"))

    async def stop(self) -> None:
        """Ends the engine's thread and its ranks at once."""
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """`stop`, and waits. Must be called after `start`, by any thread but the engine's."""
        if self.state is not State.DEAD:
            self.state = State.DRAINING
        self._closing.set()
        self._inbox.put(lambda: None)
        self.engine.kill()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        for thread in (self._tokenizer_thread, self._grammar_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    def _fail_all(self, error: TwofoldError) -> None:
        for answer in self._answers:
            answer.fail(error)

    def _died(self) -> None:
        self.state = State.DEAD
        self._fail_all(UnavailableError("the engine has failed and could not be started again"))
        self.on_death()

    # In the engine's thread

    def _run(self) -> None:
        try:
            while self._take_messages():
                try:
                    outputs = self.engine.step()
                except EngineError as error:
                    self._recover(error)
                else:
                    self._publish(outputs)
        except BaseException as error:
            logger.error("the engine has failed for good: %s", error, exc_info=not isinstance(error, EngineError))
            self._in_loop(self._died)
        finally:
            self.engine.shutdown()

    def _take_messages(self) -> bool:
        """Does what the event loop asked for, and waits for that if the engine has no work. False: it is the end."""
        while not self._closing.is_set():
            busy = self.engine.has_work
            try:
                self._inbox.get(timeout=None if busy else CHECK_SECONDS, block=not busy)()
            except queue.Empty:
                if busy:
                    return True
                self._check_idle_ranks()
        return False

    def _check_idle_ranks(self) -> None:
        try:
            self.engine.check()
        except EngineError as error:
            num_steps = self.engine.stats.num_steps
            self._num_idle_deaths = self._num_idle_deaths + 1 if num_steps == self._idle_death_step else 0
            self._idle_death_step = num_steps
            self._recover(error, delay=min(2.0**self._num_idle_deaths - 1.0, 30.0))

    def _add(self, part: Part) -> None:
        prompt = {"prompt": part.text, "prompt_token_ids": part.token_ids}
        try:
            self.engine.add_request(part.request_id, prompt, part.answer.params, output_kind=RequestOutputKind.DELTA)
        except TwofoldError as error:
            self._in_loop(part.answer.fail, error)
        else:
            self._parts[part.request_id] = part

    def _abort(self, part: Part) -> None:
        self._parts.pop(part.request_id, None)
        if (output := self.engine.abort_request(part.request_id)) is not None:
            self.observe(part, output)

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        delivery = []
        for output in outputs:
            part = self._parts[output.request_id]
            self.observe(part, output)
            delivery.append((part, output))
            if output.finished:
                del self._parts[output.request_id]
        progress = [(self._parts[name], done) for name, (done, _) in self.engine.prefill_progress().items()]
        if delivery or progress:
            self._in_loop(self._deliver, delivery, progress)

    def _recover(self, error: EngineError, delay: float = 0.0) -> None:
        """Replaces the ranks. Requests wait until the new ones have started."""
        if self._closing.is_set():  # `stop` has killed them
            return
        logger.warning("%s; starting new ranks", error)
        self._in_loop(self._set_state, State.RUNNING, State.RECOVERING)
        self._in_loop(self._notify, "recovering")
        self._publish(self.engine.rewind())
        if not self._closing.wait(delay) and self.engine.restart(self._closing.wait):
            self._in_loop(self._set_state, State.RECOVERING, State.RUNNING)

    def _set_state(self, old: State, new: State) -> None:
        if self.state is old:
            self.state = new

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)
