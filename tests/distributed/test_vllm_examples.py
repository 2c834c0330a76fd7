"""What vLLM's offline examples do, with only the import and the model changed, on real ranks."""

import asyncio
import json
import os
import re
import signal
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from twofold import LLM, AsyncEngineArgs, AsyncLLM, EngineArgs, LLMEngine, RequestError, SamplingParams
from twofold.errors import EngineError
from twofold.metrics import Counter, Gauge, Histogram, Vector
from twofold.sampling_params import RequestOutputKind, StructuredOutputsParams

PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads of a rank wait for each other where others use the machine, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """With the arguments that examples give."""
    parser = EngineArgs.add_cli_args(ArgumentParser())
    parser.set_defaults(model="demo", max_model_len=1024)
    args = vars(parser.parse_args(["--dtype", "float", "-tp", "1", "--max-logprobs", "-1"]))
    with LLM(**args, enable_prefix_caching=True, gpu_memory_utilization=0.4, disable_log_stats=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, demo_model_directory: Path) -> dict[str, Any]:
    """Arguments of an engine that starts at once: the demo's tokenizer, and few random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.from_pretrained(demo_model_directory)
    type(config).from_dict(
        {**config.to_dict(), **small, "head_dim": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    ).save_pretrained(folder)
    return {
        "model": str(folder),
        "tokenizer": str(demo_model_directory),
        "load_format": "dummy",
        "max_model_len": 256,
    }


def texts(llm: LLM, prompts: list[str], params: SamplingParams = GREEDY) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


def test_basic_and_generate(llm: LLM) -> None:
    """The model's default parameters, changed by assignment; the arguments that ask for nothing."""
    params = llm.get_default_sampling_params()
    params.max_tokens = 6
    params.temperature = 0
    outputs = llm.generate(PROMPTS, params, use_tqdm=False, lora_request=None, priority=None)
    assert [output.prompt for output in outputs] == PROMPTS
    assert outputs[2].outputs[0].text.startswith(" Paris")
    assert 1 <= len(llm.generate(PROMPTS[0], use_tqdm=False)[0].outputs[0].token_ids) <= 16
    assert llm.get_tokenizer().decode(outputs[2].outputs[0].token_ids) == outputs[2].outputs[0].text  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="requests run in the order"):
        llm.generate(PROMPTS, params, priority=[0, 1, 0])


def test_chat(llm: LLM) -> None:
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    one = llm.chat(conversation, GREEDY, use_tqdm=False)
    several = llm.chat([conversation] * 2, GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in several] == [one[0].outputs[0].text] * 2


def test_structured_outputs_and_chat_with_tools(llm: LLM) -> None:
    """A form of each kind; and a call of a tool, whose result the next answer is told."""
    for form, is_right in (
        ({"choice": ["Positive", "Negative"]}, lambda text: text in ("Positive", "Negative")),
        ({"regex": "[a-z]{3}@[a-z]{3}"}, lambda text: re.fullmatch("[a-z]{3}@[a-z]{3}", text)),
        ({"grammar": 'root ::= "SELECT " ("a" | "b")'}, lambda text: text in ("SELECT a", "SELECT b")),
    ):
        params = SamplingParams(temperature=0, max_tokens=12, structured_outputs=StructuredOutputsParams(**form))
        assert is_right(texts(llm, PROMPTS[:1], params)[0])

    template = "{{ tools | tojson }}{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}assistant: "
    weather = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools = [{"type": "function", "function": weather}]
    call = {"const": {"name": "weather", "arguments": {"city": "Dallas"}}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "How warm is it in Dallas?"}]}]
    params = SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(json=call))
    [output] = llm.chat(messages, params, use_tqdm=False, tools=tools, chat_template=template)
    assert output.prompt is not None
    assert output.prompt.startswith('[{"type": "function"')
    assert json.loads(output.outputs[0].text) == call["const"]
    messages += [
        {"role": "assistant", "content": output.outputs[0].text},
        {"role": "tool", "content": "29 degrees", "tool_call_id": "abcdefghi"},
    ]
    [output] = llm.chat(messages, GREEDY, use_tqdm=False, tools=tools, chat_template=template)
    assert output.prompt is not None
    assert output.prompt.endswith("tool: 29 degrees\nassistant: ")
    assert output.outputs[0].text


def test_prefix_caching(llm: LLM) -> None:
    """The same answers with a cold and a warm cache, and fewer tokens to compute."""
    prefix = "You are an expert school principal, skilled in effectively managing faculty and staff. " * 4
    prompts = [prefix + prompt for prompt in PROMPTS]
    assert llm.reset_prefix_cache(reset_running_requests=True)
    cold = texts(llm, prompts)
    warm = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in warm] == cold
    assert all(output.num_cached_tokens > 50 for output in warm)


def test_metrics_and_profiling(llm: LLM) -> None:
    """All that vLLM's reader has: numbers, and how many values are at most each limit."""

    def read() -> dict[str, Any]:
        metrics = llm.get_metrics()
        assert all(metric.labels == {"model_name": "demo"} and not isinstance(metric, Vector) for metric in metrics)
        return {metric.name.removeprefix("twofold:"): metric for metric in metrics}

    before = read()
    llm.start_profile()
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert len(llm.stop_profile()) == 1
    after = read()
    for name in ("computed_tokens", "engine_steps"):
        assert isinstance(after[name], Counter)
        assert after[name].value > before[name].value
    assert isinstance(after["num_requests_running"], Gauge)
    assert after["num_requests_running"].value == 0
    for name, values in {
        "request_prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
        "request_generation_tokens": [len(output.outputs[0].token_ids) for output in outputs],
        "time_to_first_token_seconds": [output.metrics.ttft for output in outputs if output.metrics],
        "e2e_request_latency_seconds": [output.metrics.e2e for output in outputs if output.metrics],
    }.items():
        old, new = before[name], after[name]
        assert isinstance(new, Histogram)
        assert new.count - old.count == new.buckets["+Inf"] - old.buckets["+Inf"] == len(values)
        assert new.sum - old.sum == pytest.approx(sum(values))
        for limit in new.buckets:
            assert new.buckets[limit] - old.buckets[limit] == sum(value <= float(limit) for value in values)


