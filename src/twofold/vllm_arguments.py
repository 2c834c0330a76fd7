"""vLLM's engine arguments that Twofold does not have: which values ask for nothing, and why the others are refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twofold.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Foreign:
    """An argument of vLLM's. With `any_value` all values are taken, since no answer depends on them."""

    reason: str
    neutral: tuple[Any, ...] = ()  # besides None
    any_value: bool = False
    is_flag: bool = False  # on the command line: --name and --no-name

    def takes(self, value: object) -> bool:
        return (
            self.any_value
            or value is None
            or any(value == other and type(value) is type(other) for other in self.neutral)
        )


def _off(reason: str) -> Foreign:
    return Foreign(reason, (False,), is_flag=True)


def _hint(reason: str, *, is_flag: bool = False) -> Foreign:
    return Foreign(reason, any_value=True, is_flag=is_flag)


TEXT_ONLY = "prompts are text only"
NO_LORA = "there is no LoRA; merge the adapter into its base model"
NO_DRAFTS = "there is no speculative decoding"
BY_RAY = "ranks on several machines are placed by Ray: distributed_executor_backend='ray'"
NO_DATA_PARALLEL = "an engine has one copy of the model; start one engine for each"
NO_QUANTIZATION = "there is no quantized computation; give a checkpoint that is not quantized, or a GGUF file"
GRAPHS = "the engine chooses what it compiles and captures; enforce_eager=True turns both off"
ALL_ANSWER = "generation is all that models are used for"

