"""Engine arguments, as given and as settled for this machine. The names are vLLM's, where vLLM has one."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from twofold.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {
    "half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32",
}  # fmt: skip
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
LOAD_FORMAT_ALIASES = {  # of vLLM: other files of the same weights, and other ways to read them
    "hf": "auto", "mistral": "auto", "fastsafetensors": "auto", "runai_streamer": "auto",
}  # fmt: skip
TOKENIZER_MODES = ("auto", "hf", "mistral")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "sdpa", "native", "flash_attn")
EXECUTOR_BACKENDS = ("mp", "ray")
EXCHANGES = ("auto", "all_gather", "push")
PARTITION_POLICIES = ("dual_chunk_swap", "contiguous")
STEP_LAYOUTS = ("auto", "tokens", "heads")
HOLDINGS = ("auto", "replicated", "sharded")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What `LLM(...)` and the command line accept. None and "auto": chosen from the model and the machine.

    Raises:
        ConfigError: a value is out of range; `field` is its name.
    """

    model: str
    tokenizer: str | None = None
    tokenizer_mode: str = "auto"  # mistral: mistral-common makes the prompts of conversations, not a chat template
    revision: str | None = None  # of a model on the hub
    tokenizer_revision: str | None = None
    download_dir: str | None = None
    hf_overrides: dict[str, Any] | None = None  # values in place of those in the model's configuration
    generation_config: str = "auto"  # where default sampling parameters come from
    override_generation_config: dict[str, Any] | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    prefill_context_parallel_size: int = 1
    distributed_executor_backend: str = "mp"  # ranks are processes of this machine (mp), or wherever Ray has places
    placement_timeout: float = 600.0  # seconds in which Ray must give all ranks a place
    min_ranks: int | None = None  # with which an engine goes on if Ray has no more places after a loss; None: all
    partition_policy: str = "dual_chunk_swap"
    step_layout: str = "auto"  # by tokens (context parallel) or by heads (tensor parallel); "auto": step by step
    step_costs: str | None = None  # JSON, as an engine's log says them: for "auto"; None: measured at the start
    weights: str = "auto"  # whole on every rank, or a part on each; "auto": sharded where whole ones leave no room
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None  # tokens of prompt and answer together
    max_num_batched_tokens: int | None = None  # tokens in a step, over all ranks
    max_num_seqs: int = 256
    max_logprobs: int = 20  # that a request may ask for at each token; -1: all of the vocabulary
    block_size: int | None = None  # tokens in a KV cache block
    kv_cache: str = "auto"  # holding: each rank has all of every KV entry (replicated), or a share of them (sharded)
    kv_cache_memory_bytes: int | None = None  # of each rank
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    attention_backend: str = "auto"
    exchange: str = "auto"
    enforce_eager: bool = False
    step_timeout: float = 20.0  # seconds that a step may take beyond what its tokens need
    seed: int = 0  # None draws one

    def __post_init__(self) -> None:
        _check(isinstance(self.model, str) and bool(self.model), "model", self.model, "a directory, hub name or 'demo'")
        for name in ("revision", "tokenizer_revision", "download_dir"):
            value = getattr(self, name)
            _check(value is None or (isinstance(value, str) and bool(value)), name, value, "a string or None")
        for name in ("hf_overrides", "override_generation_config"):
            value = getattr(self, name)
            _check(isinstance(value, dict | None), name, value, "a dict or None")
        folder = self.generation_config
        _check(isinstance(folder, str) and bool(folder), "generation_config", folder, "auto, vllm or a directory")
        for name in ("prefill_context_parallel_size", "max_num_seqs"):
            _check_count(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes", "min_ranks"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        logprobs = self.max_logprobs
        _check(isinstance(logprobs, int) and logprobs >= -1, "max_logprobs", logprobs, "an integer of at least -1")
        if self.distributed_executor_backend in (None, "uni"):  # what vLLM's scripts say for one machine
            object.__setattr__(self, "distributed_executor_backend", "mp")
        _check_choice("distributed_executor_backend", self.distributed_executor_backend, EXECUTOR_BACKENDS)
        fewest, size = self.min_ranks, self.prefill_context_parallel_size
        _check(fewest is None or fewest <= size, "min_ranks", fewest, f"at most {size}, the ranks that are asked for")
        _check_choice("partition_policy", self.partition_policy, PARTITION_POLICIES)
        _check_choice("step_layout", self.step_layout, STEP_LAYOUTS)
        _check_choice("kv_cache", self.kv_cache, HOLDINGS)
        _check_choice("weights", self.weights, HOLDINGS)
        _check_choice("device", self.device, DEVICES)
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        _check_choice("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "load_format", LOAD_FORMAT_ALIASES.get(self.load_format, self.load_format))
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("tokenizer_mode", self.tokenizer_mode, TOKENIZER_MODES)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("exchange", self.exchange, EXCHANGES)
        utilization = self.gpu_memory_utilization
        _check(
            isinstance(utilization, int | float) and 0 < utilization <= 1,
            "gpu_memory_utilization",
            utilization,
            "more than 0 and at most 1",
        )
        for name in ("step_timeout", "placement_timeout"):
            timeout = getattr(self, name)
            _check(isinstance(timeout, int | float) and 0 < timeout < 1e6, name, timeout, "above 0 and below 1e6")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(63))
        _check(isinstance(self.seed, int) and 0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What Transformers' `from_pretrained` needs to find one model."""

    path: str  # a directory or a hub name
    gguf_file: str | None = None  # within the directory
    revision: str | None = None
    cache_dir: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """For `from_pretrained`."""
        return self.place if self.gguf_file is None else self.place | {"gguf_file": self.gguf_file}

    @property
    def place(self) -> dict[str, Any]:
        """Where the hub's files are."""
        given = {"revision": self.revision, "cache_dir": self.cache_dir}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """The settled configuration. Each rank gets it when it starts."""

    engine: EngineConfig
    source: ModelSource
    model_config: "PretrainedConfig" = field(repr=False)
    device: str  # cpu, or cuda
    dtype: "torch.dtype"
    max_model_len: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache: str  # replicated or sharded; auto: sharded if one request of max_model_len tokens would not fit
    attention_backend: str
    weights: str  # replicated, or sharded
    eos_token_ids: frozenset[int]
    num_threads: int  # CPU threads of each rank
    num_nodes: int = 1  # machines; each has as many ranks, and rank r is on node r // ranks_per_node
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # of the model: for `SamplingParams`

    @property
    def num_ranks(self) -> int:
        return self.engine.prefill_context_parallel_size

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes


def _dtype_name(given: Any) -> Any:
    """Of a name that vLLM or PyTorch has for it, or of PyTorch's type itself."""
    name = str(given).removeprefix("torch.")
    return DTYPE_ALIASES.get(name, name) if isinstance(given, str) or type(given).__module__ == "torch" else given


def _check(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {limit}, got {value!r}", field=name)


def _check_count(name: str, value: object) -> None:
    _check(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, value, "an integer of at least 1"
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _check(value in choices, name, value, f"one of {', '.join(choices)}")
