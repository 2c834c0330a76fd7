"""What a server refuses, and how it says so."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from running import Server, serve

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # body, what is wrong, its name in the error
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"tools": [{"type": "web_search"}]}, "tools"),
    (CHAT, {"tools": [TOOL, TOOL]}, "tools"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    (CHAT, {"continue_final_message": True}, "continue_final_message"),
    (CHAT, {"priority": 5}, "priority"),
    (CHAT, {"chat_template": "x"}, "chat_template"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
    (CHAT, {"structured_outputs": {"regex": "(ab"}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    (TEXT, {"structured_outputs": {"xml": 1}}, "structured_outputs"),
    (TEXT, {"guided_json": "{,"}, "guided_json"),
    (TEXT, {"guided_choice": []}, "guided_choice"),
    (TEXT, {"guided_grammar": "start: foo"}, "guided_grammar"),
    (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias"),
    (CHAT, {"logit_bias": {"400000": 1}}, "logit_bias"),
    (TEXT, {"allowed_token_ids": []}, "allowed_token_ids"),
    (TEXT, {"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    (TEXT, {"bad_words": [""]}, "bad_words"),
    (CHAT, {"frobnicate": 1}, "frobnicate"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": float("nan")}, "temperature"),
    (CHAT, {"max_tokens": 10**6}, "max_tokens"),
    (CHAT, {"max_tokens": True}, "max_tokens"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 10**30}, "n"),
    (CHAT, {"stop": [1]}, "stop"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"stop": ["x"] * 129}, "stop"),
    (TEXT, {"stop": "x" * 4097}, "stop"),
    (CHAT, {"stop_token_ids": [10**30]}, "stop_token_ids"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"include_everything": True}}, "include_everything"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [CHAT["messages"][0], {"role": "system", "content": "x"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 3000}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (TEXT, {"best_of": 3}, "best_of"),
    (TEXT, {"suffix": "x"}, "suffix"),
    (TEXT, {"logprobs": 21}, "logprobs"),
    (TEXT, {"max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": ["a", 1]}, "prompt"),
    (TEXT, {"prompt": [1, -1]}, "prompt"),
    (TEXT, {"prompt": [10**9]}, "prompt"),
    (TEXT, {"prompt": [10**30]}, "prompt"),
    (TEXT, {"prompt": [1] * 2048}, "prompt"),
    (TEXT, {"prompt": "long " * 100_000}, "prompt"),
    (TEXT, {"prompt": ["x"] * 1025}, "prompt"),
    (TEXT, {"prompt": [[5] * 2000] * 501}, "prompt"),
    (TEXT, {"prompt": "\ud800"}, "prompt"),
    (TEXT, {"temperature": 0, "n": 2}, "n"),
]


@pytest.mark.parametrize(("body", "wrong", "name"), BAD, ids=lambda value: str(value)[:40])
def test_a_mistake_is_named(server: Server, body: dict[str, Any], wrong: dict[str, Any], name: str) -> None:
    """Guards OpenAI's error body, with the field's name, before any work."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    content = json.dumps(body | wrong).encode()
    response = server.http.post(path, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == name, error
    assert re.search(rf"\b{name}\b", error["message"]), error
    assert len(error["message"]) < 600


RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe\x00",
    b'{"prompt": "\xff"}',
    b"[" * 100_000,
    b'{"prompt":' * 5000,
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"\\ud800": 1, "prompt": "x"}',
]


@pytest.mark.parametrize("content", RAW, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_what_is_no_body_is_refused(server: Server, path: str, content: bytes) -> None:
    """Guards the parser: never a 5xx, never a trace."""
    response = server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "Traceback" not in message
    assert "/" not in message.replace("and/or", "")


LONG = "long " * 2_000_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}),
        ("/tokenize", {"prompt": LONG}),
    ],
)
def test_text_that_no_prompt_can_hold_is_not_tokenized(server: Server, path: str, body: dict[str, Any]) -> None:
    """Guards all others: tokens are made by one thread, and this would take it many seconds."""
    start = time.monotonic()
    response = server.http.post(path, json=body)
    assert response.status_code == 400
    assert "max_model_len=2048" in response.json()["error"]["message"]
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_must_be_sent_as_json(server: Server, content_type: str | None) -> None:
    """Guards who forgets curl's -H: the error says what is missing."""
    headers = {} if content_type is None else {"content-type": content_type}
    response = server.http.post("/v1/completions", content=json.dumps(TEXT).encode(), headers=headers)
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_values_that_ask_for_nothing_are_taken(server: Server) -> None:
    """Guards clients that send defaults of fields which are not supported."""
    harmless = {"tools": None, "response_format": {"type": "text"}, "logit_bias": {}, "user": "me", "store": False}
    harmless |= {"prompt_cache_key": "x", "safety_identifier": "x", "metadata": {"a": "b"}, "priority": 0, "tools": []}
    harmless |= {"include_reasoning": True, "add_generation_prompt": True, "service_tier": "auto"}
    assert server.http.post("/v1/chat/completions", json=CHAT | harmless).status_code == 200


