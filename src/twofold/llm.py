"""The offline interface: prompts in, answers out."""

import reprlib
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from twofold.chat.messages import check_continues, check_template_takes_tools, for_template
from twofold.config import EngineConfig
from twofold.contract import Breakdown
from twofold.engine.beam_search import beam_search
from twofold.engine.drive import Drive
from twofold.engine.prompts import Prompt, check_extras, checked_params, split_prompts
from twofold.engine_args import EngineArgs
from twofold.errors import RequestError, UserError
from twofold.launch import start_engine
from twofold.llm_engine import LLMEngine
from twofold.metrics import Metric
from twofold.models.mistral_chat import MistralChat
from twofold.outputs import BeamSearchOutput, RequestOutput
from twofold.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLM:
    """A model that answers prompts. Keyword arguments are those of `EngineArgs`.

    chat_template: text of a template for `chat`, in place of the model's.

    Several threads may call it; one call runs after the other.

    >>> llm = LLM("demo", prefill_context_parallel_size=2)
    >>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text

    Raises:
        ConfigError, ModelError: the arguments, the model and the machine do not fit together.
    """

    _chat_template: str | None = None

    def __init__(self, model: str, *, chat_template: str | None = None, **engine_args: Any) -> None:
        self._start(EngineArgs(model, **engine_args), chat_template)

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> Self:
        """Starts an engine; raises what the constructor raises."""
        llm = cls.__new__(cls)
        llm._start(engine_args)
        return llm

    def _start(self, config: EngineConfig, chat_template: str | None = None) -> None:
        self.engine = start_engine(config)
        self._chat_template = chat_template
        self._ids = count()
        self._lock = threading.Lock()  # held by the call that uses the engine or the tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: object = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt. Outputs come in the order of the prompts.

        If a rank is lost, all ranks are started again, with a warning. In float32 the tokens do not change, and
        log-probabilities differ by rounding (about 3e-5). A prompt is given up if its steps fail again and again; its
        output has the text so far and the finish_reason "error". No other prompt is affected.

        Args:
            prompts: one prompt or a list. A prompt is text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
                Token ids are a list, a numpy array or a tensor of one dim.
            sampling_params: for all prompts, or one for each. Without it, `get_default_sampling_params()`.
            use_tqdm: show progress on stderr; or a function that makes the bar, as `tqdm` does.
            lora_request, priority, tokenization_kwargs, mm_processor_kwargs: vLLM's; only values that ask for nothing
                are taken.

        Raises:
            RequestError: a prompt or its parameters cannot be served. No prompt of the call is run then.
            EngineError: ranks were lost and could not be started again.
        """
        check_extras(lora_request, priority, tokenization_kwargs, mm_processor_kwargs)
        batch = split_prompts(prompts)
        given = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = checked_params(given, len(batch))
        ids = [str(next(self._ids)) for _ in batch]
        finished: dict[str, RequestOutput] = {}
        with self._lock, Drive(self.engine, show_progress=use_tqdm) as drive:
            for number, (request_id, prompt, one) in enumerate(zip(ids, batch, params, strict=True)):
                try:
                    drive.add(request_id, prompt, one)
                except RequestError as error:
                    message = f"prompt {number}: {error}" if len(batch) > 1 else str(error)
                    raise RequestError(message, field=error.field) from None
            for outputs in drive:
                finished.update((output.request_id, output) for output in outputs)
        return [finished[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: object = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        **chat_args: Any,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation or a list of them: each a list of {"role": ..., "content": ...}.

        The model's chat template makes a prompt of each; `chat_args` are the arguments of `chat_prompt`. A content is
        text, or a list of parts of type "text". The answer's text is as the model wrote it, calls of tools included.
        """
        check_extras(lora_request, priority, tokenization_kwargs, mm_processor_kwargs)
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
        conversations: Any = messages if is_list and not any(isinstance(one, dict) for one in messages) else [messages]
        prompts = [self.chat_prompt(one, **chat_args) for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto", "string", "openai"] = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Prompt:
        """Applies a chat template to a conversation → its text and token ids, a prompt for `generate`.

        Args:
            chat_template: text of a template in place of the engine's.
            chat_template_content_format: a message's content as "string" or as a list of parts ("openai").
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end within the last message, which is the assistant's.
            tools: what the model may call, as OpenAI's API has them.
            chat_template_kwargs: variables of the template.

        Raises:
            UserError: the model has no chat template.
            RequestError: it is no conversation, the template refuses it, or the template takes no tools.
        """
        given: Any = messages
        if not isinstance(given, Sequence) or not given or not all(isinstance(message, dict) for message in given):
            raise RequestError(
                f'a conversation must be a list of {{"role": ..., "content": ...}}, got {reprlib.repr(given)}',
                field="messages",
            )
        tokenizer = self.engine.tokenizer
        chat_template = chat_template or self._chat_template
        if tokenizer is not None and self.engine.runtime.engine.tokenizer_mode == "mistral":
            if chat_template is not None:
                message = "mistral-common has no chat templates; leave out chat_template, or tokenizer_mode='mistral'"
                raise RequestError(message, field="chat_template")
            with self._lock:
                token_ids = self._mistral_chat.encode(
                    for_template(given, "", "string"),
                    tools,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **(chat_template_kwargs or {}),
                )
                return {"prompt": tokenizer.decode(token_ids), "prompt_token_ids": token_ids}
        if tokenizer is None or (tokenizer.chat_template is None and chat_template is None):
            raise UserError(
                f"model {self.engine.runtime.engine.model!r} has no chat template; use generate() with a plain prompt",
                field="messages",
            )
        check_continues(given, add_generation_prompt, continue_final_message)
        with self._lock:
            try:
                template = tokenizer.get_chat_template(chat_template, tools)
                if tools:
                    check_template_takes_tools(template)
                text = tokenizer.apply_chat_template(
                    for_template(given, template, chat_template_content_format),
                    tools=list(tools) if tools else None,
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **(chat_template_kwargs or {}),
                )
            except UserError:
                raise
            except Exception as error:  # a template can raise anything
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                message = f"the chat template refuses the messages: {reason}"
                raise RequestError(message, field="messages") from error
            return {"prompt": text, "prompt_token_ids": self.engine.prompts.encode(text, add_special_tokens=False)}

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        lora_request: object = None,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The most likely answers to each prompt that a beam search finds, the best one first.

        Raises:
            RequestError: a prompt cannot be served, or `max_logprobs` is below twice the `beam_width`.
        """
        check_extras(lora_request, None)
        with self._lock:
            return beam_search(self.engine, split_prompts(prompts), params, show_progress=use_tqdm)

    @cached_property
    def _mistral_chat(self) -> MistralChat:
        from twofold.models.source import tokenizer_place  # it brings PyTorch

        config = self.engine.runtime.engine
        return MistralChat(tokenizer_place(config.tokenizer, self.engine.runtime.source, config.tokenizer_revision))

    @property
    def llm_engine(self) -> LLMEngine:
        """The same engine, step by step."""
        return LLMEngine(self.engine)

    def get_default_sampling_params(self) -> SamplingParams:
        """Those of the model's generation_config.json, and vLLM's defaults for what it leaves out."""
        return SamplingParams(**self.engine.runtime.sampling_defaults)

    def get_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """None with `skip_tokenizer_init`."""
        return self.engine.tokenizer

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted since it started, and its state."""
        return self.llm_engine.get_metrics()

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets all cached prefixes. The arguments are vLLM's: here no request runs between calls."""
        with self._lock:
            return self.engine.reset_prefix_cache()

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """As `LLMEngine.start_profile`."""
        with self._lock:
            self.llm_engine.start_profile()

    def stop_profile(self) -> list[Breakdown | None]:
        """→ where each rank's time went since `start_profile`; None on a CPU."""
        with self._lock:
            return self.llm_engine.stop_profile()

    def shutdown(self) -> None:
        """Ends the ranks. The object cannot be used afterwards."""
        self.engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
