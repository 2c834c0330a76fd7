"""The ingress of Twofold's replicas under Ray Serve LLM: it chooses a model, and passes requests on as they are.

Unlike Ray's own ingress it has all routes of `twofold serve` and its errors. The streams of a replica that is lost it
ends with an error event.
"""

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.llm._internal.common.dict_utils import maybe_apply_llm_deployment_config_defaults
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.llm import LLMServingArgs, build_llm_deployment
from ray.serve.llm.ingress import OpenAiIngress

from twofold.errors import ConfigError, OverloadedError, UnavailableError
from twofold.ray_serve.config import read_config
from twofold.ray_serve.forward import Forwarded, Head, read_fields, routed_text
from twofold.ray_serve.server import CHAT, COMPLETIONS, DETOKENIZE, TEXT_ONLY, TOKENIZE, TwofoldServer
from twofold.server import errors
from twofold.server.answers import event
from twofold.server.errors import APIError
from twofold.server.middleware import BodyLimit

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
FORWARDED = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, f"{MESSAGES}/count_tokens", TOKENIZE, DETOKENIZE)
REFUSED = ("/v1/embeddings", "/v1/score", "/v1/audio/transcriptions")
LOST = "the replica that answered was lost, and the answer with it; send the request again"

logger = logging.getLogger("ray.serve")


class TwofoldIngress(OpenAiIngress):  # type: ignore[misc]
    """Takes `llm_deployments` and `model_cards` as Ray's OpenAiIngress does, both by model id."""

    async def forward(self, request: Request) -> Response:
        """A replica's answer. Raises an APIError if there is none."""
        path, body = request.url.path, await request.body()
        fields = read_fields(body)
        model = self.choose(fields.get("model"))
        forwarded = Forwarded(model, path, body, routed_text(fields, otherwise=path))
        pieces = self._get_response(body=forwarded, call_method="forward", raw_request=request)
        try:
            head: Head = await anext(pieces)
            if not head.is_stream:
                return _response(head, Response(b"".join([piece async for piece in pieces]), head.status))
        except (RayError, RayServeException) as error:
            raise _describe(error) from error
        return _response(head, StreamingResponse(_until_lost(pieces, path), head.status))

    def choose(self, name: Any) -> str:
        """The id of the model that a request is for. A name that is none, only a replica refuses."""
        names: list[str] = list(self._model_cards)
        if isinstance(name, str):
            if name not in names:
                message = f"the model {name[:100]!r} does not exist; /v1/models lists what there is"
                raise APIError(404, message, param="model", code="model_not_found")
            return name
        if len(names) > 1:
            raise APIError(400, f"model is required, since there are several: {', '.join(names)}", param="model")
        return names[0]


def _response(head: Head, response: Response) -> Response:
    for name, value in head.headers:
        if name not in ("content-length", "x-request-id"):  # which the response has, and Ray adds
            response.headers[name] = value
    return response


async def _until_lost(pieces: AsyncIterator[bytes], path: str) -> AsyncIterator[bytes]:
    """The pieces of a stream; if its replica is lost, the last one is an error event."""
    try:
        async for piece in pieces:
            yield piece
    except (RayError, RayServeException) as error:
        yield _last_event(_describe(error), path).encode()


def _describe(error: Exception) -> APIError:
    if isinstance(error, BackPressureError):
        return errors.describe(OverloadedError("the deployment has max_queued_requests requests waiting", 1))
    if isinstance(error, RayTaskError):  # what the replica raised
        return errors.describe(error)
    logger.warning("a replica did not answer: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
    return errors.describe(UnavailableError(LOST))


def _last_event(error: APIError, path: str) -> str:
    if path == MESSAGES:
        return event(error.anthropic_body, "error")
    if path == RESPONSES:
        told = error.body["error"]
        body = {"type": "error", "code": told["code"], "message": told["message"], "param": None, "sequence_number": 0}
        return event(body, "error")
    return event(error.body)


def make_app(max_body_bytes: int) -> FastAPI:
    """The app of an ingress. Its routes are functions: Ray 2.60 cannot bind methods to routes of FastAPI 0.165."""
    app = FastAPI(title="Twofold", docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    for path in FORWARDED:
        app.post(path, response_model=None)(_forward)
    for path in REFUSED:
        app.post(path, response_model=None)(_refuse)
    app.get("/v1/models")(_models)
    app.get("/v1/models/{model:path}")(_model)
    app.get("/health")(_health)
    return app


def _ingress() -> TwofoldIngress:
    ingress: TwofoldIngress = serve.get_replica_context().servable_object
    return ingress


async def _forward(request: Request) -> Response:
    return await _ingress().forward(request)


async def _refuse() -> Response:
    raise APIError(404, TEXT_ONLY)


async def _models() -> Any:
    return await _ingress().models()


async def _model(model: str) -> Any:
    ingress = _ingress()
    return await ingress.model(ingress.choose(model))


async def _health() -> dict[str, str]:
    return {"status": "ok"}


def build_openai_app(builder_config: Mapping[str, Any]) -> serve.Application:
    """Builds an application for `serve run` and `serve.run`, as Ray's function of this name does.

    Args:
        builder_config: `LLMServingArgs`. An LLMConfig without `server_cls` gets `TwofoldServer`.

    Raises:
        ConfigError: a configuration cannot be served; the message says what to change.
    """
    args = LLMServingArgs.model_validate(builder_config)
    configs, ingress = args.llm_configs, args.ingress_cls_config
    if ingress.ingress_cls.__name__ != "OpenAiIngress" or ingress.ingress_extra_kwargs:
        raise ConfigError("ingress_cls_config is not supported: TwofoldIngress passes all requests on; leave it out")
    options = maybe_apply_llm_deployment_config_defaults(
        TwofoldIngress.get_deployment_options(configs), args.ingress_deployment_config
    )
    app = make_app(max(read_config(config)[1].max_body_bytes for config in configs))
    return serve.deployment(serve.ingress(app)(TwofoldIngress), **options).bind(
        llm_deployments={
            config.model_id: build_llm_deployment(config, deployment_cls=config.server_cls or TwofoldServer)
            for config in configs
        },
        model_cards={config.model_id: to_model_metadata(config.model_id, config) for config in configs},
    )
