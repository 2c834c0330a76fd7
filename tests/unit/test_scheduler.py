"""The scheduler, alone and against fake ranks that keep token ids where real ones keep keys and values."""

import random
import time
from collections import deque
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from twofold.contract import Step
from twofold.engine.block_pool import NULL_BLOCK_ID, BlockPool
from twofold.engine.request import Request, RequestStatus
from twofold.engine.scheduler import Scheduler
from twofold.errors import EngineError, RequestError
from twofold.sampling_params import SamplingParams

EOS = 0
VOCAB_SIZE = 6


NAMES: dict[int, str] = {}  # number of a request -> what the test calls it


class NamedRequest(Request):
    name: str


class NamedScheduler(Scheduler):
    """Knows its requests, and the ranks' states of them, by name."""

    def add(self, request: NamedRequest) -> None:
        super().add(request)
        NAMES[request.number] = request.name

    def schedule(self) -> Step | None:
        step = super().schedule()
        if step is not None:
            states = self.__dict__.setdefault("states", {})
            self.removed = tuple(states.pop(i) for i in step.removed)
            states.update({new.state_idx: NAMES[new.number] for new in step.new})
            self.new = [NAMES[new.number] for new in step.new]
            assert len(set(states.values())) == len(states)
        return step

    def request(self, name: str) -> Request:
        return next(request for request in self._requests.values() if request.name == name)


def make_request(name="a", prompt=8, max_tokens=4, *, eos=frozenset(), seed=0, **params) -> NamedRequest:
    """`prompt` is its tokens, or how many."""
    tokens = np.arange(10, 10 + prompt) if isinstance(prompt, int) else prompt
    request = NamedRequest(tokens, SamplingParams(max_tokens=max_tokens, **params), seed=seed, eos_token_ids=eos)
    request.name = name
    return request


def make_scheduler(num_blocks=100, block_size=4, seqs=8, budget=32, max_model_len=1000, caching=True) -> NamedScheduler:
    return NamedScheduler(BlockPool(num_blocks, block_size, caching), seqs, budget, max_model_len)


def next_step(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    assert step is not None
    return step


def rows(step: Step) -> dict[str, tuple[int, int, bool]]:
    """request -> (computed, scheduled, samples)"""
    batch = step.batch
    columns = (batch.num_computed_tokens, batch.num_scheduled_tokens, batch.num_sampled_tokens > 0)
    names = [NAMES[number] for number in batch.numbers.tolist()]
    return dict(zip(names, zip(*(c.tolist() for c in columns), strict=True), strict=True))


def take(scheduler: Scheduler, step_id: int, tokens: dict[str, int]) -> list[tuple[str, int]]:
    """Gives a step's tokens to their requests, as the engine does; what was given."""
    numbers = [number for number, name in NAMES.items() if name in tokens]
    taken = []
    for request in scheduler.complete(step_id, numbers):
        scheduler.append(request, tokens[request.name])
        taken.append((request.name, tokens[request.name]))
    return taken


def answer(scheduler: Scheduler, step: Step, token=7) -> list[tuple[str, int]]:
    tokens = {name: token for name, (_, _, samples) in rows(step).items() if samples}
    return take(scheduler, step.step_id, tokens)


# --- Request ---------------------------------------------------------------------------------------------------------


def test_tokens_grow_behind_stable_views():
    """A NewRequest keeps a view: tokens appended later must not show in it, however often the buffer is moved."""
    request = make_request(prompt=3, max_tokens=None)
    before = request.token_ids
    for token in range(500):
        assert request.append_token(token) is None
    assert before.tolist() == [10, 11, 12]
    assert request.token_ids.tolist() == [10, 11, 12, *range(500)]
    assert request.token_ids.dtype == np.int32
    assert request.prompt_token_ids.tolist() == [10, 11, 12]
    assert request.output_token_ids.tolist() == list(range(500))
    with pytest.raises(ValueError, match="read-only"):
        before[0] = 1


@pytest.mark.parametrize(
    ("params", "tokens", "status", "stop_reason"),
    [
        ({}, [5, EOS], RequestStatus.FINISHED_STOPPED, None),
        ({"ignore_eos": True, "max_tokens": 2}, [EOS, EOS], RequestStatus.FINISHED_LENGTH, None),
        ({"stop_token_ids": [5]}, [4, 5], RequestStatus.FINISHED_STOPPED, 5),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, [4, EOS], RequestStatus.FINISHED_STOPPED, EOS),
        ({"stop_token_ids": [5], "min_tokens": 3}, [5, EOS, 5], RequestStatus.FINISHED_STOPPED, 5),
        ({"max_tokens": 3}, [4, 4, 4], RequestStatus.FINISHED_LENGTH, None),
        ({"max_tokens": 2}, [4, EOS], RequestStatus.FINISHED_STOPPED, None),
    ],
)
def test_a_request_stops_where_vllm_stops(params, tokens, status, stop_reason):
    """Which token ends a request, with which status and stop reason; the token itself is kept."""
    request = make_request(**{"max_tokens": 10, "eos": frozenset({EOS}), **params})
    assert [request.append_token(token) for token in tokens] == [None] * (len(tokens) - 1) + [status]
    assert request.stop_reason == stop_reason
    assert request.output_token_ids.tolist() == tokens


