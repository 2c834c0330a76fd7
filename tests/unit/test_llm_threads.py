"""`LLM` in several threads: one call runs after the other, and Ctrl-C ends the wait."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
from harness import make_engine
from tiny_models import tiny_config, tiny_model

from twofold import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.fixture
def llm() -> Iterator[LLM]:
    """An LLM on two ranks that are threads."""
    llm = LLM.__new__(LLM)
    llm.engine, llm._ids, llm._lock = make_engine(tiny_model(tiny_config("llama")), 2), count(), threading.Lock()
    yield llm
    llm.shutdown()


def answers(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_two_threads_get_the_answers_of_one(llm: LLM) -> None:
    """One thread took the other's step: an IndexError in one, and 39 s without a word in the other."""
    batches = [[[3 + number, 5 + i, 7] for i in range(5)] for number in range(6)]
    expected = [answers(llm, prompts) for prompts in batches]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda prompts: answers(llm, prompts), batches)) == expected
    assert llm.engine.is_idle


def test_an_interrupt_ends_the_wait_for_another_thread(llm: LLM) -> None:
    """Guards Ctrl-C while another thread's call runs, which may take hours."""
    expected = answers(llm, [[5, 6, 7]])
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with llm._lock, pytest.raises(KeyboardInterrupt):
        answers(llm, [[5, 6, 7]])
    assert answers(llm, [[5, 6, 7]]) == expected
