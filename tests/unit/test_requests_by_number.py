"""Requests as ranks know them: by numbers and places, whatever users call them and whenever they come again."""

import os
import signal
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import ThreadExecutor, generate, make_engine, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold.contract import ScheduledBatch, StepResult
from twofold.engine.block_pool import BlockPool
from twofold.engine.drive import Drive
from twofold.engine.engine import LLMEngine
from twofold.engine.request import Request
from twofold.engine.scheduler import Scheduler
from twofold.errors import EngineError
from twofold.outputs import RequestOutput
from twofold.sampling_params import RequestOutputKind, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def executor_of(engine: LLMEngine) -> ThreadExecutor:
    assert isinstance(engine.executor, ThreadExecutor)
    return engine.executor


def finish(engine: LLMEngine) -> dict[str, RequestOutput]:
    finished = {}
    while engine.has_work:
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return finished


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_an_id_that_comes_again_gets_no_token_of_the_old_one(model: PreTrainedModel, num_ranks: int) -> None:
    """An id was aborted and added again while its step was in flight. Ranks found the state by id, so some of them gave
    the new request the old one's token, and the ranks went on with different tokens."""
    engine = make_engine(model, num_ranks, steps_in_flight=2, max_num_seqs=1)
    prompts = [prompt_of(9, 1), prompt_of(9, 2), prompt_of(12, 3)]
    expected = [output.outputs[0].token_ids for output in generate(engine, prompts, GREEDY)]
    for depth in range(1, 4):
        for first, second in ((0, 1), (1, 2), (2, 0)):
            engine.add_request("a", prompts[first], GREEDY)
            for _ in range(depth):
                engine.step()
            engine.abort_request("a")
            engine.add_request("a", prompts[second], GREEDY)
            assert finish(engine)["a"].outputs[0].token_ids == expected[second]
    tokens = [runner.states.token_ids for runner in executor_of(engine).runners]
    for other in tokens[1:]:
        np.testing.assert_array_equal(other, tokens[0])
    engine.shutdown()


def test_ids_that_look_like_answers_of_another_are_ids(model: PreTrainedModel) -> None:
    """Request "a#1" was refused, or took the tokens, because answers of request "a" with n=2 had that name inside."""
    engine = make_engine(model, 2)
    sampled = SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=8)
    [alone] = generate(engine, [prompt_of(9)], GREEDY)
    [both] = generate(engine, [prompt_of(20)], sampled)
    engine.add_request("a", prompt_of(20), sampled)
    engine.add_request("a#1", prompt_of(9), GREEDY)
    engine.add_request("a#0", prompt_of(9), GREEDY)
    finished = finish(engine)
    assert [one.token_ids for one in finished["a"].outputs] == [one.token_ids for one in both.outputs]
    assert finished["a#1"].outputs[0].token_ids == finished["a#0"].outputs[0].token_ids == alone.outputs[0].token_ids
    engine.shutdown()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_answers_of_one_prompt_compute_it_once(
    model: PreTrainedModel, steps_in_flight: int, prompt_logprobs: int | None
) -> None:
    """Five answers computed their prompt five times when they were admitted together, also where its log-probabilities
    were asked for, which only the first answer needs to make."""
    engine = make_engine(model, 2, steps_in_flight=steps_in_flight, block_size=4, max_num_batched_tokens=64)
    prompt, num_answers, max_tokens = prompt_of(150), 5, 6
    params = SamplingParams(
        temperature=1.0, seed=1, n=num_answers, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs
    )
    [output] = generate(engine, [prompt], params)
    batches = [step.batch for step in executor_of(engine).steps]
    num_prefilled = sum(int(batch.num_scheduled_tokens[batch.num_scheduled_tokens > 1].sum()) for batch in batches)
    assert len(prompt) <= num_prefilled <= len(prompt) + num_answers * 4
    for index, answer in enumerate(output.outputs):
        one = replace(params, seed=1 + index, n=1)
        assert generate(engine, [prompt], one)[0].outputs[0].token_ids == answer.token_ids
    if prompt_logprobs is not None:
        assert output.prompt_logprobs is not None
        found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs, prompt, strict=True) if entry]
        np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4)
    engine.shutdown()


def test_exchange_figures_are_those_of_the_steps(model: PreTrainedModel) -> None:
    """What ranks exchange while they measure memory and capture graphs counted into the first step's figure."""
    engine = make_engine(model, 2)
    for runner in executor_of(engine).runners:
        runner.exchange.transport.num_bytes += 10**9  # as after captures
    generate(engine, [prompt_of(64)], SamplingParams(temperature=0, max_tokens=1))
    entry_bytes = sum(spec.entry_width for spec in executor_of(engine).models[0].specs) * 4
    assert engine.stats.exchange_bytes == 64 * entry_bytes  # each rank receives the 32 tokens of the other
    engine.shutdown()