def test_finish_reasons_are_those_of_the_api():
    """Clients switch on these strings."""
    reasons = {status.name: status.finish_reason for status in RequestStatus if status.finished}
    assert reasons == {
        "FINISHED_STOPPED": "stop",
        "FINISHED_LENGTH": "length",
        "FINISHED_ABORTED": "abort",
        "FINISHED_ERROR": "error",
    }
    assert make_request().finish_reason is None


# --- One step after another ------------------------------------------------------------------------------------------


def test_prompt_is_chunked_and_samples_once():
    """Only the chunk that reaches the prompt's end samples, even if it is one token short of looking like a decode."""
    scheduler = make_scheduler(budget=4)
    scheduler.add(make_request(prompt=9))
    steps = [next_step(scheduler) for _ in range(3)]
    assert [rows(step)["a"] for step in steps] == [(0, 4, False), (4, 4, False), (8, 1, True)]
    assert [len(step.new) for step in steps] == [1, 0, 0]
    state = steps[0].new[0].state_idx
    assert [step.new_block_ids for step in steps] == [{}, {state: [2]}, {state: [3]}]
    assert steps[0].new[0].block_ids == [1]
    assert steps[0].new[0].token_ids.tolist() == list(range(10, 19))
    assert [answer(scheduler, step) for step in steps] == [[], [], [("a", 7)]]


def test_decodes_go_before_prompts():
    """A long prompt takes what the decodes leave; it never stops them."""
    scheduler = make_scheduler(budget=8, caching=False)
    scheduler.add(make_request("a", 4))
    answer(scheduler, next_step(scheduler))
    scheduler.add(make_request("b", 20))
    assert rows(next_step(scheduler)) == {"a": (4, 1, True), "b": (0, 7, False)}


def test_pipelined_decode_needs_no_token():
    """Step n+1 is scheduled before step n's token is known: one token, at the placeholder's position."""
    scheduler = make_scheduler()
    scheduler.add(make_request(prompt=5, max_tokens=3))
    steps = [next_step(scheduler) for _ in range(3)]
    assert [rows(step)["a"] for step in steps] == [(0, 5, True), (5, 1, True), (6, 1, True)]
    assert scheduler.schedule() is None, "its third and last token is in flight"
    assert [answer(scheduler, step, 7 + i) for i, step in enumerate(steps)] == [[("a", 7)], [("a", 8)], [("a", 9)]]
    assert scheduler.is_idle


@pytest.mark.parametrize("limits", [{"max_model_len": 7}, {"num_blocks": 3, "block_size": 3}])
def test_length_limits_stop_scheduling_in_time(limits):
    """max_model_len, and a pool that one request alone has filled, end it by "length", not by a dead lock."""
    scheduler = make_scheduler(**limits)
    request = make_request(prompt=5, max_tokens=None)
    scheduler.add(request)
    for _ in range(2):
        first, second = scheduler.schedule(), scheduler.schedule()
        for step in filter(None, (first, second)):
            answer(scheduler, step)
    assert request.num_tokens == 7
    assert request.finish_reason == "length"
    assert scheduler.is_idle


