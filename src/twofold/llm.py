"""The offline interface: prompts in, answers out."""

from collections.abc import Sequence
from itertools import count
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from twofold.config import EngineConfig
from twofold.engine.prompts import checked_params
from twofold.errors import ConfigError, RequestError, UserError
from twofold.launch import start_engine
from twofold.outputs import RequestOutput
from twofold.sampling_params import SamplingParams

Prompt = str | Sequence[int] | dict[str, Any]


class LLM:
    """A model, ready to answer. Keyword arguments are those of `EngineConfig`.

    >>> llm = LLM("demo", prefill_context_parallel_size=2)
    >>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text

    Raises:
        ConfigError, ModelError: the arguments, the model and the machine do not fit together.
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        known = EngineConfig.__dataclass_fields__
        if unknown := [name for name in engine_args if name not in known]:
            raise ConfigError(f"unknown engine argument {unknown[0]!r}; known are {', '.join(known)}")
        self.engine = start_engine(EngineConfig(model=model, **engine_args))
        self._ids = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers every prompt; outputs in the order of prompts.

        When a rank is lost new ones are started, with a warning, and the answers are what they would have been. A
        prompt that brings its ranks down twice is given up alone: its output has the finish_reason "error", and the
        text that it had by then.

        Args:
            prompts: text, {"prompt_token_ids": [...]} or {"prompt": ...}, or a list of these.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show prompt tokens computed and answers finished, on stderr.

        Raises:
            RequestError: a prompt or its parameters cannot be served; none of the call's prompts is then run.
            EngineError: ranks were lost, and no new ones could be started.
        """
        batch: list[Prompt] = [prompts] if isinstance(prompts, str | dict) else list(prompts)  # type: ignore[arg-type]
        if batch and all(isinstance(token, int) for token in batch):
            batch = [{"prompt_token_ids": batch}]
        params = self._params(sampling_params, len(batch))
        ids = [str(next(self._ids)) for _ in batch]
        added: list[str] = []
        try:
            for number, (request_id, prompt, one) in enumerate(zip(ids, batch, params, strict=True)):
                try:
                    self.engine.add_request(request_id, prompt, one)
                except RequestError as error:
                    raise RequestError(f"prompt {number}: {error}" if len(batch) > 1 else str(error)) from None
                added.append(request_id)
            finished = self._run(use_tqdm)
        except BaseException:
            for request_id in added:
                self.engine.abort_request(request_id)
            raise
        return [finished[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers conversations, each a list of {"role": ..., "content": ...}, through the model's chat template."""
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        return self.generate([self.chat_prompt(one) for one in conversations], sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Sequence[dict[str, Any]]) -> Prompt:
        """A conversation as the model's chat template writes it, as token ids."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise UserError(
                f"model {self.engine.runtime.engine.model!r} has no chat template; use generate() with a plain prompt"
            )
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def _params(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        return checked_params(sampling_params, num_prompts)

    def _run(self, use_tqdm: bool) -> dict[str, RequestOutput]:
        engine, finished = self.engine, dict[str, RequestOutput]()
        users = engine.outputs.user_requests.values()
        total = sum(len(user.prompt_token_ids) * len(user.sequences) for user in users)
        answers = len(users)
        with tqdm(total=total, desc="prompt tokens", unit="tok", disable=not use_tqdm) as bar:
            done = 0
            # Steps may be under way still when the last request ends.
            while engine.has_unfinished_requests or engine.scheduler.num_in_flight:
                for output in engine.step_or_recover():
                    if output.finished:
                        finished[output.request_id] = output
                        done += len(output.prompt_token_ids) * len(output.outputs)
                bar.set_postfix_str(f"answers {len(finished)}/{answers}", refresh=False)
                bar.update(done + engine.num_computed_tokens() - bar.n)
        return finished

    def shutdown(self) -> None:
        """Ends the ranks; the object is of no use afterwards."""
        self.engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
