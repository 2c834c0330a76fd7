"""A worker of NVIDIA Dynamo that runs Twofold: a backend for Dynamo's `LLMEngine` interface (ai-dynamo 1.6).

    python -m dynamo.frontend --discovery-backend file --http-host 127.0.0.1 &
    python examples/dynamo/twofold_engine.py --discovery-backend file --model demo -pcp 2

Dynamo's frontend has the API: it renders chats, tokenizes, finds stop strings and makes text of tokens. This worker
takes token ids and gives token ids. Install ai-dynamo into the same environment (it asks for pydantic before 2.14).
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.llm.exceptions import InvalidArgument

from twofold import AsyncLLM, EngineArgs, SamplingParams
from twofold.errors import RequestError
from twofold.launch import start_engine
from twofold.llm_engine import LLMEngine as SyncEngine
from twofold.models.source import demo_directory
from twofold.outputs import CompletionOutput
from twofold.sampling_params import RequestOutputKind, StructuredOutputsParams

SUMMARY = "a worker of NVIDIA Dynamo that runs Twofold"
SAMPLING = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "logit_bias", "bad_words", "allowed_token_ids",
)  # fmt: skip
STOPPING = ("max_tokens", "min_tokens", "ignore_eos")  # stop strings are the frontend's
FORMS = ("json", "regex", "choice", "grammar", "whitespace_pattern")


class TwofoldEngine(LLMEngine):
    def __init__(self, args: EngineArgs, served_model_name: str) -> None:
        self._args, self._served_model_name = args, served_model_name
        self._llm: AsyncLLM | None = None
        self._defaults: dict[str, Any] = {}

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple["TwofoldEngine", WorkerConfig]:
        parser = EngineArgs.add_cli_args(argparse.ArgumentParser(description=SUMMARY))
        for name, default in (
            ("namespace", "dynamo"),
            ("component", "backend"),
            ("endpoint", "generate"),
            ("discovery-backend", "etcd"),
            ("request-plane", "tcp"),
            ("event-plane", None),
            ("dyn-tool-call-parser", None),
            ("dyn-reasoning-parser", None),
        ):
            parser.add_argument(f"--{name}", default=default, help="as of Dynamo's other workers")
        given = parser.parse_args(argv)
        name = getattr(given, "served_model_name", None) or given.model
        if given.model == "demo":  # Dynamo's frontend reads the model's files, too
            given.model = str(demo_directory())
        args = EngineArgs.from_cli_args(given)
        worker = WorkerConfig(
            namespace=given.namespace,
            component=given.component,
            endpoint=given.endpoint,
            model_name=args.model,
            served_model_name=name,
            discovery_backend=given.discovery_backend,
            request_plane=given.request_plane,
            event_plane=given.event_plane,
            tool_call_parser=given.dyn_tool_call_parser,
            reasoning_parser=given.dyn_reasoning_parser,
            enable_kv_routing=False,  # there are no KV events
        )
        return cls(args, name), worker

    async def start(self, worker_id: int) -> EngineConfig:
        engine = await asyncio.to_thread(start_engine, self._args)
        self._llm = AsyncLLM(SyncEngine(engine))
        runtime, self._defaults = engine.runtime, dict(engine.runtime.sampling_defaults)
        return EngineConfig(
            model=self._args.model,
            served_model_name=self._served_model_name,
            llm=LlmRegistration(
                context_length=runtime.max_model_len,
                kv_cache_block_size=runtime.block_size,
                total_kv_blocks=engine.kv_cache_capacity // runtime.block_size,
                max_num_seqs=self._args.max_num_seqs,
                max_num_batched_tokens=runtime.max_num_batched_tokens,
            ),
        )

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        """Chunks with new tokens of each choice; the last one of a choice has `finish_reason`."""
        assert self._llm is not None
        num_prompt, num_new = len(request["token_ids"]), 0

        def usage() -> dict[str, int]:
            return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}

        try:
            params = sampling_params(request, self._defaults)
            prompt = {"prompt_token_ids": list(request["token_ids"])}
            async for output in self._llm.generate(prompt, params, context.id()):
                for completion in output.outputs:
                    num_new += len(completion.token_ids)
                    if not completion.token_ids and completion.finish_reason is None:
                        continue
                    chunk = {"token_ids": list(completion.token_ids), "index": completion.index}
                    chunk |= _logprobs(completion) if params.logprobs is not None else {}
                    if completion.finish_reason is not None:
                        chunk |= {"finish_reason": completion.finish_reason, "completion_usage": usage()}
                    yield chunk
        except RequestError as error:
            if not context.is_stopped():
                raise InvalidArgument(str(error)) from error
            yield {"token_ids": [], "index": 0, "finish_reason": "cancelled", "completion_usage": usage()}

    async def abort(self, context: Any) -> None:
        if self._llm is not None:
            await self._llm.abort(context.id())

    async def cleanup(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None


def sampling_params(request: dict[str, Any], defaults: dict[str, Any]) -> SamplingParams:
    """Raises a RequestError if a value is wrong."""
    options, stopping = request.get("sampling_options") or {}, request.get("stop_conditions") or {}
    values = {**defaults, **{name: value for name in SAMPLING if (value := options.get(name)) is not None}}
    values |= {name: value for name in STOPPING if (value := stopping.get(name)) is not None}
    values.setdefault("max_tokens", None)
    hidden = {*(stopping.get("stop_token_ids") or ()), *(stopping.get("stop_token_ids_hidden") or ())}
    form = {name: value for name in FORMS if (value := (options.get("guided_decoding") or {}).get(name)) is not None}
    logprobs = (request.get("output_options") or {}).get("logprobs")
    return SamplingParams(
        **values,
        stop_token_ids=sorted(hidden),
        structured_outputs=StructuredOutputsParams(**form) if form else None,
        logprobs=None if logprobs is None else int(logprobs),
        output_kind=RequestOutputKind.DELTA,
    )


def _logprobs(completion: CompletionOutput) -> dict[str, Any]:
    entries = completion.logprobs or []
    chosen = [entry[token_id].logprob for token_id, entry in zip(completion.token_ids, entries, strict=True)]
    top = [
        [
            {"rank": one.rank, "token_id": token_id, "token": one.decoded_token, "logprob": one.logprob}
            for token_id, one in entry.items()
        ]
        for entry in entries
    ]
    return {"log_probs": chosen, "top_logprobs": top}


if __name__ == "__main__":
    from dynamo.common.backend.run import run

    run(TwofoldEngine)