def test_token_after_the_end_is_dropped():
    """A stop token in step n ends the request; step n+1 has sampled a token already, which must be dropped."""
    scheduler = make_scheduler()
    request = make_request(eos=frozenset({EOS}))
    scheduler.add(request)
    first, second = next_step(scheduler), next_step(scheduler)
    assert answer(scheduler, first, EOS) == [("a", EOS)]
    assert scheduler.block_pool.is_idle()
    assert not scheduler.is_idle, "a step is in flight"
    assert answer(scheduler, second) == []
    assert request.output_token_ids.tolist() == [EOS]
    assert scheduler.is_idle


def test_reused_id_does_not_inherit_tokens_in_flight():
    """After an abort the same id may come again while the old one's token is still under way."""
    scheduler = make_scheduler()
    scheduler.add(make_request())
    first = next_step(scheduler)
    old = scheduler.request("a")
    scheduler.abort(old)
    assert old.finish_reason == "abort"
    fresh = make_request(prompt=6)
    scheduler.add(fresh)
    second = next_step(scheduler)
    assert scheduler.removed == ("a",)
    assert scheduler.new == ["a"]
    assert second.new[0].number != old.number
    assert answer(scheduler, first) == []
    assert answer(scheduler, second) == [("a", 7)]
    assert fresh.num_output_tokens == 1


def test_ranks_are_told_once_and_only_of_what_they_know():
    """`removed` names a request in the first step after its end, and never one that ranks have not seen."""
    scheduler = make_scheduler(seqs=1)
    scheduler.add(make_request("a", max_tokens=1))
    scheduler.add(make_request("unseen"))
    answer(scheduler, next_step(scheduler))
    unseen = scheduler.request("unseen")
    scheduler.abort(unseen)
    assert unseen.status is RequestStatus.FINISHED_ABORTED
    assert scheduler.schedule() is None, "no step only to remove"
    scheduler.add(make_request("b"))
    next_step(scheduler)
    assert scheduler.removed == ("a",)
    next_step(scheduler)
    assert scheduler.removed == ()


def test_stop_string_outranks_length():
    """The engine finds stop strings after `update`, which may have ended the request by length with the same token."""
    scheduler = make_scheduler()
    request = make_request(max_tokens=1)
    scheduler.add(request)
    answer(scheduler, next_step(scheduler))
    assert request.finish_reason == "length"
    scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
    assert request.finish_reason == "stop"
    assert scheduler.is_idle


def test_finish_ends_a_running_request():
    """A stop string ends a request while its next token is in flight."""
    scheduler = make_scheduler()
    request = make_request()
    scheduler.add(request)
    first, second = next_step(scheduler), next_step(scheduler)
    answer(scheduler, first)
    scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
    assert not scheduler.has_unfinished
    assert answer(scheduler, second) == []
    assert scheduler.is_idle


@pytest.mark.parametrize("prompt", [0, 20, 16])
def test_what_can_never_run_is_refused(prompt):
    """A prompt without room for one more token would wait at the head of the queue for ever."""
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_model_len=16)
    with pytest.raises(RequestError, match=f"{prompt} tokens"):
        scheduler.add(make_request(prompt=prompt))
    assert scheduler.is_idle


def test_a_number_is_never_used_twice():
    """A token on its way to a request must not reach another one, whatever users call them."""
    scheduler = make_scheduler()
    numbers = []
    for _ in range(3):
        scheduler.add(make_request())
        numbers.append(scheduler.request("a").number)
        scheduler.abort(scheduler.request("a"))
    assert len(set(numbers)) == 3


def test_wrong_answers_change_nothing():
    """A step answered out of turn, or without a token, must not shift tokens to other requests."""
    scheduler = make_scheduler()
    request = make_request()
    scheduler.add(request)
    first, second = next_step(scheduler), next_step(scheduler)
    with pytest.raises(EngineError, match="step 1"):
        scheduler.complete(second.step_id, [request.number])
    with pytest.raises(EngineError, match=f"token for request {request.number}"):
        scheduler.complete(first.step_id, [request.number + 1])
    assert request.num_output_tokens == 0
    assert answer(scheduler, first) == [("a", 7)]


def test_running_requests_are_bounded():
    """max_num_seqs bounds what ranks hold, max_num_batched_tokens what a step computes."""
    scheduler = make_scheduler(seqs=2, budget=6)
    for name in "abc":
        scheduler.add(make_request(name, 4))
    assert rows(next_step(scheduler)) == {"a": (0, 4, True), "b": (0, 2, False)}
    assert rows(next_step(scheduler)) == {"a": (4, 1, True), "b": (2, 2, True)}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