def test_unknown_models_and_routes(server: Server) -> None:
    """Guards 404 and 405 in OpenAI's form."""
    response = server.http.post("/v1/completions", json=TEXT | {"model": "gpt-5"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert server.http.get("/nowhere").json()["error"]["message"]
    assert server.http.get("/v1/completions").status_code == 405


def test_an_api_key_guards_every_route_but_health(tiny_model: Path, tmp_path: Path) -> None:
    """Guards the key, the size of bodies, the queue, and that a server drains when it is told to end."""
    flags = ("--api-key", "s3cret", "--api-key", "other", "--max-body-bytes", "5000", "--max-waiting-requests", "4")
    with serve(tiny_model, tmp_path, *flags, "--max-num-seqs", "1", key="s3cret") as server:
        for path in ("/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/nowhere", "/tokenize"):
            for header in ("", "Bearer", "Bearer s3cre", "Bearer s3cret x", "Basic s3cret", "s3cret"):
                response = server.http.get(path, headers={"Authorization": header})
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert server.http.get("/health", headers={"Authorization": ""}).status_code == 200
        for header in ("Bearer other", "bearer s3cret"):  # a scheme's case does not matter
            assert server.http.get("/v1/models", headers={"Authorization": header}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client().with_options(api_key="wrong").models.list()
        assert server.http.post("/v1/completions", content=b"x" * 5001).status_code == 413
        assert server.http.post("/v1/completions", content=iter([b"x" * 3000] * 2)).status_code == 413
        _check_overload(server)
        _check_drain(server)


def _check_overload(server: Server) -> None:
    """Beyond the queue there is a 429 that says when to come back; the queue itself is answered."""
    (server.faults / "slow").write_text("0.05")
    client = server.client()
    body: dict[str, Any] = {
        "model": server.http.get("/v1/models").json()["data"][0]["id"],
        "prompt": "x",
        "max_tokens": 40,
    }
    streams = [client.completions.create(**body, stream=True, temperature=0)]
    next(iter(streams[0]))  # it runs; those that follow wait
    waiting = [_post_and_leave_open(server, body | {"max_tokens": 2}) for _ in range(4)]
    server.wait_for(lambda: server.metric("num_requests_waiting") == 4)
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**body)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.body["code"] == "rate_limit_exceeded"  # type: ignore[index]
    (server.faults / "slow").unlink()
    assert sum(1 for _ in streams[0]) >= 1
    for connection in waiting:
        assert b"200 OK" in connection.recv(4096)
        connection.close()
    server.assert_idle()


def _check_drain(server: Server) -> None:
    """SIGTERM: what runs is answered in full, what comes is refused, and the process ends with 0."""
    (server.faults / "slow").write_text("0.02")
    body: dict[str, Any] = {
        "model": server.http.get("/v1/models").json()["data"][0]["id"],
        "prompt": "x",
        "max_tokens": 60,
    }
    stream = iter(
        server.client().completions.create(**body, stream=True, temperature=0, extra_body={"ignore_eos": True})
    )
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.health() == (503, "draining"))
    refused = server.http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(10) == 0


def test_a_second_signal_does_not_wait(tiny_model: Path, tmp_path: Path) -> None:
    """Guards who is in a hurry from a step that takes long: clients hear of it, no trace is left, no rank either."""
    with serve(tiny_model, tmp_path, "--served-model-name", "tiny") as server:
        (server.faults / "slow").write_text("60")
        waiting = _post_and_leave_open(server, TEXT | {"stream": True})
        server.wait_for(lambda: server.metric("num_requests_running") == 1)
        ranks = server.ranks()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.health() == (503, "draining"))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(8) == 0
        assert b"the server is shutting down" in waiting.recv(1 << 20)
        waiting.close()
        assert not psutil.wait_procs(ranks, timeout=5)[1]
        assert "Traceback" not in server.log.read_text()


def _post_and_leave_open(server: Server, body: dict[str, Any]) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def test_clients_that_leave_are_forgotten(server: Server) -> None:
    """Guards aborts: in the queue, in the prefill, while streaming or waiting for the whole; blocks come back."""
    aborted = server.metric("request_success_total")
    (server.faults / "slow").write_text("0.05")
    body = {"model": "tiny", "prompt": [7] * 1000, "max_tokens": 500, "ignore_eos": True}
    connections = [_post_and_leave_open(server, body | {"stream": i % 2 == 0}) for i in range(20)]
    server.wait_for(lambda: server.metric("num_requests_running") > 5)
    time.sleep(0.3)
    for connection in connections:
        connection.close()
    (server.faults / "slow").unlink()
    server.assert_idle()
    assert server.metric("request_success_total") == aborted + 20


def test_a_reader_that_stalls_delays_no_other(server: Server) -> None:
    """Guards the engine from slow clients: others are answered, and the slow one gets everything in the end."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1500, "temperature": 0, "stream": True, "logprobs": 20}
    stalled = _post_and_leave_open(server, body | {"ignore_eos": True})
    with server.client() as client:
        client.completions.create(model="tiny", prompt="y", max_tokens=50)
    server.wait_for(
        lambda: server.metric("num_requests_running") == 0, 60
    )  # it is done, though the answer was not read
    data = b""
    while b"data: [DONE]" not in data:
        data += stalled.recv(1 << 20)
    assert b'"finish_reason":"length"' in data
    stalled.close()


def test_a_taken_port_is_told_before_the_model_is_loaded(server: Server) -> None:
    """Guards the quick end: one line, exit code 2."""
    port = server.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "twofold.cli.main", "serve", "no-such-model", "--port", port],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
