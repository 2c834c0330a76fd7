"""Answers whose tokens are restricted: structured outputs, allowed and bad tokens, biased logits."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from harness import generate, make_engine
from tiny_models import tiny_config, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from twofold.engine.masks import MaskMaker, NextTokens
from twofold.errors import EngineError, RequestError
from twofold.outputs import RequestOutput
from twofold.sampling_params import Reasoning, SamplingParams, StructuredOutputsParams

torch.set_num_threads(1)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json": PERSON},
    {"regex": r"[a-z]{3,9}-[0-9]{2,4}"},
    {"choice": ["yes", "no", "yes, but"]},
    {"grammar": 'root ::= "(" root ")" | [xy]+ "!"'},
    {"json": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4}},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, and some words of JSON; <eos> is the last of its ids."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    own.train_from_iterator(['{"name": "anna", "age": 12, "tags": ["a", "bc", null]}', "yes, but no"] * 9, trainer)
    own.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Its vocabulary has more ids than the tokenizer, as those of many models."""
    return tiny_model(tiny_config("llama", vocab_size=len(tokenizer) + 13, eos_token_id=None, num_hidden_layers=2))


def structured(form: dict[str, Any], **params: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**form), **({"max_tokens": 60} | params))


def has_form(form: dict[str, Any], text: str) -> bool:
    if "json" in form:
        jsonschema.validate(json.loads(text), form["json"])
        return True
    if "choice" in form:
        return text in form["choice"]
    return re.fullmatch(form.get("regex", r"(\()*[xy]+!(\))*"), text) is not None


def is_right(form: dict[str, Any], output: RequestOutput) -> bool:
    """Whether a whole answer has its form."""
    [answer] = output.outputs
    return has_form(form, answer.text) if answer.finish_reason == "stop" else answer.finish_reason == "length"


@torch.no_grad()
def reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], params: SamplingParams
) -> list[int]:
    """Greedy tokens of Transformers' logits, masked step by step."""
    maker = MaskMaker(tokenizer, model.config.vocab_size, frozenset({tokenizer.eos_token_id}))
    restriction = maker.compile(params)
    next_tokens = None if restriction is None else NextTokens(restriction)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + (params.max_tokens or 0):
        ids = torch.tensor([tokens])
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].numpy().copy()
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        if next_tokens is not None:
            [mask] = maker.make([next_tokens])
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            logits[[i for i in range(len(logits)) if i >= len(bits) or not bits[i]]] = -np.inf
        tokens.append(int(logits.argmax()))
        if next_tokens is not None:
            assert next_tokens.take(tokens[-1])
            if next_tokens.is_complete:
                break
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokens[len(prompt) :]


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 280, rng.integers(3, 40)).tolist() for _ in range(num)]


@pytest.mark.parametrize(("num_ranks", "steps_in_flight"), [(1, 1), (2, 1), (2, 2)])
def test_tokens_are_those_of_masked_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_ranks: int, steps_in_flight: int
) -> None:
    """Guards masks by tokens and by heads, in batches with free requests, with a step launched ahead: each token is
    the most likely one that Transformers gives and the form allows."""
    each = [
        *(structured(form, temperature=0) for form in FORMS),
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=0, max_tokens=20, allowed_token_ids=[5, 77, 270, 280]),
        SamplingParams(temperature=0, max_tokens=20, logit_bias={7: 9.5, 250: -100.0, 290: 8.0}),
        structured(FORMS[0], temperature=0, logit_bias={tokenizer.encode('"')[0]: 5.0}),
    ]
    engine = make_engine(
        model,
        num_ranks,
        steps_in_flight=steps_in_flight,
        tokenizer=tokenizer,
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
    )
    asked = prompts(len(each))
    try:
        outputs = generate(engine, asked, each)
    finally:
        engine.shutdown()
    for prompt, params, output in zip(asked, each, outputs, strict=True):
        assert output.outputs[0].token_ids == reference(model, tokenizer, prompt, params), params
    assert any(step.by_heads for step in engine.executor.steps) == (num_ranks > 1)  # type: ignore[attr-defined]
    for form, output in zip(FORMS, outputs, strict=False):
        assert is_right(form, output), output


