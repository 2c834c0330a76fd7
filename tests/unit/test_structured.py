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
from harness import LaggingDevice, generate, make_engine
from tiny_models import tiny_config, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from twofold.engine.masks import MaskMaker, NextTokens
from twofold.errors import EngineError, RequestError
from twofold.outputs import RequestOutput
from twofold.sampling_params import SamplingParams, StructuredOutputsParams

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
