"""A replica of Ray Serve LLM, for `LLMConfig.server_cls`: an engine, and the app that `twofold serve` has."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray.llm._internal.serve.core.configs import openai_api_models as classes

from twofold.engine.async_engine import State
from twofold.errors import ConfigError
from twofold.ray_serve.config import deployment_options, read_config
from twofold.ray_serve.forward import Forwarded, Head, call
from twofold.server.run import load
from twofold.server.service import Service, make_service

if TYPE_CHECKING:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
    from ray.llm._internal.serve.core.protocol import RawRequestInfo

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
READ = ("authorization", "x-api-key", "x-request-id")  # headers that the app reads, besides the body's
NO_SLEEP = "ranks keep their memory; scale the deployment down instead"
NO_PROFILE = "steps are profiled offline, by LLM.start_profile"
TEXT_ONLY = "models continue text only; there is no such route"


class TwofoldServer:
    """Implements Ray's `LLMServerProtocol` (2.60), and `forward`, by which `TwofoldIngress` sends all requests.

    Raises:
        ConfigError, ModelError: the configuration, the model and the machine do not fit together.
    """

    async def __init__(self, llm_config: "LLMConfig") -> None:  # type: ignore[misc] # Ray awaits it
        self._llm_config = llm_config
        self._config, self._server_config = read_config(llm_config)
        self._service: Service | None = None
        await self.start()

    @classmethod
    def get_deployment_options(cls, llm_config: "LLMConfig") -> dict[str, Any]:
        return deployment_options(llm_config)

    async def start(self) -> None:
        if self._service is not None:
            return
        _share_threads(self._config.prefill_context_parallel_size)
        engine = await asyncio.to_thread(load, self._config)
        self._service = make_service(self._server_config, engine)
        self._service.engine.start()

    async def llm_config(self) -> "LLMConfig":
        return self._llm_config

    async def check_health(self) -> None:
        """Raises an UnavailableError if the engine has failed for good: then Ray starts another replica.

        While lost ranks are replaced, the replica is well: its streams wait and go on.
        """
        if self._service is not None and self._service.engine.state is State.DEAD:
            self._service.engine.check()

    async def reset_prefix_cache(self) -> None:
        if self._service is not None:
            engine = self._service.engine
            await engine.in_engine_thread(engine.engine.reset_prefix_cache)

    # Requests

    async def forward(
        self, request: Forwarded, raw_request_info: "RawRequestInfo | None" = None
    ) -> AsyncIterator[Head | bytes]:
        """The app's answer as the ingress passes it on: a Head, and the body in pieces."""
        headers: Mapping[str, str] = {} if raw_request_info is None else raw_request_info.headers
        kept = {name.lower(): value for name, value in headers.items() if name.lower() in READ}
        assert self._service is not None
        return call(self._service.app, request.path, kept, request.body)

    async def chat(self, request: Any, raw_request_info: "RawRequestInfo | None" = None) -> AsyncIterator[Any]:
        return self._answer(CHAT, request, raw_request_info, classes.ChatCompletionResponse)

    async def completions(self, request: Any, raw_request_info: "RawRequestInfo | None" = None) -> AsyncIterator[Any]:
        return self._answer(COMPLETIONS, request, raw_request_info, classes.CompletionResponse)

    async def tokenize(self, request: Any, raw_request_info: "RawRequestInfo | None" = None) -> AsyncIterator[Any]:
        return self._answer(TOKENIZE, request, raw_request_info, classes.TokenizeResponse)

    async def detokenize(self, request: Any, raw_request_info: "RawRequestInfo | None" = None) -> AsyncIterator[Any]:
        return self._answer(DETOKENIZE, request, raw_request_info, classes.DetokenizeResponse)

    async def _answer(
        self, path: str, request: Any, raw_request_info: "RawRequestInfo | None", whole: type[Any]
    ) -> AsyncIterator[Any]:
        """For Ray's own ingress: events as they come, in lists of one, or an object of the class `whole`."""
        fields = request.model_dump(mode="json", exclude_unset=True)
        body = json.dumps(fields).encode()
        pieces = await self.forward(Forwarded(fields.get("model") or "", path, body), raw_request_info)
        head = await anext(pieces)
        assert isinstance(head, Head)
        if head.is_stream:
            async for piece in pieces:
                assert isinstance(piece, bytes)
                yield [piece.decode()]
            return
        answer = json.loads(b"".join([piece async for piece in pieces if isinstance(piece, bytes)]))
        if head.status == 200:
            yield whole(**answer)
        else:
            told = answer["error"]
            yield _error(head.status, told["message"], told["type"], told["param"])

    # What Twofold does not have

    async def embeddings(self, request: Any, raw_request_info: "RawRequestInfo | None" = None) -> AsyncIterator[Any]:
        return _refuse()

    async def score(self, request: Any, raw_request_info: "RawRequestInfo | None" = None) -> AsyncIterator[Any]:
        return _refuse()

    async def transcriptions(
        self, request: Any, raw_request_info: "RawRequestInfo | None" = None
    ) -> AsyncIterator[Any]:
        return _refuse()

    async def sleep(self, **kwargs: Any) -> None:
        _lacks("sleep", NO_SLEEP)

    async def wakeup(self, **kwargs: Any) -> None:
        _lacks("wakeup", NO_SLEEP)

    async def is_sleeping(self) -> bool:
        return False

    async def pause(self, **kwargs: Any) -> None:
        _lacks("pause", NO_SLEEP)

    async def resume(self, **kwargs: Any) -> None:
        _lacks("resume", NO_SLEEP)

    async def is_paused(self) -> bool:
        return False

    async def start_profile(self) -> None:
        _lacks("start_profile", NO_PROFILE)

    async def stop_profile(self) -> None:
        _lacks("stop_profile", NO_PROFILE)


def _share_threads(num_ranks: int) -> None:
    """Shares the replica's CPUs among its ranks, where Ray has set OMP_NUM_THREADS to all of them for each process."""
    num_cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    if num_cpus > 1 and os.environ.get("OMP_NUM_THREADS") == str(num_cpus):
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_cpus // num_ranks))


async def _refuse() -> AsyncIterator[Any]:
    yield _error(404, TEXT_ONLY, "invalid_request_error", None)


def _error(status: int, message: str, kind: str, param: str | None) -> Any:
    return classes.ErrorResponse(error=classes.ErrorInfo(message=message, type=kind, param=param, code=status))


def _lacks(name: str, reason: str) -> NoReturn:
    raise ConfigError(f"{name} is not supported: {reason}")
