"""Decides every `None` and `auto` of the engine arguments, once, by the model's files and the machine."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from twofold.config import DTYPES, EngineConfig, ModelSource, RuntimeConfig
from twofold.errors import ConfigError, ModelError, RequestError
from twofold.machine import computes_bfloat16, threads_of_rank, usable_cores
from twofold.models.mistral_chat import check_installed
from twofold.models.sizes import model_shape
from twofold.models.source import check_weights, load_config, load_generation_config, load_tokenizer, resolve
from twofold.models.support import model_class, refusal
from twofold.parallel.costs import StepCosts
from twofold.planning.room import Wish, choose, longest, ranks_needed
from twofold.planning.shape import ModelShape
from twofold.sampling_params import SamplingParams

# generation_config.json -> SamplingParams, as in vLLM
SAMPLING_NAMES = {
    "repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "min_p": "min_p", "max_new_tokens": "max_tokens",
}  # fmt: skip
LONGER_ROPE = ("yarn", "linear", "dynamic")  # kinds that serve `factor` times as many positions
GPU_BLOCK_SIZE = 128  # tokens
RANKS_PER_CORE = 4  # more ranks would only wait for each other

logger = logging.getLogger(__name__)


def settle(config: EngineConfig) -> tuple[RuntimeConfig, PreTrainedTokenizerBase | None]:
    """Looks at the model's files and the machine.

    Raises:
        ConfigError: an argument does not fit the model or the machine.
        ModelError: the model or its tokenizer is missing, broken or not served.
    """
    if config.step_costs is not None:
        StepCosts.from_json(config.step_costs)
    if config.tokenizer_mode == "mistral":
        check_installed()
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
    dtype = choose_dtype(config, model_config, device)
    max_model_len = choose_max_model_len(config, model_config)
    runtime = RuntimeConfig(
        engine=config,
        source=source,
        model_config=model_config,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens or _default_batched_tokens(config, device),
        block_size=config.block_size or (16 if device == "cpu" else GPU_BLOCK_SIZE),
        kv_cache=config.kv_cache if config.prefill_context_parallel_size > 1 else "replicated",
        attention_backend=_attention_backend(config, device),
        weights=_weights(config, model_config, device, dtype, max_model_len),
        eos_token_ids=_eos_token_ids(generation, model_config, tokenizer),
        num_threads=threads_of_rank(config.prefill_context_parallel_size),
        sampling_defaults=_sampling_defaults(config, generation),
    )
    return runtime, tokenizer


def device_of_machine() -> str:
    return "cuda" if torch.cuda.device_count() else "cpu"


def _device(config: EngineConfig) -> str:
    size = config.prefill_context_parallel_size
    num_gpus = torch.cuda.device_count()
    device = config.device if config.device != "auto" else device_of_machine()
    if config.distributed_executor_backend == "ray":  # which waits for places, on whatever machines
        return device
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
        return "flash_attn" if device == "cuda" else "native"
    if backend == "flash_attn" and device != "cuda":
        raise ConfigError(
            f"attention_backend 'flash_attn' runs on CUDA only, and the device is {device}; use 'auto' or 'sdpa'",
            field="attention_backend",
        )
    return backend


def _weights(
    config: EngineConfig, model_config: PretrainedConfig, device: str, dtype: torch.dtype, max_model_len: int
) -> str:
    """Ranks of a CPU share one copy already, so there "auto" shards nothing.

    Raises:
        ConfigError: sharded weights are asked for that do not divide.
        ModelError: the model and one request of max_model_len tokens do not fit on the GPUs.
    """
    num_ranks = config.prefill_context_parallel_size
    is_asked = config.weights == "sharded" and num_ranks > 1
    if config.distributed_executor_backend == "ray":  # only ranks see the GPUs of their machines
        return "sharded" if is_asked else "replicated"
    if device == "cpu" and not is_asked:
        return "replicated"
    shape = _shape(config, model_config, dtype)
    if shape is None:  # only a rank can tell
        return "sharded" if is_asked else "replicated"
    if is_asked and not shape.divided(num_ranks):
        raise ConfigError(
            f"weights='sharded' cannot be had of model {config.model!r} on {num_ranks} ranks: {_why_whole(shape)}; "
            "use weights='auto'",
            field="weights",
        )
    if device == "cpu":
        return "sharded"
    wish = Wish(
        max_model_len=max_model_len,
        weights=config.weights,
        kv_cache=config.kv_cache,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        block_size=config.block_size or GPU_BLOCK_SIZE,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
    )
    memory = min(torch.cuda.get_device_properties(rank).total_memory for rank in range(num_ranks))
    usable = int(memory * config.gpu_memory_utilization)
    if not choose(shape, usable, num_ranks, wish, least=True).fits:
        raise ModelError(_no_room(config, shape, usable, wish), field="model")
    chosen = choose(shape, usable, num_ranks, wish)
    return "sharded" if chosen.shards_weights else "replicated"


def _shape(config: EngineConfig, model_config: PretrainedConfig, dtype: torch.dtype) -> ModelShape | None:
    """None if the model cannot be built without memory, as some that come with code of their own."""
    try:
        return model_shape(model_config, dtype, config.trust_remote_code)
    except Exception as error:  # a family may do anything with its modules
        logger.debug("how large the model is will be known when it is loaded: %s", error)
        return None


def _why_whole(shape: ModelShape) -> str:
    counts = sorted({count for group in shape.divisible for count in group.counts})
    if not counts:
        return "no projection of it is known to divide by heads"
    return f"none of its projections divides (of {', '.join(map(str, counts))} heads and columns)"


def _no_room(config: EngineConfig, shape: ModelShape, usable: int, wish: Wish) -> str:
    """One line: what does not fit, and what would do."""
    num_ranks = config.prefill_context_parallel_size
    tried = choose(shape, usable, num_ranks, wish, least=True)
    enough = ranks_needed(shape, usable, wish)
    ways = [f"{enough.num_ranks} such GPUs would do (prefill_context_parallel_size)"] if enough else []
    most = longest(shape, usable, num_ranks, wish)
    ways += [f"here max_model_len may be at most {most.needed_tokens}"] if most else []
    whole = "" if tried.shards_weights or num_ranks == 1 or wish.weights != "auto" else f" ({_why_whole(shape)})"
    return (
        f"model {config.model!r} with one request of max_model_len={wish.max_model_len} tokens does not fit on "
        f"{num_ranks} GPU{'s' * (num_ranks > 1)}: each may use {usable / 1e9:.1f} GB and would need "
        f"{tried.needed / 1e9:.1f}, of which weights {tried.weights / 1e9:.1f}{whole}; "
        f"{'; '.join(ways) or 'no number of GPUs would do: lower max_model_len, or use GPUs with more memory'}"
    )


def choose_dtype(config: EngineConfig, model_config: PretrainedConfig, device: str) -> torch.dtype:
    """Of weights and KV entries. As in vLLM, "auto" rounds weights that are stored in float32 to bfloat16.

    On a CPU it is what the processor computes fast, whatever is stored, or what TWOFOLD_CPU_DTYPE says.
    """
    name = config.dtype
    if name == "auto" and device == "cpu":
        name = os.environ.get("TWOFOLD_CPU_DTYPE") or ("bfloat16" if computes_bfloat16() else "float32")
        if name not in DTYPES[1:]:
            raise ConfigError(f"TWOFOLD_CPU_DTYPE must be one of {', '.join(DTYPES[1:])}, got {name!r}", field="dtype")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    stored = model_config.get_text_config().dtype
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    stored = stored or torch.float32
    return torch.bfloat16 if stored == torch.float32 else stored


def choose_max_model_len(config: EngineConfig, model_config: PretrainedConfig) -> int:
    """Tokens of a prompt and its answer.

    Raises:
        ConfigError: more than the model has positions for.
    """
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