# --- Blocks ----------------------------------------------------------------------------------------------------------


def test_head_of_the_queue_is_not_overtaken():
    """A small request must not slip past a large one that waits for blocks, or the large one starves."""
    scheduler = make_scheduler(num_blocks=7, caching=False)
    scheduler.add(make_request("a", 12))
    next_step(scheduler)
    scheduler.add(make_request("large", 16))
    scheduler.add(make_request("small", 4))
    assert rows(next_step(scheduler)) == {"a": (12, 1, True)}
    scheduler.abort(scheduler.request("a"))
    assert list(rows(next_step(scheduler))) == ["large", "small"]


def test_prompt_short_of_blocks_keeps_them_and_its_turn():
    """A half-computed prompt keeps its blocks while no earlier request needs them, and it is not overtaken."""
    scheduler = make_scheduler(num_blocks=9, budget=16, caching=False)
    scheduler.add(make_request("a", 4, 20))
    scheduler.add(make_request("b", 30))
    assert rows(next_step(scheduler)) == {"a": (0, 4, True), "b": (0, 12, False)}
    scheduler.add(make_request("c", 4))
    assert rows(next_step(scheduler)) == {"a": (4, 1, True)}
    assert (scheduler.block_pool.num_free, scheduler.num_waiting) == (3, 1)
    scheduler.abort(scheduler.request("a"))
    assert rows(next_step(scheduler)) == {"b": (12, 16, False)}


def test_latest_arrival_is_preempted_and_resumes_first():
    """Preemption costs the youngest its blocks, not its turn or its tokens."""
    scheduler = make_scheduler(num_blocks=5, caching=False)
    first, second = make_request("a", 8, 8), make_request("b", 7, 8)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.add(make_request("c", 2))
    answer(scheduler, next_step(scheduler))
    step = next_step(scheduler)
    assert rows(step) == {"a": (8, 1, True)}
    assert scheduler.removed == ("b",)
    assert second.status is RequestStatus.PREEMPTED
    answer(scheduler, step)
    assert rows(next_step(scheduler)) == {"a": (9, 1, True)}, "c may not take what b waits for"
    scheduler.abort(scheduler.request("a"))
    step = next_step(scheduler)
    assert rows(step) == {"b": (0, 8, True), "c": (0, 2, True)}
    assert step.new[0].token_ids.tolist() == [*range(10, 17), 7]
    assert step.new[0].num_prompt_tokens == 7
    assert second.num_preemptions == 1


def test_preempted_request_waits_for_its_token_in_flight():
    """Ranks forget a preempted request, so it can only return with every token known to the engine."""
    scheduler = make_scheduler(num_blocks=5, caching=False)
    scheduler.add(make_request("a", 8, 8))
    scheduler.add(make_request("b", 8, 8))
    first = next_step(scheduler)
    next_step(scheduler)
    assert scheduler.removed == ("b",)
    scheduler.abort(scheduler.request("a"))
    assert scheduler.schedule() is None
    assert answer(scheduler, first) == [("b", 7)]
    assert rows(next_step(scheduler)) == {"b": (0, 9, True)}


def test_token_in_flight_may_finish_a_preempted_request():
    """Its last token was sampled before it was preempted: it is done, and must not run again."""
    scheduler = make_scheduler(num_blocks=5, caching=False)
    scheduler.add(make_request("a", 8, 8))
    request = make_request("b", 8, 1)
    scheduler.add(request)
    first = next_step(scheduler)
    next_step(scheduler)
    assert scheduler.removed == ("b",)
    assert answer(scheduler, first) == [("a", 7), ("b", 7)]
    assert request.finish_reason == "length"
    assert scheduler.num_waiting == 0


def test_preempted_prompt_does_not_return_before_it_fits():
    """Else each block that an earlier request needs would throw the same prompt out again, computed in vain."""
    scheduler = make_scheduler(num_blocks=9, budget=9, caching=False)
    scheduler.add(make_request("a", 4, 20))
    scheduler.add(make_request("b", 28, 2))
    num_resumed = 0
    while scheduler.has_unfinished:
        step = next_step(scheduler)
        num_resumed += "b" in scheduler.new
        answer(scheduler, step)
    assert num_resumed == 2