DRAWN: Sequence[dict[str, Any]] = (
    *FORMS,
    {"json": {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string", "pattern": "^a+$"}}}},
)


def drawn(form: dict[str, Any], number: int) -> SamplingParams:
    filters = {"top_p": 0.9} if number % 2 else {"top_k": 20}
    return structured(form, temperature=1.0, seed=number, **filters)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_losses_and_preemptions_change_no_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps_in_flight: int
) -> None:
    """Guards masks after a rank is lost and after preemptions: a matcher must be where its answer's tokens are."""
    asked, each = prompts(6, seed=1), [drawn(form, number) for number, form in enumerate(DRAWN)]
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "eos_token_ids": frozenset({tokenizer.eos_token_id}),
        "steps_in_flight": steps_in_flight,
    }

    def run(fail_at: Sequence[int], **more: Any) -> tuple[list[RequestOutput], int]:
        engine = make_engine(model, 2, **options, **more)
        count, submit = itertools.count(1), engine.executor.submit

        def failing(step: Any) -> None:
            if next(count) in fail_at:
                raise EngineError("a rank is lost")
            submit(step)

        def renewed(start_timeout: float | None) -> Any:
            nonlocal submit
            executor = make(start_timeout)
            submit, executor.submit = executor.submit, failing  # type: ignore[method-assign]
            return executor

        make = engine._make_executor
        assert make is not None
        engine._make_executor = renewed
        engine.executor.submit = failing  # type: ignore[method-assign]
        for number, (prompt, one) in enumerate(zip(asked, each, strict=True)):
            engine.add_request(f"{number}", prompt, one)
        finished: dict[str, RequestOutput] = {}
        while engine.has_work:
            finished |= {output.request_id: output for output in engine.step_or_recover() if output.finished}
        assert engine.is_idle
        engine.shutdown()
        return [finished[f"{number}"] for number in range(len(asked))], engine.scheduler.num_preemptions

    expected, _ = run([])
    for form, output in zip(DRAWN, expected, strict=True):
        assert is_right(form, output), output
    assert sum(output.outputs[0].finish_reason == "stop" for output in expected) >= 3
    tokens = [output.outputs[0].token_ids for output in expected]
    again, _ = run([1, 4, 9])
    assert [output.outputs[0].token_ids for output in again] == tokens
    preempted, num_preemptions = run([12], num_blocks=12, max_model_len=130)
    assert num_preemptions
    assert [output.outputs[0].token_ids for output in preempted] == tokens