def test_all_log_probabilities_and_a_truncated_prompt(llm: LLM, smollm2: PreTrainedModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, truncate_prompt_tokens=3)
    [output] = llm.generate(PROMPTS[2], params, use_tqdm=False)
    assert len(output.prompt_token_ids) == 3
    assert output.outputs[0].logprobs is not None
    entries = output.outputs[0].logprobs[0]
    with torch.no_grad():
        expected = smollm2(torch.tensor([output.prompt_token_ids])).logits[0, -1].log_softmax(-1)
    mine = torch.tensor([entries[token].logprob for token in range(len(expected))])
    assert (mine - expected).abs().max() < 1e-4


def test_llm_engine(llm: LLM) -> None:
    """The step loop of a script: requests come while others run, and one is aborted."""
    engine = llm.llm_engine
    waiting = [(prompt, SamplingParams(temperature=0, max_tokens=6, logprobs=1)) for prompt in PROMPTS]
    number, done = 0, {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            prompt, params = waiting.pop(0)
            engine.add_request(str(number), prompt, params)
            engine.add_request(f"unwanted {number}", prompt, params)
            engine.abort_request([f"unwanted {number}", "unknown"])
            with pytest.raises(RequestError, match="abort them, or wait for them"):
                engine.reset_prefix_cache(reset_running_requests=True)
            number += 1
        done.update({output.request_id: output for output in engine.step() if output.finished})
    assert [done[str(number)].outputs[0].text for number in range(3)] == texts(llm, PROMPTS)


def test_reproducibility_and_an_engine_from_arguments(tiny: dict[str, Any]) -> None:
    """The seed of the engine decides all that is drawn."""
    drawn = []
    for _ in range(2):
        engine = LLMEngine.from_engine_args(EngineArgs(**tiny, seed=42))
        engine.add_request("0", PROMPTS[0], SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8))
        while engine.has_unfinished_requests():
            outputs = engine.step()
        drawn.append(outputs[0].outputs[0].token_ids)
        engine.shutdown()
    assert drawn[0] == drawn[1]


def test_context_extension() -> None:
    """RoPE scaled by YaRN: twice the model's positions, and still an answer."""
    yarn = {"rope_theta": 100000.0, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}
    with LLM("demo", hf_overrides={"rope_parameters": yarn, "max_model_len": 16384}) as llm:
        assert llm.engine.runtime.max_model_len == 16384
        assert texts(llm, PROMPTS[2:])[0].startswith(" Paris")


def test_async_llm(tiny: dict[str, Any]) -> None:
    """Many coroutines, each with its kind of outputs; one that stops early leaves nothing behind."""
    with LLM(**tiny) as llm:
        expected = texts(llm, PROMPTS)

    async def stream(engine: AsyncLLM, number: int, kind: RequestOutputKind) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=6, output_kind=kind)
        outputs = [output async for output in engine.generate(PROMPTS[number], params, f"request-{number}")]
        assert outputs[-1].finished
        assert all(output.request_id == f"request-{number}" for output in outputs)
        return [output.outputs[0].text for output in outputs]

    async def run() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**tiny))
        kinds = (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)
        deltas, whole, final = await asyncio.gather(*(stream(engine, i, kind) for i, kind in enumerate(kinds)))
        assert ["".join(deltas), whole[-1], *final] == expected
        assert len(deltas) > 1
        answers = engine.generate(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True), "left")
        async for _ in answers:
            break
        assert not await engine.reset_prefix_cache()
        with pytest.raises(RequestError, match="reset_running_requests=True is not supported while requests run"):
            await engine.reset_prefix_cache(reset_running_requests=True)
        assert engine.get_num_unfinished_requests() == 1
        await answers.aclose()  # type: ignore[attr-defined]
        await engine.wait_for_requests_to_drain(drain_timeout=10)
        while not await engine.reset_prefix_cache():  # blocks are free after the step under way
            await asyncio.sleep(0.01)
        await engine.start_profile()
        assert await engine.stop_profile() == [None]
        assert engine.tokenizer is engine.get_tokenizer()
        wrong = SamplingParams()
        wrong.temperature = -1
        with pytest.raises(RequestError, match="temperature"):
            await anext(engine.generate("Hi", wrong, "wrong"))
        assert not engine.errored
        engine.shutdown()
        assert engine.errored
        assert not engine.is_running
        assert "make a new one" in str(engine.dead_error)

    asyncio.run(run())


def test_async_llm_before_its_first_request(tiny: dict[str, Any]) -> None:
    """A cache is reset before anything was asked, and a rank that ends during a profile is replaced."""

    async def run() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**tiny))
        assert await engine.reset_prefix_cache()
        os.kill(engine._sync.engine.executor.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="rank 0"):
            await engine.stop_profile()
        answers = [one async for one in engine.generate("Hi", SamplingParams(max_tokens=2, ignore_eos=True), "0")]
        assert len(answers[-1].outputs[0].token_ids) == 2
        engine.shutdown()

    asyncio.run(run())
