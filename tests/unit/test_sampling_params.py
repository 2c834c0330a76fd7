"""What a user may and may not ask of sampling."""

import inspect
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from twofold.errors import RequestError
from twofold.sampling_params import SamplingParams, StructuredOutputsParams

NAN, INF = math.nan, math.inf
HUGE = 10**5000  # too long for Python to print

WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 129, True, 1.0, "1", None, HUGE],
    "temperature": [-0.1, NAN, INF, -INF, "1", None, True, 1e7, HUGE],
    "top_k": [-2, 1.5, True, None, HUGE, NAN],
    "top_p": [0.0, -0.1, 1.0001, NAN, INF, None, False, "0.5"],
    "min_p": [-0.1, 1.1, NAN, None, True, []],
    "seed": [-(2**63) - 1, 2**64, 1.0, True, "7", HUGE],
    "presence_penalty": [-2.01, 2.01, NAN, None, True],
    "frequency_penalty": [-2.01, 2.01, NAN, None, True],
    "repetition_penalty": [0.0, -1.0, NAN, INF, None, True],
    "min_tokens": [-1, None, True, 1.0, 17, HUGE],
    "max_tokens": [0, -1, True, 1.0, INF, 2**31, HUGE],
    "stop": ["", [""], ["a", ""], [1], 7, {"a": 1}, b"a"],
    "stop_token_ids": [[-1], [2**31], [True], [1.0], ["1"], 5, "12", {1: 2}, [HUGE]],
    "ignore_eos": [1, None, "yes"],
    "logprobs": [-2, 2**31, True, 1.0, HUGE],
    "prompt_logprobs": [-2, 2**31, True, 1.0],
    "skip_special_tokens": [0, None],
    "spaces_between_special_tokens": [0, None],
    "detokenize": [1, None],
    "include_stop_str_in_output": [1, None],
    "truncate_prompt_tokens": [0, -2, True, 1.0, HUGE],
    "output_kind": [None, 1, "delta"],
    "logit_bias": [{-1: 1}, {"1": 1}, {1: NAN}, {1: "2"}, {2**31: 0}, {1: 1e7}, [1], 5],
    "bad_words": ["a", [""], [" "], [1], 7, {"a": 1}],
    "allowed_token_ids": [[], [-1], [2**31], ["1"], 5, "12", [HUGE]],
    "structured_outputs": [{"json": {}}, "json", 1],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}-{i}") for name, values in WRONG.items() for i, value in enumerate(values)],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(name: str, value: Any) -> None:
    """Guards every field against wrong types and ranges: none may reach a rank, where it would hurt other requests."""
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**{name: value})
    message = str(refusal.value)
    assert refusal.value.field == name
    assert name in message
    assert ", got " in message
    assert "\n" not in message
    assert len(message) < 200


def test_messages_say_the_limit_and_the_value() -> None:
    """Guards the wording that a user acts on."""
    with pytest.raises(RequestError, match=r"^temperature must be a finite number at least 0 and .*, got nan$"):
        SamplingParams(temperature=NAN)
    with pytest.raises(RequestError, match=r"^top_p must be a finite number above 0 and at most 1, got 1\.5$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(RequestError, match=r"^logprobs must be an integer from -1 to 2147483647 or None, got -2$"):
        SamplingParams(logprobs=-2)
    with pytest.raises(RequestError, match=r"^min_tokens must be at most max_tokens, which is 16, got 17$"):
        SamplingParams(min_tokens=17)


def test_every_field_is_tested_with_wrong_values() -> None:
    """Guards the table above: a new field must bring its wrong values."""
    assert {*WRONG, "logits_processors"} == set(SamplingParams.__dataclass_fields__)


def test_the_defaults_are_those_of_vllm() -> None:
    """Guards scripts that change only their import."""
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.seed, params.min_tokens, params.max_tokens, params.ignore_eos) == (None, 0, 16, False)
    assert (params.stop, params.stop_token_ids, params.logprobs, params.prompt_logprobs) == ((), (), None, None)
    assert params.detokenize
    assert params.skip_special_tokens
    assert params.spaces_between_special_tokens
    assert not params.include_stop_str_in_output


def test_the_edges_of_every_range_are_accepted() -> None:
    """Guards against limits that are off by one."""
    SamplingParams(n=128, top_k=-1, top_p=1e-300, min_p=1, seed=-(2**63), min_tokens=16, logprobs=0, prompt_logprobs=20)
    SamplingParams(presence_penalty=-2, frequency_penalty=2.0, repetition_penalty=0.01, seed=2**64 - 1, max_tokens=None)
    SamplingParams(max_tokens=None, min_tokens=10**6, stop_token_ids=[0, 2**31 - 1], temperature=0)


def test_values_are_brought_to_one_form() -> None:
    """Guards readers, which see tuples and plain numbers whatever was passed."""
    params = SamplingParams(stop="\n", stop_token_ids=[2, 0], temperature=np.float32(0.5), seed=np.int64(3), top_k=5)
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (2, 0)
    assert type(params.temperature) is float
    assert type(params.seed) is int
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_greedy_begins_below_a_tiny_temperature() -> None:
    """Guards vLLM's threshold, and its refusal of several answers that could not differ."""
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
    with pytest.raises(RequestError, match=r"^n must be 1 when sampling is greedy"):
        SamplingParams(temperature=0, n=2)


