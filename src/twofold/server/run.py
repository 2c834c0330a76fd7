"""Run the server: load the engine, serve on a socket, and drain when a signal comes."""

import asyncio
import errno
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from twofold.config import EngineConfig
from twofold.engine.async_engine import State
from twofold.engine.engine import LLMEngine
from twofold.launch import start_engine
from twofold.server.config import ServerConfig
from twofold.server.errors import APIError
from twofold.server.service import Service, make_service

# Clients and proxies drop idle connections after 60 s (nginx, load balancers) or 90 s (Go). A server that is quicker
# resets connections just when they are used again.
KEEP_ALIVE_SECONDS = 120
SPARE_FILES = 64  # file descriptors that connections leave to new ranks, as far as some of them are idle
MAX_RECEIVED = 16 << 10  # bytes at once: asyncio's 256 KiB may be 43,000 chunks of a body, and nobody else is served
WARN_SECONDS = 10.0  # between warnings of connections that cannot be accepted
NO_HTTP = "the request is not valid HTTP/1.1, or its headers are too long"

logger = logging.getLogger(__name__)


def load(config: EngineConfig) -> LLMEngine:
    """Starts the engine, and says on stderr when it is ready."""
    start = time.perf_counter()
    size = config.prefill_context_parallel_size
    _say(f"loading {config.model} on {'1 rank' if size == 1 else f'{size} ranks'}")
    engine = start_engine(config)
    runtime = engine.runtime
    _say(
        f"{config.model} is ready after {time.perf_counter() - start:.1f} s: {runtime.device}, "
        f"{str(runtime.dtype).removeprefix('torch.')}, max_model_len {runtime.max_model_len}, "
        f"KV cache of {engine.kv_cache_capacity} tokens"
    )
    _say(engine.holdings)
    return engine


def _say(message: str) -> None:
    with suppress(OSError):  # a log that cannot be written is no reason to end
        print(message, file=sys.stderr, flush=True)


def serve(config: ServerConfig, engine: LLMEngine, listener: socket.socket) -> int:
    """Serves until a signal → the exit code: 1 if the engine has failed, else 0."""
    service = make_service(config, engine)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    settings = uvicorn.Config(
        service.app,
        http=_Connection,
        ws="none",
        log_config=None,  # all goes to stderr
        log_level="warning",
        access_log=config.access_log,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    if config.access_log:
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    server = _Server(settings, service, config.drain_timeout)
    return asyncio.run(server.run_until_drained(listener))


class _Connection(H11Protocol):
    """A connection that answers with JSON even to what is not HTTP, and ends if its client sends nothing for long.

    Those that have waited longest for their clients end when file descriptors run short.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = MAX_RECEIVED  # type: ignore[attr-defined]
        self._limit_wait()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if transport.get_extra_info("socket").fileno() >= limit - min(SPARE_FILES, limit // 4):  # the lowest free one
            self._end_oldest()

    def _end_oldest(self) -> None:
        """Ends an eighth of the connections that wait for their client, so that the next clients have room, too."""
        waits = {
            one: one.timeout_keep_alive_task.when()
            for one in self.connections
            if isinstance(one, _Connection) and one is not self and one.timeout_keep_alive_task is not None
        }
        for one in sorted(waits, key=waits.__getitem__)[: -(-len(waits) // 8)]:
            one.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_wait()

    def _limit_wait(self) -> None:
        """Waits for a request, or for the rest of one, no longer than for the next one."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # or else an answer has begun
            response = APIError(400, NO_HTTP, headers={"Connection": "close"}).response()
            head = h11.Response(status_code=400, reason=b"Bad Request", headers=response.raw_headers)
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # a route that still reads the request must not answer, too
        self.transport.close()


class _Server(uvicorn.Server):
    """A server that drains after the first signal: it refuses new requests, and ends when the others are answered.

    A second signal ends it at once.
    """

    def __init__(self, settings: uvicorn.Config, service: Service, drain_timeout: float) -> None:
        super().__init__(settings)
        self._service, self._engine, self._drain_timeout = service, service.engine, drain_timeout
        self._engine.on_death = self._give_up
        self._draining: Future[None] | None = None
        self._last_warning = -WARN_SECONDS

    async def run_until_drained(self, listener: socket.socket) -> int:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._warn)
        self._engine.start()
        try:
            await self.serve(sockets=[listener])
        finally:
            dead = self._engine.state is State.DEAD
            self._service.close_helpers()
            await self._engine.stop()
        return 1 if dead else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        _say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")

    def _warn(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        """Logs an error of the event loop. It tells of each connection that it cannot accept, hundreds a second."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(dict(context))
        elif time.monotonic() >= self._last_warning + WARN_SECONDS:
            self._last_warning = time.monotonic()
            logger.warning("no connection can be accepted: %s; raise the limit with ulimit -n", error.strerror)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            self.should_exit = True
            self._loop.call_soon_threadsafe(self._engine.give_up)
        else:
            self._draining = asyncio.run_coroutine_threadsafe(self._drain(sig), self._loop)

    async def _drain(self, sig: int) -> None:
        _say(f"{signal.Signals(sig).name}: no new requests; answering those under way")
        self._service.close_helpers()  # what they read are new requests
        await self._engine.drain(self._drain_timeout)
        self.should_exit = True

    def _give_up(self) -> None:
        """Ends the server, since the engine has failed. A supervisor can start another."""
        self.should_exit = True
