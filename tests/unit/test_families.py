"""Every causal language model of Transformers: answered as Transformers answers it on any number of ranks, or refused.

A family that is answered wrongly is a bug; one that is refused without need is a family lost. So both lists are here.
"""

import copy
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from harness import generate, make_engine, prompt_logprobs, reference_continuation, reference_logprobs
from tiny_models import LAYER_TYPES, VOCAB_SIZE, WINDOW, default_config, tiny_config, tiny_model
from transformers import PretrainedConfig, PreTrainedModel

from twofold.attention.op import attention_forward
from twofold.errors import ModelError
from twofold.models.decoder import DecoderModel
from twofold.models.loader import fix_rope
from twofold.models.probe import probe
from twofold.models.support import FOUND_BY_PROBE, ONLY_BY_TOKENS, causal_model_types, refusal
from twofold.sampling_params import SamplingParams

ENCODER_DECODER = "encoder-decoder"
MULTIMODAL = "multimodal"
RECURRENT = "recurrent or has linear attention"
ENCODER = "an encoder"
BYPASS = "does not go through Transformers' attention interface"
OTHER_LAYERS = "it has layers of type"

# What is served, and must not be lost. Versions of Transformers differ in which types they have.
SERVED = {
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere",
    "cohere2", "cohere2_moe", "cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2", "deepseek_v3",
    "diffllama", "dory", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "flex_olmo",
    "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm",
    "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1",
    "laguna", "lfm2", "lfm2_moe", "llama", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mistral4", "mixtral", "modernbert-decoder",
    "moshi", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "sarvam_mla", "sarvam_moe", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
}  # fmt: skip
# All tokens of these go through the last layer: the list of layers is not found, or code around the layers needs them.
WHOLE = {"diffllama", "dory", "gpt2", "gpt_bigcode", "hrm_text", "longcat_flash"}
# What is not served, and a part of the reason that is given; versions may come that can be.
REFUSED = {
    **dict.fromkeys(
        ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody",
         "mvp", "pegasus", "plbart", "prophetnet", "whisper"],
        ENCODER_DECODER,
    ),
    **dict.fromkeys(
        ["dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
         "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama", "moss_transcribe_diarize",
         "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"],
        f"{MULTIMODAL}|{BYPASS}",  # by version
    ),
    **dict.fromkeys(
        ["bailing_hybrid", "bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba",
         "kimi_linear", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
         "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"],
        RECURRENT,
    ),
    **dict.fromkeys(
        ["bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
         "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "xlm-roberta",
         "xlm-roberta-xl", "xmod"],
        ENCODER,
    ),
    **dict.fromkeys(
        ["bloom", "codegen", "cpmant", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "openai-gpt",
         "reformer", "xglm", "xlm", "xlnet"],
        BYPASS,
    ),
    **dict.fromkeys(
        ["axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4", "inkling2_text", "inkling_text", "lfm3",
         "llama4_text", "minimax"],
        OTHER_LAYERS,
    ),
    "blt": "patches of bytes",
    "doge": "depends on their values",
}  # fmt: skip
NAMED = [  # in issue 2
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "starcoder2",
    "gpt_neox", "gpt2", "olmo2", "granite", "cohere", "gpt_oss", "smollm3", "glm4", "stablelm",
]  # fmt: skip
UNBUILDABLE: dict[str, str] = {}  # types without a tiny model, and why

