"""The offline loop: add requests, step the engine until nothing is left, and show the progress."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from twofold.engine.prompts import Prompt
from twofold.errors import RequestError
from twofold.interrupts import held_back
from twofold.outputs import RequestOutput
from twofold.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from twofold.engine.engine import LLMEngine


class Drive:
    """Adds requests to an engine, and iterates over its steps: each gives the outputs that are due.

        with Drive(engine) as drive:
            drive.add("0", prompt, params)
            for outputs in drive:
                ...

    However the block ends, its unfinished requests are aborted, and the engine can be used again.

    Args:
        output_kind: which outputs the requests give.
        recover: whether lost ranks are replaced. Without it a step that fails raises an EngineError.
        show_progress: show computed prompt tokens, finished answers and generated tokens on stderr. Needs final
            outputs with all tokens, so not RequestOutputKind.DELTA. A function makes the bar in place of tqdm.
    """

    def __init__(
        self,
        engine: "LLMEngine",
        *,
        output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY,
        recover: bool = True,
        show_progress: bool | Callable[..., Any] = False,
    ) -> None:
        self._engine, self._output_kind = engine, output_kind
        self._step = engine.step_or_recover if recover else engine.step
        self._show_progress = show_progress
        self._bar: _ProgressBar | None = None
        self._request_ids: list[str] = []

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        """Queues a prompt.

        Raises:
            RequestError: the prompt or its parameters cannot be served; nothing is queued.
        """
        self._request_ids.append(request_id)  # first, since an interrupt may come in between
        try:
            self._engine.add_request(request_id, prompt, params, output_kind=self._output_kind)
        except RequestError:  # the id may be that of another caller's request
            self._request_ids.pop()
            raise

    def __iter__(self) -> Iterator[list[RequestOutput]]:
        return self

    def __next__(self) -> list[RequestOutput]:
        if not self._engine.has_work:
            raise StopIteration
        if self._show_progress and self._bar is None:
            make_bar = self._show_progress if callable(self._show_progress) else tqdm
            self._bar = _ProgressBar(self._engine, make_bar)
        outputs = self._step()
        if self._bar is not None:
            self._bar.update(outputs)
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with held_back():  # or a second Ctrl-C would leave requests behind
                for request_id in self._request_ids:
                    self._engine.abort_request(request_id)
        finally:
            if self._bar is not None:
                self._bar.close()


class _ProgressBar:
    """Follows the requests that are in the engine when it is made."""

    def __init__(self, engine: "LLMEngine", make_bar: Callable[..., Any]) -> None:
        self._engine = engine
        start = engine.progress()
        self._num_requests = start.num_requests
        self._num_finished = self._num_prompt_tokens = self._num_output_tokens = 0  # of finished requests
        self._bar = make_bar(total=start.num_prompt_tokens, desc="prefill", unit="tok")

    def update(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.finished:
                self._num_finished += 1
                self._num_prompt_tokens += len(output.prompt_token_ids) * len(output.outputs)
                self._num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        now = self._engine.progress()
        num_generated = self._num_output_tokens + now.num_output_tokens
        answers = f"answers {self._num_finished}/{self._num_requests}, {num_generated} tokens"
        self._bar.set_postfix_str(answers, refresh=False)
        self._bar.update(self._num_prompt_tokens + now.num_computed_tokens - self._bar.n)

    def close(self) -> None:
        self._bar.close()
