"""Losing the ranks: what the scheduler takes back, whom it blames, and when a step counts as hung."""

import threading
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest
from harness import ThreadExecutor, make_engine
from tiny_models import tiny_config, tiny_model

from twofold import LLM
from twofold.contract import ScheduledBatch, Step
from twofold.engine import engine as engine_module
from twofold.engine.block_pool import BlockPool
from twofold.engine.request import Request, RequestStatus
from twofold.engine.scheduler import Scheduler
from twofold.engine.watchdog import SLACK, Watchdog
from twofold.errors import EngineError
from twofold.outputs import OutputKind
from twofold.sampling_params import SamplingParams


def make_scheduler(names: str, prompt: int = 8, seqs: int = 8) -> Scheduler:
    scheduler = Scheduler(BlockPool(100, 4), seqs, 64, 1000)
    for name in names:
        add(scheduler, name, prompt)
    return scheduler


def add(scheduler: Scheduler, name: str, prompt: int = 8) -> Request:
    """Requests that begin alike would wait for each other: each begins with its name."""
    request = Request(np.append(ord(name), np.arange(prompt - 1)), SamplingParams(max_tokens=9), seed=0)
    scheduler.add(request)
    return request


def names_of(requests: Iterable[Request]) -> str:
    return "".join(chr(request.token_ids[0]) for request in requests)


def next_names(scheduler: Scheduler, answer: bool = True) -> str:
    """Runs a step; the requests in it."""
    step = scheduler.schedule()
    assert step is not None
    requests = [scheduler._requests[number] for number in step.batch.numbers.tolist()]
    if answer:
        for request in scheduler.complete(step.step_id, step.batch.numbers.tolist()):
            scheduler.append(request, 1)
    return names_of(requests)


def fail(scheduler: Scheduler) -> str:
    """A step that never comes back; the requests that are blamed for it."""
    next_names(scheduler, answer=False)
    return names_of(scheduler.restart(BlockPool(100, 4)))


def test_suspects_run_one_at_a_time_and_in_order() -> None:
    """Guards isolation: of those that were in the failed step a step has one at most, until it is past it."""
    scheduler = make_scheduler("abcd", seqs=3)
    assert next_names(scheduler) == "abc"
    assert fail(scheduler) == ""
    assert scheduler.num_in_flight == 0
    assert scheduler.block_pool.is_idle()
    assert [next_names(scheduler) for _ in range(4)] == ["a", "ab", "abc", "abc"]  # d was not there, and still waits


def test_the_one_that_fails_twice_is_blamed_alone() -> None:
    """Guards the others, which were in both failed steps, too, but have had a token since the first."""
    scheduler = make_scheduler("abc")
    assert fail(scheduler) == ""
    assert next_names(scheduler) == "a"
    assert fail(scheduler) == "b"
    assert [next_names(scheduler) for _ in range(3)] == ["a", "ac", "ac"]


def test_a_suspect_that_is_past_the_point_is_one_no_more() -> None:
    """Guards long prompts: twice lost at different points of a prefill is bad luck."""
    scheduler = make_scheduler("ab", prompt=200)
    assert fail(scheduler) == ""
    assert [next_names(scheduler) for _ in range(2)] == ["a", "a"]
    assert fail(scheduler) == ""
    assert next_names(scheduler) == "a"
    assert fail(scheduler) == "a"


def test_an_aborted_request_is_not_blamed() -> None:
    """Guards requests that were gone before the step failed."""
    scheduler = make_scheduler("")
    request = add(scheduler, "a")
    assert fail(scheduler) == ""
    next_names(scheduler, answer=False)
    scheduler.abort(request)
    assert scheduler.restart(BlockPool(100, 4)) == []
    assert scheduler.is_idle


def test_a_lost_step_loses_no_token() -> None:
    """Guards steps in flight: their placeholders are taken back, known tokens stay."""
    scheduler = make_scheduler("a")
    request = scheduler._waiting[0]
    next_names(scheduler)
    next_names(scheduler, answer=False)
    next_names(scheduler, answer=False)
    assert request.num_placeholders == 2
    scheduler.restart(BlockPool(100, 4))
    assert (request.num_placeholders, request.num_tokens, request.num_computed_tokens) == (0, 9, 0)
    step = scheduler.schedule()
    assert step is not None
    assert step.removed == ()
    assert len(step.new[0].token_ids) == 9