def test_several_answers_have_a_matcher_each(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards n > 1, and that a whole answer ends by itself, also where the end-of-sequence token is ignored."""
    form = {"choice": ["red", "green", "blue"]}
    engine = make_engine(model, 1, tokenizer=tokenizer, eos_token_ids=frozenset({tokenizer.eos_token_id}))
    params = [structured(form, n=12, seed=0), structured(form, ignore_eos=True), structured(form, min_tokens=40)]
    several, ignoring, longer = generate(engine, prompts(3), params)
    engine.shutdown()
    texts = {answer.text for answer in several.outputs}
    assert texts <= set(form["choice"])
    assert len(texts) > 1
    for output in (several, ignoring, longer):
        assert {answer.finish_reason for answer in output.outputs} == {"stop"}
        assert all(answer.text in form["choice"] for answer in output.outputs)


def test_an_answer_may_end_where_its_form_does(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards the end-of-sequence token: it comes only where the form is whole, and not where it is ignored."""
    eos = tokenizer.eos_token_id
    engine = make_engine(model, 1, tokenizer=tokenizer, eos_token_ids=frozenset({eos}))
    likely = {eos: 1000.0}
    params = [
        structured({"regex": "(ab)+"}, temperature=0, logit_bias=likely),
        structured({"regex": "(ab)+"}, temperature=0, logit_bias=likely, ignore_eos=True, max_tokens=9),
        structured({"regex": "(ab)+"}, temperature=0, logit_bias=likely, min_tokens=5),
    ]
    ends, goes_on, later = (output.outputs[0] for output in generate(engine, prompts(3), params))
    engine.shutdown()
    assert (ends.text, ends.token_ids[-1], ends.finish_reason) == ("ab", eos, "stop")
    assert (eos in goes_on.token_ids, goes_on.finish_reason) == (False, "length")
    assert (later.text, later.finish_reason) == ("ab" * 3, "stop")


def test_bad_words_never_come(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards words of one token and of several, at the start and within."""
    engine = make_engine(model, 2, tokenizer=tokenizer, steps_in_flight=2)
    [prompt] = prompts(1)
    free = SamplingParams(temperature=0, max_tokens=12)
    [before] = generate(engine, [prompt], free)
    tokens = before.outputs[0].token_ids
    one, two = tokenizer.decode(tokens[:1]), tokenizer.decode(tokens[3:5])
    bad = [word for word in (one, two) if word.strip() and "\ufffd" not in word] or ["a"]
    bad += ["ab", "xyz"]
    [after] = generate(engine, [prompt], SamplingParams(temperature=0, max_tokens=12, bad_words=bad))
    every = SamplingParams(temperature=0, max_tokens=30, allowed_token_ids=tokenizer.encode("abxyz"), bad_words=bad)
    [few] = generate(engine, [prompt], every)
    engine.shutdown()
    found = after.outputs[0].token_ids
    for word in bad:
        ids = tokenizer.encode(word)
        for answer in (found, few.outputs[0].token_ids):
            assert all(answer[i : i + len(ids)] != ids for i in range(len(answer))), word
    assert set(few.outputs[0].token_ids) <= set(tokenizer.encode("abxyz"))


def test_where_no_token_may_come_the_answer_ends_with_the_reason(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Guards contradictions: the request ends, and says why; others go on."""
    engine = make_engine(model, 2, tokenizer=tokenizer, eos_token_ids=frozenset({tokenizer.eos_token_id}))
    contrary = structured({"regex": "a+"}, allowed_token_ids=tokenizer.encode("b"))
    no_end = structured({"choice": ["a"]}, bad_words=["a"])
    outputs = generate(engine, prompts(3), [contrary, structured({"regex": "a{3}"}), no_end])
    engine.shutdown()
    for output in (outputs[0], outputs[2]):
        assert output.outputs[0].finish_reason == "error"
        assert "no token may come next" in str(output.outputs[0].stop_reason)
    assert outputs[1].outputs[0].text == "aaa"


def test_log_probabilities_are_of_raw_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards vLLM's meaning: what the model said, before a mask or a bias."""
    [prompt] = prompts(1)
    engine = make_engine(model, 2, tokenizer=tokenizer)
    free = SamplingParams(temperature=0, max_tokens=1, logprobs=3, prompt_logprobs=1)
    [expected] = generate(engine, [prompt], free)
    for change in ({"logit_bias": {3: 500.0}}, {"allowed_token_ids": [3]}):
        [output] = generate(engine, [prompt], SamplingParams(temperature=0, max_tokens=1, logprobs=3, **change))
        assert output.outputs[0].token_ids == [3]
        assert output.outputs[0].logprobs is not None
        assert expected.outputs[0].logprobs is not None
        seen, said = output.outputs[0].logprobs[0], expected.outputs[0].logprobs[0]
        assert {t: round(seen[t].logprob, 4) for t in said} == {t: round(said[t].logprob, 4) for t in said}
        assert seen[3].rank is not None
        assert seen[3].rank > 1
    engine.shutdown()


CANNOT: list[tuple[dict[str, Any], str]] = [
    ({"json": {"properties": {"a": {"items": {"not": {}}}}}}, r"^json cannot be compiled at /properties/a/items: Unim"),
    ({"json": {"anyOf": [True, {"type": "strin"}]}}, r"^json cannot be compiled at /anyOf/1: Invalid type: strin"),
    ({"json": {"$ref": "#/$defs/x"}}, r"^json cannot be compiled: Pointer '/\$defs/x' does not exist"),
    ({"json": "{,"}, r"^json is not JSON: .* at character 1$"),
    ({"json": "[" * 100_000}, r"^json cannot be read: it is too deep"),
    ({"json": {"enum": [f"{i}" for i in range(100_000)]}}, r"^json has \d+ characters, more than 262144"),
    (
        {"json": {"properties": {f"{i}": {} for i in range(3001)}}},
        r"^json has 3002 keys in its objects, more than 3000",
    ),
    ({"json": {"type": "object", "x-guidance": {"lenient": True}, "not": {}}}, r"Unimplemented keys: \[\"not\"\]"),
    ({"regex": "(ab"}, r"^regex cannot be compiled: .*unclosed group"),
    ({"regex": "a(?=b)"}, r"^regex cannot be compiled: .*look-around"),
    ({"grammar": "start: foo"}, r'^grammar cannot be compiled: at 1\(8\): unknown name: "foo"'),
    ({"grammar": 'root ::= "a" | foo'}, r"^grammar cannot be compiled: .*'foo' not found"),
    ({"regex": "a" * 40_000}, r"^regex has 40000 characters, more than 32768"),
    ({"grammar": "start: " + "(" * 20_000}, r"^grammar cannot be compiled: "),
]


@pytest.mark.parametrize(
    ("form", "message"), CANNOT, ids=[f"{next(iter(form))}-{i}" for i, (form, _) in enumerate(CANNOT)]
)
def test_a_form_that_cannot_be_compiled_says_where(
    tokenizer: PreTrainedTokenizerFast, form: dict[str, Any], message: str
) -> None:
    """Guards the message that a user acts on: one line, the place, the cause."""
    maker = MaskMaker(tokenizer, 300, frozenset({tokenizer.eos_token_id}))
    with pytest.raises(RequestError, match=message) as refusal:
        maker.compile(structured(form))
    assert refusal.value.field == "structured_outputs"
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_options_of_json(tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards vLLM's options: which texts a schema takes."""
    maker = MaskMaker(tokenizer, 300, frozenset({tokenizer.eos_token_id}))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

    def takes(text: str, **options: Any) -> bool:
        restriction = maker.compile(structured(options if "json_object" in options else {"json": schema} | options))
        assert restriction is not None
        next_tokens = NextTokens(restriction)
        for token in tokenizer.encode(text):
            maker.make([next_tokens])
            if not next_tokens.take(token):
                return False
        return next_tokens.may_end

    assert takes('{"a": 1}')
    assert takes('{\n  "a": 1,\n  "b": 2\n}')
    assert not takes("{" + " " * 40 + '"a": 1}'), "spaces have a bound"
    assert not takes('{"a": 1, "b": 2}', disable_additional_properties=True)
    assert takes('{"a":1}', disable_any_whitespace=True)
    assert not takes('{"a": 1}', disable_any_whitespace=True)
    assert not takes('{"a":\n1}', whitespace_pattern=" ?")
    assert takes('{"x": [1, null]}', json_object=True)
    assert not takes("[1]", json_object=True)


def test_a_grammar_rests_while_an_answer_reasons(tokenizer: PreTrainedTokenizerFast) -> None:
    """Guards the reasoning before a form: all but the answer's end may come, until the tokens that end it."""
    maker = MaskMaker(tokenizer, 300, frozenset({tokenizer.eos_token_id}))
    restriction = maker.compile(structured({"choice": ["yes"]}))
    assert restriction is not None
    [y, *_] = yes = tokenizer.encode("yes")

    def allowed(next_tokens: NextTokens) -> set[int]:
        [mask] = maker.make([next_tokens])
        return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())

    begun = NextTokens(restriction, Reasoning(end=(7, 8)))
    first = allowed(begun)
    assert set(range(250)) <= first
    assert tokenizer.eos_token_id not in first
    for token in (7, y, 8, 7):
        assert begun.take(token)
        assert allowed(begun) == first
    assert not begun.may_end
    assert begun.take(8)
    assert y in allowed(begun)
    assert 7 not in allowed(begun)
    assert all(begun.take(token) and allowed(begun) for token in yes)
    assert begun.may_end

    free = NextTokens(restriction, Reasoning(end=(8,), begin=9))
    without = NextTokens(restriction)
    assert allowed(free) == allowed(without) | {9}
    assert free.take(9)
    assert allowed(free) == first
    assert free.take(8)
    assert allowed(free) == allowed(without)
    skipped = NextTokens(restriction, Reasoning(end=(8,), begin=9))
    allowed(skipped)
    assert skipped.take(y)
    assert 9 not in allowed(skipped)


def test_what_needs_a_tokenizer_or_other_tokens_is_refused() -> None:
    """Guards engines of token ids only, and ids that the model has not."""
    maker = MaskMaker(None, 40, frozenset())
    for params, field in (
        (structured({"regex": "a"}), "structured_outputs"),
        (SamplingParams(bad_words=["a"]), "bad_words"),
        (SamplingParams(allowed_token_ids=[39, 40]), "allowed_token_ids"),
        (SamplingParams(logit_bias={40: 1}), "logit_bias"),
    ):
        with pytest.raises(RequestError) as refusal:
            maker.compile(params)
        assert refusal.value.field == field
    assert maker.compile(SamplingParams(logit_bias={39: 1})) is None
    assert maker.compile(SamplingParams(allowed_token_ids=[39])) is not None


def test_a_tokenizer_whose_bytes_are_not_known_is_refused() -> None:
    """Guards models of whole words: a grammar needs the bytes of tokens."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(RequestError, match=r"^structured outputs cannot use the model's tokenizer: ") as refusal:
        MaskMaker(words, 2, frozenset()).compile(structured({"regex": "a"}))
    assert refusal.value.field == "structured_outputs"
