"""Chat templates are programs that come with a model: whatever they do, the server serves the others, and ends."""

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running import Server, serve
from tiny import CHAT_TEMPLATE
from transformers import AutoTokenizer

# Loops without an end have to be made of loops with one: Jinja's ranges have at most 100,000 numbers.
ENDLESS = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
HUGE = "{% set x = namespace(y='x' * 1000) %}{% for i in range(30) %}{% set x.y = x.y ~ x.y %}{% endfor %}{{ x.y }}"
LONG = "{% set n = 200000000 %}{{ 'x' * n }}"
TEMPLATE = (
    f"{{% if act == 'loop' %}}{ENDLESS}{{% elif act == 'huge' %}}{HUGE}{{% elif act == 'long' %}}{LONG}"
    "{% elif act == 'divide' %}{{ 1 / 0 }}{% endif %}" + CHAT_TEMPLATE
)


@pytest.fixture(scope="module")
def wild_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that does what the variable `act` says."""
    folder = tmp_path_factory.mktemp("wild") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wild(wild_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(wild_model, tmp_path_factory.mktemp("server")) as running:
        yield running


def chat(act: str, content: str = "hi") -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "chat_template_kwargs": {"act": act}, "max_tokens": 4, "temperature": 0}


def helpers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if any("helper" in part for part in child.cmdline())]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("loop", "takes more than 5 s"),
        ("huge", "takes more than 1024 MiB of memory"),
        ("long", r"the prompt has 20\d{7} characters, more than max_model_len"),
        ("divide", "refuses the messages: division by zero"),
    ],
)
def test_a_wild_template_is_an_error_of_its_own_chat(wild: Server, act: str, said: str) -> None:
    """A template that looped held the only thread that tokenizes; one that made gigabytes took them from the server."""
    answers: list[httpx.Response] = []
    before = psutil.Process(wild.process.pid).memory_info().rss
    other = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{wild.url}/v1/chat/completions", json=chat(act), timeout=60))
    )
    other.start()
    longest = 0.0
    while other.is_alive():
        start = time.monotonic()
        assert wild.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1}).status_code == 200
        longest = max(longest, time.monotonic() - start)
    [answer] = answers
    print(f"{act}: {answer.elapsed.total_seconds():.2f} s; others waited {longest * 1e3:.0f} ms")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert re.search(said, error["message"]), error
    assert longest < 0.6
    assert psutil.Process(wild.process.pid).memory_info().rss < before + (100 << 20)
    assert wild.http.post("/v1/chat/completions", json=chat("")).status_code == 200


def test_a_template_sees_what_transformers_gives_it(wild: Server, wild_model: Path) -> None:
    """Guards the variables of a template: special tokens, messages, and those that a client adds."""
    tokenizer = AutoTokenizer.from_pretrained(wild_model)
    messages = [{"role": "system", "content": "Grüße 🦊"}, {"role": "user", "content": "x" * 500, "name": "me"}]
    for generates in (True, False):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=generates, return_dict=False)
        answer = wild.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": generates})
        assert answer.json()["tokens"] == expected


def test_names_that_rendering_uses_are_not_variables(wild: Server) -> None:
    """Guards the arguments that render a template: a variable of the same name would replace them."""
    for name in ("chat_template", "conversations", "messages", "add_generation_prompt", "tools", "tokenize"):
        answer = wild.http.post("/v1/chat/completions", json=chat("") | {"chat_template_kwargs": {name: "x"}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_a_helper_that_somebody_ends_is_replaced(wild: Server) -> None:
    """Guards who runs out of memory: the kernel may end a helper."""
    for helper in helpers(wild):
        helper.kill()
        wild.wait_for(lambda helper=helper: helper.status() == psutil.STATUS_ZOMBIE, 5)
    long = chat("") | {"user": "x" * 100_000}
    assert wild.http.post("/v1/chat/completions", json=long).status_code == 200
    assert len(helpers(wild)) == 2


@pytest.mark.parametrize("signals", [1, 2])
def test_a_server_ends_while_a_template_loops(wild_model: Path, tmp_path: Path, signals: int) -> None:
    """Not even two SIGTERMs ended such a server: Python waits for its threads."""
    with serve(wild_model, tmp_path) as server:
        ends = [*helpers(server), *server.ranks()]
        caller = threading.Thread(target=_call, args=(server, chat("loop")))
        caller.start()
        time.sleep(1.0)
        start = time.monotonic()
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert server.process.wait(20) in (0, -signal.SIGTERM)  # the second may come when all is done
        print(f"{signals} SIGTERM: ended after {time.monotonic() - start:.1f} s")
        assert time.monotonic() - start < (10 if signals == 1 else 5)
        caller.join()
        assert len(ends) == 3
        assert not psutil.wait_procs(ends, timeout=5)[1]
        assert "Traceback" not in server.log.read_text()


def _call(server: Server, body: dict[str, Any]) -> None:
    try:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            content=json.dumps(body),
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert answer.status_code == 503, answer.text
    except httpx.TransportError:
        pass  # it was not answered


def test_helpers_end_with_a_server_that_is_killed(wild_model: Path, tmp_path: Path) -> None:
    """Guards machines from processes that nobody ends: not even SIGKILL leaves one, though it is in a loop."""
    with serve(wild_model, tmp_path) as server:
        ends = [*helpers(server), *server.ranks()]
        caller = threading.Thread(target=_call, args=(server, chat("loop")))
        caller.start()
        time.sleep(1.0)
        server.process.kill()
        caller.join()
        assert not psutil.wait_procs(ends, timeout=5)[1]
