"""Keep connections from using up the file descriptors of the server: new ranks need some, too."""

import asyncio
import errno
import logging
import os
import resource
import time
from collections.abc import Collection
from typing import Any

REPORT_SECONDS = 60.0  # between two lines about connections that cannot be accepted
SHARE = 0.75  # of the file descriptors free at the start: if connections have more, idle ones are closed early

logger = logging.getLogger(__name__)


class IdleConnections:
    """Closes connections without a request: each after `timeout` seconds, and the oldest when there are too many.

    uvicorn closes only those that have had a response.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._num_open = timeout, len(os.listdir("/dev/fd"))
        self._since: dict[Any, float] = {}  # idle connection -> when it was first seen idle

    def close(self, connections: Collection[Any]) -> None:
        """Looks at all of uvicorn's connections."""
        now = time.monotonic()
        idle = {
            one: self._since.get(one, now) for one in connections if one.cycle is None or one.cycle.response_complete
        }
        num_free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - self._num_open
        num_excess = len(connections) - int(SHARE * num_free)
        for place, (connection, since) in enumerate(sorted(idle.items(), key=lambda item: item[1])):
            if place < num_excess or now - since >= self._timeout:
                connection.transport.close()
                del idle[connection]
        self._since = idle


class AcceptErrors:
    """Says once a minute that no connection can be accepted. asyncio says it with thousands of tracebacks a second."""

    def __init__(self) -> None:
        self._next_report = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
            errno.ENOBUFS,
        ):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + REPORT_SECONDS
            logger.error("new connections wait: %s; raise the limit on open files (ulimit -n)", error.strerror)