def test_whole_pool_serves_one_request():
    """A request that needs every block runs alone, and others wait for it."""
    scheduler = make_scheduler(num_blocks=5, caching=False)
    scheduler.add(make_request("small", 4, 1))
    scheduler.add(make_request("whole", 16, 1))
    step = next_step(scheduler)
    assert list(rows(step)) == ["small"]
    answer(scheduler, step)
    step = next_step(scheduler)
    assert rows(step) == {"whole": (0, 16, True)}
    answer(scheduler, step)
    assert scheduler.is_idle


# --- Prefix cache ----------------------------------------------------------------------------------------------------


def test_prefix_is_found_in_whole_blocks():
    """A hit skips full blocks only and is counted once, for the first scheduling."""
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 11, 1))
    answer(scheduler, next_step(scheduler))
    request = make_request("b", 15)
    scheduler.add(request)
    step = next_step(scheduler)
    assert rows(step) == {"b": (8, 7, True)}
    assert step.new[0].block_ids[:2] == [1, 2]
    assert request.num_cached_tokens == 8


def test_whole_prompt_hit_still_runs_a_token():
    """Without a computed token there are no logits to sample from."""
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 1))
    answer(scheduler, next_step(scheduler))
    scheduler.add(make_request("b", 8, 1))
    assert rows(next_step(scheduler)) == {"b": (4, 4, True)}


def test_prompt_logprobs_compute_every_token():
    """Cached tokens have no logits, and prompt log-probabilities need them."""
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, 1))
    answer(scheduler, next_step(scheduler))
    scheduler.add(make_request("b", 8, prompt_logprobs=0))
    assert rows(next_step(scheduler)) == {"b": (0, 8, True)}


def test_output_is_cached_once_it_is_known():
    """The next turn of a chat finds the answer too, but never a block with placeholders."""
    scheduler = make_scheduler()
    request = make_request("a", 7, 6)
    scheduler.add(request)
    steps = [next_step(scheduler), next_step(scheduler), next_step(scheduler)]
    assert scheduler.block_pool.num_cached == 1, "token 7 is a placeholder"
    answer(scheduler, steps[0])
    assert scheduler.block_pool.num_cached == 2
    for step in steps[1:]:
        answer(scheduler, step)
    while step := scheduler.schedule():
        answer(scheduler, step)
    assert request.num_tokens == 13
    scheduler.add(make_request("b", [*request.token_ids, 1, 2]))
    assert rows(next_step(scheduler)) == {"b": (12, 3, True)}


def test_what_is_being_computed_is_not_computed_twice():
    """Eight answers to one prompt that came together computed it eight times; so did eight prompts that begin alike.

    Within one step no row may rely on another's writes. So those behind the first wait for the next step, let others
    pass meanwhile, and find the prefix then, though the first step is still in flight.
    """
    scheduler = make_scheduler(budget=12)
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name, 14))
    scheduler.add(make_request("other", [1, 2, 3]))
    assert rows(next_step(scheduler)) == {"a": (0, 12, False)}
    assert rows(next_step(scheduler)) == {
        "a": (12, 2, True),
        "b": (12, 2, True),
        "c": (12, 2, True),
        "other": (0, 3, True),
    }
    assert scheduler.num_waiting == 0


def test_those_that_wait_for_a_prefix_let_others_pass_and_keep_their_turn():
    """They are passed while they would only compute what another does; when blocks run out, arrival decides."""
    scheduler = make_scheduler(budget=12)
    scheduler.add(make_request("a", 20))
    scheduler.add(make_request("b", 20))
    scheduler.add(make_request("other", [1, 2, 3]))
    assert rows(next_step(scheduler)) == {"a": (0, 12, False)}
    assert rows(next_step(scheduler)) == {"a": (12, 8, True), "other": (0, 3, True)}
    assert rows(next_step(scheduler)) == {"a": (20, 1, True), "b": (16, 4, True), "other": (3, 1, True)}
    assert [request.name for request in scheduler._running] == ["a", "b", "other"]


