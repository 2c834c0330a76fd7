"""Losing the ranks: what the scheduler takes back, whom it blames, and when a step counts as hung."""

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest
from harness import ThreadExecutor, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_model

from twofold import LLM
from twofold.contract import ScheduledBatch, Step
from twofold.engine import engine as engine_module
from twofold.engine.block_pool import BlockPool
from twofold.engine.request import Request, RequestStatus
from twofold.engine.scheduler import Scheduler
from twofold.engine.watchdog import SLACK, Watchdog
from twofold.errors import EngineError
from twofold.sampling_params import RequestOutputKind, SamplingParams


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


def test_after_a_failure_all_go_on_together() -> None:
    """Each suspect ran alone until it was past the point, so with 24 streams readers waited for 25 s although the ranks
    were back after 4 s. No other request enters until all are past it."""
    scheduler = make_scheduler("abc")
    assert next_names(scheduler) == "abc"
    assert fail(scheduler) == ""
    assert scheduler.num_in_flight == 0
    assert scheduler.block_pool.is_idle()
    add(scheduler, "d")
    assert [next_names(scheduler) for _ in range(3)] == ["abc", "abcd", "abcd"]


@pytest.mark.parametrize("name", ["a", "ab"])
def test_a_second_loss_right_after_the_first_blames_nobody(name: str) -> None:
    """One of 336 streams was lost when a rank was killed while the streams recovered from the kill before."""
    scheduler = make_scheduler(name)
    assert fail(scheduler) == ""
    assert fail(scheduler) == ""
    assert next_names(scheduler) == "a"
    assert next_names(scheduler) == name


def test_a_group_that_fails_again_is_halved_until_one_is_found() -> None:
    """The example of the scheduler's docstring: those who were in every failed step, too, are not blamed."""
    scheduler = make_scheduler("abcd")
    assert fail(scheduler) == ""
    add(scheduler, "e")  # it waits until the others are past the point
    assert fail(scheduler) == ""
    assert next_names(scheduler) == "ab"
    assert fail(scheduler) == ""  # a b c d
    assert next_names(scheduler) == "ab"
    assert fail(scheduler) == ""  # a b c
    assert next_names(scheduler) == "ab"
    assert fail(scheduler) == "c"  # a b c
    assert [next_names(scheduler) for _ in range(4)] == ["ab", "abd", "abde", "abde"]


def test_a_suspect_that_is_past_the_point_is_one_no_more() -> None:
    """Guards long prompts: losses at later and later points of a prefill are bad luck, as often as they come."""
    scheduler = make_scheduler("a", prompt=300)
    for num_steps in range(1, 4):
        assert [next_names(scheduler) for _ in range(num_steps)] == ["a"] * num_steps
        assert fail(scheduler) == ""
    for _ in range(2):
        assert fail(scheduler) == "", "as a suspect, but then it gets past the point"
        assert [next_names(scheduler) for _ in range(5)] == ["a"] * 5
        assert fail(scheduler) == ""
    assert fail(scheduler) == "", "before the point of the last time, which still counts"
    assert [next_names(scheduler) for _ in range(2)] == ["a", "a"]
    assert fail(scheduler) == "a"


def test_an_aborted_request_is_not_blamed() -> None:
    """Guards requests that were gone before the step failed."""
    scheduler = make_scheduler("")
    request = add(scheduler, "a")
    assert fail(scheduler) == ""
    assert fail(scheduler) == ""
    next_names(scheduler, answer=False)
    scheduler.abort(request)
    assert scheduler.restart(BlockPool(100, 4)) == []
    assert scheduler.is_idle


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_only_the_poisoned_request_is_ended(data: st.DataObject) -> None:
    """Guards crowds of any size from one request that makes every step with a certain token of it fail, and from ranks
    that are killed in between. Each failure is a restart, so there must be few."""
    num_requests = data.draw(st.integers(1, 24), "requests")
    poisoned = data.draw(st.none() | st.integers(0, num_requests - 1), "poisoned")
    num_kills = data.draw(st.integers(0, 2 if poisoned is None else 1), "kills")  # nobody fails three times by them
    steps_in_flight = data.draw(st.integers(1, 2), "steps in flight")
    num_blocks, max_num_seqs = data.draw(st.integers(30, 200), "blocks"), data.draw(st.integers(1, 24), "seqs")
    scheduler = Scheduler(BlockPool(num_blocks, 4), max_num_seqs, data.draw(st.integers(8, 64), "budget"), 100)
    requests = []
    for i in range(num_requests):
        prompt = np.append(i, np.arange(data.draw(st.integers(0, 60))))
        requests.append(Request(prompt, SamplingParams(max_tokens=data.draw(st.integers(1, 12))), seed=0))
        scheduler.add(requests[-1])
    fatal = data.draw(st.integers(0, requests[poisoned].max_num_tokens - 2), "token") if poisoned is not None else -1
    kills = set(data.draw(st.lists(st.integers(0, 40), min_size=num_kills, max_size=num_kills), "kills at"))
    num_restarts, ended, in_flight = 0, [], deque[Step]()

    def fails(step: Step, number: int) -> bool:
        batch = step.batch
        ends = batch.num_computed_tokens + batch.num_scheduled_tokens
        computed = zip(batch.numbers.tolist(), batch.num_computed_tokens.tolist(), ends.tolist(), strict=True)
        return number in kills or any(one == poisoned and start <= fatal < end for one, start, end in computed)

    for number in range(3000):
        while len(in_flight) < steps_in_flight and (step := scheduler.schedule()):
            in_flight.append(step)
        if not in_flight:
            break
        step = in_flight.popleft()
        if fails(step, number):
            in_flight.clear()
            num_restarts += 1
            ended += scheduler.restart(BlockPool(num_blocks, 4))
            assert not scheduler.restart(BlockPool(num_blocks, 4)), "the engine calls it again with new ranks"
        else:
            for request in scheduler.complete(step.step_id, step.batch.numbers.tolist()):
                scheduler.append(request, 1)
    assert scheduler.is_idle
    assert ended == ([] if poisoned is None else [requests[poisoned]])
    assert {request.finish_reason for request in requests if request not in ended} <= {"length"}
    most = min(num_requests, max_num_seqs)
    assert num_restarts <= num_kills + (0 if poisoned is None else 3 + math.ceil(math.log2(most)))


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
            engine.add_request(str(number), prompt, one, output_kind=RequestOutputKind.DELTA)
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
    model, llm._ids, llm._lock = tiny_model(tiny_config("llama")), count(), threading.Lock()
    llm.engine = engine = make_engine(model, 2)
    runtime, num_blocks = engine.runtime, engine.block_pool.num_blocks
    engine._make_executor = lambda start_timeout: PoisonedExecutor(model, runtime, num_blocks)
    yield llm
    llm.shutdown()


def test_generate_gives_up_only_what_fails_again_and_again(offline: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """Guards a batch of many prompts from one of them, and who asks from not hearing of it."""
    prompts = [[5, 6, 7], [POISON, 6, 7], list(range(20, 90))]
    params = SamplingParams(temperature=0, max_tokens=12)
    expected = [output.outputs[0] for output in offline.generate(prompts, params, use_tqdm=False)]
    offline.engine.recover()
    outputs = offline.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert [output.outputs[0].token_ids for output in outputs] == [expected[0].token_ids, [], expected[2].token_ids]
    assert offline.engine.is_idle
    assert caplog.text.count("a rank is lost; starting new ranks") == 5  # all, all, the last two, the second twice


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
