"""The routes of the server."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from transformers import PreTrainedTokenizerBase

import twofold
from twofold.chat.conversation import Conversation
from twofold.engine.async_engine import Answer, AsyncEngine, State
from twofold.errors import RequestError
from twofold.sampling_params import SamplingParams, StructuredOutputsParams
from twofold.server import errors
from twofold.server.answers import ChatWriter, CompletionWriter, Pieces, Writer
from twofold.server.anthropic import CountRequest, MessagesRequest, MessagesWriter
from twofold.server.bodies import BodyReader, BodyRoute
from twofold.server.chat import Template
from twofold.server.errors import APIError
from twofold.server.metrics import Metrics
from twofold.server.middleware import ApiKey, BodyLimit, RequestId
from twofold.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from twofold.server.responses import ResponsesRequest, ResponsesWriter
from twofold.server.sse import ClientGoneError, EventStream, until_gone

CLIENT_GONE = 499  # nginx's status for it; no client reads it
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def make_app(
    engine: AsyncEngine,
    metrics: Metrics,
    bodies: BodyReader,
    template: Template | None,
    *,
    model_names: Sequence[str],
    api_keys: Sequence[str],
    max_body_bytes: int,
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
    app.add_middleware(RequestId)
    app.state.bodies = bodies
    app.include_router(Routes(engine, metrics, template, model_names).router())
    _name_models(app, model_names)
    return app


def _name_models(app: FastAPI, names: Sequence[str]) -> None:
    """Lists the models in the OpenAPI schema."""
    for schema in app.openapi()["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"title": "Model", "enum": [*names, None]}


class Routes:
    """One method for each route. `model_names` are all names of the one model; answers have the first by default."""

    def __init__(
        self, engine: AsyncEngine, metrics: Metrics, template: Template | None, model_names: Sequence[str]
    ) -> None:
        self._engine, self._metrics, self._template, self._model_names = engine, metrics, template, model_names
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(route_class=BodyRoute)
        router.post("/v1/completions")(self.completions)
        router.post("/v1/chat/completions")(self.chat_completions)
        router.post("/v1/responses")(self.responses)
        router.post("/v1/messages")(self.messages)
        router.post("/v1/messages/count_tokens")(self.count_tokens)
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
        model, params = self._check_model(body.model), body.sampling_params(self._engine.sampling_defaults)
        try:
            answer = await self._engine.submit(body.prompts, params, num_asked=body.num_asked)
        except RequestError as error:
            raise errors.describe(error, form=body.form_field) from error
        try:
            echoed = await self._texts_of_prompts(answer) if body.echo else None
            return await _respond(body.stream, request, CompletionWriter(answer, model, body, echoed))
        except BaseException:
            answer.close()
            raise

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        model, params = self._check_model(body.model), body.sampling_params(self._engine.sampling_defaults)
        answer, pieces = await self._chat(body.conversation(), params, body.num_asked, form_field=body.form_field)
        return await _respond(body.stream, request, ChatWriter(answer, model, body, pieces))

    async def responses(self, body: ResponsesRequest, request: Request) -> Response:
        model, params = self._check_model(body.model), body.sampling_params(self._engine.sampling_defaults)
        answer, pieces = await self._chat(body.conversation(), params, body.max_output_tokens, "input", "text")
        return await _respond(body.stream, request, ResponsesWriter(answer, model, body, pieces))

    async def messages(self, body: MessagesRequest, request: Request) -> Response:
        model, params = self._check_model(body.model), body.sampling_params(self._engine.sampling_defaults)
        answer, pieces = await self._chat(body.conversation(), params, None, form_field="output_config")
        return await _respond(body.stream, request, MessagesWriter(answer, model, pieces))

    async def count_tokens(self, body: CountRequest) -> dict[str, int]:
        self._check_model(body.model)
        token_ids, _ = await self._read_chat(body.conversation(), is_constrained=False)
        return {"input_tokens": len(token_ids)}

    async def _chat(
        self,
        chat: Conversation,
        params: SamplingParams,
        num_asked: int | None,
        prompt_field: str = "messages",
        form_field: str = "response_format",
    ) -> tuple[Answer, Pieces]:
        """Queues a chat → its answer, and what cuts that into pieces.

        The request's field `prompt_field` had the messages, and `form_field` what the answer has to look like.
        """
        self._engine.check()
        self._tokenizer()
        assert self._template is not None
        answers, tools = self._template.answers, chat.tools
        if (schema := tools.answer_schema()) is not None:
            form = StructuredOutputsParams(json=schema, disable_additional_properties=True)
            params = replace(params, structured_outputs=form)
            form_field = "tools"
        is_constrained, left_out = params.structured_outputs is not None, params.skip_special_tokens
        try:
            token_ids, text = await self._read_chat(chat, is_constrained)
            reasons = False
            if params.structured_outputs is not None:
                reasoning = answers.reasoning_before_form(text, chat)
                reasons = reasoning is not None
                params = replace(params, structured_outputs=replace(params.structured_outputs, reasoning=reasoning))
            if left_out and answers.keeps_special_tokens(tools, is_constrained=is_constrained, reasons=reasons):
                params = replace(params, skip_special_tokens=False)
            answer = await self._engine.submit([token_ids], params, num_asked=num_asked)
        except RequestError as error:
            raise errors.describe(error, prompt=prompt_field, form=form_field) from error
        parse = partial(
            answers.parser, text, tools, is_constrained=is_constrained, reasons=reasons, leaves_out=left_out
        )
        return answer, Pieces(parse, answers.has_short_ids)

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

    async def tokenize(self, body: TokenizeRequest) -> Response:
        self._check_model(body.model)
        self._tokenizer()
        if body.messages is not None:
            tokens, _ = await self._read_chat(body.conversation(), is_constrained=False)
        else:
            tokens = await self._encode(body.prompt or "", body.add_special_tokens)
        return await self._in_json(self._describe_tokens, tokens, body.return_token_strs)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        self._check_model(body.model)
        tokens, vocab_size, max_model_len = body.tokens, self._engine.vocab_size, self._engine.max_model_len
        if len(tokens) > max_model_len:
            message = f"tokens has {len(tokens)} ids, more than max_model_len={max_model_len}; send fewer at once"
            raise APIError(400, message, param="tokens")
        if len(wrong := tokens[(tokens < 0) | (tokens >= vocab_size)]):
            raise APIError(400, f"tokens must be from 0 to {vocab_size - 1}, got {wrong[0]}", param="tokens")
        tokenizer = self._tokenizer()
        return await self._in_json(lambda: {"prompt": tokenizer.decode(tokens)})

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._engine.tokenizer is None:
            raise APIError(400, "the server has no tokenizer (skip_tokenizer_init); send token ids to /v1/completions")
        return self._engine.tokenizer

    async def _read_chat(self, chat: Conversation, is_constrained: bool) -> tuple[list[int], str]:
        """→ token ids and text of the prompt."""
        self._tokenizer()
        assert self._template is not None
        prompt = await self._template.render(chat, is_constrained=is_constrained)
        if isinstance(prompt, int):
            raise self._engine.too_long(prompt)
        if isinstance(prompt, str):
            return await self._encode(prompt, add_special_tokens=False), prompt
        return prompt, await self._engine.in_tokenizer_thread(self._tokenizer().decode, prompt)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        encode = partial(self._engine.encode, add_special_tokens=add_special_tokens)
        token_ids: list[int] = await self._engine.in_tokenizer_thread(encode, text)
        return token_ids

    def _describe_tokens(self, tokens: list[int], with_strs: bool) -> dict[str, Any]:
        return {
            "count": len(tokens),
            "max_model_len": self._engine.max_model_len,
            "tokens": tokens,
            "token_strs": self._tokenizer().convert_ids_to_tokens(tokens) if with_strs else None,
        }

    async def _in_json(self, describe: Callable[..., dict[str, Any]], *args: Any) -> Response:
        """An answer that may be long, so it is made and written in the tokenizer's thread."""

        def write() -> bytes:
            pieces = _JSON.iterencode(describe(*args))  # `encode` is quicker, but lets no other thread run meanwhile
            return "".join(pieces).encode()

        return Response(await self._engine.in_tokenizer_thread(write), media_type="application/json")

    # Operation

    async def health(self) -> JSONResponse:
        state, reason = self._engine.state, self._engine.waits_for
        body = {"status": state} | ({} if reason is None else {"waits_for": reason})
        return JSONResponse(body, 200 if state is State.RUNNING else 503)

    async def version(self) -> dict[str, str]:
        return {"version": twofold.__version__}

    async def show_metrics(self) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _respond(streams: bool | None, request: Request, writer: Writer) -> Response:
    """The answer, as a stream if the client asked for one. However that ends, the writer's answer is closed."""
    if streams:
        return EventStream(writer.stream(), writer.answer.close)
    try:
        return JSONResponse(await until_gone(writer.write(), request.receive))
    except ClientGoneError:
        return Response(status_code=CLIENT_GONE)
    finally:
        writer.answer.close()