@pytest.mark.parametrize("end", ["abort", "preempt"])
def test_no_request_waits_for_a_prefix_that_is_no_longer_computed(end):
    """The request that computed it is aborted, or loses its blocks: the next request computes it."""
    scheduler = make_scheduler(num_blocks=9, budget=8)
    if end == "preempt":
        scheduler.add(make_request("early", [1, 2, 3, 4], 20))
        next_step(scheduler)
    scheduler.add(make_request("a", 20))
    scheduler.add(make_request("b", 20))
    assert "b" not in rows(next_step(scheduler))
    scheduler.abort(scheduler.request("a"))
    assert rows(next_step(scheduler))["b"][1] > 0


def test_steps_cost_no_more_for_longer_prompts():
    """A decode step must not walk the prompt (the usual is 3 ms for all of them)."""
    scheduler = make_scheduler(num_blocks=70_000, block_size=16, budget=1_000_000, max_model_len=1_100_000)
    scheduler.add(make_request(prompt=1_000_000, max_tokens=300))
    answer(scheduler, next_step(scheduler))
    start = time.perf_counter()
    for _ in range(100):
        answer(scheduler, next_step(scheduler))
    assert time.perf_counter() - start < 0.2


# --- Fake ranks ------------------------------------------------------------------------------------------------------


def next_token(token_ids, seed: int) -> int:
    """What the fake model says after `token_ids`: a function of all of them, the position and the seed."""
    data = np.asarray(token_ids, np.int32).tobytes() + bytes([seed])
    return blake2b(data, digest_size=1).digest()[0] % VOCAB_SIZE


def direct_output(request: Request, limit: int) -> tuple[list[int], str]:
    """The answer computed alone, in one go, for at most `limit` tokens of prompt and output."""
    params, tokens = request.sampling_params, request.prompt_token_ids.tolist()
    num_prompt = len(tokens)
    while True:
        tokens.append(next_token(tokens, request.seed))
        output = tokens[num_prompt:]
        if len(output) >= params.min_tokens:
            if tokens[-1] == EOS and not params.ignore_eos:
                return output, "stop"
            if tokens[-1] in (params.stop_token_ids or ()):
                return output, "stop"
        if len(tokens) >= limit or len(output) == params.max_tokens:
            return output, "length"