def test_ranks_that_answer_different_steps_are_lost(model: PreTrainedModel) -> None:
    """After a lost answer one rank stayed a step ahead; only the first rank's step was looked at."""

    class Shifted(ThreadExecutor):
        def collect(self, timeout: float | None = None) -> list[StepResult]:
            results = super().collect(timeout)
            return [results[0], replace(results[1], step_id=results[1].step_id + 1)]

    engine = make_engine(model, 2)
    engine.executor.__class__ = Shifted
    engine.add_request("a", prompt_of(9), GREEDY)
    with pytest.raises(EngineError, match="ranks answered different steps: 0, 1"):
        engine.step()
    engine.executor.__class__ = ThreadExecutor
    engine.recover()
    assert len(finish(engine)["a"].outputs[0].token_ids) == 8
    engine.shutdown()


# --- Interrupts, pauses and suspects ---------------------------------------------------------------------------------


def interrupt(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.005)  # the handler runs between two instructions


def test_an_interrupt_at_a_step_s_end_loses_no_token(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal was held back until the step was done, and raised in place of returning what the step gave: a caller
    that went on had one token less, or never heard of the end."""
    engine = make_engine(model, 2)
    [expected] = generate(engine, [prompt_of(9)], GREEDY)
    engine.add_request("a", prompt_of(9), GREEDY, output_kind=RequestOutputKind.DELTA)
    update, tokens, num_interrupts = engine._update, [], 0

    def update_interrupted(results: list[StepResult]) -> list[RequestOutput]:
        interrupt()
        return update(results)

    monkeypatch.setattr(engine, "_update", update_interrupted)
    finished = False
    while engine.has_work:
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            num_interrupts += 1
            continue
        for output in outputs:
            tokens += output.outputs[0].token_ids
            finished |= output.finished
    assert tokens == expected.outputs[0].token_ids
    assert finished
    assert num_interrupts == len(tokens)
    engine.shutdown()


def test_a_second_interrupt_leaves_no_request_behind(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came between two aborts, and the next call computed 2,629 requests that nobody waited for."""
    engine = make_engine(model, 1)
    abort = engine.abort_request

    def abort_interrupted(request_id: str) -> RequestOutput | None:
        interrupt()
        return abort(request_id)

    monkeypatch.setattr(engine, "abort_request", abort_interrupted)

    def drive_and_fail() -> None:
        with Drive(engine) as drive:
            for number in range(5):
                drive.add(str(number), prompt_of(9), GREEDY)
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt):
        drive_and_fail()
    assert not engine.outputs.user_requests
    assert not engine.scheduler.has_unfinished
    engine.shutdown()


def test_a_pause_after_an_interrupt_is_no_slow_step(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who looks around for 20 s after Ctrl-C taught the watchdog that ranks take that long, so that for hundreds
    of steps a hung rank would not have been noticed."""
    engine = make_engine(model, 1)
    generate(engine, [prompt_of(9)], GREEDY)
    collect, limit = engine.executor.collect, engine.watchdog.limit(ScheduledBatch.of([0], [9]))

    def fail(timeout: float | None = None) -> list[StepResult]:
        raise KeyboardInterrupt

    engine.add_request("a", prompt_of(9), GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "collect", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    time.sleep(1.0)
    seconds = engine.stats.step_seconds
    engine.executor.collect = collect  # type: ignore[method-assign]
    assert len(finish(engine)["a"].outputs[0].token_ids) == 8
    assert engine.stats.step_seconds - seconds < 0.9
    assert engine.watchdog.limit(ScheduledBatch.of([0], [9])) < limit + 5
    engine.shutdown()


def test_a_suspect_is_not_blamed_for_a_step_of_another() -> None:
    """No step has suspects of two groups. One suspect was aborted while its step was in flight, so one of another group
    entered the next step; the first step failed, and the second suspect was ended for it."""
    scheduler = Scheduler(BlockPool(100, 4), 8, 64, 1000)
    requests = [Request(np.arange(8) + 10 * i, SamplingParams(max_tokens=9), seed=0) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    for _ in range(2):  # they fail together, and again, which makes each a group
        assert scheduler.schedule() is not None
        assert scheduler.restart(BlockPool(100, 4)) == []
    step = scheduler.schedule()
    assert step is not None
    assert step.batch.numbers.tolist() == [0]
    scheduler.abort(requests[0])
    assert scheduler.schedule() is None, "the suspect's step is still in flight"
    assert scheduler.restart(BlockPool(100, 4)) == []
    assert not requests[1].finished
    assert not requests[1].failed_alone
