"""Engine arguments, as given and as settled for this machine. The names are vLLM's, where vLLM has one."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from twofold.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "sdpa", "flash_attn")
EXCHANGES = ("auto", "all_gather", "push")
PARTITION_POLICIES = ("dual_chunk_swap", "contiguous")
STEP_LAYOUTS = ("auto", "tokens", "heads")
WEIGHTS = ("auto", "replicated", "sharded")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What `LLM(...)` and the command line accept. None and "auto": chosen from the model and the machine.

    Raises:
        ConfigError: a value is out of range; `field` is its name.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    prefill_context_parallel_size: int = 1
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
    block_size: int | None = None  # tokens in a KV cache block
    kv_cache_memory_bytes: int | None = None  # of each rank
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    attention_backend: str = "auto"
    exchange: str = "auto"
    enforce_eager: bool = False
    step_timeout: float = 20.0  # seconds that a step may take beyond what its tokens need
    seed: int = 0

    def __post_init__(self) -> None:
        _check(isinstance(self.model, str) and bool(self.model), "model", self.model, "a directory, hub name or 'demo'")
        for name in ("prefill_context_parallel_size", "max_num_seqs"):
            _check_count(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "block_size", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        _check_choice("partition_policy", self.partition_policy, PARTITION_POLICIES)
        _check_choice("step_layout", self.step_layout, STEP_LAYOUTS)
        _check_choice("weights", self.weights, WEIGHTS)
        _check_choice("device", self.device, DEVICES)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("exchange", self.exchange, EXCHANGES)
        utilization = self.gpu_memory_utilization
        _check(
            isinstance(utilization, int | float) and 0 < utilization <= 1,
            "gpu_memory_utilization",
            utilization,
            "more than 0 and at most 1",
        )
        timeout = self.step_timeout
        _check(isinstance(timeout, int | float) and 0 < timeout < 1e6, "step_timeout", timeout, "above 0 and below 1e6")
        _check(isinstance(self.seed, int) and 0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What Transformers' `from_pretrained` needs to find one model."""

    path: str  # a directory or a hub name
    gguf_file: str | None = None  # within the directory

    @property
    def arguments(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


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
    attention_backend: str
    weights: str  # replicated, or sharded
    eos_token_ids: frozenset[int]
    num_threads: int  # CPU threads of each rank

    @property
    def num_ranks(self) -> int:
        return self.engine.prefill_context_parallel_size


def _check(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {limit}, got {value!r}", field=name)


def _check_count(name: str, value: object) -> None:
    _check(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, value, "an integer of at least 1"
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _check(value in choices, name, value, f"one of {', '.join(choices)}")
