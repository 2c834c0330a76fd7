"""Beam search against Transformers' `generate(num_beams=...)`."""

import pytest
import torch
from harness import make_engine
from tiny_models import tiny_config, tiny_model

from twofold import BeamSearchParams, RequestError
from twofold.engine.beam_search import beam_search


@pytest.mark.parametrize(("eos", "length_penalty"), [(None, 1.0), (3, 1.0), (3, 0.0), (11, 2.0)])
def test_the_answers_are_those_of_transformers(eos: int | None, length_penalty: float) -> None:
    """Guards the choice of beams, their scores, ends in the midst, and two prompts at once."""
    model = tiny_model(tiny_config("llama"))
    engine = make_engine(model, 2, eos_token_ids=frozenset() if eos is None else frozenset({eos}))
    prompts = [[5, 6, 7, 8], [9, 10, 12]]
    params = BeamSearchParams(
        beam_width=4, max_tokens=8, length_penalty=length_penalty, include_stop_str_in_output=True
    )
    found = beam_search(engine, prompts, params)
    for prompt, output in zip(prompts, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=4,
            num_return_sequences=4, max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=0,
            length_penalty=length_penalty, early_stopping=False,
        )  # fmt: skip
        for sequence, row in zip(output.sequences, expected.tolist(), strict=True):
            padding = [0] * (len(row) - len(sequence.tokens))
            assert sequence.tokens + padding == row
            assert sequence.finish_reason == ("stop" if sequence.tokens[-1] == eos else "length")
    assert engine.is_idle
    engine.shutdown()


def test_more_beams_than_log_probabilities_are_refused() -> None:
    engine = make_engine(tiny_model(tiny_config("llama")), 1)
    with pytest.raises(RequestError, match="logprobs must be at most the engine's max_logprobs=20, got 22"):
        beam_search(engine, [[1, 2]], BeamSearchParams(beam_width=11, max_tokens=2))
    with pytest.raises(RequestError, match="temperature must be 0"):
        BeamSearchParams(beam_width=2, max_tokens=2, temperature=0.5)
    assert not engine.has_work
    engine.shutdown()
