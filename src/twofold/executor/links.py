"""Connections over TCP between an engine and the places of its ranks. Nothing is unpickled before both ends have proved
that they know the token of this start, which travels through Ray.

    engine's Door                              place of a rank
    32 random bytes            ──────────►
                               ◄──────────     purpose, rank, 32 random bytes, proof of all of these
    proof of the same, as the engine ──────►

A rank has two connections. The *channel* carries messages; it is the rank's own, and ends with it. The *link* carries
nothing but the kernel's probes, and at the end how the rank's process ended: so either end learns within `LINK_SECONDS`
that the other machine is out of reach, however long a step takes and however much of a message waits.
"""

import hmac
import queue
import secrets
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHANNEL, LINK = range(2)  # purposes
PROBE_SECONDS, NUM_PROBES = 3, 4
LINK_SECONDS = PROBE_SECONDS * (1 + NUM_PROBES)  # without an answer, after which a link counts as lost
HANDSHAKE_SECONDS = 10.0
NUM_RANDOM = 32  # bytes
EXIT_CODE = struct.Struct("!i")
HELLO = struct.Struct(f"!BI{NUM_RANDOM}s32s")

GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Door:
    """Takes connections from the places of `num_ranks` ranks on an address, while it is open."""

    def __init__(self, host: str, num_ranks: int, token: bytes) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=4 * num_ranks + 16)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._token, self._num_ranks = token, num_ranks
        self._arrived: queue.SimpleQueue[tuple[int, int, socket.socket]] = queue.SimpleQueue()
        self._sockets: dict[tuple[int, int], socket.socket] = {}  # (purpose, rank) -> its connection
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def are_all_there(self) -> bool:
        with suppress(queue.Empty):
            while True:
                purpose, rank, sock = self._arrived.get_nowait()
                self._sockets[purpose, rank] = sock
        return len(self._sockets) == 2 * self._num_ranks

    def take(self, purpose: int) -> list[socket.socket]:
        """The connections of all ranks, in their order."""
        return [self._sockets.pop((purpose, rank)) for rank in range(self._num_ranks)]

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        for sock in self._sockets.values():
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            # A thread for each: one that says nothing keeps nobody waiting.
            threading.Thread(target=self._admit, args=(sock,), daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(HANDSHAKE_SECONDS)
            ours = secrets.token_bytes(NUM_RANDOM)
            sock.sendall(ours)
            purpose, rank, theirs, proof = HELLO.unpack(_read(sock, HELLO.size))
            if not hmac.compare_digest(proof, _prove(self._token, b"place", purpose, rank, ours, theirs)):
                raise OSError("it does not know the token")
            if purpose not in (CHANNEL, LINK) or rank >= self._num_ranks:
                raise OSError("there is no such rank")
            sock.sendall(_prove(self._token, b"engine", purpose, rank, ours, theirs))
            _tune(sock, purpose)
        except OSError:
            sock.close()
        else:
            self._arrived.put((purpose, rank, sock))


@contextmanager
def open_door(host: str, num_ranks: int, token: bytes) -> Iterator[Door]:
    door = Door(host, num_ranks, token)
    try:
        yield door
    finally:
        door.close()


def connect(address: tuple[str, int], purpose: int, rank: int, token: bytes) -> socket.socket:
    """Of a rank's place to its engine.

    Raises:
        OSError: the engine is out of reach, or it does not know the token.
    """
    sock = socket.create_connection(address, timeout=HANDSHAKE_SECONDS)
    try:
        theirs, ours = _read(sock, NUM_RANDOM), secrets.token_bytes(NUM_RANDOM)
        proof = _prove(token, b"place", purpose, rank, theirs, ours)
        sock.sendall(HELLO.pack(purpose, rank, ours, proof))
        if not hmac.compare_digest(_read(sock, 32), _prove(token, b"engine", purpose, rank, theirs, ours)):
            raise OSError(f"what answers at {address[0]}:{address[1]} is not this rank's engine")
        _tune(sock, purpose)
    except BaseException:
        sock.close()
        raise
    return sock


def has_gone(link: socket.socket, timeout: float = 0.0) -> bool:
    """Whether the other end has gone, or is out of reach; waits for that, `timeout` seconds at most."""
    poller = select.poll()
    poller.register(link, select.POLLRDHUP)
    return any(event & GONE for _, event in poller.poll(timeout * 1e3))


def send_exit_code(link: socket.socket, code: int) -> None:
    """Says how a rank's process ended: the last that goes over its link."""
    with suppress(OSError):
        link.sendall(EXIT_CODE.pack(code))


def read_exit_code(link: socket.socket) -> int | None:
    """What `send_exit_code` sent from a place that has gone; None if its machine was lost."""
    try:
        return int(EXIT_CODE.unpack(_read(link, EXIT_CODE.size))[0])
    except OSError:
        return None


def _prove(token: bytes, who: bytes, purpose: int, rank: int, engines: bytes, places: bytes) -> bytes:
    return hmac.digest(token, who + struct.pack("!BI", purpose, rank) + engines + places, "sha256")


def _read(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        if not (piece := sock.recv(num_bytes - len(data))):
            raise ConnectionResetError("the other end has gone")
        data += piece
    return data


def _tune(sock: socket.socket, purpose: int) -> None:
    sock.settimeout(None)
    if purpose == CHANNEL:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, PROBE_SECONDS),
        (socket.TCP_KEEPINTVL, PROBE_SECONDS),
        (socket.TCP_KEEPCNT, NUM_PROBES),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
