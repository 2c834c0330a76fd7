"""A place of Ray's, as it watches over its rank."""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from twofold import processes
from twofold.executor.links import read_exit_code
from twofold.executor.ray_place import _watch

Watched = tuple["subprocess.Popen[bytes]", socket.socket, threading.Thread]


@pytest.fixture
def watched() -> Iterator[Watched]:
    """A process in a rank's place, its engine's end of the link, and the thread that watches."""
    process, lifeline = processes.start(["sleep", "1000"])
    engine, place = socket.socketpair()
    thread = threading.Thread(target=_watch, args=(process, lifeline, place))
    thread.start()
    with engine:
        yield process, engine, thread
    process.kill()
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_engine_is_told_how_a_rank_was_lost(watched: Watched, number: int) -> None:
    """A stopped one is ended, long before its step would take too long."""
    process, engine, thread = watched
    os.kill(process.pid, number)
    engine.settimeout(20)
    assert read_exit_code(engine) == -number
    thread.join()
    assert process.wait(5) == -signal.SIGKILL


def test_a_rank_ends_with_its_engine(watched: Watched) -> None:
    """However that ends, and wherever it is: the place sees the end of the link."""
    process, engine, _ = watched
    engine.close()
    assert process.wait(20) == -signal.SIGKILL
