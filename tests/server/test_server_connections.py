"""Connections that nobody uses: they end, and never take the descriptors that others and new ranks need."""

import resource
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import FLAGS
from running import serve

from twofold.server.connections import IdleConnections


class Connection:
    """What `IdleConnections` uses of a connection of uvicorn."""

    def __init__(self, is_answered: bool | None = None) -> None:
        self.is_closed = False
        self.transport = SimpleNamespace(close=lambda: setattr(self, "is_closed", True))
        self.cycle = None if is_answered is None else SimpleNamespace(response_complete=is_answered)


def test_connections_without_a_request_end() -> None:
    """uvicorn waited for ever for the first request of a connection, and for the rest of its head."""
    idle = IdleConnections(0.2)
    silent, answered, busy = Connection(), Connection(True), Connection(False)
    idle.close({silent, answered, busy})
    assert not silent.is_closed
    time.sleep(0.3)
    late = Connection()
    idle.close({silent, answered, busy, late})
    assert [one.is_closed for one in (silent, answered, busy, late)] == [True, True, False, False]


def test_the_oldest_idle_connections_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards descriptors for new ranks, and those who wait for an answer."""
    idle = IdleConnections(100)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (idle._num_open + 8, 1000))  # room for six connections
    busy, old = [Connection(False) for _ in range(3)], [Connection() for _ in range(3)]
    idle.close([*busy, *old])
    new = [Connection() for _ in range(2)]
    idle.close([*busy, *old, *new])
    assert [one.is_closed for one in [*busy, *old, *new]] == [False] * 3 + [True, True, False] + [False] * 2


def test_more_connections_than_descriptors(tiny_model: Path, tmp_path: Path) -> None:
    """Idle connections took all descriptors: nobody got in, asyncio wrote 12,248 tracebacks, and a lost rank ended the
    server, since there was no descriptor for another."""
    with serve(tiny_model, tmp_path, *FLAGS, faulty=False) as server:
        server.assert_idle()
        limit = psutil.Process(server.process.pid).num_fds() + 24
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        host, port = server.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(60)]
        server.wait_for(lambda: "new connections wait" in server.log.read_text())
        server.ranks()[1].kill()
        server.wait_for(lambda: "new ranks after" in server.log.read_text(), 60)
        server.assert_idle()
        log = server.log.read_text()
        assert log.count("new connections wait: Too many open files; raise the limit") == 1
        assert "Traceback" not in log
        for connection in idle:
            connection.close()
