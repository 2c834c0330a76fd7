"""The way between engine and rank: whole messages, whatever their size, and neither end blocks the other."""

import os
import signal
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

from twofold.channel import Channel, pack, wait
from twofold.interrupts import held_back, let_through


@pytest.fixture
def ends() -> Any:
    ours, theirs = socket.socketpair()
    channels = Channel(ours), Channel(theirs)
    yield channels
    for channel in channels:
        channel.close()


def test_messages_keep_their_order_and_size(ends: tuple[Channel, Channel]) -> None:
    """Small ones in one packet, large ones in many."""
    engine, rank = ends
    messages = ["a", list(range(3)), np.arange(500_000), {"b": b"x" * 3_000_000}, None]
    sender = threading.Thread(target=lambda: [engine.send(message) for message in messages])
    sender.start()
    received = [rank.recv() for _ in messages]
    sender.join()
    assert received[:2] == messages[:2]
    np.testing.assert_array_equal(received[2], messages[2])
    assert received[3:] == messages[3:]


def test_both_ends_may_send_at_once(ends: tuple[Channel, Channel]) -> None:
    """A large `prompt_logprobs` answer met a very long prompt: both waited for the other to read, until the healthy
    rank counted as hung."""
    engine, rank = ends
    large = b"x" * 20_000_000
    other = threading.Thread(target=lambda: (rank.send(large), rank.recv()), daemon=True)
    other.start()
    engine.post(pack(large))  # returns at once, whatever the rank does
    while engine.find(bytes) is None or engine.is_sending:
        wait([engine], 5.0)
        engine.pump()
    assert engine.take(bytes) == large
    other.join(10)
    assert not other.is_alive()


def test_an_end_that_is_gone_is_told_after_its_last_message(ends: tuple[Channel, Channel]) -> None:
    """A rank's last message says why it ends; it must not be lost to the end itself."""
    engine, rank = ends
    rank.send("why")
    rank.close()
    engine.pump()
    assert engine.take(str) == "why"
    with pytest.raises(EOFError):
        engine.pump()


def test_messages_are_found_by_kind(ends: tuple[Channel, Channel]) -> None:
    """The answer to a profile may come before or after that of a step in flight."""
    engine, rank = ends
    for message in ("step 1", 2.5, "step 2"):
        rank.send(message)
    engine.pump()
    assert engine.take(float) == 2.5
    assert [engine.take(str), engine.take(str)] == ["step 1", "step 2"]
    assert engine.find(str) is None


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # the handler runs between two instructions


def test_an_interrupt_waits_until_nothing_is_half_done() -> None:
    """One in 12 interrupts of `generate` came between reading a rank's answer and keeping it. The answer was lost, and
    32 s later the ranks counted as hung."""
    done = []

    def work() -> None:
        with held_back():
            interrupt()
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["whole"]


def test_an_interrupt_comes_where_it_may() -> None:
    """A step of minutes can be interrupted while its ranks compute, also by a signal that came just before."""
    reached = []

    def work(early: bool) -> None:
        with held_back():
            if early:
                interrupt()
            with let_through():
                interrupt()
                reached.append("waited on")
            reached.append("went on")

    for early in (True, False):
        with pytest.raises(KeyboardInterrupt):
            work(early)
    assert reached == []


def test_handlers_of_others_are_called_late_and_restored() -> None:
    """A server's own handler, which raises nothing, is held back as well; outside the main thread nothing changes."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append("theirs"))
    try:
        theirs = signal.getsignal(signal.SIGINT)
        with held_back(), held_back():
            interrupt()
            assert calls == []
        assert calls == ["theirs"]
        assert signal.getsignal(signal.SIGINT) is theirs

        def elsewhere() -> None:
            with held_back(), let_through():
                calls.append("thread")

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert calls == ["theirs", "thread"]
    finally:
        signal.signal(signal.SIGINT, before)