# Variants of families besides the default: type, what is changed. All are served.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads as wide as half the model": ("llama", {"head_dim": 32}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                           "original_max_position_embeddings": 32}}),
    "llama3 rope": ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4,
                                                  "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
                                                  "high_freq_factor": 4.0}}),
    "queries scaled by position": ("ministral3", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.3, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "layers that reuse keys and values": ("gemma3n_text", {"num_kv_shared_layers": 2}),
    "keys that are values": ("gemma4_text", {"attention_k_eq_v": True}),
    "experts and a dense layer": ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                                     "moe_intermediate_size": 32}),
    "scaling by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "multi-head": ("gpt_bigcode", {"multi_query": False}),
    "parallel residual": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "sequential residual": ("gpt_neox", {"use_parallel_residual": False}),
    "clipped projections": ("olmo", {"clip_qkv": 1.0}),
    "normed heads": ("cohere", {"use_qk_norm": True}),
    "layers without positions": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "windows in some layers": ("smollm3", {"use_sliding_window": True, "layer_types": LAYER_TYPES}),
    "no window": ("mistral", {"sliding_window": None}),
    "latents without a query rank": ("deepseek_v3", {"q_lora_rank": None}),
    "a hybrid with attention only": ("granitemoehybrid", {"layer_types": ["attention"] * 4,
                                                          "position_embedding_type": "rope"}),
    "an encoder made a decoder": ("bert", {"is_decoder": True}),
}  # fmt: skip
REFUSED_VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "layers of type conv"),
    "convolutions, experts": ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2}, "layers of type conv"),
    "chunked attention": (
        "llama4_text",
        {"layer_types": ["chunked_attention"] * 4},
        "layers of type chunked_attention",
    ),
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "neither causal nor causal within"),
    "alibi": ("falcon", {"alibi": True}, "ALiBi"),
    "positions from the padding id on": ("roberta", {"is_decoder": True}, "numbered in a way of its own"),
}

PROMPT_LENS = (1, 2, 3, 5, 37, 70)
# Ranks, max_num_batched_tokens (with two ranks prompts come in chunks), layout.
WAYS = ((1, 4096, "tokens"), (2, 40, "mixed"), (3, 4096, "tokens"))
NUM_NEW_TOKENS = 4


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENS]


def compare(config: PretrainedConfig, only_by_tokens: bool | None = None) -> None:
    """Prompt log-probabilities and greedy tokens on one, two and three ranks are those of Transformers, whatever the
    layout of a step."""
    model = tiny_model(config)
    prompts = make_prompts()
    expected = [reference_logprobs(model, prompt) for prompt in prompts]
    assert np.concatenate(expected).std() > 0.03, "the model says the same of all tokens: it could not be told apart"
    continuations = [reference_continuation(model, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    for num_ranks, max_num_batched_tokens, layout in WAYS:
        engine = make_engine(model, num_ranks, max_num_batched_tokens=max_num_batched_tokens, step_layout=layout)
        try:
            if layout == "mixed" and only_by_tokens is not None:
                reason = engine.reports[0].only_by_tokens
                assert (reason is not None) == only_by_tokens, f"by heads: {reason}"
            found = prompt_logprobs(engine, prompts)
            params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS)
            outputs = generate(engine, prompts, params)
        finally:
            engine.shutdown()
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4, err_msg=f"{num_ranks} ranks")
        for output, tokens in zip(outputs, continuations, strict=True):
            assert output.outputs[0].token_ids[: len(tokens)] == tokens, f"{num_ranks} ranks"


@cache
def examine(model_type: str) -> str | None:
    """None if the type is served, and rightly; else why it is refused."""
    if reason := refusal(default_config(model_type)):
        return reason
    config = tiny_config(model_type)
    try:
        decoder = DecoderModel(tiny_model(config))
    except ModelError as error:
        return str(error)
    assert decoder.last_layer is not None or model_type not in SERVED - WHOLE, "all tokens go through its last layer"
    compare(config, only_by_tokens=config.model_type in ONLY_BY_TOKENS)
    return None


@pytest.mark.parametrize("model_type", causal_model_types())
def test_a_family_is_served_rightly_or_refused(model_type: str) -> None:
    """A type that came with a version of Transformers after these lists may be either."""
    if model_type in UNBUILDABLE:
        with pytest.raises(Exception, match=re.escape(UNBUILDABLE[model_type])):
            tiny_model(tiny_config(model_type))
        return
    reason = examine(model_type)
    if model_type in SERVED:
        assert reason is None, "a family is lost"
    elif model_type in REFUSED and reason is not None:
        assert re.search(REFUSED[model_type], reason)


@pytest.mark.parametrize("model_type", NAMED)
def test_families_that_were_promised(model_type: str) -> None:
    assert examine(model_type) is None


def test_falcon_is_refused_with_its_reason() -> None:
    """It was promised, too, but its code computes attention itself: nothing that is registered would ever be called."""
    assert examine("falcon") == "its attention does not go through Transformers' attention interface"


