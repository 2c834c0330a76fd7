"""Ranks that are killed, stopped, hang or run out of memory: every stream goes on, and its text does not change."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from conftest import FLAGS
from running import Server, serve

LONG = 1500  # tokens of a prompt that takes several steps
POISON = 77
PATIENCE = 240  # seconds for five restarts, each of which imports PyTorch, on a machine that is busy


@pytest.fixture(scope="module")
def faulty(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = (*FLAGS, "--served-model-name", "tiny", "--step-timeout", "1.5")
    with serve(tiny_model, tmp_path_factory.mktemp("faulty"), *flags) as running:
        yield running


def body(index: int, **changes: Any) -> dict[str, Any]:
    """Mixed requests: short and long prompts, greedy and drawn."""
    prompt = [5 + index] * LONG if index % 3 == 0 else f"Question {index}: is a rank lost?"
    sampling = {"temperature": 0.0} if index % 2 else {"temperature": 0.9, "seed": index}
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 60,
        "extra_body": {"ignore_eos": True},
        **sampling,
        **changes,
    }


class Streams:
    """Streams that run in threads; `texts` and `errors` are by index."""

    def __init__(self, server: Server, bodies: list[dict[str, Any]]) -> None:
        self.texts: dict[int, str] = {}
        self.errors: dict[int, Exception] = {}
        self.num_chunks = 0
        self._client = server.client(timeout=PATIENCE)
        self._threads = [
            threading.Thread(target=self._read, args=(index, one), daemon=True) for index, one in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, index: int, one: dict[str, Any]) -> None:
        self.texts[index] = ""
        try:
            for chunk in self._client.completions.create(stream=True, **one):
                self.texts[index] += chunk.choices[0].text
                self.num_chunks += 1
        except openai.OpenAIError as error:
            self.errors[index] = error

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._client.close()


@pytest.fixture(scope="module")
def expected(faulty: Server) -> dict[int, str]:
    """Each answer by itself, from ranks in good health."""
    texts = {}
    with faulty.client() as client:
        for index in range(6):
            texts[index] = client.completions.create(**body(index)).choices[0].text
    return texts


def kill(rank: int) -> Callable[[Server], None]:
    return lambda server: server.ranks()[rank].kill()


def stop(rank: int) -> Callable[[Server], None]:
    return lambda server: server.ranks()[rank].send_signal(signal.SIGSTOP)


def fault(name: str) -> Callable[[Server], None]:
    return lambda server: (server.faults / name).touch()


FAULTS = {
    "kill-0": kill(0),
    "kill-1": kill(1),
    "stop-1": stop(1),
    "oom-0": fault("oom-0"),
    "oom-1": fault("oom-1"),
    "hang-1": fault("hang-1"),
}
CASES = [  # benchmarks/server_faults.py does all of them, with a real model
    ("kill-0", "prefill"),
    ("kill-1", "decode"),
    ("stop-1", "decode"),
    ("oom-1", "prefill"),
    ("oom-0", "decode"),
    ("hang-1", "prefill"),
]


def test_a_hang_in_the_first_step_is_noticed(faulty: Server) -> None:
    """Guards a server before its pace is known. The first test, because it needs ranks that have done no step."""
    assert faulty.metric("prompt_tokens_total") == 0
    (faulty.faults / "hang-1").touch()
    streams = Streams(faulty, [body(1, prompt=[5] * 5)])
    faulty.wait_for(lambda: faulty.health() == (503, "recovering"), 30)
    streams.join()
    assert not streams.errors
    assert streams.texts[0]
    faulty.assert_idle()


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_streams_outlive_a_rank(faulty: Server, expected: dict[int, str], name: str, phase: str) -> None:
    """Guards recovery: no character is lost, repeated or changed; health and metrics tell of it."""
    restarts = faulty.metric("rank_restarts_total")
    (faulty.faults / "slow").write_text("0.03")
    streams = Streams(faulty, [body(index) for index in range(6)])
    enough = 1 if phase == "prefill" else 60
    faulty.wait_for(lambda: faulty.metric("num_requests_running") > 0 and streams.num_chunks >= enough - 1)
    FAULTS[name](faulty)
    (faulty.faults / "slow").unlink()
    faulty.wait_for(lambda: faulty.health() == (503, "recovering"))
    streams.join()
    assert not streams.errors
    assert streams.texts == expected
    faulty.assert_idle()
    assert faulty.metric("rank_restarts_total") == restarts + 1
    assert len(faulty.ranks()) == 2


def test_a_request_that_always_kills_its_rank_is_given_up_alone(faulty: Server, expected: dict[int, str]) -> None:
    """Guards the others: they were in the failed steps, too. In a stream the error is an event, else a 500."""
    restarts = faulty.metric("rank_restarts_total")
    (faulty.faults / "poison").write_text(f"{POISON}")
    poison = body(0, prompt=[POISON] * 20)
    streams = Streams(faulty, [body(1), body(2), poison, body(4)])
    streams.join()
    (faulty.faults / "poison").unlink()
    assert list(streams.errors) == [2]
    assert "given up" in str(streams.errors[2])
    assert {i: streams.texts[i] for i in (0, 1, 3)} == {0: expected[1], 1: expected[2], 3: expected[4]}
    faulty.assert_idle()
    assert restarts + 3 <= faulty.metric("rank_restarts_total") <= restarts + 5  # it was in a step with up to 3 others


def test_the_error_of_what_was_given_up_is_a_500(faulty: Server) -> None:
    """Guards the status, and that the error tells nothing of the machine."""
    (faulty.faults / "poison").write_text(f"{POISON}")
    with pytest.raises(openai.InternalServerError) as failure, faulty.client(timeout=PATIENCE) as client:
        client.completions.create(**body(0, prompt=[POISON] * 20))
    (faulty.faults / "poison").unlink()
    assert failure.value.status_code == 500
    assert failure.value.body["code"] == "engine_failed"  # type: ignore[index]
    faulty.assert_idle()


def test_idle_ranks_are_looked_after(faulty: Server) -> None:
    """Guards a server without work: a lost rank is noticed and replaced before anybody asks."""
    faulty.ranks()[1].kill()
    faulty.wait_for(lambda: faulty.health()[1] == "recovering", 5)
    faulty.wait_for(lambda: faulty.health() == (200, "ok"))
    assert len(faulty.ranks()) == 2


def test_no_rank_outlives_its_server(faulty: Server) -> None:
    """Guards against orphans when the server itself is killed. The last test: it ends the server of this file."""
    ranks = faulty.ranks()
    assert len(ranks) == 2
    faulty.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