class FakeRanks:
    """What all ranks do with steps: they keep token ids in slots, and check what they would attend to."""

    def __init__(self, pool: BlockPool) -> None:
        self.block_size = pool.block_size
        self.slots = np.full(pool.num_blocks * pool.block_size, -1, np.int64)
        self.states: dict[int, dict] = {}

    def run(self, step: Step) -> dict[str, int]:
        for i in step.removed:
            del self.states[i]
        for new in step.new:
            assert new.state_idx not in self.states
            tokens, blocks = new.token_ids.tolist(), list(new.block_ids)
            state = {"tokens": tokens, "blocks": blocks, "computed": None, "seed": new.seed, "number": new.number}
            self.states[new.state_idx] = state
        for i, blocks in step.new_block_ids.items():
            self.states[i]["blocks"] += blocks

        states = [self.states[i] for i in step.batch.state_idx.tolist()]
        assert [state["number"] for state in states] == step.batch.numbers.tolist()
        rows_ = [(state, *row) for state, row in zip(states, rows(step).values(), strict=True)]
        for state, start, length, samples in rows_:
            assert length >= 1
            assert start % self.block_size == 0 if state["computed"] is None else start == state["computed"]
            assert start + length <= len(state["tokens"])
            assert samples == (start + length == len(state["tokens"]))
            assert len(state["blocks"]) == -(-(start + length) // self.block_size)
            assert NULL_BLOCK_ID not in state["blocks"]
            assert self.slots[self.slot_ids(state, 0, start)].tolist() == state["tokens"][:start]
        written = np.concatenate([self.slot_ids(state, start, start + length) for state, start, length, _ in rows_])
        assert len(np.unique(written)) == len(written)
        for state, start, length, _ in rows_:
            self.slots[self.slot_ids(state, start, start + length)] = state["tokens"][start : start + length]
            state["computed"] = start + length

        sampled = {}
        for state, (name, (_, _, samples)) in zip(states, rows(step).items(), strict=True):
            held = self.slots[self.slot_ids(state, 0, state["computed"])]
            assert held.tolist() == state["tokens"][: state["computed"]]
            if samples:
                sampled[name] = next_token(held, state["seed"])
                state["tokens"].append(sampled[name])
        return sampled

    def slot_ids(self, state: dict, start: int, end: int) -> np.ndarray:
        positions = np.arange(start, end)
        return np.array(state["blocks"])[positions // self.block_size] * self.block_size + positions % self.block_size


class World:
    """A scheduler, fake ranks that lag behind it by `depth` steps, and what every request must answer."""

    def __init__(self, depth, num_blocks, block_size, max_num_seqs, budget, max_model_len, caching) -> None:
        self.depth = depth
        self.scheduler = make_scheduler(num_blocks, block_size, max_num_seqs, budget, max_model_len, caching)
        self.ranks = FakeRanks(self.scheduler.block_pool)
        self.in_flight: deque[Step] = deque()
        self.live: dict[str, Request] = {}  # in order of arrival
        self.outputs: dict[str, list[int]] = {}
        self.num_added = 0

    def add(self, prompt, seed=0, **params) -> None:
        name = f"r{self.num_added}"
        self.num_added += 1
        request = make_request(name, prompt, seed=seed, eos=frozenset({EOS}), **params)
        try:
            self.scheduler.add(request)
        except RequestError:
            assert not 1 <= len(prompt) < self.scheduler.max_num_tokens
            return
        self.live[name], self.outputs[name] = request, []

    def abort(self, index: int) -> None:
        name = list(self.live)[index % len(self.live)]
        request = self.live.pop(name)
        self.scheduler.abort(request)
        assert request.finish_reason == "abort"

    def schedule(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        assert 1 <= step.batch.num_scheduled_tokens.sum() <= self.scheduler.max_num_batched_tokens
        assert self.scheduler.num_running <= self.scheduler.max_num_seqs
        numbers = step.batch.numbers.tolist()
        assert numbers == sorted(numbers)
        passed = [r for r in self.live.values() if r.status is not RequestStatus.RUNNING and r.number < max(numbers)]
        begins = {r: tuple(r.token_ids[: self.ranks.block_size].tolist()) for r in self.live.values()}
        running = {begins[r] for r in self.live.values() if r not in passed}
        assert all(begins[r] in running for r in passed), "only a request that begins like one that runs is overtaken"
        self.in_flight.append(step)
        return True

    def update(self) -> None:
        step = self.in_flight.popleft()
        requests = dict(self.live)
        for name, token in take(self.scheduler, step.step_id, self.ranks.run(step)):
            request = requests[name]
            self.outputs[name].append(token)
            if request.finished:
                del self.live[name]
                expected = direct_output(request, self.scheduler.max_num_tokens)
                assert (request.output_token_ids.tolist(), request.finish_reason) == expected
                assert self.outputs[name] == expected[0]

    def drain(self) -> None:
        while self.live or self.in_flight:
            while len(self.in_flight) < self.depth and self.schedule():
                pass
            assert self.in_flight, "dead lock"
            self.update()
        self.check_idle()

    def check_idle(self) -> None:
        assert self.scheduler.is_idle
        assert not self.scheduler.has_unfinished
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.num_in_flight == 0
        assert self.scheduler.block_pool.is_idle()
        self.add([1], max_tokens=1)  # one more step takes the last state from the ranks
        if self.schedule():
            self.update()
            assert len(self.ranks.states) == 1


PREFIX = [1, 2, 3, 4, 5, 1, 2, 3, 1, 2, 1, 1, 5, 4, 3, 2, 1, 5, 5, 5, 2, 2, 2, 4]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        depth=st.integers(1, 2),
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 16),
        max_model_len=st.integers(2, 40),
        caching=st.booleans(),
    )
    def start(self, **config):
        self.world = World(**config)

    @rule(
        shared=st.integers(0, len(PREFIX)),
        own=st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=5),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 6),
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=1),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def add(self, shared, own, **params):
        params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
        self.world.add(PREFIX[:shared] + own, seed=len(own), **params)

    @precondition(lambda self: self.world.live)
    @rule(index=st.integers(0, 9))
    def abort(self, index):
        self.world.abort(index)

    @precondition(lambda self: len(self.world.in_flight) < self.world.depth)
    @rule()
    def schedule(self):
        self.world.schedule()

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def update(self):
        self.world.update()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, database=None)


