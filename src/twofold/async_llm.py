"""Answers as they come, for the coroutines of one event loop."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from twofold.config import EngineConfig
from twofold.contract import Breakdown
from twofold.engine.async_engine import Answer, AsyncEngine, Part, State, merge
from twofold.engine.prompts import Prompt, check_extras
from twofold.errors import EngineError, RequestError, UnavailableError
from twofold.launch import start_engine
from twofold.llm_engine import LLMEngine
from twofold.metrics import Metric
from twofold.outputs import RequestOutput
from twofold.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")


class AsyncLLM:
    """A model that answers prompts of many coroutines at once. The engine runs on a thread of its own.

    >>> engine = AsyncLLM.from_engine_args(AsyncEngineArgs("demo"))
    >>> async for output in engine.generate("The capital of France is", SamplingParams(max_tokens=8), "0"):
    ...     print(output.outputs[0].text)
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._sync = engine
        self._engine = AsyncEngine(
            engine.engine, max_waiting_requests=sys.maxsize, max_waiting_tokens=sys.maxsize, observe=_observe_nothing
        )
        self._answers: dict[str, Answer] = {}

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> Self:
        """Starts an engine.

        Raises:
            ConfigError, ModelError: the arguments, the model and the machine do not fit together.
        """
        return cls(LLMEngine(start_engine(engine_args)))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: object = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of one prompt, as the `output_kind` of its parameters says.

        The arguments after `request_id` are vLLM's; only values that ask for nothing are taken.

        Outputs that are not taken in time are joined. The request ends with the iteration, however that ends.

        Raises:
            RequestError: the prompt or its parameters cannot be served.
            EngineError: the request was given up, or the engine has failed.
        """
        check_extras(lora_request, priority, tokenization_kwargs)
        if data_parallel_rank is not None:
            raise RequestError("there is one engine; leave data_parallel_rank out", field="data_parallel_rank")
        self._start()
        answer = await self._engine.submit([prompt], sampling_params)
        if request_id in self._answers:
            answer.close()
            raise RequestError(f"request id {request_id!r} is in use; choose another", field="request_id")
        self._answers[request_id] = answer
        kind, so_far = sampling_params.output_kind, None
        try:
            while (item := await answer.read()) is not None:
                if isinstance(item, str):  # a note on progress
                    continue
                _, output = item
                output.request_id, output.prompt = request_id, answer.parts[0].text
                if kind is RequestOutputKind.DELTA:
                    yield output
                    continue
                so_far = output if so_far is None else merge(so_far, output)
                if kind is RequestOutputKind.CUMULATIVE or so_far.finished:
                    yield _copied(so_far)
        finally:
            del self._answers[request_id]
            answer.close()

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Ends requests: their iterations raise a RequestError. Those that are not there are left out."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            if (answer := self._answers.get(one)) is not None:
                answer.close()
                answer.fail(RequestError(f"request {one!r} was aborted", field="request_id"))

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """None with `skip_tokenizer_init`."""
        return self._engine.tokenizer

    def get_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        return self.tokenizer

    def get_num_unfinished_requests(self) -> int:
        return len(self._answers)

    async def wait_for_requests_to_drain(self, drain_timeout: float = 300) -> None:
        """Waits until no request is under way.

        Raises:
            TimeoutError: some still are after `drain_timeout` seconds.
        """
        async with asyncio.timeout(drain_timeout):
            while self._answers:
                await asyncio.sleep(0.05)

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As `LLMEngine.reset_prefix_cache`, between two steps."""
        return await self._in_engine(partial(self._sync.reset_prefix_cache, reset_running_requests, reset_connector))

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """As `LLM.start_profile`."""
        await self._in_engine(self._sync.start_profile)

    async def stop_profile(self) -> list[Breakdown | None]:
        """→ where each rank's time went since `start_profile`; None on a CPU."""
        return await self._in_engine(self._sync.stop_profile)

    def get_metrics(self) -> list[Metric]:
        return self._sync.get_metrics()

    @property
    def is_running(self) -> bool:
        return self._engine.state in (State.STARTING, State.RUNNING, State.RECOVERING)

    @property
    def errored(self) -> bool:
        """Whether no requests are accepted any more. While lost ranks are replaced they are."""
        return not self.is_running

    is_stopped = errored

    @property
    def dead_error(self) -> EngineError:
        """For those who find `errored`."""
        return UnavailableError("the engine has ended; make a new one")

    async def check_health(self) -> None:
        """Raises an EngineError if no requests are accepted any more."""
        if not self.is_running:
            self._engine.check()

    def _start(self) -> None:
        """Starts the thread in the event loop of the first call that needs it."""
        if self._engine.state is State.STARTING:
            self._engine.start()

    async def _in_engine(self, function: Callable[[], Result]) -> Result:
        self._start()
        return await self._engine.in_engine_thread(function)

    def shutdown(self) -> None:
        """Ends the ranks. The object cannot be used afterwards."""
        if self._engine.state is State.STARTING:
            self._sync.shutdown()
        else:
            self._engine.end()


def _observe_nothing(part: Part, output: RequestOutput) -> None:
    pass


def _copied(output: RequestOutput) -> RequestOutput:
    """What later outputs do not change."""
    output = copy(output)
    output.outputs = [copy(completion) for completion in output.outputs]
    for completion in output.outputs:
        completion.token_ids = list(completion.token_ids)
        completion.logprobs = None if completion.logprobs is None else list(completion.logprobs)
    return output
