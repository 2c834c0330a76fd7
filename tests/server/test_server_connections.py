"""What a server does with connections and headers, before any route sees a request."""

import asyncio
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from running import Server, serve

from twofold.server import run
from twofold.server.config import ServerConfig, bind

TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
NO_HTTP = [
    b"hello\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",  # no Host
    b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000,
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # who takes it for https
]


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("sent", NO_HTTP, ids=lambda sent: repr(sent[:32]))
def test_what_is_not_http_gets_json(server: Server, sent: bytes) -> None:
    """Errors are always JSON, but malformed HTTP got uvicorn's "Invalid HTTP request received." as plain text."""
    log = len(server.log.read_text())
    with connect(server) as connection:
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # to the end: the connection is closed
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"content-type: application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in server.log.read_text()[log:]


def test_no_answer_follows_one_that_has_begun(server: Server) -> None:
    """A broken chunk after the answer cannot be answered, too: that was a trace in the log."""
    with connect(server) as connection:
        connection.sendall(b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):
            answer += connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 405")
        connection.sendall(b"zz\r\n")
        assert connection.recv(1 << 16) == b""
    assert "Traceback" not in server.log.read_text()


TWICE = [
    ('{"prompt": "hi", "prompt": "ho"}', "prompt"),
    ('{"prompt": "hi", "temperature": 0, "temperature": 0}', "temperature"),
    ('{"prompt": "hi", "prom\\u0070t": "hi"}', "prompt"),
    ('{"prompt": "hi", "\\ud800": 1, "\\ud800": 1}', "?"),
    ('{"prompt": "hi", "stream_options": {"include_usage": true, "include_usage": false}}', "include_usage"),
]


@pytest.mark.parametrize(("body", "name"), TWICE)
def test_a_key_that_is_given_twice_is_named(server: Server, body: str, name: str) -> None:
    """No field is ignored; but of a key that was given twice, the first value was."""
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/completions", content=body.encode(), headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, name)
    assert error["message"] == f"the key {name!r} is given twice in one object; give it once"