class FailingExecutor(ThreadExecutor):
    """Loses its ranks at the steps of these numbers."""

    fail_at: ClassVar[set[int]] = set()
    count = 0

    def submit(self, step: Step) -> None:
        cls = type(self)
        cls.count += 1
        if cls.count in cls.fail_at:
            raise EngineError("a rank is lost")
        super().submit(step)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_answers_do_not_depend_on_losses(num_ranks: int, in_flight: int) -> None:
    """Guards recovery of the engine by itself: greedy and drawn, with penalties and log-probabilities, deltas too."""
    model = tiny_model(tiny_config("llama"))
    prompts = [list(range(1, 40)), [5, 6, 7], list(range(20, 90))]
    params = [
        SamplingParams(temperature=0, max_tokens=12, frequency_penalty=0.5),
        SamplingParams(seed=3, max_tokens=20, logprobs=2),
        SamplingParams(temperature=0, max_tokens=5),
    ]

    def run(fail_at: set[int]) -> dict[str, Any]:
        engine = make_engine(model, num_ranks, max_num_batched_tokens=24, steps_in_flight=in_flight)
        runtime, num_blocks = engine.runtime, engine.block_pool.num_blocks
        FailingExecutor.fail_at, FailingExecutor.count = fail_at, 0
        engine._make_executor = lambda start_timeout: FailingExecutor(model, runtime, num_blocks)
        engine.recover()
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(number), prompt, one, output_kind=OutputKind.DELTA)
        tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        while engine.has_unfinished_requests or engine.scheduler.num_in_flight:
            try:
                outputs = engine.step()
            except EngineError:
                outputs = engine.recover()
            for output in outputs:
                tokens[output.request_id] += output.outputs[0].token_ids
        assert engine.is_idle
        assert engine.stats.num_restarts == 1 + len(fail_at)
        engine.shutdown()
        return tokens

    expected = run(set())
    assert [len(expected[name]) for name in expected] == [12, 20, 5]
    for fail_at in ({1}, {3}, {7}, {2, 20}):
        assert run(fail_at) == expected
    assert threading.active_count() < 20


POISON = 9


class PoisonedExecutor(ThreadExecutor):
    """Loses its ranks with each new prompt that begins with POISON."""

    def submit(self, step: Step) -> None:
        if POISON in [new.token_ids[0] for new in step.new]:
            raise EngineError("a rank is lost")
        super().submit(step)


@pytest.fixture
def offline() -> Iterator[LLM]:
    """An LLM on threads, that can have new ones."""
    llm = LLM.__new__(LLM)
    model, llm._ids = tiny_model(tiny_config("llama")), count()
    llm.engine = engine = make_engine(model, 2)
    runtime, num_blocks = engine.runtime, engine.block_pool.num_blocks
    engine._make_executor = lambda start_timeout: PoisonedExecutor(model, runtime, num_blocks)
    yield llm
    llm.shutdown()


def test_generate_gives_up_only_what_fails_twice(offline: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Guards a batch of many prompts from one of them, and who asks from not hearing of it."""
    prompts = [[5, 6, 7], [POISON, 6, 7], list(range(20, 90))]
    params = SamplingParams(temperature=0, max_tokens=12)
    expected = [output.outputs[0] for output in offline.generate(prompts, params, use_tqdm=False)]
    offline.engine.recover()
    outputs = offline.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert [output.outputs[0].token_ids for output in outputs] == [expected[0].token_ids, [], expected[2].token_ids]
    assert offline.engine.is_idle
    assert caplog.text.count("a rank is lost; starting new ranks") == 2


def test_generate_ends_when_no_ranks_come_up(offline: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards callers from waiting without an end, and the next call from what this one asked for."""
    make, tries = offline.engine._make_executor, count()
    assert make is not None

    def refuse(start_timeout: float | None) -> ThreadExecutor:
        next(tries)
        raise EngineError("no memory")

    monkeypatch.setattr(engine_module, "RESTART_DELAYS", (0.0, 0.0, 0.0))
    offline.engine.recover()
    offline.engine._make_executor = refuse
    with pytest.raises(EngineError, match="the ranks did not start in 3 tries"):
        offline.generate([[POISON], [5]], use_tqdm=False)
    assert next(tries) == 3
    assert not offline.engine.has_unfinished_requests
    offline.engine._make_executor = make
    offline.engine.recover()
    (output,) = offline.generate([[5, 6, 7]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3


def batch(computed: int, scheduled: int) -> ScheduledBatch:
    return ScheduledBatch.of([computed], [scheduled])


def test_the_limit_of_a_step_grows_with_its_work() -> None:
    """Guards long prompts from the watchdog, and short steps from waiting for long."""
    watchdog = Watchdog(5.0, "cpu", 10**8)
    watchdog.observe(batch(0, 1000), 2.0)
    small, large, late = (watchdog.limit(batch(*work)) for work in ((100, 1), (0, 10_000), (100_000, 10_000)))
    assert 5 < small < 8
    assert large > SLACK * 20
    assert late > 10 * large
    for _ in range(500):  # a slow step of long ago counts no more
        watchdog.observe(batch(100, 1), 0.01)
    assert watchdog.limit(batch(100, 1)) < 5.2


def test_a_first_step_has_ample_time_and_a_limit() -> None:
    """Guards clients of ranks that hang at once, and slow machines and compilers from being taken for hung ones."""
    small, cpu, cuda = Watchdog(20.0, "cpu", 10**8), Watchdog(20.0, "cpu", 8 * 10**9), Watchdog(20.0, "cuda", 8 * 10**9)
    assert 20 < small.limit(batch(0, 10)) < 30
    assert 60 < cpu.limit(batch(0, 10)) < 300
    assert cpu.limit(batch(0, 2048)) > 2048 * 2  # two seconds a token
    assert 300 < cuda.limit(batch(0, 10)) < 360
    assert 600 < cuda.limit(batch(0, 32_768)) < 1800
    cuda.observe(batch(0, 10), 0.01)
    known = cuda.limit(batch(0, 10))
    assert known < 21
    cuda.restart()
    assert cuda.limit(batch(0, 10)) == known + 300


def test_statuses() -> None:
    """Guards the reason that users see."""
    assert RequestStatus.FINISHED_ERROR.finish_reason == "error"
