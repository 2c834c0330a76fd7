"""Benchmarks of an engine: what they count."""

from harness import make_engine
from tiny_models import tiny_config, tiny_model

from twofold.bench.latency import time_batch


def test_decode_steps_are_those_in_which_the_whole_batch_took_part() -> None:
    """Guards the median of a decode step from prefills, and from steps that only some requests are in."""
    engine = make_engine(tiny_model(tiny_config("llama")), 2, max_num_batched_tokens=16)
    seconds, steps = time_batch(engine, batch_size=3, input_len=10, output_len=8, seed=0)
    assert engine.is_idle
    # The prompts take two steps. The third prompt has its first token one step after the others, whose last token comes
    # one step before its own: 7 steps give all of them a token, and of these the first two and the last do not count.
    assert len(steps) == 4
    assert sum(steps) <= seconds * 1e3
    engine.shutdown()
