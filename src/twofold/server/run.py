"""Run the server: load the engine, serve on a socket, and drain when a signal comes."""

import asyncio
import logging
import signal
import socket
import sys
import time
from concurrent.futures import Future
from types import FrameType

import uvicorn

from twofold.config import EngineConfig
from twofold.engine.async_engine import AsyncEngine, State
from twofold.engine.engine import LLMEngine
from twofold.launch import start_engine
from twofold.server.app import make_app
from twofold.server.config import ServerConfig
from twofold.server.connections import AcceptErrors, IdleConnections
from twofold.server.metrics import Metrics


def load(config: EngineConfig) -> LLMEngine:
    """Starts the engine, and says on stderr when it is ready."""
    start = time.perf_counter()
    size = config.prefill_context_parallel_size
    print(f"loading {config.model} on {'1 rank' if size == 1 else f'{size} ranks'}", file=sys.stderr, flush=True)
    engine = start_engine(config)
    runtime = engine.runtime
    print(
        f"{config.model} is ready after {time.perf_counter() - start:.1f} s: {runtime.device}, "
        f"{str(runtime.dtype).removeprefix('torch.')}, max_model_len {runtime.max_model_len}, "
        f"KV cache of {engine.kv_cache_capacity} tokens",
        file=sys.stderr,
        flush=True,
    )
    return engine


def serve(config: ServerConfig, engine: LLMEngine, listener: socket.socket) -> int:
    """Serves until a signal → the exit code: 1 if the engine has failed, else 0."""
    runtime = engine.runtime
    names = config.served_model_name or [runtime.engine.model]
    metrics = Metrics(names[0])
    async_engine = AsyncEngine(
        engine,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens or max(1_000_000, 4 * runtime.max_model_len),
        observe=metrics.observe,
    )
    metrics.watch(async_engine)
    app = make_app(async_engine, metrics, names, config.api_key or [], config.max_body_bytes)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    settings = uvicorn.Config(
        app,
        log_level="info" if config.access_log else "warning",
        access_log=config.access_log,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    server = _Server(settings, async_engine, config.drain_timeout)
    return asyncio.run(server.run_until_drained(listener))


class _Server(uvicorn.Server):
    """A server that drains after the first signal: it refuses new requests, and ends when the others are answered.

    A second signal ends it at once.
    """

    def __init__(self, settings: uvicorn.Config, engine: AsyncEngine, drain_timeout: float) -> None:
        super().__init__(settings)
        self._engine, self._drain_timeout = engine, drain_timeout
        engine.on_death = self._give_up
        self._draining: Future[None] | None = None
        self._idle_connections = IdleConnections(settings.timeout_keep_alive)

    async def run_until_drained(self, listener: socket.socket) -> int:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(AcceptErrors())
        self._engine.start()
        try:
            host, port = listener.getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
            await self.serve(sockets=[listener])
        finally:
            dead = self._engine.state is State.DEAD
            await self._engine.stop()
        return 1 if dead else 0

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self._idle_connections.close(self.server_state.connections)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None:
            self.should_exit = True
            self._loop.call_soon_threadsafe(self._engine.give_up)
        else:
            self._draining = asyncio.run_coroutine_threadsafe(self._drain(sig), self._loop)

    async def _drain(self, sig: int) -> None:
        print(f"{signal.Signals(sig).name}: no new requests; answering those under way", file=sys.stderr, flush=True)
        await self._engine.drain(self._drain_timeout)
        self.should_exit = True

    def _give_up(self) -> None:
        """Ends the server, since the engine has failed. A supervisor can start another."""
        self.should_exit = True
