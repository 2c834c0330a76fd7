"""Decides every `None` and `auto` of the engine arguments, once, by the model's files and the machine."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from twofold.config import EngineConfig, ModelSource, RuntimeConfig
from twofold.errors import ConfigError, ModelError, RequestError
from twofold.models.sizes import model_bytes
from twofold.models.source import check_weights, load_config, load_generation_config, load_tokenizer, resolve
from twofold.models.support import model_class, refusal
from twofold.parallel.costs import StepCosts
from twofold.sampling_params import SamplingParams

# generation_config.json -> SamplingParams, as in vLLM
SAMPLING_NAMES = {
    "repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "min_p": "min_p", "max_new_tokens": "max_tokens",
}  # fmt: skip
LONGER_ROPE = ("yarn", "linear", "dynamic")  # kinds that serve `factor` times as many positions
RANKS_PER_CORE = 4  # more ranks would only wait for each other
WORKSPACE_BYTES = 4 << 30  # of a GPU, besides weights and cache: activations of the largest step, kernels, graphs

logger = logging.getLogger(__name__)


def settle(config: EngineConfig) -> tuple[RuntimeConfig, PreTrainedTokenizerBase | None]:
    """Looks at the model's files and the machine.

    Raises:
        ConfigError: an argument does not fit the model or the machine.
        ModelError: the model or its tokenizer is missing, broken or not served.
    """
    if config.step_costs is not None:
        StepCosts.from_json(config.step_costs)
    source = resolve(config)
    overrides = dict(config.hf_overrides or {})
    if (length := overrides.pop("max_model_len", None)) is not None and config.max_model_len is None:
        config = replace(config, max_model_len=length)
    model_config = load_config(source, config.trust_remote_code, overrides)
    if reason := refusal(model_config, config.trust_remote_code):
        raise ModelError(f"model {config.model!r} ({model_config.model_type}) is not served: {reason}", field="model")
    device = _device(config)
    tokenizer = (
        None
        if config.skip_tokenizer_init
        else load_tokenizer(config.tokenizer, source, config.trust_remote_code, config.tokenizer_revision)
    )
    generation = {} if source.gguf_file or config.load_format == "dummy" else load_generation_config(source)
    cls = model_class(model_config, config.trust_remote_code)
    if config.load_format != "dummy" and cls is not None:
        check_weights(source, model_config, cls)
    dtype, max_model_len = _dtype(config, model_config, device), _max_model_len(config, model_config)
    runtime = RuntimeConfig(
        engine=config,
        source=source,
        model_config=model_config,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens or _default_batched_tokens(config, device),
        block_size=config.block_size or (16 if device == "cpu" else 128),
        kv_cache=config.kv_cache if config.prefill_context_parallel_size > 1 else "replicated",
        attention_backend=_attention_backend(config, device),
        weights=_weights(config, model_config, device, dtype, max_model_len),
        eos_token_ids=_eos_token_ids(generation, model_config, tokenizer),
        num_threads=int(os.environ.get("OMP_NUM_THREADS") or 0)
        or max(1, usable_cores() // config.prefill_context_parallel_size),
        sampling_defaults=_sampling_defaults(config, generation),
    )
    return runtime, tokenizer


def usable_cores() -> int:
    """The number of cores that this process may use; on systems that do not tell (macOS), of the whole machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _device(config: EngineConfig) -> str:
    size = config.prefill_context_parallel_size
    num_gpus = torch.cuda.device_count()
    device = config.device if config.device != "auto" else ("cuda" if num_gpus else "cpu")
    if device == "cuda":
        limit, holder = num_gpus, f"{num_gpus} GPUs"
    else:
        num_cores = usable_cores()
        limit, holder = RANKS_PER_CORE * num_cores, f"{num_cores} cores"
    if size > limit:
        raise ConfigError(
            f"prefill_context_parallel_size must be at most {limit} on this machine ({holder}), got {size}",
            field="prefill_context_parallel_size",
        )
    return device


def _attention_backend(config: EngineConfig, device: str) -> str:
    backend = config.attention_backend
    if backend == "auto":
        return "flash_attn" if device == "cuda" else "sdpa"
    if backend == "flash_attn" and device != "cuda":
        raise ConfigError(
            f"attention_backend 'flash_attn' runs on CUDA only, and the device is {device}; use 'auto' or 'sdpa'",
            field="attention_backend",
        )
    return backend


def _weights(
    config: EngineConfig, model_config: PretrainedConfig, device: str, dtype: torch.dtype, max_model_len: int
) -> str:
    """Ranks of a CPU share one copy already, so there "auto" shards nothing."""
    num_ranks = config.prefill_context_parallel_size
    if num_ranks == 1:
        return "replicated"
    if config.weights != "auto" or device == "cpu":
        return "replicated" if config.weights == "auto" else config.weights
    sizes = model_bytes(model_config, dtype, config.trust_remote_code)
    cache = config.kv_cache_memory_bytes or max_model_len * sizes.entry
    total = int(torch.cuda.get_device_properties(0).total_memory * config.gpu_memory_utilization)
    needed = sizes.whole + cache + WORKSPACE_BYTES
    if needed <= total:
        return "replicated"
    logger.info(
        "weights are sharded: whole ones of %.1f GB and a cache of %.1f GB do not fit in the %.1f GB that a GPU may "
        "use; each rank keeps %.1f GB of weights",
        *(size / 1e9 for size in (sizes.whole, cache, total, sizes.sharded(num_ranks))),
    )
    return "sharded"


def _dtype(config: EngineConfig, model_config: PretrainedConfig, device: str) -> torch.dtype:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    stored = model_config.get_text_config().dtype
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    stored = stored or torch.float32
    return torch.bfloat16 if device == "cuda" and stored == torch.float32 else stored


def _max_model_len(config: EngineConfig, model_config: PretrainedConfig) -> int:
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    rope = getattr(model_config.get_text_config(), "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") in LONGER_ROPE and rope.get("original_max_position_embeddings"):
        limit = max(limit, int(rope["original_max_position_embeddings"] * rope.get("factor", 1)))
    if config.max_model_len is None:
        return int(limit or 8192)
    if limit is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len must be at most the model's {limit} positions (max_position_embeddings), "
            f"got {config.max_model_len}",
            field="max_model_len",
        )
    return config.max_model_len


def _default_batched_tokens(config: EngineConfig, device: str) -> int:
    return (2048 if device == "cpu" else 32768) * config.prefill_context_parallel_size


def _sampling_defaults(config: EngineConfig, of_model: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters for requests that leave them out.

    Raises:
        ConfigError: they are not served.
    """
    where = config.generation_config
    says = of_model if where == "auto" else {} if where == "vllm" else load_generation_config(ModelSource(where))
    says = {**says, **(config.override_generation_config or {})}
    defaults = {ours: says[name] for name, ours in SAMPLING_NAMES.items() if says.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ConfigError(
            f"the default sampling parameters of generation_config={where!r} are not served: {error}; "
            "generation_config='vllm' does without them",
            field="generation_config",
        ) from None
    return defaults


def _eos_token_ids(
    generation: Mapping[str, Any], model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """The token ids that end an answer, from the model's configuration, generation configuration and tokenizer."""
    found: set[int] = set()
    configs = (model_config.get_text_config(), tokenizer)
    for said in (*(getattr(config, "eos_token_id", None) for config in configs), generation.get("eos_token_id")):
        found.update([said] if isinstance(said, int) else said or ())
    return frozenset(found)
