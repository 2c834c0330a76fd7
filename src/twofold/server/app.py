"""The routes."""

import inspect
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedTokenizerBase

import twofold
from twofold.engine.async_engine import AsyncEngine, State
from twofold.errors import RequestError
from twofold.server import errors
from twofold.server.answers import ChatWriter, CompletionWriter, Writer
from twofold.server.errors import APIError
from twofold.server.metrics import Metrics
from twofold.server.middleware import ApiKey, BodyLimit
from twofold.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    Sampling,
    TokenizeRequest,
)
from twofold.server.sse import ClientGoneError, EventStream, until_gone

GONE = 499  # nobody reads it


def make_app(
    engine: AsyncEngine, metrics: Metrics, model_names: Sequence[str], api_keys: Sequence[str], max_body_bytes: int
) -> FastAPI:
    """The app. `engine` must be started in the event loop that runs it."""
    app = FastAPI(
        title="Twofold",
        version=twofold.__version__,
        description="OpenAI-compatible server of one model.",
        lifespan=None,
    )
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if api_keys:
        app.add_middleware(ApiKey, keys=list(api_keys))
    started = int(time.time())

    def check_model(name: str | None) -> str:
        if name is not None and name not in model_names:
            message = f"the model {name[:100]!r} does not exist; /v1/models lists what there is"
            raise APIError(404, message, param="model", code="model_not_found")
        return name or model_names[0]

    def tokenizer() -> PreTrainedTokenizerBase:
        if engine.tokenizer is None:
            raise APIError(400, "the server has no tokenizer (skip_tokenizer_init); send token ids to /v1/completions")
        return engine.tokenizer

    def render(messages: Sequence[Message], add_generation_prompt: bool, kwargs: dict[str, Any]) -> list[int]:
        """Messages as the model's template writes them."""
        template = tokenizer()
        if template.chat_template is None:
            raise APIError(400, "the model has no chat template; use /v1/completions", param="messages")
        reserved = inspect.signature(template.apply_chat_template).parameters
        for name in kwargs:
            if name in reserved or name in ("messages", "add_generation_prompt"):
                raise APIError(400, f"chat_template_kwargs cannot set {name[:64]!r}", param="chat_template_kwargs")
        try:
            text = template.apply_chat_template(
                [message.as_template_has_it() for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            return engine.encode(text, add_special_tokens=False)
        except RequestError:
            raise
        except Exception as error:  # templates raise what they like
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            message = f"the model's chat template refuses the messages: {reason}"
            raise APIError(400, message, param="messages") from error

    async def answer(body: Sampling, request: Request, writer: Writer) -> Response:
        if body.stream:
            return EventStream(writer.stream(body.include_usage), writer.answer.close)
        try:
            return JSONResponse(await until_gone(writer.write(), request.receive))
        except ClientGoneError:
            return Response(status_code=GONE)
        finally:
            writer.answer.close()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        name, params = check_model(body.model), body.sampling_params()
        got = await engine.submit(body.prompts, params, num_asked=body.num_asked)
        try:
            echoed = None
            if body.echo:
                echoed = [
                    part.text if part.text is not None else await engine.in_tokenizer_thread(got.decode, part.token_ids)
                    for part in got.parts
                ]
            return await answer(body, request, CompletionWriter(got, name, body, echoed))
        except BaseException:
            got.close()
            raise

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        name, params = check_model(body.model), body.sampling_params()
        engine.check()
        try:
            token_ids = await engine.in_tokenizer_thread(render, body.messages, True, body.chat_template_kwargs or {})
            got = await engine.submit([token_ids], params, num_asked=body.num_asked)
        except RequestError as error:
            raise errors.describe(error, prompt="messages") from error
        return await answer(body, request, ChatWriter(got, name, body))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe_model(name) for name in model_names]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return describe_model(check_model(model))

    def describe_model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "twofold",
            "root": model_names[0],
            "parent": None,
            "max_model_len": engine.engine.runtime.max_model_len,
        }

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        check_model(body.model)
        known = tokenizer()

        def encode() -> list[int]:
            if body.messages is not None:
                return render(body.messages, body.add_generation_prompt, body.chat_template_kwargs or {})
            return engine.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)

        tokens = await engine.in_tokenizer_thread(encode)
        return {
            "count": len(tokens),
            "max_model_len": engine.engine.runtime.max_model_len,
            "tokens": tokens,
            "token_strs": known.convert_ids_to_tokens(tokens) if body.return_token_strs else None,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        check_model(body.model)
        known, vocab_size = tokenizer(), engine.engine.vocab_size
        for token in body.tokens:
            if token >= vocab_size:
                message = f"tokens must be below {vocab_size}, got {token if token < 2**63 else 'a very large one'}"
                raise APIError(400, message, param="tokens")
        return {"prompt": await engine.in_tokenizer_thread(known.decode, body.tokens)}

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": engine.state}, 200 if engine.state is State.RUNNING else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": twofold.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    _name_models(app, model_names)
    return app


def _name_models(app: FastAPI, names: Sequence[str]) -> None:
    """Has the OpenAPI schema say which models there are."""
    for schema in app.openapi()["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"title": "Model", "enum": [*names, None]}
