"""Connections of an engine with places of its ranks: nobody else gets in, and each end learns when the other went."""

import pickle
import socket
import threading
import time
from pathlib import Path

import pytest

from twofold.channel import Channel, pack
from twofold.executor.links import (
    CHANNEL,
    HELLO,
    LINK,
    Door,
    connect,
    has_gone,
    open_door,
    read_exit_code,
    send_exit_code,
)

TOKEN = bytes(range(32))


def fill(door: Door, num_ranks: int) -> dict[tuple[int, int], socket.socket]:
    """The places' ends."""
    ends = {
        (purpose, rank): connect(door.address, purpose, rank, TOKEN)
        for purpose in range(2)
        for rank in range(num_ranks)
    }
    deadline = time.monotonic() + 5
    while not door.are_all_there:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return ends


def test_each_rank_gets_its_two_connections() -> None:
    """Guards the order: what is meant for rank 1 must not reach rank 0."""
    with open_door("127.0.0.1", 3, TOKEN) as door:
        ends = fill(door, 3)
        ours = {CHANNEL: door.take(CHANNEL), LINK: door.take(LINK)}
    for (purpose, rank), theirs in ends.items():
        theirs.sendall(bytes([purpose, rank]))
        assert ours[purpose][rank].recv(2) == bytes([purpose, rank])
    for sock in (*ends.values(), *ours[CHANNEL], *ours[LINK]):
        sock.close()


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_nothing_of_a_stranger_is_unpickled(tmp_path: Path) -> None:
    """A pickle runs code. A stranger who finds the port sends one at once, or with a proof of another token, or an
    honest proof for a rank that is not there; silent ones keep nobody waiting."""
    evil = pack(Evil(tmp_path / "was here"))
    with open_door("127.0.0.1", 1, TOKEN) as door:
        silent = [socket.create_connection(door.address) for _ in range(5)]
        strangers = [socket.create_connection(door.address) for _ in range(2)]
        strangers[0].sendall(evil * 20)
        strangers[1].sendall(HELLO.pack(CHANNEL, 0, bytes(32), bytes(32)) + evil)
        with pytest.raises(OSError, match=r"gone|reset"):
            connect(door.address, CHANNEL, 0, b"another token")
        with pytest.raises(OSError, match=r"gone|reset"):
            connect(door.address, CHANNEL, 1, TOKEN)
        assert not door.are_all_there
        ends = fill(door, 1)
        channel = Channel(door.take(CHANNEL)[0])
        Channel(ends[CHANNEL, 0]).send("mine")
        assert channel.recv() == "mine"
        channel.close()
    for sock in (*silent, *strangers, *ends.values()):
        sock.close()
    assert not list(tmp_path.iterdir())
    assert pickle.loads(evil[8:]) is None, "it would have"
    assert list(tmp_path.iterdir())


def test_a_place_trusts_its_engine_only() -> None:
    """A rank unpickles what it gets, too: whoever took over the engine's port does not know the token."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            sock, _ = server.accept()
            with sock:
                sock.sendall(bytes(32))
                sock.recv(HELLO.size)
                sock.sendall(bytes(32))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(OSError, match="is not this rank's engine"):
            connect(server.getsockname()[:2], LINK, 0, TOKEN)
        thread.join()


def test_a_link_tells_that_the_other_end_has_gone_and_how_its_rank_ended() -> None:
    """The engine says "was killed by signal 9" of ranks on other machines, too."""
    with open_door("127.0.0.1", 1, TOKEN) as door:
        ends = fill(door, 1)
        (link,) = door.take(LINK)
    assert not has_gone(link)
    send_exit_code(ends[LINK, 0], -9)
    ends[LINK, 0].close()
    assert has_gone(link, 5.0)
    assert read_exit_code(link) == -9
    assert read_exit_code(link) is None
    link.close()
    ends[CHANNEL, 0].close()


def test_idle_links_are_probed_and_channels_never_wait_to_fill_a_packet() -> None:
    """Guards the bound: without probes a lost machine is noticed after two hours, or never."""
    with open_door("127.0.0.1", 1, TOKEN) as door:
        ends = fill(door, 1)
        ours = {(purpose, 0): door.take(purpose)[0] for purpose in (CHANNEL, LINK)}
        for side in (ends, ours):
            assert side[LINK, 0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, interval, count = (
                side[LINK, 0].getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 30
            assert side[CHANNEL, 0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for sock in (*ends.values(), *ours.values()):
        sock.close()