def test_an_idle_connection_is_used_again(server: Server) -> None:
    """Connections were closed after 5 s: of 200 requests 5 s apart, 9 were reset."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=20)
    for pause in (0.0, 7.0):
        time.sleep(pause)
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {server.key}"})
        used = connection.sock.getsockname()
        with connection.getresponse() as response:
            assert response.read() == b'{"status":"ok"}'
    assert used == connection.sock.getsockname()
    connection.close()


def test_no_page_loads_scripts_of_others(server: Server) -> None:
    """/docs loaded its scripts from a host on the Internet, and ran them with the server's origin."""
    assert [server.http.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404, 404, 200]


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key, an access log, and no name for its model."""
    with serve(
        tiny_model, tmp_path_factory.mktemp("guarded"), "--api-key", "s3cret", "--access-log", key="s3cret"
    ) as running:
        yield running


def test_two_keys_are_none(guarded: Server) -> None:
    """Two Authorization headers were joined, so that two halves of a key were taken for the key."""
    halves = [("Authorization", "Bearer s3c"), ("Authorization", "ret")]
    for headers in (halves, [("Authorization", "Bearer s3cret")] * 2, [("Authorization", "Bearer s3cret"), halves[1]]):
        with connect(guarded) as connection:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
            connection.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"send it once" in answer


def test_a_model_is_not_called_by_its_path(guarded: Server, tiny_model: Path) -> None:
    """/v1/models told everyone where on the machine the model lies."""
    [model] = guarded.http.get("/v1/models").json()["data"]
    assert model["id"] == model["root"] == tiny_model.name
    for path in ("/v1/models", "/openapi.json", "/metrics"):
        assert str(tiny_model) not in guarded.http.get(path).text
    answer = guarded.http.post("/v1/completions", json=TEXT | {"model": tiny_model.name})
    assert answer.json()["model"] == tiny_model.name
    assert guarded.http.post("/v1/completions", json=TEXT | {"model": str(tiny_model)}).status_code == 404


def test_the_access_log_goes_to_stderr(guarded: Server) -> None:
    """The lines of --access-log went to stdout, though all messages go to stderr."""
    guarded.http.get("/version?seen=1")
    guarded.wait_for(lambda: '"GET /version?seen=1 HTTP/1.1" 200' in guarded.log.read_text(), 5)


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def test_listening_is_said_when_clients_can_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server said "listening" before its socket listened: who waited for it could be refused."""
    service: Any = SimpleNamespace(engine=SimpleNamespace(on_death=None))
    server = run._Server(uvicorn.Config(_no_app, lifespan="off", log_config=None), service, 1.0)

    def connect_at_once(message: str) -> None:
        host, port = message.removeprefix("listening on http://").split(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        server.should_exit = True

    monkeypatch.setattr(run, "_say", connect_at_once)
    with bind(ServerConfig(port=0)) as listener:
        asyncio.run(server.serve(sockets=[listener]))
    assert server.should_exit


def half_a_request(server: Server) -> socket.socket:
    connection = connect(server)
    connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
    return connection


def test_idle_connections_make_room_for_others(tiny_model: Path, tmp_path: Path) -> None:
    """Idle connections used up all file descriptors, and nobody else could connect for two minutes."""
    with serve(tiny_model, tmp_path) as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (80, 80))
        stream = server.client().completions.create(
            model=tiny_model.name, prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        connections = []
        for make in [connect, half_a_request] * 75:
            connections.append(make(server))
            time.sleep(0.005)
        start = time.monotonic()
        with connect(server) as another:
            another.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert another.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - start < 1
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"  # what is used is left alone
        num_ended = sum(_has_ended(connection) for connection in connections)
        assert 75 < num_ended < 150
        assert _has_ended(connections[0])
        assert not _has_ended(connections[-1])
        for connection in connections:
            connection.close()
        log = server.log.read_text()
    assert "Traceback" not in log


def _has_ended(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_connections_beyond_the_limit_wait(tiny_model: Path, tmp_path: Path) -> None:
    """A server without file descriptors logged 12,248 traces; it logs one line, and serves those who come later."""
    with serve(tiny_model, tmp_path) as server:
        (server.faults / "slow").write_text("0.2")
        body = TEXT | {"model": tiny_model.name, "max_tokens": 500, "ignore_eos": True, "stream": True}
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        connections = []
        for _ in range(100):  # none of them is idle
            connections.append(connect(server))
            connections[-1].sendall(request(body))
            time.sleep(0.005)
        server.wait_for(lambda: "no connection can be accepted" in server.log.read_text(), 5)
        time.sleep(2.5)  # asyncio tries again each second
        for connection in connections:
            connection.close()
        (server.faults / "slow").unlink()
        server.wait_for(lambda: server.health() == (200, "ok"), 10)
        log = server.log.read_text()
    assert log.count("Too many open files; raise the limit with ulimit -n") == 1
    assert "Traceback" not in log


def test_a_client_that_sends_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections without a complete request stayed forever, each with a file descriptor."""
    config = uvicorn.Config(_no_app, lifespan="off", log_config=None, http=run._Connection, timeout_keep_alive=1)
    service: Any = SimpleNamespace(engine=SimpleNamespace(on_death=None))
    server = run._Server(config, service, 1.0)
    ended = []

    async def silent_clients(port: int) -> None:
        for sent in (b"", b"GET /hea", b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            with suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 10)
            ended.append(sent)
            writer.close()
        server.should_exit = True

    async def serve_silent_clients(listener: socket.socket) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve(sockets=[listener]))
            await asyncio.sleep(0.3)
            tasks.create_task(silent_clients(listener.getsockname()[1]))

    monkeypatch.setattr(run, "_say", lambda message: None)
    with bind(ServerConfig(port=0)) as listener:
        asyncio.run(serve_silent_clients(listener))
    assert len(ended) == 3
