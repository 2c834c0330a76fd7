"""Bodies that are made to keep a server busy: the other clients do not notice, and its memory stays small."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FLAGS
from running import Server, serve

MAX_WAIT = 0.1 * 3  # seconds: what is promised, times what machines that others use may add
MAX_GROWTH = 14  # bytes of memory for a byte of the body; a character of a text alone may take 4, in several copies
SMALL = 50 << 20  # bytes of memory that are not counted

CHAT, TEXT, ENCODE, DECODE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
MESSAGE = '{"role":"user","content":"x"}'


def many(item: str, num_bytes: float) -> str:
    """So many bytes of the item, with commas between."""
    return ",".join([item] * int(num_bytes / (len(item.encode()) + 1)))


def prompt(value: str, rest: str = "") -> str:
    return f'{{"prompt":{value}{rest}}}'


def prompts(item: str, num_bytes: float = 30e6) -> str:
    return prompt(f"[{many(item, num_bytes)}]")


def tokens(item: str) -> str:
    return f'{{"tokens":[{many(item, 30e6)}]}}'


def chat(messages: str, rest: str = "") -> str:
    return f'{{"messages":[{messages}]{rest}}}'


def keys(number: int) -> str:
    return ",".join(f'"k{i}":1' for i in range(number))


LONG = f'"{"x" * 30_000_000}"'
VARIABLES = ',"chat_template_kwargs":'
BODIES: list[tuple[str, str, Callable[[], str], str]] = [  # name, path, body, what the error says
    ("empty messages, 30 KB", CHAT, lambda: chat(many("{}", 3e4)), "messages"),
    ("empty messages, 1.2 MB", CHAT, lambda: chat(many("{}", 1.2e6)), "too many"),
    ("empty messages, 30 MB", CHAT, lambda: chat(many("{}", 30e6)), "too many"),
    ("unknown keys, 2 MB", TEXT, lambda: prompt('"x",' + keys(199_000)), "unknown field 'k0'"),
    ("unknown keys, 20 MB", TEXT, lambda: prompt('"x",' + keys(1_700_000)), "too many"),
    ("unknown keys of a message", CHAT, lambda: chat(f"{{{keys(100_000)}}}"), "unknown field 'k0'"),
    ("messages, 6 MB", CHAT, lambda: chat(many(MESSAGE, 6e6)), "too many"),
    ("messages within the limit", CHAT, lambda: chat(many(MESSAGE, 1.2e5)), "max_model_len"),
    ("stop token ids", TEXT, lambda: prompt('"x"', f',"stop_token_ids":[{many("7", 8e6)}]'), "stop_token_ids"),
    ("stop strings", TEXT, lambda: prompt('"x"', f',"stop":[{many("1", 3e6)}]'), "stop"),
    ("deep lists", TEXT, lambda: prompt("[" * 30_000_000), "too many"),
    ("deep template variables", CHAT, lambda: chat(MESSAGE, VARIABLES + '{"a":' * 500 + "1" + "}" * 500), "deep"),
    ("long template variables", CHAT, lambda: chat(MESSAGE, f"{VARIABLES}[{many('1000', 30e6)}]"), "too many"),
    ("long text", TEXT, lambda: prompt(LONG), "max_model_len"),
    ("long text, 4 bytes a character", TEXT, lambda: prompt(f'"{"🦊" * 7_000_000}"'), "max_model_len"),
    ("long text, one character of 4 bytes", TEXT, lambda: prompt(LONG[:-1] + '🦊"'), "max_model_len"),
    ("long text of quotes", TEXT, lambda: prompt(json.dumps('"' * 15_000_000)), "max_model_len"),
    ("long text without an end", TEXT, lambda: '{"prompt":"' + '\\"' * 15_000_000, "not JSON"),
    ("long message", CHAT, lambda: chat(f'{{"role":"user","content":{LONG}}}'), "max_model_len"),
    ("many prompts", TEXT, lambda: prompts('"xy"'), "too many"),
    ("many prompts within the limit", TEXT, lambda: prompts('"xy"', 5e4), "max_waiting_requests"),
    ("prompts of ids", TEXT, lambda: prompts("[5]"), "too many"),
    ("a prompt of short ids", TEXT, lambda: prompts("5"), "max_model_len"),
    ("a prompt of long ids", TEXT, lambda: prompts("70000"), "prompt"),
    ("ids that no model has", TEXT, lambda: prompts("9" * 30), "prompt"),
    ("ids that are no integers", DECODE, lambda: tokens("-1.5"), "tokens"),
    ("ids to decode", DECODE, lambda: tokens("5"), "tokens"),
    ("a number without end", TEXT, lambda: prompt('"x"', f',"seed":{"9" * 30_000_000}'), "digits"),
    ("a number of 100,000 digits", TEXT, lambda: prompt('"x"', f',"seed":{"9" * 100_000}'), "digits"),
    ("a number too large", TEXT, lambda: prompt('"x"', ',"temperature":1e999'), "temperature"),
    ("a fraction without end", TEXT, lambda: prompt('"x"', f',"top_p":1.{"9" * 30_000_000}'), "top_p"),
    ("a long key", TEXT, lambda: prompt('"x"', f",{LONG}:1"), "unknown field"),
    ("text to encode", ENCODE, lambda: prompt(LONG), "max_model_len"),
    ("no JSON", TEXT, lambda: "}" * 30_000_000, "not JSON"),
]


@pytest.fixture(scope="module")
def roomy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_model, tmp_path_factory.mktemp("roomy"), *FLAGS) as running:
        yield running


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """Fills the list when it ends: the longest wait for /health, and for a token of a stream, in seconds."""
    waits: list[float] = []
    port = server.url.rpartition(":")[2]
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("watch.py")), port],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield waits
        finally:
            process.stdin.close()
            waits += map(float, process.stdout.read().split())


class Memory:
    """The most memory of a server and its helpers since this object was made, in bytes."""

    def __init__(self, server: Server) -> None:
        ranks = {rank.pid for rank in server.ranks()}
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
        self._pids = [process.pid for process in processes if process.pid not in ranks]
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts again
        self._before = self._peak()

    def _peak(self) -> int:
        lines = [line for pid in self._pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def growth(self) -> int:
        return self._peak() - self._before


def post(server: Server, path: str, body: bytes) -> tuple[int, Any]:
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    return response.status_code, response.json()


@pytest.mark.parametrize(("path", "make", "said"), [pytest.param(*rest, id=name) for name, *rest in BODIES])
def test_nobody_waits_for_a_body(roomy: Server, path: str, make: Callable[[], str], said: str) -> None:
    """Bodies were read on the event loop, with all their errors: 1.2 MB took 15 s and 1 GB, 22 MB took 13 GB."""
    body = make().encode()
    for _ in range(3):  # others use the machine, too
        with watched(roomy) as waits:
            memory, start = Memory(roomy), time.monotonic()
            status, answer = post(roomy, path, body)
            seconds, growth = time.monotonic() - start, memory.growth()
        print(
            f"{len(body) / 1e6:.1f} MB: {status} after {seconds:.2f} s, {growth / 1e6:.0f} MB more, "
            f"/health {waits[0] * 1e3:.0f} ms, stream {waits[1] * 1e3:.0f} ms; {answer['error']['message'][:100]}"
        )
        assert status == 400, answer
        assert said in answer["error"]["message"]
        assert growth < MAX_GROWTH * len(body) + SMALL
        roomy.wait_for(lambda: roomy.metric("num_requests_running") == 0)
        if max(waits) < MAX_WAIT:
            break
    assert max(waits) < MAX_WAIT
    assert "Traceback" not in roomy.log.read_text()


def test_a_long_body_with_a_key_twice_is_refused(roomy: Server) -> None:
    """Guards long bodies: they are read like short ones."""
    status, answer = post(roomy, TEXT, b'{"prompt":"hi","user":"' + b"x" * 100_000 + b'","prompt":"ho"}')
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert answer["error"]["message"] == "the key 'prompt' is given twice in one object; give it once"


def test_a_long_body_is_answered_like_a_short_one(roomy: Server) -> None:
    """Guards long prompts and chats: text, ids, batches, and numbers in a form that few clients use."""
    rest = {"max_tokens": 4, "temperature": 0}
    padding = {"user": "x" * 100_000}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"prompt": "hi"} | rest),
        (TEXT, {"prompt": [5, 6, 7] * 100} | rest),
        (TEXT, {"prompt": [[5, 6, 7], [8]]} | rest),
        (TEXT, {"prompt": ["hi", "Grüße 🦊"], "logprobs": 2, "echo": True} | rest),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]} | rest),
    ]
    for path, body in bodies:
        (status, short), (_, long) = (post(roomy, path, json.dumps(one).encode()) for one in (body, body | padding))
        assert status == 200, short
        assert (long["choices"], long["usage"]["prompt_tokens"]) == (short["choices"], short["usage"]["prompt_tokens"])


def test_chunks_of_one_byte(roomy: Server) -> None:
    """A body in the smallest of chunks made 43,000 events of the quarter of a megabyte that was received at once."""
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = roomy.url.removeprefix("http://").split(":")
    with watched(roomy) as waits, socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + b"1\r\n[\r\n" * 500_000 + b"0\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")
    print(f"/health {waits[0] * 1e3:.0f} ms, stream {waits[1] * 1e3:.0f} ms")
    assert max(waits) < MAX_WAIT
