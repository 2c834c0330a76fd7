"""The routes of the server."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedTokenizerBase

import twofold
from twofold.engine.async_engine import Answer, AsyncEngine, State
from twofold.errors import RequestError
from twofold.server import chat, errors
from twofold.server.answers import ChatWriter, CompletionWriter, Writer
from twofold.server.errors import APIError
from twofold.server.metrics import Metrics
from twofold.server.middleware import ApiKey, BodyLimit
from twofold.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from twofold.server.sse import ClientGoneError, EventStream, until_gone
from twofold.server.strict_json import StrictRoute

CLIENT_GONE = 499  # nginx's status for it; no client reads it


def make_app(
    engine: AsyncEngine, metrics: Metrics, model_names: Sequence[str], api_keys: Sequence[str], max_body_bytes: int
) -> FastAPI:
    """The app. `engine` must be started in the event loop that runs the app."""
    app = FastAPI(
        title="Twofold",
        version=twofold.__version__,
        description="OpenAI-compatible server of one model.",
        lifespan=None,
        docs_url=None,  # its page and that of redoc would run scripts of another host
        redoc_url=None,
    )
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if api_keys:
        app.add_middleware(ApiKey, keys=list(api_keys))
    app.include_router(Routes(engine, metrics, model_names).router())
    _name_models(app, model_names)
    return app


def _name_models(app: FastAPI, names: Sequence[str]) -> None:
    """Lists the models in the OpenAPI schema."""
    for schema in app.openapi()["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"title": "Model", "enum": [*names, None]}


class Routes:
    """One method for each route. `model_names` are all names of the one model; answers have the first by default."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics, model_names: Sequence[str]) -> None:
        self._engine, self._metrics, self._model_names = engine, metrics, model_names
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(route_class=StrictRoute)
        router.post("/v1/completions")(self.completions)
        router.post("/v1/chat/completions")(self.chat_completions)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{model:path}")(self.model)
        router.post("/tokenize")(self.tokenize)
        router.post("/detokenize")(self.detokenize)
        router.get("/health")(self.health)
        router.get("/version")(self.version)
        router.get("/metrics", response_class=PlainTextResponse)(self.show_metrics)
        return router

    # Completions

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        model, params = self._check_model(body.model), body.sampling_params()
        answer = await self._engine.submit(body.prompts, params, num_asked=body.num_asked)
        try:
            echoed = await self._texts_of_prompts(answer) if body.echo else None
            return await _respond(body, request, CompletionWriter(answer, model, body, echoed))
        except BaseException:
            answer.close()
            raise

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        model, params = self._check_model(body.model), body.sampling_params()
        self._engine.check()
        try:
            token_ids = await self._engine.in_tokenizer_thread(self._tokenize_chat, body, True)
            answer = await self._engine.submit([token_ids], params, num_asked=body.num_asked)
        except RequestError as error:
            raise errors.describe(error, prompt="messages") from error
        return await _respond(body, request, ChatWriter(answer, model, body))

    async def _texts_of_prompts(self, answer: Answer) -> list[str]:
        return [
            part.text
            if part.text is not None
            else await self._engine.in_tokenizer_thread(answer.decode, part.token_ids)
            for part in answer.parts
        ]

    # Models

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._describe_model(name) for name in self._model_names]}

    async def model(self, model: str) -> dict[str, Any]:
        return self._describe_model(self._check_model(model))

    def _describe_model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "twofold",
            "root": self._model_names[0],
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }

    def _check_model(self, name: str | None) -> str:
        """The name that the answer gives the model."""
        if name is not None and name not in self._model_names:
            message = f"the model {name[:100]!r} does not exist; /v1/models lists what there is"
            raise APIError(404, message, param="model", code="model_not_found")
        return name or self._model_names[0]

    # Tokens

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self._check_model(body.model)
        tokenizer = self._tokenizer()
        tokens = await self._engine.in_tokenizer_thread(self._tokenize, body)
        return {
            "count": len(tokens),
            "max_model_len": self._engine.max_model_len,
            "tokens": tokens,
            "token_strs": tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None,
        }

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        self._check_model(body.model)
        tokenizer, vocab_size = self._tokenizer(), self._engine.vocab_size
        for token in body.tokens:
            if token >= vocab_size:
                shown = token if token < 2**63 else "a very large one"
                raise APIError(400, f"tokens must be below {vocab_size}, got {shown}", param="tokens")
        return {"prompt": await self._engine.in_tokenizer_thread(tokenizer.decode, body.tokens)}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._engine.tokenizer is None:
            raise APIError(400, "the server has no tokenizer (skip_tokenizer_init); send token ids to /v1/completions")
        return self._engine.tokenizer

    def _tokenize(self, body: TokenizeRequest) -> list[int]:
        """Runs in the tokenizer's thread."""
        if body.messages is not None:
            return self._tokenize_chat(body, body.add_generation_prompt)
        return self._engine.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)

    def _tokenize_chat(self, body: ChatRequest | TokenizeRequest, add_generation_prompt: bool) -> list[int]:
        """Runs in the tokenizer's thread."""
        text = chat.render(
            self._tokenizer(),
            body.messages or (),
            add_generation_prompt=add_generation_prompt,
            kwargs=body.chat_template_kwargs,
        )
        return self._engine.encode(text, add_special_tokens=False)

    # Operation

    async def health(self) -> JSONResponse:
        state = self._engine.state
        return JSONResponse({"status": state}, 200 if state is State.RUNNING else 503)

    async def version(self) -> dict[str, str]:
        return {"version": twofold.__version__}

    async def show_metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _respond(body: Sampling, request: Request, writer: Writer) -> Response:
    """The answer, as a stream if the client asked for one. However that ends, the writer's answer is closed."""
    if body.stream:
        return EventStream(writer.stream(body.include_usage), writer.answer.close)
    try:
        return JSONResponse(await until_gone(writer.write(), request.receive))
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        writer.answer.close()
