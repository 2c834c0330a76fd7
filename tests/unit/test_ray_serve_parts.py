"""What needs no cluster of Ray Serve: how a replica is configured and called, and what routers see of a request."""

import asyncio
import inspect
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from twofold import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples/ray_serve"


@pytest.fixture(scope="module")
def ray_llm() -> Any:
    """Ray's modules warn of pydantic's changes when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.llm._internal.serve.core.protocol import LLMServerProtocol

        import twofold.ray_serve
        from twofold.ray_serve import config, forward

    return SimpleNamespace(
        Protocol=LLMServerProtocol, Server=twofold.ray_serve.TwofoldServer, LLMConfig=twofold.ray_serve.LLMConfig,
        config=config, forward=forward, build=twofold.ray_serve.build_openai_app,
    )  # fmt: skip


def make_config(ray_llm: Any, **given: Any) -> Any:
    return ray_llm.LLMConfig(model_loading_config={"model_id": "m", "model_source": "demo"}, **given)


def test_a_replica_has_the_methods_of_rays_protocol(ray_llm: Any) -> None:
    names = [name for name, method in vars(ray_llm.Protocol).items() if callable(method) and name[0] != "_"]
    assert {"start", "chat", "completions", "check_health", "tokenize", "detokenize"} <= set(names)
    for name in names:
        theirs, ours = getattr(ray_llm.Protocol, name), getattr(ray_llm.Server, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name


CPU = {"accelerator_config": {"kind": "cpu"}}
TWO = {"prefill_context_parallel_size": 2}
BY_RAY = {"distributed_executor_backend": "ray", **TWO}
BUNDLES = {"bundle_per_worker": {"CPU": 2, "GPU": 1}}
KV_AWARE = {"request_router_config": {"request_router_class": "ray.serve.llm.request_router.KVAwareRouter"}}


@pytest.mark.parametrize(
    ("given", "actor", "device"),
    [
        ({}, {"num_cpus": 1, "num_gpus": 1}, "auto"),
        ({"accelerator_type": "L4"}, {"num_cpus": 1, "num_gpus": 1, "accelerator_type": "L4"}, "auto"),
        ({"engine_kwargs": TWO, **CPU}, {"num_cpus": 2}, "cpu"),
        ({"engine_kwargs": TWO, "placement_group_config": BUNDLES}, {"num_cpus": 4, "num_gpus": 2}, "auto"),
        ({"engine_kwargs": BY_RAY}, {"num_cpus": 1}, "cuda"),
        ({"deployment_config": {"ray_actor_options": {"num_cpus": 3}}, **CPU}, {"num_cpus": 3}, "cpu"),
    ],
)  # fmt: skip
def test_a_replica_asks_ray_for_what_its_ranks_need(
    ray_llm: Any, given: dict[str, Any], actor: dict[str, Any], device: str
) -> None:
    config = make_config(ray_llm, **given)
    assert ray_llm.config.deployment_options(config)["ray_actor_options"] == actor | {"runtime_env": {}}
    engine, server = ray_llm.config.read_config(config)
    assert (engine.device, server.served_model_name) == (device, ["m"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_config": {}}, "merge the adapter"),
        ({"engine_kwargs": {"max_mdel_len": 8}}, "did you mean max_model_len"),
        ({"engine_kwargs": {"model": "x"}}, "model_source"),
        ({"engine_kwargs": BY_RAY, "placement_group_config": BUNDLES}, "leave it out"),
        ({"placement_group_config": BUNDLES | {"strategy": "STRICT_SPREAD"}}, "on one machine"),
        ({"deployment_config": KV_AWARE}, "use PrefixCacheAffinityRouter"),
    ],
)
def test_what_a_replica_cannot_have_is_refused_when_it_is_built(
    ray_llm: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_llm.config.deployment_options(make_config(ray_llm, **given))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["demo.yaml", "kuberay.yaml"])
def test_applications_of_the_examples_can_be_built(ray_llm: Any, name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((EXAMPLES / name).read_text())
    if "spec" in config:
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "twofold.ray_serve:build_openai_app"
    ray_llm.build(application.args)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "abc", "model": "m"}, "abc"),
        ({"prompt": [[1, 2], [3]]}, "1 2 3 "),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]}], "system": "a"}, "ab"),
        ({"input": "b", "instructions": "a"}, "ab"),
        ({"prompt": ""}, "/path"),
        ({"prompt": "a" * 100_000}, "a" * 65_536),
    ],
)
def test_routers_see_the_beginning_of_the_prompt(ray_llm: Any, fields: dict[str, Any], text: str) -> None:
    assert ray_llm.forward.routed_text(fields, "/path") == text
    sent = ray_llm.forward.Forwarded("m", "/path", b"{}", text)
    assert pickle.loads(pickle.dumps(sent)).prompt == ""  # replicas read the body


def test_pieces_that_nobody_took_in_time_are_joined_and_the_app_ends_with_the_iteration(ray_llm: Any) -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for number in range(5):
                await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def run() -> list[Any]:
        pieces = ray_llm.forward.call(app, "/v1/completions", {}, b"{}")
        taken = [await anext(pieces), await anext(pieces)]
        await pieces.aclose()
        assert ended.is_set()
        return taken

    assert asyncio.run(run()) == [ray_llm.forward.Head(200, []), b"01234"]