def test_most_decoders_are_served() -> None:
    served = [model_type for model_type in causal_model_types() if examine(model_type) is None]
    assert len(served) >= 60
    assert len(UNBUILDABLE) <= 5


@pytest.mark.parametrize("model_type", FOUND_BY_PROBE)
def test_what_is_known_of_a_type_is_what_the_probe_finds(model_type: str) -> None:
    with pytest.raises(ModelError, match="masks attention in a way of its own"):
        probe(tiny_model(tiny_config(model_type)))


def test_what_is_refused_is_refused_before_it_is_loaded() -> None:
    """`twofold models` has nothing but configurations to go by, and must not promise what loading then denies."""
    for model_type in {*SERVED, *REFUSED}.intersection(causal_model_types()):
        assert (refusal(default_config(model_type)) is None) == (examine(model_type) is None), model_type


def test_a_model_of_which_nothing_comes_is_refused() -> None:
    """`max` passes over NaN that comes late, here in the hidden states alone."""
    model = tiny_model(tiny_config("llama"))
    with torch.no_grad():
        model.base_model.norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="change nan"):
        probe(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_served_rightly(name: str) -> None:
    model_type, changes = VARIANTS[name]
    config = tiny_config(model_type, **changes)
    assert refusal(config) is None
    compare(config)


@pytest.mark.parametrize("name", REFUSED_VARIANTS)
def test_a_variant_is_refused(name: str) -> None:
    model_type, changes, expected = REFUSED_VARIANTS[name]
    config = tiny_config(model_type, **changes)
    reason = refusal(config)
    if reason is None:
        with pytest.raises(ModelError) as caught:
            probe(tiny_model(config))
        reason = str(caught.value)
    assert expected in reason


@pytest.mark.parametrize(
    ("model_type", "windows"),
    [
        ("mistral", [WINDOW] * 4),
        ("qwen2", [None, None, WINDOW, WINDOW]),
        ("gemma2", [WINDOW, None, WINDOW, None]),
        ("gpt_oss", [WINDOW, None, WINDOW, None]),
        ("llama", [None] * 4),
    ],
)
def test_windows_are_read_off_the_masks(model_type: str, windows: list[int | None]) -> None:
    """Some families hand their window to attention, some put it into the mask only."""
    assert [spec.sliding_window for _, spec in probe(tiny_model(tiny_config(model_type)))] == windows


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_oss", "gemma3n_text", "deepseek_v3", "granitemoe"])
def test_rounding_is_not_taken_for_mixing(model_type: str) -> None:
    """In bfloat16 a token's numbers may differ a little with its company; no model may be refused for that."""
    assert probe(tiny_model(tiny_config(model_type)).to(torch.bfloat16))


# --- RoPE frequencies that Transformers chooses in each forward pass ------------------------------------------------

ORIGINAL_POSITIONS = 32
LONG_ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": ORIGINAL_POSITIONS,
        },
    }),
    "dynamic": ("llama", {
        "max_position_embeddings": ORIGINAL_POSITIONS,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    }),
}  # fmt: skip


@pytest.mark.parametrize("max_model_len", [ORIGINAL_POSITIONS, 64])
@pytest.mark.parametrize("name", LONG_ROPES)
def test_rope_is_settled_by_the_longest_prompt(name: str, max_model_len: int) -> None:
    """The choice by the longest position of a pass would differ between ranks, chunks and decodes of one prompt."""
    model_type, changes = LONG_ROPES[name]
    model = tiny_model(tiny_config(model_type, **changes))
    text = np.random.default_rng(1).integers(3, VOCAB_SIZE, max_model_len).tolist()
    expected = reference_logprobs(model, text)  # of max_model_len tokens; its first rows are those of a prompt
    fix_rope(model, max_model_len)
    prompts = [text[:length] for length in (1, 2, 5, 20, max_model_len - 1)]
    for num_ranks in (1, 2, 3):
        engine = make_engine(model, num_ranks, max_model_len=max_model_len, max_num_batched_tokens=24)
        for prompt, found in zip(prompts, prompt_logprobs(engine, prompts), strict=True):
            np.testing.assert_allclose(found, expected[: len(prompt) - 1], rtol=0, atol=1e-4)
        engine.shutdown()