class TestSchedulerMachine(SchedulerMachine.TestCase):
    """In no order of arrivals, aborts, steps and answers does a request read another's slots, answer otherwise than
    alone, overtake, dead-lock, or leave a block behind."""


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_crowds_answer_as_if_alone(depth, caching):
    """Long runs under pressure: answers do not depend on batching, chunking, preemption, cache hits or pipelining."""
    num_preemptions = num_cached = 0
    for seed in range(25):
        rng = random.Random(seed)
        world = World(depth, rng.randint(6, 24), rng.randint(1, 5), rng.randint(1, 8), rng.randint(1, 40), 60, caching)
        requests = []
        for _ in range(120):
            if rng.random() < 0.35:
                prompt = PREFIX[: rng.randint(0, len(PREFIX))] + rng.choices(range(1, VOCAB_SIZE), k=rng.randint(1, 8))
                world.add(prompt, rng.randint(0, 3), max_tokens=rng.randint(1, 30), ignore_eos=rng.random() < 0.8)
                requests += list(world.live.values())[-1:]
            if world.live and rng.random() < 0.03:
                world.abort(rng.randrange(100))
            if len(world.in_flight) == depth or (world.in_flight and not world.schedule()):
                world.update()
            elif not world.in_flight:
                world.schedule()
        world.drain()
        num_preemptions += sum(r.num_preemptions for r in set(requests))
        num_cached += sum(r.num_cached_tokens for r in set(requests))
    assert num_preemptions > 50, "the pools were not small enough to mean anything"
    assert (num_cached > 500) == caching


def answer_all(scheduler: Scheduler) -> None:
    """Runs steps until nothing is left to run; each sampled token is 7."""
    while (step := scheduler.schedule()) is not None:
        sampled = [int(n) for n, one in zip(step.batch.numbers, step.batch.num_sampled_tokens, strict=True) if one]
        for request in scheduler.complete(step.step_id, sampled):
            scheduler.append(request, 7)


def test_a_conversation_that_goes_on_keeps_its_prefix():
    """An operator sizes the cache for long conversations: one-off requests that pass through take each other's blocks,
    and those of conversations that ended, before those of one that goes on.
    """
    scheduler = make_scheduler(num_blocks=1 + 40, block_size=4, budget=200)
    rng = np.random.default_rng(0)
    said = {name: rng.integers(10, 99, 40).tolist() for name in ("goes on", "ended")}
    for name in ("ended", "goes on"):
        scheduler.add(make_request(name, said[name], max_tokens=4))
        answer_all(scheduler)
    for turn in range(8):
        for i in range(2):  # in all 96 blocks, of a cache of 40
            scheduler.add(make_request(f"one-off {turn} {i}", rng.integers(10, 99, 21), max_tokens=4))
            answer_all(scheduler)
        said["goes on"] += [7] * 4 + rng.integers(10, 99, 4).tolist()
        scheduler.add(request := make_request("goes on", said["goes on"], max_tokens=4))
        answer_all(scheduler)
        # All but the new text, the token before it (which was never computed), and the rest of its block.
        assert request.num_cached_tokens == (len(said["goes on"]) - 5) // 4 * 4
    assert scheduler.block_pool.num_cached <= 40
    scheduler.add(request := make_request("ended", said["ended"], max_tokens=4))
    answer_all(scheduler)
    assert request.num_cached_tokens == 0


def test_a_turn_that_waits_keeps_its_prefix():
    """A turn's prefix was evicted while the turn waited behind other prompts: the cache knew of its use only when it
    began to run.
    """
    scheduler = make_scheduler(num_blocks=1 + 24, block_size=4, seqs=1, budget=200)
    rng = np.random.default_rng(0)
    said = rng.integers(10, 99, 40).tolist()
    scheduler.add(make_request("first turn", said, max_tokens=4))
    answer_all(scheduler)
    scheduler.add(make_request("one-off before", rng.integers(10, 99, 41), max_tokens=4))
    answer_all(scheduler)
    for i in range(2):
        scheduler.add(make_request(f"one-off {i}", rng.integers(10, 99, 21), max_tokens=4))
    scheduler.add(request := make_request("second turn", [*said, *[7] * 4, *rng.integers(10, 99, 4)], max_tokens=4))
    answer_all(scheduler)
    assert request.num_cached_tokens == 40