FOREIGN: dict[str, Foreign] = {
    # Model
    "runner": Foreign(ALL_ANSWER, ("auto", "generate")),
    "convert": Foreign(ALL_ANSWER, ("auto", "none")),
    "task": Foreign(ALL_ANSWER, ("auto", "generate")),
    "pooler_config": Foreign(ALL_ANSWER),
    "quantization": Foreign(NO_QUANTIZATION),
    "config_format": Foreign("configurations are those of Transformers (config.json)", ("auto", "hf", "mistral")),
    "hf_config_path": Foreign("a model's configuration lies beside its weights; change it with hf_overrides"),
    "hf_token": Foreign("put the token into the environment variable HF_TOKEN", (False,)),
    "code_revision": Foreign("code comes with the model; its revision is that of revision"),
    "model_impl": Foreign("models run with Transformers' own code", ("auto", "transformers")),
    "logprobs_mode": Foreign("log-probabilities are those of the raw logits", ("raw_logprobs",)),
    "enable_prompt_embeds": _off("a prompt is text or token ids"),
    "enable_sleep_mode": _off("ranks keep their memory; end the engine with shutdown()"),
    "disable_sliding_window": _off("windows are part of the model; lower max_model_len to the window instead"),
    "disable_cascade_attn": _hint("shared prefixes are read once where that is quicker", is_flag=True),
    "allowed_local_media_path": _hint(TEXT_ONLY),
    "allowed_media_domains": _hint(TEXT_ONLY),
    "served_model_name": _hint("the server's flag; offline no name is shown"),
    "logits_processor_pattern": Foreign("a request cannot bring code"),
    # Loading
    "ignore_patterns": _hint("only the files that are needed are read"),
    "use_tqdm_on_load": _hint("there is no progress bar while weights are loaded", is_flag=True),
    "safetensors_load_strategy": _hint("weights are mapped, and read as they are needed"),
    "model_loader_extra_config": Foreign("weights are loaded by Transformers", ({},)),
    "pt_load_map_location": _hint("weights are safetensors or GGUF"),
    # Ranks
    "tensor_parallel_size": Foreign(
        "use prefill_context_parallel_size=N: ranks then share each step by tokens or by heads (tensor parallel), "
        "see step_layout",
        (1,),
    ),
    "pipeline_parallel_size": Foreign("every rank has all layers; use prefill_context_parallel_size=N", (1,)),
    "decode_context_parallel_size": Foreign(
        "answers run by heads or by tokens (step_layout); use prefill_context_parallel_size=N", (1,)
    ),
    "data_parallel_size": Foreign(NO_DATA_PARALLEL, (1,)),
    "data_parallel_size_local": Foreign(NO_DATA_PARALLEL, (1,)),
    "data_parallel_rank": Foreign(NO_DATA_PARALLEL, (0,)),
    "data_parallel_backend": Foreign(NO_DATA_PARALLEL, ("mp",)),
    "data_parallel_hybrid_lb": _off(NO_DATA_PARALLEL),
    "nnodes": Foreign(BY_RAY, (1,)),
    "node_rank": Foreign(BY_RAY, (0,)),
    "ray_workers_use_nsight": _off("profile a rank with start_profile() and stop_profile()"),
    "max_parallel_loading_workers": _hint("ranks load at the same time"),
    "disable_custom_all_reduce": _hint("the way of sums is chosen when ranks start", is_flag=True),
    "enable_expert_parallel": _off("a rank has a part of each expert, or all of all experts"),
    "enable_eplb": _off("experts are not spread over ranks"),
    "enable_dbo": _off("a step is one batch"),
    "worker_cls": Foreign("ranks run Twofold's own worker", ("auto",)),
    "worker_extension_cls": Foreign("ranks run Twofold's own worker", ("",)),
    # Cache
    "swap_space": _hint("preempted requests are computed again, so nothing is swapped"),
    "kv_cache_dtype": Foreign("KV entries have the type of the model (dtype)", ("auto",)),
    "calculate_kv_scales": _off("KV entries are not quantized"),
    "num_gpu_blocks_override": Foreign("give the cache's size with kv_cache_memory_bytes"),
    "cpu_offload_gb": Foreign("weights stay on the GPU; use more ranks, or a smaller model", (0, 0.0)),
    "kv_offloading_size": Foreign("KV entries stay on the GPU"),
    "prefix_caching_hash_algo": _hint("blocks are found by BLAKE2"),
    "kv_sharing_fast_prefill": _off("layers that share KV entries run as the model says"),
    # Scheduler
    "enable_chunked_prefill": Foreign(
        "prompts longer than max_num_batched_tokens are always cut; raise that to keep prompts whole",
        (True,),
        is_flag=True,
    ),
    "scheduling_policy": Foreign("requests run in the order of their arrival", ("fcfs",)),
    "max_num_partial_prefills": _hint("requests run in the order of their arrival"),
    "max_long_partial_prefills": _hint("requests run in the order of their arrival"),
    "long_prefill_token_threshold": _hint("requests run in the order of their arrival"),
    "num_scheduler_steps": _hint("a step gives one token"),
    "num_lookahead_slots": _hint(NO_DRAFTS),
    "async_scheduling": _hint("on a GPU two steps are in flight", is_flag=True),
    "stream_interval": _hint("outputs come with every token"),
    "preemption_mode": Foreign("preempted requests are computed again", ("recompute",)),
    "disable_hybrid_kv_cache_manager": _hint("all layers have the same blocks", is_flag=True),
    "scheduler_cls": Foreign("there is one scheduler"),
    "use_v2_block_manager": _hint("there is one block pool", is_flag=True),
    # LoRA, drafts
    "enable_lora": _off(NO_LORA),
    "enable_lora_bias": _off(NO_LORA),
    "lora_modules": Foreign(NO_LORA, ([],)),
    "max_loras": _hint("it is for enable_lora"),
    "max_lora_rank": _hint("it is for enable_lora"),
    "max_cpu_loras": _hint("it is for enable_lora"),
    "lora_extra_vocab_size": _hint("it is for enable_lora"),
    "lora_dtype": _hint("it is for enable_lora"),
    "fully_sharded_loras": _hint("it is for enable_lora", is_flag=True),
    "speculative_config": Foreign(NO_DRAFTS),
    "speculative_model": Foreign(NO_DRAFTS),
    "num_speculative_tokens": Foreign(NO_DRAFTS),
    # Multimodal
    "limit_mm_per_prompt": _hint(TEXT_ONLY),
    "mm_processor_kwargs": _hint(TEXT_ONLY),
    "mm_processor_cache_gb": _hint(TEXT_ONLY),
    "disable_mm_preprocessor_cache": _hint(TEXT_ONLY, is_flag=True),
    "disable_chunked_mm_input": _hint(TEXT_ONLY, is_flag=True),
    "media_io_kwargs": _hint(TEXT_ONLY),
    # Kernels
    "compilation_config": _hint(GRAPHS),
    "cuda_graph_sizes": _hint(GRAPHS),
    "max_seq_len_to_capture": _hint(GRAPHS),
    "optimization_level": _hint(GRAPHS),
    # Logs and metrics
    "disable_log_stats": _hint("numbers are in get_metrics() and /metrics, not in a log", is_flag=True),
    "disable_log_requests": _hint("requests are not logged", is_flag=True),
    "enable_log_requests": _off("prompts are not logged; the server's access_log has a line for each request"),
    "max_log_len": _hint("prompts are not logged"),
    "otlp_traces_endpoint": Foreign("there are no traces"),
    "collect_detailed_traces": Foreign("there are no traces"),
    "show_hidden_metrics_for_version": _hint("no metric is hidden"),
    "kv_cache_metrics": _off("numbers of the cache are in get_metrics() and /metrics"),
    "profiler_config": _hint("start_profile() and stop_profile() time kernels, and return the times"),
    "disable_async_output_proc": _hint("outputs are made while ranks compute", is_flag=True),
    # Between engines
    "kv_transfer_config": Foreign("KV entries stay with their engine"),
    "kv_events_config": Foreign("KV entries stay with their engine"),
    "additional_config": Foreign("there is nothing more to configure", ({},)),
}
_ALIKE: tuple[tuple[Foreign, str], ...] = (  # names of one kind, separated by spaces
    (
        _hint(TEXT_ONLY),
        "interleave_mm_strings mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb "
        "mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
        "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin renderer_num_workers video_pruning_rate "
        "video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize "
        "ec_transfer_config ec_manager_config",
    ),
    (
        _hint(TEXT_ONLY, is_flag=True),
        "language_model_only skip_mm_profiling enable_mm_processor_stats",
    ),
    (_off(TEXT_ONLY), "enable_mm_embeds mm_encoder_only"),
    (Foreign(TEXT_ONLY), "io_processor_plugin"),
    (
        _hint(GRAPHS),
        "cudagraph_capture_sizes max_cudagraph_capture_size performance_mode ir_op_priority kernel_config "
        "attention_config",
    ),
    (
        _hint("kernels are chosen by the device; attention_backend chooses those of attention"),
        "moe_backend linear_backend sparse_indexer_topk_backend gdn_prefill_backend kda_prefill_backend "
        "kda_decode_backend",
    ),
    (_hint("kernels are chosen when ranks start", is_flag=True), "enable_flashinfer_autotune monokernel"),
    (Foreign(ALL_ANSWER), "diffusion_config engram_config"),
    (
        _hint("models with Mamba layers are not served"),
        "mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size "
        "mamba_cache_mode mamba_backend mamba_ssu_algorithm mamba_cache_philox_rounds mamba_config "
        "replayssm_buffer_len",
    ),
    (
        _hint("models with Mamba layers are not served", is_flag=True),
        "enable_mamba_shared_prefix_checkpoint use_replayssm enable_mamba_cache_stochastic_rounding",
    ),
    (Foreign(NO_DATA_PARALLEL, (0,)), "data_parallel_start_rank"),
    (_hint("an engine has one copy of the model, and no address"), "data_parallel_address data_parallel_rpc_port"),
    (_off(NO_DATA_PARALLEL), "data_parallel_external_lb data_parallel_multi_port_external_lb enable_elastic_ep"),
    (
        _hint("it is for data or expert parallelism"),
        "all2all_backend elastic_ep_max_dp_size dp_sync_interval eplb_config expert_placement_strategy",
    ),
    (
        _hint("it is for data or expert parallelism", is_flag=True),
        "disable_nccl_for_dp_synchronization enable_ep_weight_filter",
    ),
    (_hint("it is for enable_dbo"), "ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold"),
    (
        _hint("it is for decode_context_parallel_size"),
        "dcp_comm_backend dcp_kv_cache_interleave_size cp_kv_cache_interleave_size",
    ),
    (_hint("it is for decode_context_parallel_size", is_flag=True), "dcp_q_replicate"),
    (_hint("ranks on several machines meet through Ray (RAY_ADDRESS)"), "master_addr master_port"),
    (
        _hint("step_timeout is how long a step may take, placement_timeout how long Ray may"),
        "distributed_timeout_seconds cpu_distributed_timeout_seconds watchdog_config",
    ),
    (
        _hint("lost ranks are always replaced, and min_ranks says with how many it goes on", is_flag=True),
        "enable_fault_tolerance",
    ),
    (_hint("lost ranks are always replaced, and min_ranks says with how many it goes on"), "fault_tolerance_config"),
    (_hint("ranks are bound by what starts the engine: numactl", is_flag=True), "numa_bind"),
    (_hint("ranks are bound by what starts the engine: numactl"), "numa_bind_nodes numa_bind_cpus"),
    (Foreign("choose GPUs by CUDA_VISIBLE_DEVICES"), "device_ids"),
    (
        _hint("ranks share each step as costs least (step_layout)", is_flag=True),
        "enable_hc_sp enable_batch_sharded_sampling enable_shm_tensor_arena",
    ),
    (Foreign("it is part of the model's name here: model"), "model_weights"),
    (
        _hint("weights are mapped, and read as they are needed"),
        "safetensors_prefetch_num_threads safetensors_prefetch_block_size",
    ),
    (Foreign("models run with Transformers' own code", ({},)), "model_class_overrides"),
    (Foreign(NO_QUANTIZATION), "quantization_config"),
    (_hint(NO_QUANTIZATION, is_flag=True), "allow_deprecated_quantization"),
    (Foreign("KV entries have the type of the model (dtype)", ([],)), "kv_cache_dtype_skip_layers"),
    (Foreign("weights stay on the GPU; use more ranks, or a smaller model", ("auto",)), "offload_backend"),
    (
        _hint("it is for offloading, which there is not"),
        "cpu_offload_params offload_num_in_group offload_prefetch_step offload_params kv_offloading_backend",
    ),
    (Foreign("weights stay on the GPU; use more ranks, or a smaller model", (0,)), "offload_group_size"),
    (_hint("cached prefixes stay until their blocks are needed"), "prefix_cache_retention_interval prefix_match_unit"),
    (_hint("windows are part of the model", is_flag=True), "swa_bounded_replay"),
    (Foreign("use max_num_batched_tokens"), "max_num_scheduled_tokens"),
    (Foreign("use max_num_seqs"), "max_num_active_seqs"),
    (_hint("the server has max_waiting_requests and max_waiting_tokens"), "max_num_queued_reqs max_num_queued_tokens"),
    (_hint("requests run in the order of their arrival"), "prefill_schedule_interval watermark"),
    (
        _hint("requests run in the order of their arrival", is_flag=True),
        "long_prefill_token_threshold_adaptive scheduler_reserve_full_isl",
    ),
    (_off("the choice of experts is not told"), "enable_return_routed_experts"),
    (_off("masks stay in the engine"), "return_sampling_mask"),
    (_hint("seeds decide what is drawn", is_flag=True), "use_fp64_gumbel"),
    (_off("put the tokens into the prompt, and use prompt_logprobs"), "enable_trace_replay"),
    (
        Foreign(
            "a request cannot bring code; use logit_bias, allowed_token_ids, bad_words or structured_outputs", ([],)
        ),
        "logits_processors",
    ),
    (Foreign("answers have no watermark"), "watermark_config"),
    (_hint("grammars are llguidance's"), "structured_outputs_config guided_decoding_backend"),
    (_hint("the server's flag; LLM gives answers as the model wrote them"), "reasoning_parser reasoning_config"),
    (Foreign("parsers are those of reasoning_parser", ("",)), "reasoning_parser_plugin"),
    (Foreign("what layers compute is not told"), "aux_output_config"),
    (Foreign("change the model's configuration: hf_overrides={'rope_parameters': {...}}"), "rope_scaling rope_theta"),
    (Foreign(NO_DRAFTS), "spec_method spec_model spec_tokens"),
    (_hint(NO_DRAFTS), "per_request_spec_decode_metrics"),
    (_hint("it is for enable_lora"), "default_mm_loras lora_target_modules max_lora_cls_labels"),
    (
        _hint("it is for enable_lora", is_flag=True),
        "enable_tower_connector_lora specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras",
    ),
    (
        _hint("numbers are in get_metrics() and /metrics, with limits of their own"),
        "custom_histogram_buckets kv_cache_metrics_sample",
    ),
    (
        _hint("numbers are in get_metrics() and /metrics, not in a log", is_flag=True),
        "aggregate_engine_logging cudagraph_metrics enable_mfu_metrics enable_logging_iteration_details",
    ),
    (
        _hint("start_profile() and stop_profile() time kernels", is_flag=True),
        "enable_layerwise_nvtx_tracing jit_monitor_verbose",
    ),
    (_hint("start_profile() and stop_profile() time kernels"), "jit_monitor_mode"),
    (_hint("the logger is Python's: logging.getLogger('twofold')"), "logging_config log_level log_config_file"),
    (_hint("it is for enable_sleep_mode"), "sleep_mode_backend sleep_preserve_parameter_names"),
    (
        _hint("it is for enable_sleep_mode", is_flag=True),
        "sleep_mode_offload_cudagraph enable_cumem_allocator enable_nccl_comm_suspend",
    ),
    (_off("use skip_tokenizer_init"), "tokens_only"),
    (_hint("the server has drain_timeout"), "shutdown_timeout"),
    (Foreign("weights are those of the checkpoint"), "weight_transfer_config"),
    (_hint("VLLM_* variables have no effect", is_flag=True), "fail_on_environ_validation"),
)
FOREIGN |= {name: foreign for foreign, names in _ALIKE for name in names.split()}
SHORT_FOREIGN = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp", "data_parallel_size": "-dp"}


def without_foreign(given: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments without those of vLLM's that ask for nothing.

    Raises:
        ConfigError: one asks for what Twofold does not have. The message says why, and what to use.
    """
    for name, value in given.items():
        if name in FOREIGN and not FOREIGN[name].takes(value):
            raise ConfigError(f"{name}={value!r} is not supported: {FOREIGN[name].reason}", field=name)
    return {name: value for name, value in given.items() if name not in FOREIGN}
