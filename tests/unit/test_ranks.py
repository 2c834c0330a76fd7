"""Ranks together, as threads: the answer depends neither on their number, nor on the batch, chunks, hits, preemption.

A tiny Llama with random weights says something else after every token, so whatever is mixed up shows.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from harness import ThreadExecutor, generate, make_engine, prompt_logprobs, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold.engine.engine import LLMEngine
from twofold.errors import RequestError
from twofold.outputs import RequestOutput
from twofold.parallel.plan import TokenLayout, plan_step
from twofold.sampling_params import SamplingParams

NUM_LAYERS = 4
RANKS = [1, 2, 3, 4]
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = tiny_config("llama")
    # Up to four ranks divide them.
    config.update({"num_attention_heads": 24, "num_key_value_heads": 12, "head_dim": 8, "intermediate_size": 96})
    return tiny_model(config)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed * 1000 + length).integers(3, VOCAB_SIZE, length).tolist()


def executor_of(engine: LLMEngine) -> ThreadExecutor:
    assert isinstance(engine.executor, ThreadExecutor)
    return engine.executor


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": MAX_TOKENS} | changes))


# Prompts of all lengths, and every way to sample. Seeds are given, since seeds that are drawn depend on the order.
PREFIX = random_prompt(40)
PLAIN: list[tuple[list[int], SamplingParams]] = [
    (random_prompt(1), params()),
    (random_prompt(2), params(temperature=0.9, seed=1)),
    (random_prompt(3), params(logprobs=0)),
    (random_prompt(7), params(temperature=0.9, top_p=0.8, seed=2)),
    (random_prompt(8), params(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=3)),
    (random_prompt(16), params(logprobs=3, prompt_logprobs=2)),
    (random_prompt(31), params(temperature=1.0, seed=2**63 - 1, logprobs=2)),
    (random_prompt(64), params(prompt_logprobs=0)),
    (PREFIX + random_prompt(5), params(temperature=0.9, seed=4)),
    (PREFIX + random_prompt(20), params(min_tokens=4, stop_token_ids=list(range(3, 40)))),
    (PREFIX, params(n=3, temperature=1.0, seed=5)),
]
COUNTING: list[tuple[list[int], SamplingParams]] = [  # with penalties, which count the tokens so far
    (random_prompt(9), params(repetition_penalty=1.3)),
    (random_prompt(33), params(presence_penalty=0.7, frequency_penalty=0.4, temperature=0.7, seed=6)),
    (random_prompt(12), params(repetition_penalty=0.8, n=2, temperature=0.9, seed=7, logprobs=1)),
]
Requests = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel) -> dict[str, list[RequestOutput]]:
    """One rank, each request alone, its prompt in one step, nothing cached."""
    answers = {}
    for name, requests in (("plain", PLAIN), ("counting", COUNTING)):
        engine = make_engine(model, 1, enable_prefix_caching=False)
        answers[name] = [generate(engine, [prompt], one)[0] for prompt, one in requests]
        engine.shutdown()
    return answers


def assert_same(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for number, (mine, theirs) in enumerate(zip(outputs, expected, strict=True)):
        assert len(mine.outputs) == len(theirs.outputs)
        for one, other in zip(mine.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids, f"request {number}"
            assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
            assert_same_logprobs(one.logprobs, other.logprobs)
        assert_same_logprobs(mine.prompt_logprobs, theirs.prompt_logprobs)


def assert_same_logprobs(mine: Any, theirs: Any) -> None:
    if theirs is None:
        assert mine is None
        return
    for one, other in zip(mine, theirs, strict=True):
        if other is None:
            assert one is None
            continue
        assert list(one) == list(other)
        for token in one:
            assert one[token].rank == other[token].rank
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "one batch": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 24, blocks of 3": {"max_num_batched_tokens": 24, "block_size": 3},
    "blocks of one token": {"block_size": 1},
    "no prefix caching": {"enable_prefix_caching": False, "max_num_batched_tokens": 50},
    "three at a time": {"max_num_seqs": 3},
    "preempted": {"max_model_len": 88, "block_size": 4, "num_blocks": 23},
    "preempted, in chunks": {"max_model_len": 88, "block_size": 4, "num_blocks": 23, "max_num_batched_tokens": 19},
    "contiguous": {"partition_policy": "contiguous", "max_num_batched_tokens": 60},
}


OVERLAPPED = ["one batch", "chunks of 7", "preempted, in chunks"]  # tried with two steps in flight, too


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(
    ("variant", "steps_in_flight"), [(name, 1) for name in VARIANTS] + [(name, 2) for name in OVERLAPPED]
)
def test_the_answer_is_always_the_same(
    model: PreTrainedModel,
    expected: dict[str, list[RequestOutput]],
    variant: str,
    num_ranks: int,
    steps_in_flight: int,
) -> None:
    """Invariant 7, for every way to sample at once. Two passes: the second one finds prefixes in the cache.

    Guards: a last chunk taken for a decode, the sampled row on another rank than 0, a stale cursor after preemption,
    randomness that depends on the batch, tokens that are known on the device only.
    """
    engine = make_engine(model, num_ranks, steps_in_flight=steps_in_flight, **VARIANTS[variant])
    requests: dict[str, Requests] = {"plain": PLAIN, "counting": PLAIN + COUNTING}
    answers = {"plain": expected["plain"], "counting": expected["plain"] + expected["counting"]}
    for name in ("plain", "counting"):
        outputs = generate(engine, [prompt for prompt, _ in requests[name]], [one for _, one in requests[name]])
        assert_same(outputs, answers[name])
    steps = executor_of(engine).steps
    if "chunks" in variant:
        limit = VARIANTS[variant]["max_num_batched_tokens"]
        assert max(step.batch.num_scheduled_tokens.sum() for step in steps) <= limit
    starts = Counter(new.number for step in steps for new in step.new)
    num_preemptions = sum(count - 1 for count in starts.values())
    assert (num_preemptions > 0) == ("preempted" in variant), "the variant tries something else than it says"
    engine.shutdown()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_ranks", RANKS)
def test_no_memory_is_read_before_it_is_written(
    model: PreTrainedModel, expected: dict[str, list[RequestOutput]], num_ranks: int
) -> None:
    """Buffers, padding, ends of blocks: reading unwritten memory would give NaN in some answer."""
    engine = make_engine(model, num_ranks, max_num_batched_tokens=33)
    requests = PLAIN + COUNTING
    outputs = generate(engine, [prompt for prompt, _ in requests], [one for _, one in requests])
    assert_same(outputs, expected["plain"] + expected["counting"])
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_caches_are_equal_on_all_ranks(model: PreTrainedModel, num_ranks: int, seed: int) -> None:
    """Invariant 4, after each of many mixed steps: prompts, chunks, decodes, aborts, preemptions, evictions.

    The null block is left out: padding is written there. Guards: slots cut to the local count after a gather.
    """
    engine = make_engine(
        model, num_ranks, max_model_len=64, num_blocks=24, block_size=4, max_num_batched_tokens=21, max_num_seqs=6
    )
    caches = [runner.cache for runner in executor_of(engine).runners]
    rng = np.random.default_rng(seed)
    names: list[str] = []
    for step in range(60):
        if step < 45 and rng.random() < 0.4:
            names.append(f"r{step}")
            prompt = rng.integers(3, VOCAB_SIZE, rng.integers(1, 50)).tolist()
            engine.add_request(names[-1], prompt, params(max_tokens=int(rng.integers(1, 10))))
        if rng.random() < 0.08 and names:
            engine.abort_request(names[rng.integers(len(names))])
        engine.step()
        for layer in range(NUM_LAYERS):
            written = caches[0].blocks[layer][1:]
            for other in caches[1:]:
                assert torch.equal(written.view(torch.int32), other.blocks[layer][1:].view(torch.int32))
    assert all(cache.blocks[0][1:].any() for cache in caches)
    while engine.has_unfinished_requests:
        engine.step()
    assert engine.is_idle
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_rank_calls_the_same_collectives(model: PreTrainedModel, num_ranks: int) -> None:
    """Invariant 5: one exchange a layer (one in all where all decode), and one of tokens where any are
    sampled, whatever a rank holds.

    Guards: an empty rank that skips a collective, and collectives that follow from a rank's own rows.
    """
    engine = make_engine(model, num_ranks, max_num_batched_tokens=30, step_layout="tokens")
    generate(engine, [prompt for prompt, _ in PLAIN], [one for _, one in PLAIN])
    generate(engine, [random_prompt(1)], params())  # all ranks but one are empty, all the time
    executor = executor_of(engine)
    if num_ranks > 1:
        batches = [step.batch for step in executor.steps]
        are_decodes = [bool((batch.num_scheduled_tokens == 1).all()) for batch in batches]
        num_exchanges = sum(1 if is_decode else NUM_LAYERS for is_decode in are_decodes)
        num_calls = num_exchanges + sum(batch.num_sampled_tokens.any() for batch in batches)
        assert len(executor.meshes[0].calls) == num_calls
        assert 0 < sum(are_decodes) < len(batches)
        for mesh in executor.meshes:
            assert mesh.calls == executor.meshes[0].calls
    engine.shutdown()


@pytest.mark.parametrize("policy", ["dual_chunk_swap", "contiguous"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_token_is_sampled_once_by_its_owner(model: PreTrainedModel, num_ranks: int, policy: str) -> None:
    """Invariant 6. If all ranks sampled, last-bit differences would let them go on with different tokens."""
    engine = make_engine(model, num_ranks, max_num_batched_tokens=30, partition_policy=policy, step_layout="tokens")
    generate(engine, [prompt for prompt, _ in PLAIN], [one for _, one in PLAIN])
    executor = executor_of(engine)
    sampling_ranks = set()
    for step, results in zip(executor.steps, executor.results, strict=True):
        batch = step.batch
        owner = plan_step(batch, TokenLayout(num_ranks, policy)).owner
        due = {
            number: int(rank)
            for number, rank, samples in zip(batch.numbers.tolist(), owner, batch.num_sampled_tokens, strict=True)
            if samples
        }
        assert Counter(number for result in results for number in result.numbers.tolist()) == Counter(due.keys())
        for result in results:
            assert all(due[number] == result.rank for number in result.numbers.tolist())
            assert len(result.token_ids) == len(result.numbers)
            if len(result.numbers):
                sampling_ranks.add(result.rank)
    assert sampling_ranks == set(range(num_ranks))
    for runner in executor.runners:  # everyone received every token
        np.testing.assert_array_equal(runner.states.token_ids, executor.runners[0].states.token_ids)
        np.testing.assert_array_equal(runner.states.num_tokens, executor.runners[0].states.num_tokens)
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_prompts_shorter_than_the_ranks_need(model: PreTrainedModel, num_ranks: int) -> None:
    """1 to 2P + 1 tokens, alone, so that most ranks are empty; and all in one batch."""
    prompts = [random_prompt(length) for length in range(1, 2 * num_ranks + 2)]
    expected = [reference_logprobs(model, prompt) for prompt in prompts]
    engine = make_engine(model, num_ranks)
    for found in (
        [prompt_logprobs(engine, [prompt])[0] for prompt in prompts],
        prompt_logprobs(engine, prompts),
    ):
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(("length", "num_cached"), [(48, 32), (49, 48), (47, 32), (16, 0), (17, 16)])
def test_a_whole_prompt_in_the_cache(model: PreTrainedModel, num_ranks: int, length: int, num_cached: int) -> None:
    """One token must still run: its hidden state gives the first token of the answer. Blocks have 16 tokens."""
    prompt = random_prompt(length)
    engine = make_engine(model, num_ranks)
    first = generate(engine, [prompt], params(logprobs=1))[0]
    again = generate(engine, [prompt], params(logprobs=1))[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, num_cached)
    assert_same([again], [first])
    assert executor_of(engine).steps[-MAX_TOKENS].batch.num_scheduled_tokens.tolist() == [length - num_cached]
    engine.shutdown()


def test_answers_are_cached_as_prompts_are(model: PreTrainedModel) -> None:
    """A conversation's next turn finds the last turn's answer, whichever ranks computed it."""
    engine = make_engine(model, 3)
    alone = make_engine(model, 1, enable_prefix_caching=False)
    prompt = random_prompt(30)
    answer = generate(engine, [prompt], params(max_tokens=40))[0].outputs[0].token_ids
    following = prompt + answer + random_prompt(6)
    output = generate(engine, [following], params())[0]
    assert output.num_cached_tokens == 64  # of 30 + 40 tokens; the last was not computed
    assert_same([output], generate(alone, [following], params()))
    for one in (engine, alone):
        one.shutdown()


def test_prompt_logprobs_need_the_whole_prompt(model: PreTrainedModel) -> None:
    """A cached prefix has no hidden states left, so a request that asks for them does without the hit."""
    prompt = random_prompt(50)
    engine = make_engine(model, 2)
    generate(engine, [prompt], params())
    np.testing.assert_allclose(
        prompt_logprobs(engine, [prompt])[0], reference_logprobs(model, prompt), rtol=0, atol=1e-4
    )
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_logprobs_are_those_of_the_model(model: PreTrainedModel, num_ranks: int) -> None:
    """Of raw logits, the sampled token first, the best K after it, with ranks; sums and shapes as vLLM has them."""
    prompt = random_prompt(45)
    engine = make_engine(model, num_ranks, max_num_batched_tokens=17)
    output = generate(engine, [prompt], params(temperature=1.5, seed=3, logprobs=4, prompt_logprobs=3))[0]
    answer = output.outputs[0]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + answer.token_ids])).logits[0].log_softmax(-1)
    assert answer.logprobs is not None
    assert output.prompt_logprobs is not None
    assert len(answer.logprobs) == MAX_TOKENS
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    entries = [*output.prompt_logprobs[1:], *answer.logprobs]
    total = 0.0
    for position, (entry, token) in enumerate(zip(entries, prompt[1:] + answer.token_ids, strict=True)):
        assert entry is not None
        num_best = 3 if position < len(prompt) - 1 else 4
        best = logprobs[position].topk(num_best)
        assert next(iter(entry)) == token
        assert set(entry) == {token, *best.indices.tolist()}
        assert entry[token].rank == 1 + int((logprobs[position] > logprobs[position, token]).sum())
        for place, (index, value) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True), 1):
            assert entry[index].logprob == pytest.approx(value, abs=1e-4)
            assert entry[index].rank == place
        if position >= len(prompt) - 1:
            total += entry[token].logprob
    assert answer.cumulative_logprob == pytest.approx(total, abs=1e-4)
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_answers_of_one_request_are_those_of_their_seeds(model: PreTrainedModel, num_ranks: int) -> None:
    """`n` answers share a prompt and differ; answer i has seed + i."""
    engine = make_engine(model, num_ranks)
    prompt = random_prompt(20)
    output = generate(engine, [prompt], params(temperature=1.0, seed=11, n=4))[0]
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 4
    alone = [generate(engine, [prompt], params(temperature=1.0, seed=11 + i))[0].outputs[0] for i in range(4)]
    assert [one.token_ids for one in output.outputs] == [one.token_ids for one in alone]
    engine.shutdown()


def test_requests_without_a_seed_differ_and_repeat(model: PreTrainedModel) -> None:
    """Two engines of one seed draw alike; another seed draws otherwise; and no two requests of one engine alike."""
    requests = [random_prompt(6)] * 3
    drawn = []
    for seed, num_ranks in ((0, 1), (0, 3), (1, 1)):
        engine = make_engine(model, num_ranks, seed=seed)
        outputs = generate(engine, requests, params(temperature=1.0))
        drawn.append([tuple(output.outputs[0].token_ids) for output in outputs])
        engine.shutdown()
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 6


# --- Ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_ends_an_answer(model: PreTrainedModel, num_ranks: int, steps_in_flight: int) -> None:
    """End-of-sequence and stop tokens, the tokens before which neither may come, and the longest answer."""
    prompt = random_prompt(19)
    engine = make_engine(model, num_ranks)
    free = generate(engine, [prompt], params())[0].outputs[0].token_ids
    engine.shutdown()
    fourth = next(i for i in range(3, MAX_TOKENS) if free[i] not in free[:i])  # the first time it is said
    end = free[fourth]

    engine = make_engine(model, num_ranks, eos_token_ids=frozenset({end}), steps_in_flight=steps_in_flight)

    def answer(**changes: Any) -> tuple[list[int], str | None, int | str | None]:
        one = generate(engine, [prompt], params(**changes))[0].outputs[0]
        return one.token_ids, one.finish_reason, one.stop_reason

    assert answer() == (free[: fourth + 1], "stop", None)
    assert answer(ignore_eos=True) == (free, "length", None)
    assert answer(ignore_eos=True, stop_token_ids=[end]) == (free[: fourth + 1], "stop", end)
    assert answer(max_tokens=fourth) == (free[:fourth], "length", None)
    assert answer(max_tokens=fourth + 1) == (free[: fourth + 1], "stop", None)
    assert answer(stop_token_ids=[free[1]]) == (free[:2], "stop", free[1])
    assert answer(min_tokens=fourth) == (free[: fourth + 1], "stop", None)
    tokens, reason, _ = answer(min_tokens=fourth + 1)
    assert tokens[:fourth] == free[:fourth]
    assert tokens[fourth] != end
    tokens, reason, _ = answer(min_tokens=10)
    assert tokens[:fourth] == free[:fourth]
    assert end not in tokens[:10]  # the likeliest other token was taken instead
    assert len(tokens) >= 10
    tokens, reason, _ = answer(min_tokens=MAX_TOKENS, stop_token_ids=[free[0]])
    assert reason == "length"
    assert not {free[0], end} & set(tokens)
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_answer_fills_the_model_s_length(model: PreTrainedModel, num_ranks: int) -> None:
    engine = make_engine(model, num_ranks, max_model_len=40, block_size=4, num_blocks=11)
    prompt = random_prompt(13)
    output = generate(engine, [prompt], params(max_tokens=None))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (27, "length")
    longest = generate(engine, [random_prompt(39)], params())[0].outputs[0]
    assert (len(longest.token_ids), longest.finish_reason) == (1, "length")
    engine.shutdown()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_aborting_one_leaves_the_others(
    model: PreTrainedModel, expected: dict[str, list[RequestOutput]], num_ranks: int, steps_in_flight: int
) -> None:
    """While its prompt is under way, while it answers, while it waits; twice; and its name is free again."""
    engine = make_engine(
        model, num_ranks, max_num_batched_tokens=40, max_num_seqs=8, steps_in_flight=steps_in_flight, block_size=4
    )
    doomed = {"answering": random_prompt(5, 1), "in its prompt": random_prompt(150, 1), "waiting": random_prompt(60, 1)}
    engine.add_request("answering", doomed["answering"], params(max_tokens=100))
    for _ in range(4):
        engine.step()
    for number, (prompt, one) in enumerate(PLAIN[:4]):
        engine.add_request(f"prompt-{number}", prompt, one)
    engine.add_request("in its prompt", doomed["in its prompt"], params(prompt_logprobs=1, n=2, temperature=1.0))
    engine.step()
    for number, (prompt, one) in enumerate(PLAIN[4:], 4):
        engine.add_request(f"prompt-{number}", prompt, one)
    engine.add_request("waiting", doomed["waiting"], params())
    finished: dict[str, RequestOutput] = {}
    for name in doomed:
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        output = engine.abort_request(name)
        assert output is not None
        assert output.finished
        assert {one.finish_reason for one in output.outputs} == {"abort"}
        assert engine.abort_request(name) is None
    assert len(output.outputs[0].token_ids) == 0
    assert engine.abort_request("unknown") is None
    engine.add_request("waiting", doomed["waiting"], params(max_tokens=1))
    while engine.has_unfinished_requests or engine.scheduler.num_in_flight:
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    assert engine.is_idle
    assert finished.keys() == {f"prompt-{number}" for number in range(len(PLAIN))} | {"waiting"}
    assert_same([finished[f"prompt-{number}"] for number in range(len(PLAIN))], expected["plain"])
    engine.shutdown()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_an_idle_engine_is_clean(model: PreTrainedModel, num_ranks: int) -> None:
    """Invariant 8: every block is free or cached, and ranks forget requests with the next step."""
    engine = make_engine(model, num_ranks)
    generate(engine, [prompt for prompt, _ in PLAIN], [one for _, one in PLAIN])
    assert engine.is_idle
    assert engine.block_pool.num_free == engine.block_pool.num_blocks - 1
    assert engine.block_pool.reset_prefix_cache()
    assert engine.block_pool.num_cached == 0
    assert engine.step() == []
    engine.add_request("last", random_prompt(4), params(max_tokens=2))
    engine.step()
    assert [len(runner.states) for runner in executor_of(engine).runners] == [1] * num_ranks
    engine.abort_request("last")
    while engine.scheduler.num_in_flight:
        engine.step()
    assert engine.is_idle
    engine.shutdown()


def test_a_wrong_request_affects_no_other(model: PreTrainedModel, expected: dict[str, list[RequestOutput]]) -> None:
    """Invariant 9, in the middle of others' answers; each message names the value and the limit."""
    engine = make_engine(model, 2, max_model_len=100, max_num_batched_tokens=30)
    wrong: list[tuple[Any, str]] = [
        ([], r"empty \(0 tokens\)"),
        ([3, VOCAB_SIZE], rf"token id {VOCAB_SIZE} is out of range; the model has ids 0 to {VOCAB_SIZE - 1}"),
        ([-1], "token id -1 is out of range"),
        ([2**40], "token id 1099511627776 is out of range"),
        ([1.5], r"1\.5 is not a token id"),
        ([True], "True is not a token id"),
        (["a"], "'a' is not a token id"),
        ([1, 10**30], "token id 10{30} is out of range"),
        (random_prompt(100), r"100 tokens, more than the 99 .* max_model_len=100"),
        ("text", "skip_tokenizer_init"),
        ({"tokens": [1]}, "'tokens' is not known"),
        (7, "must be text or a list of token ids, got int"),
    ]
    finished: dict[str, RequestOutput] = {}
    for number, (prompt, one) in enumerate(PLAIN):
        engine.add_request(f"prompt-{number}", prompt, one)
        bad, message = wrong[number % len(wrong)]
        with pytest.raises(RequestError, match=message) as caught:
            engine.add_request("bad", bad, params())
        assert "\n" not in str(caught.value)
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    with pytest.raises(RequestError, match="'prompt-10' is in use"):
        engine.add_request("prompt-10", [1], params())
    while engine.has_unfinished_requests:
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    assert_same([finished[f"prompt-{number}"] for number in range(len(PLAIN))], expected["plain"])
    assert engine.is_idle
    engine.shutdown()
