"""Read Ray's `LLMConfig`: the arguments of the engine and the server, and what a replica needs of the cluster."""

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import ray

from twofold.config import EngineConfig
from twofold.engine_args import EngineArgs
from twofold.errors import ConfigError
from twofold.server.config import ServerConfig

if TYPE_CHECKING:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

# Arguments of the server that `engine_kwargs` may have. The others are Ray's: addresses, names, draining.
SERVER_ARGUMENTS = (
    "api_key", "max_waiting_requests", "max_waiting_tokens", "max_body_bytes", "chat_template", "tool_call_parser",
    "reasoning_parser",
)  # fmt: skip


def read_config(llm_config: "LLMConfig") -> tuple[EngineConfig, ServerConfig]:
    """Raises a ConfigError if something is asked for that Twofold does not have, or a value is wrong."""
    loading, given = llm_config.model_loading_config, dict(llm_config.engine_kwargs)
    source = loading.model_source or loading.model_id
    if not isinstance(source, str):
        raise ConfigError("model_source must be a directory, hub name or 'demo': models are not loaded from buckets")
    if llm_config.lora_config is not None:
        raise ConfigError("lora_config is not supported: merge the adapter into its base model", field="lora_config")
    if "model" in given:
        raise ConfigError("engine_kwargs must not have model; give model_loading_config.model_source", field="model")
    kind = llm_config.accelerator_config.kind
    if kind not in ("cpu", "gpu"):
        raise ConfigError(f"models run on GPUs and CPUs, got accelerator {kind!r}", field="accelerator_config")
    is_by_ray = given.get("distributed_executor_backend") == "ray"
    if kind == "cpu" or is_by_ray:  # then the replica itself has no GPU by which to decide
        given.setdefault("device", "cpu" if kind == "cpu" else "cuda")
    if loading.tokenizer_source is not None:
        given.setdefault("tokenizer", loading.tokenizer_source)
    own = {name: given.pop(name) for name in SERVER_ARGUMENTS if name in given}
    return EngineArgs(source, **given), ServerConfig(served_model_name=[loading.model_id], **own)


def deployment_options(llm_config: "LLMConfig") -> dict[str, Any]:
    """Options of the deployment: those of `deployment_config`, and what each replica needs.

    Raises:
        ConfigError: as `read_config`; or ranks would not have what `placement_group_config` gives.
    """
    config, _ = read_config(llm_config)
    options: dict[str, Any] = copy.deepcopy(llm_config.deployment_config)
    if wrong := [name for name in options if name.startswith("placement_group_")]:
        raise ConfigError(f"deployment_config must not have {wrong[0]}; ranks have what placement_group_config gives")
    if "KVAwareRouter" in str(options.get("request_router_config")):
        raise ConfigError(
            "request_router_config: KVAwareRouter needs events of vLLM's cache; use PrefixCacheAffinityRouter",
            field="request_router_config",
        )
    actor = _needs(llm_config, config) | options.get("ray_actor_options", {})
    environment = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    environment = {**environment, **actor.get("runtime_env", {}), **(llm_config.runtime_env or {})}
    return options | {"ray_actor_options": actor | {"runtime_env": environment}}


def _needs(llm_config: "LLMConfig", config: EngineConfig) -> dict[str, Any]:
    """Options of a replica's actor. Its ranks are processes of its own, or Ray places them: then they are not in it."""
    num_ranks, group = config.prefill_context_parallel_size, llm_config.placement_group_config
    if config.distributed_executor_backend == "ray":
        if group is not None:
            raise ConfigError(
                "placement_group_config is for ranks in the replica; leave it out with distributed_executor_backend="
                "'ray', where each rank takes a bundle of its own: one GPU, or one CPU with device='cpu'",
                field="placement_group_config",
            )
        return {"num_cpus": 1}
    if group is not None:
        if "SPREAD" in (strategy := group.get("strategy", "PACK")):
            raise ConfigError(
                f"placement_group_config has strategy {strategy!r}, but a replica's ranks are on one machine; use "
                "'PACK', or engine_kwargs with distributed_executor_backend='ray'",
                field="placement_group_config",
            )
        total: Counter[str] = Counter()
        for bundle in group.get("bundles") or [group.get("bundle_per_worker", {})] * num_ranks:
            total.update(bundle)
        needs = {name: total.pop(key) for name, key in (("num_cpus", "CPU"), ("num_gpus", "GPU")) if key in total}
        return {"num_cpus": 1} | needs | ({"resources": dict(total)} if total else {})
    if llm_config.accelerator_config.kind == "cpu":
        return {"num_cpus": num_ranks}
    kind = {} if llm_config.accelerator_type is None else {"accelerator_type": llm_config.accelerator_type}
    return {"num_cpus": 1, "num_gpus": num_ranks} | kind
