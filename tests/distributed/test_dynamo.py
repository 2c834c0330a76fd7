"""The example of a worker for NVIDIA Dynamo, against what ai-dynamo 1.6.1 asks of one.

The package cannot be installed beside ours (its runtime asks for pydantic before 2.14). So what it says of `LLMEngine`
(dynamo/common/backend/engine.py), `WorkerConfig` (worker.py) and requests is written down here: names and parameters.
`benchmarks/dynamo_worker.py` runs the example with the package itself.
"""

import asyncio
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples/dynamo/twofold_engine.py"
FLAGS = ["--dtype", "float32", "--skip-tokenizer-init", "--kv-cache-memory-bytes", "1000000"]
METHODS = {  # of LLMEngine: the first four are abstract, and all but `generate`, which yields, are coroutines
    "from_args": ["argv"],
    "start": ["self", "worker_id"],
    "generate": ["self", "request", "context"],
    "cleanup": ["self"],
    "abort": ["self", "context"],
}
ENGINE_CONFIG = {"model", "served_model_name", "runtime_data", "llm", "model_aliases"}
REGISTRATION = {
    "context_length", "kv_cache_block_size", "total_kv_blocks", "max_num_seqs", "max_num_batched_tokens",
    "data_parallel_size", "data_parallel_start_rank", "bootstrap_host", "bootstrap_port", "enable_eagle",
    "max_gpu_lora_count",
}  # fmt: skip
WORKER_CONFIG = {
    "namespace", "component", "endpoint", "model_name", "served_model_name", "model_input", "endpoint_types",
    "discovery_backend", "request_plane", "event_plane", "use_kv_events", "custom_jinja_template", "tool_call_parser",
    "reasoning_parser", "exclude_tools_when_tool_choice_none", "enable_local_indexer", "enable_kv_routing",
    "metrics_labels", "disaggregation_mode", "health_check_payload", "structural_tag", "route_to_encoder",
    "media_decoder", "media_fetcher", "kv_state_endpoint", "default_thinking_mode", "response_plane",
}  # fmt: skip


class InvalidArgument(Exception):  # noqa: N818 # its name there
    pass


def record(known: set[str]) -> Any:
    """A class of objects with some of the known fields."""

    def make(**given: Any) -> SimpleNamespace:
        assert given.keys() <= known, given.keys() - known
        return SimpleNamespace(**given)

    return make


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    names = ("dynamo", "dynamo.common", "dynamo.common.backend", "dynamo.llm", "dynamo.llm.exceptions")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    backend = modules["dynamo.common.backend"]
    backend.LLMEngine = type("LLMEngine", (), {})
    backend.EngineConfig, backend.LlmRegistration = record(ENGINE_CONFIG), record(REGISTRATION)
    backend.WorkerConfig = record(WORKER_CONFIG)
    modules["dynamo.llm.exceptions"].InvalidArgument = InvalidArgument
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("twofold_dynamo_engine", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        yield made


class Context:
    """Of a request: `stop` is what Dynamo does when a client goes away."""

    def __init__(self, name: str) -> None:
        self._name, self._is_stopped = name, False

    def id(self) -> str:
        return self._name

    def is_stopped(self) -> bool:
        return self._is_stopped

    def stop(self) -> None:
        self._is_stopped = True


def test_the_engine_has_the_methods_of_the_interface(example: Any) -> None:
    for name, parameters in METHODS.items():
        method = getattr(example.TwofoldEngine, name)
        assert list(inspect.signature(method).parameters) == parameters, name
        is_right = inspect.isasyncgenfunction if name == "generate" else inspect.iscoroutinefunction
        assert is_right(method), name


def test_requests_are_answered_aborted_and_refused_as_dynamo_expects(example: Any, tmp_path: Path) -> None:
    prompt, reference = list(range(3, 40)), tiny_model(tiny_config("llama", eos_token_id=None))
    reference.save_pretrained(tmp_path)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    unused = next(token_id for token_id in range(3, 97) if token_id not in expected)
    flags = ["--model", str(tmp_path), *FLAGS]

    async def run() -> None:
        engine, worker = await example.TwofoldEngine.from_args([*flags, "--served-model-name", "tiny"])
        assert (worker.model_name, worker.served_model_name) == (str(tmp_path), "tiny")
        config = await engine.start(7)
        assert config.llm.context_length == reference.config.max_position_embeddings
        assert config.llm.total_kv_blocks > 0

        async def chunks(context: Context, **request: Any) -> list[dict[str, Any]]:
            body = {"token_ids": prompt, "sampling_options": {"temperature": 0}} | request
            return [chunk async for chunk in engine.generate(body, context)]

        try:
            limit = {"max_tokens": 8, "ignore_eos": True, "stop": ["frontend's"], "stop_token_ids_hidden": [unused]}
            answers = await asyncio.gather(
                chunks(Context("a"), stop_conditions=limit),
                chunks(Context("b"), stop_conditions=limit, output_options={"logprobs": "2"}),
                chunks(Context("c"), stop_conditions=limit, sampling_options={"top_k": 1, "n": 2}),
            )
            for answer in answers:
                for index in {chunk["index"] for chunk in answer}:
                    mine = [chunk for chunk in answer if chunk["index"] == index]
                    token_ids = [token_id for chunk in mine for token_id in chunk["token_ids"]]
                    assert token_ids == expected[0, len(prompt) :].tolist()
                    assert [chunk.get("finish_reason") for chunk in mine][-1] == "length"
                assert answer[-1]["completion_usage"]["prompt_tokens"] == len(prompt)
            assert answers[0][-1]["completion_usage"]["total_tokens"] == len(prompt) + 8
            assert {chunk["index"] for chunk in answers[2]} == {0, 1}
            for chunk in answers[1]:
                assert len(chunk["log_probs"]) == len(chunk["top_logprobs"]) == len(chunk["token_ids"])
                assert chunk["top_logprobs"][0][0]["logprob"] == chunk["log_probs"][0]

            context = Context("d")
            endless = engine.generate({"token_ids": prompt, "stop_conditions": {"ignore_eos": True}}, context)
            await anext(endless)
            context.stop()
            await engine.abort(context)
            assert [chunk async for chunk in endless][-1]["finish_reason"] == "cancelled"
            with pytest.raises(InvalidArgument, match="temperature"):
                await chunks(Context("e"), sampling_options={"temperature": -1})
            with pytest.raises(InvalidArgument, match="max_model_len"):
                await chunks(Context("f"), token_ids=[1] * (config.llm.context_length + 1))
        finally:
            await engine.cleanup()
            await engine.cleanup()  # Dynamo may do it twice

    asyncio.run(run())