# --- The probe: models that no configuration gives away --------------------------------------------------------------


class Mixing(torch.nn.Module):
    """A layer's MLP that adds a little of other tokens to its output."""

    def __init__(self, mlp: torch.nn.Module, mix: Any) -> None:
        super().__init__()
        self.mlp, self.mix = mlp, mix

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden_states) + 0.1 * self.mix(hidden_states)


def tiny_llama() -> PreTrainedModel:
    return tiny_model(tiny_config("llama"))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x.roll(1, dims=1),
        lambda x: x.roll(-1, dims=1),
        lambda x: torch.nn.functional.pad(x, (0, 0, 2, 0))[:, :-2],
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.cumsum(1),
        lambda x: x.std(1, keepdim=True),
    ],
    ids=["from the left", "from the right", "from two before", "mean", "sum so far", "deviation"],
)
def test_mixing_outside_attention_is_found(mix: Any) -> None:
    """Ranks have other neighbours than the prompt has: a convolution would read across a chunk's edge."""
    model = tiny_llama()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, mix)
    with pytest.raises(ModelError, match="its tokens see each other outside attention"):
        probe(model)


def test_a_token_s_own_work_is_not_mixing() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, torch.tanh)
    assert len(probe(model)) == 4


def test_positions_of_its_own_are_found() -> None:
    """RoPE would treat tokens of a tail as if they began the prompt. Only queries and keys show it."""
    model = tiny_llama()
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])
    with pytest.raises(ModelError, match="numbered in a way of its own"):
        probe(model)


def test_a_hidden_window_is_found() -> None:
    """Declared, and neither in the mask nor in the call: the layer would cut its keys itself."""
    model = tiny_llama()
    model.config.layer_types = LAYER_TYPES
    with pytest.raises(ModelError, match="layer 0 hides its sliding window"):
        probe(model)


def test_a_window_told_twice_must_be_the_same() -> None:
    model = tiny_model(tiny_config("mistral"))
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)
        layer.self_attn.config.sliding_window = WINDOW + 1
    with pytest.raises(ModelError, match=f"a layer's mask has a window of {WINDOW}, its attention one of {WINDOW + 1}"):
        probe(model)


def test_attention_that_is_not_causal_is_found() -> None:
    model = tiny_llama()
    model.model.layers[2].self_attn.is_causal = False
    with pytest.raises(ModelError, match="its attention is not causal"):
        probe(model)


def test_what_attention_is_given_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias or a head mask that is passed and ignored would give a wrong answer."""
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    forward, bias = attention.forward, torch.ones(1)
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: forward(*args, position_bias=bias, **kwargs))
    with pytest.raises(ModelError, match="its attention takes 'position_bias', which is not known here"):
        probe(model)


def test_a_layer_that_attends_by_itself_is_found() -> None:
    """Its keys would be those of this rank's tokens."""

    class OwnAttention(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    model = tiny_llama()
    model.model.layers[3].self_attn = OwnAttention()
    with pytest.raises(ModelError, match="3 of its 4 layers attend through the attention interface"):
        probe(model)


def test_a_head_that_needs_more_than_hidden_states_is_refused() -> None:
    model = tiny_llama()
    model.lm_head = torch.nn.Bilinear(64, 64, VOCAB_SIZE)
    with pytest.raises(ModelError, match="its head cannot run apart"):
        DecoderModel(model)


def test_an_id_that_cannot_be_predicted_is_out_of_range() -> None:
    """Moshi embeds one id more than it has logits: its log-probability would be read past the end."""
    model = tiny_model(tiny_config("moshi"))
    assert model.get_input_embeddings().num_embeddings == VOCAB_SIZE + 1
    assert DecoderModel(model).vocab_size == VOCAB_SIZE


def test_attention_outside_a_step_is_an_error() -> None:
    """No context of an earlier step may be left behind for a forward pass without one."""
    module = torch.nn.Identity()
    module.twofold_v_head_dim = 4
    with pytest.raises(AttributeError):
        attention_forward(module, *torch.zeros(3, 1, 2, 5, 4), None)