def test_stop_strings_need_text() -> None:
    """Guards a request that could never stop as asked."""
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_functions_cannot_travel_to_ranks() -> None:
    """Guards vLLM's older parameter: nothing is dropped silently."""
    assert not SamplingParams(logits_processors=[]).is_masked
    with pytest.raises(RequestError, match=r"^logits_processors are not supported: .* use logit_bias"):
        SamplingParams(logits_processors=[lambda ids, row: row])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "^structured_outputs must be one of json, regex, choice, grammar, json_object, got None"),
        ({"json_object": False}, "^structured_outputs must be one of"),
        ({"json": {}, "regex": "a"}, r"got \['json', 'regex'\]$"),
        ({"json": 1}, "^json must be a JSON schema"),
        ({"json": ""}, "^json must be a JSON schema"),
        ({"json": {"a": {1, 2}}}, "^json must be a JSON schema"),
        ({"regex": ""}, "^regex must be text"),
        ({"choice": []}, "^choice must be a list of texts"),
        ({"choice": "yes"}, "^choice must be a list of texts"),
        ({"choice": ["a", 1]}, "^choice must be a list of texts"),
        ({"json_object": 1}, "^json_object must be True or False"),
        ({"structural_tag": "{}"}, "^structural_tag is not supported"),
    ],
)
def test_a_form_is_one_of_five(form: dict[str, Any], message: str) -> None:
    """Guards forms that contradict each other, and values of wrong types."""
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams(**form)


def test_forms_are_brought_to_one_form() -> None:
    """Guards parameters that are compared, copied and sent: schemas are text, choices a tuple."""
    form = StructuredOutputsParams(json={"type": "object"})
    assert form.json == '{"type": "object"}'
    assert StructuredOutputsParams(json={}).json == "{}"
    assert StructuredOutputsParams(choice=["a"]).choice == ("a",)
    assert replace(form, disable_any_whitespace=True).json == form.json
    assert SamplingParams(logit_bias={np.int64(3): 1}).logit_bias == {3: 1.0}
    assert SamplingParams(structured_outputs=form).is_masked
    assert not SamplingParams(bad_words=[], logit_bias={3: 1}).is_masked


def test_what_vllm_has_besides_is_taken_where_it_asks_for_nothing() -> None:
    """Guards scripts of vLLM's examples, old ones with best_of=n and use_beam_search=False among them."""
    nothing: dict[str, Any] = {
        "use_beam_search": False,
        "flat_logprobs": False,
        "extra_args": None,
        "stream_interval": 1,
    }
    params = SamplingParams(2, best_of=2, temperature=0.5, **nothing)
    assert params == SamplingParams(n=2, temperature=0.5) == params.clone()
    params.best_of = 2  # type: ignore[attr-defined]
    for name, value, way_out in (("best_of", 3, "give n"), ("guided_decoding", {"json": {}}, "use structured_outputs")):
        for use in (lambda: SamplingParams(**{name: value}), lambda: setattr(params, name, value)):  # noqa: B023
            with pytest.raises(RequestError, match=f"^{name}=.* is not supported: {way_out}") as refusal:
                use()
            assert refusal.value.field == name


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    """Guards against parameters that are silently dropped, and against a bare TypeError."""
    message = r"^'temprature' is not a sampling parameter; did you mean temperature\?$"
    with pytest.raises(RequestError, match=message) as refusal:
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    assert refusal.value.field == "temprature"
    with pytest.raises(RequestError, match=r"^'xyzzy' is not a sampling parameter; known are allowed_token_ids, "):
        SamplingParams(xyzzy=1)  # type: ignore[call-arg]


def test_positions_are_those_of_vllm() -> None:
    """Guards scripts that give `n` and penalties without names."""
    params = SamplingParams(2, 0.5, -0.5, 1.1, 0.8, 0.95, 40, 0.1, 7)
    assert params == SamplingParams(
        n=2, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1, temperature=0.8, top_p=0.95,
        top_k=40, min_p=0.1, seed=7,
    )  # fmt: skip


def test_values_may_be_changed_and_are_checked_when_used() -> None:
    """Guards scripts that assign, as vLLM's do; a wrong value reaches no rank, a wrong name no field."""
    params = SamplingParams()
    params.max_tokens, params.stop = 8, "x"  # type: ignore[assignment]
    copy = params.clone()
    assert (copy.max_tokens, copy.stop) == (8, ("x",))
    params.temperature = -1
    assert copy.temperature == 1.0
    with pytest.raises(RequestError, match="temperature"):
        params.clone()
    with pytest.raises(RequestError, match=r"did you mean temperature\?"):
        params.temprature = 0.5  # type: ignore[attr-defined]


def test_the_signature_names_every_field() -> None:
    """Guards `help` and completion in notebooks, which the check of names must not hide."""
    assert list(inspect.signature(SamplingParams).parameters) == list(SamplingParams.__dataclass_fields__)


def test_copies_and_pickles() -> None:
    """Guards the ways parameters travel: `replace`, and the pipes to the ranks."""
    params = SamplingParams(temperature=0.5, stop=["x"], seed=4)
    assert pickle.loads(pickle.dumps(params)) == params
    assert replace(params, n=2).n == 2
    with pytest.raises(RequestError):
        replace(params, n=0)
