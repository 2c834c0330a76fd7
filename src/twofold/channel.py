"""Pickled messages over a stream socket, both ways at once: neither end can block the other by sending.

A message is its length in 8 bytes, then a pickle. Bytes that the socket does not take at once wait in `Channel`, and
are sent while its owner waits for something. Messages that arrive meanwhile are kept. So an engine can send a prompt of
a million tokens while a rank sends a large answer.
"""

import pickle
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

HEADER = struct.Struct("!Q")
CHUNK = 1 << 20  # bytes that are read at once

Kind = TypeVar("Kind")


class RankChannel(Protocol):
    """What a rank needs of its channel to the engine."""

    def send(self, message: Any) -> None:
        """Sends a message; returns when all of it is on its way."""

    def recv(self) -> Any:
        """Waits for the next message. Raises EOFError when the engine has gone."""

    def poll(self, timeout: float) -> bool:
        """Whether there is a message, or the engine has gone; waits for `timeout` seconds at most."""


def pack(message: Any) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class Channel:
    """One end of a stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()
        self._messages: deque[Any] = deque()
        self._is_closed = False  # by the other end

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def is_sending(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._outgoing)

    def find(self, kind: type[Kind]) -> Kind | None:
        """The oldest message of that kind, which is kept; None if there is none."""
        return next((message for message in self._messages if isinstance(message, kind)), None)

    def post(self, data: bytes) -> None:
        """Sends what `pack` made; never waits. Raises OSError where the other end has gone."""
        self._outgoing.append(memoryview(data))
        self._flush()

    def pump(self) -> None:
        """Sends and receives what can be without waiting.

        Raises:
            EOFError: the other end has gone, and all that it sent was taken.
        """
        self._flush()
        while not self._is_closed:
            try:
                data = self._socket.recv(CHUNK)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            self._is_closed = not data
            self._incoming += data
        start = 0
        while len(self._incoming) - start >= HEADER.size:
            body = start + HEADER.size
            end = body + HEADER.unpack_from(self._incoming, start)[0]
            if len(self._incoming) < end:
                break
            with memoryview(self._incoming) as view:
                self._messages.append(pickle.loads(view[body:end]))
            start = end
        del self._incoming[:start]
        if self._is_closed and not self._messages:
            raise EOFError

    def take(self, kind: type[Kind]) -> Kind:
        """Removes the message that `find` finds, and returns it."""
        message = self.find(kind)
        assert message is not None
        self._messages.remove(message)
        return message

    def take_any(self) -> Any:
        """Removes the oldest message, and returns it; None if there is none."""
        return self._messages.popleft() if self._messages else None

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing[0])
            except BlockingIOError:
                return
            if sent == len(self._outgoing[0]):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = self._outgoing[0][sent:]

    def send(self, message: Any) -> None:
        self.post(pack(message))
        while self.is_sending:
            wait([self], None)
            self.pump()

    def recv(self) -> Any:
        while not self._messages:
            wait([self], None)
            self.pump()
        return self._messages.popleft()

    def poll(self, timeout: float) -> bool:
        try:
            self.pump()
            if not self._messages and timeout:
                wait([self], timeout)
                self.pump()
        except EOFError:
            return True
        return bool(self._messages)

    def shutdown(self) -> None:
        """Ends both ways of it at once: whoever waits here or there finds the other end gone. For any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def wait(channels: Sequence[Channel], timeout: float | None) -> None:
    """Waits until one of the channels has something to pump, `timeout` seconds at most."""
    poller = select.poll()
    for channel in channels:
        poller.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.is_sending else 0))
    if timeout is not None and timeout < 1e-3:  # poll counts in milliseconds
        if not poller.poll(0):
            time.sleep(timeout)
        return
    poller.poll(None if timeout is None else timeout * 1e3)
