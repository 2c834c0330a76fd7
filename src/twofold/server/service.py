"""All that serves an engine over HTTP, but for the socket: `twofold serve` and a replica of Ray Serve have the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI

from twofold.engine.async_engine import AsyncEngine
from twofold.engine.engine import LLMEngine
from twofold.server.app import make_app
from twofold.server.bodies import BodyReader
from twofold.server.chat import ChatTemplate, Template
from twofold.server.config import ServerConfig, public_name, read_chat_template
from twofold.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Service:
    """The app of an engine. `engine` must be started in the event loop that runs the app."""

    app: FastAPI
    engine: AsyncEngine
    helpers: Sequence[BodyReader | Template]  # processes that read requests, until they are closed

    def close_helpers(self) -> None:
        for helper in self.helpers:
            helper.close()


def make_service(config: ServerConfig, engine: LLMEngine) -> Service:
    """Raises a ConfigError if the chat template cannot be read, or nothing is known of a parser's name."""
    runtime = engine.runtime
    names = config.served_model_name or [public_name(runtime.engine.model)]
    metrics = Metrics(names[0])
    async_engine = AsyncEngine(
        engine,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens or max(1_000_000, 4 * runtime.max_model_len),
        observe=metrics.observe,
    )
    metrics.watch(async_engine)
    bodies = BodyReader()
    template: Template | None = None
    own = read_chat_template(config, runtime.engine)
    parsers = (config.tool_call_parser, config.reasoning_parser)
    if engine.tokenizer is not None and runtime.engine.tokenizer_mode == "mistral":
        from twofold.models.source import tokenizer_place  # it brings PyTorch
        from twofold.server.mistral import MistralPrompts

        place = tokenizer_place(runtime.engine.tokenizer, runtime.source, runtime.engine.tokenizer_revision)
        template = MistralPrompts(engine.tokenizer, async_engine.max_chars, place, *parsers)
    elif engine.tokenizer is not None:
        template = ChatTemplate(engine.tokenizer, async_engine.max_chars, own, *parsers)
    app = make_app(
        async_engine,
        metrics,
        bodies,
        template,
        model_names=names,
        api_keys=config.api_key or [],
        max_body_bytes=config.max_body_bytes,
    )
    return Service(app, async_engine, [helper for helper in (bodies, template) if helper])
