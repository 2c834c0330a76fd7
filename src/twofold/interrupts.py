"""Holds Ctrl-C back while something must be done completely or not at all.

    with held_back():              # Ctrl-C waits ...
        ...
        with let_through():        # ... but it may come here, between two such things
            wait()

Python runs signal handlers in the main thread only, between any two instructions. Without this, an answer that was
read and not yet stored could be lost, and a step could reach some ranks only. In other threads both do nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class _Held:
    """A handler in the place of the user's own, `before`, which is called when it is safe."""

    def __init__(self, before: Handler) -> None:
        self.before, self.is_safe = before, False
        self.pending: tuple[int, FrameType | None] | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.is_safe:
            self.before(signum, frame)
        else:
            self.pending = signum, frame

    def deliver(self) -> None:
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.before(*pending)


_held: _Held | None = None


@contextmanager
def held_back() -> Iterator[None]:
    """Delays Ctrl-C until the block ends, or until `let_through` within it."""
    global _held
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if _held is not None or not callable(before):  # SIG_IGN and SIG_DFL raise nothing
        yield
        return
    _held = held = _Held(before)
    try:
        signal.signal(signal.SIGINT, held)
        yield
    finally:
        _held = None
        signal.signal(signal.SIGINT, before)
        held.deliver()


@contextmanager
def let_through() -> Iterator[None]:
    """Lets a Ctrl-C that is held back come now, or while the block runs: the block must not change anything."""
    held = _held if threading.current_thread() is threading.main_thread() else None
    if held is None:
        yield
        return
    held.is_safe = True
    try:
        held.deliver()
        yield
    finally:
        held.is_safe = False
