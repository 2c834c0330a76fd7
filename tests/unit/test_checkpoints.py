"""Checkpoints that are broken, quantised, or of another model: each is refused in one line, never answered.

A ModelOpt and an AutoFP8 checkpoint were loaded as if their scales were not there; the answers were garbage, and the
exit code 0. So a checkpoint is taken only if all of it is understood.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import PreTrainedModel

from twofold import ModelError
from twofold.cli.main import main
from twofold.config import EngineConfig
from twofold.models.loader import load_model
from twofold.runtime import settle

Tensors = dict[str, torch.Tensor]
Break = Callable[[Path], Any]
TYPES = ("llama", "qwen2", "mixtral", "deepseek_v3", "gpt2", "gpt_oss")
QUERY = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.block_sparse_moe.experts.3.w1.weight"


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {model_type: tiny_model(tiny_config(model_type)) for model_type in TYPES}


@pytest.fixture(scope="module")
def folders(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for model_type, model in models.items():
        made[model_type] = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(made[model_type])
    return made


def copy_of(folders: dict[str, Path], model_type: str, folder: Path) -> Path:
    shutil.copytree(folders[model_type], folder / "model")
    return folder / "model"


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    """What an engine does before it starts a rank, and what the rank does then."""
    runtime, _ = settle(EngineConfig(model=str(folder), skip_tokenizer_init=True, device="cpu", **arguments))
    device = torch.device("cpu")
    return load_model(runtime.engine, runtime.source, runtime.model_config, runtime.dtype, device, 64)


# --- Ways to break a checkpoint --------------------------------------------------------------------------------------


def tensors(change: Callable[[Tensors], Any]) -> Break:
    """Changes what the one file of weights holds."""

    def break_it(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return break_it


def extra(*names: str, shape: tuple[int, ...] = (1,)) -> Break:
    return tensors(lambda stored: stored.update({name: torch.ones(shape) for name in names}))


def instead(name: str, tensor: torch.Tensor) -> Break:
    return tensors(lambda stored: stored.update({name: tensor}))


def without(name: str) -> Break:
    return tensors(lambda stored: stored.pop(name))


def quantised(dtype: torch.dtype, *scales: str) -> Break:
    """All projections stored in a narrow type, each with its scales."""

    def change(stored: Tensors) -> None:
        for name in [name for name in stored if "proj" in name]:
            stored[name] = stored[name].to(dtype)
            stored |= {name.replace("weight", scale): torch.ones(1) for scale in scales}

    return tensors(change)


def packed(stored: Tensors) -> None:
    """Four-bit integers, as GPTQ and AWQ have them."""
    for name in [name for name in stored if "proj.weight" in name]:
        rows, columns = stored.pop(name).shape
        stored[name.replace("weight", "qweight")] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        stored[name.replace("weight", "qzeros")] = torch.zeros(1, rows // 8, dtype=torch.int32)
        stored[name.replace("weight", "scales")] = torch.ones(1, rows, dtype=torch.float16)


def with_value(name: str, value: float) -> Break:
    def change(stored: Tensors) -> None:
        stored[name][1, 2] = value

    return tensors(change)


def config(**values: Any) -> Break:
    def break_it(folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | values))

    return break_it


def quantisation(method: str, **values: Any) -> Break:
    return config(quantization_config={"quant_method": method, **values})


def file(name: str, content: str = "{}") -> Break:
    return lambda folder: (folder / name).write_text(content)


def saved_as(name: str) -> Break:
    """The weights under another name."""
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def sharded(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(stored))}
    for place in sorted(set(places.values())):
        part = {name: tensor for name, tensor in stored.items() if places[name] == place}
        save_file(part, folder / place, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def both(*breaks: Break) -> Break:
    def break_it(folder: Path) -> None:
        for one in breaks:
            one(folder)

    return break_it


def in_two_shards(folder: Path) -> None:
    sharded(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    stored = load_file(second)
    stored[min(load_file(first))] = torch.ones(1)
    save_file(stored, second, metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def an_adapter_alone(folder: Path) -> None:
    saved_as("adapter_model.safetensors")(folder)
    (folder / "config.json").rename(folder / "adapter_config.json")


def of_config(model_type: str) -> Break:
    """The weights of one family under the configuration of another."""
    return lambda folder: tiny_config(model_type).save_pretrained(folder)


INDEX = "model.safetensors.index.json"
UNUSED = r"that the model does not use, such as "
BROKEN: dict[str, tuple[str, Break, str]] = {  # name -> family, how, a part of its line
    # Quantised, and the configuration says so.
    "AutoFP8": (
        "llama",
        both(
            quantised(torch.float8_e4m3fn, "weight_scale", "input_scale"),
            quantisation("fp8", activation_scheme="static"),
        ),
        r"is quantised \(quant_method 'fp8'\), which is not served; serve the unquantised checkpoint, or a GGUF file",
    ),
    "ModelOpt": (
        "llama",
        both(quantised(torch.float8_e4m3fn, "weight_scale", "input_scale"), file("hf_quant_config.json")),
        r"is quantised by ModelOpt \(hf_quant_config.json\), which is not served",
    ),
    "ModelOpt of today": (
        "llama",
        quantisation("modelopt"),
        r"quant_method 'modelopt'\), which Transformers does not know",
    ),
    "GPTQ": (
        "llama",
        both(tensors(packed), quantisation("gptq", bits=4, group_size=128)),
        r"\(quant_method 'gptq'\), which is not served: gptqmodel is not installed, and would not be enough",
    ),
    "GPTQ of old": (
        "llama",
        both(tensors(packed), file("quantize_config.json")),
        r"by AutoGPTQ \(quantize_config.json\)",
    ),
    "AWQ": (
        "qwen2",
        quantisation("awq", bits=4),
        r"'awq'\), which is not served: gptqmodel is not installed, and would",
    ),
    "AWQ of old": ("qwen2", both(tensors(packed), file("quant_config.json")), r"by AutoAWQ \(quant_config.json\)"),
    "bitsandbytes": (
        "llama",
        quantisation("bitsandbytes", load_in_4bit=True),
        r"'bitsandbytes'\), which is not served: bitsandbytes is not installed, and would not be enough",
    ),
    "compressed-tensors": (
        "qwen2",
        quantisation("compressed-tensors"),
        r"which is not served: compressed-tensors is not installed",
    ),
    "compressed-tensors of old": ("qwen2", config(compression_config={}), r"is quantised \(compression_config\)"),
    "torchao": ("llama", quantisation("torchao"), r"which is not served: torchao is not installed"),
    "DeepSeek's fp8": (
        "deepseek_v3",
        both(quantised(torch.float8_e4m3fn, "weight_scale_inv"), quantisation("fp8", weight_block_size=[128, 128])),
        r"is quantised \(quant_method 'fp8'\)",
    ),
    "gpt-oss's mxfp4": ("gpt_oss", quantisation("mxfp4"), r"is quantised \(quant_method 'mxfp4'\)"),
    "a method that is not known": ("llama", quantisation("exl2"), r"'exl2'\), which Transformers does not know"),
    "a method without a name": (
        "llama",
        config(quantization_config={"bits": 4}),
        "a quantization_config without quant_method",
    ),
    # Quantised, and no configuration says so.
    "fp8 and scales": (
        "llama",
        quantised(torch.float8_e4m3fn, "weight_scale"),
        r"not of full precision, and no quantization_config.* \(F8_E4M3 \[\d+, \d+\] in model.safetensors\)",
    ),
    "fp8 alone": (
        "qwen2",
        instead(QUERY, torch.ones(64, 64).to(torch.float8_e5m2)),
        rf"{QUERY} \(F8_E5M2 \[64, 64\] in",
    ),
    "int8": ("llama", quantised(torch.int8, "SCB"), r"\(I8 \["),
    "int64": ("llama", instead(QUERY, torch.ones(64, 64, dtype=torch.int64)), rf"{QUERY} \(I64 \[64, 64\]"),
    "fp8 experts": ("mixtral", instead(EXPERT, torch.ones(64, 64).to(torch.float8_e4m3fn)), r"\(F8_E4M3 \[64, 64\]"),
    "four-bit integers": ("llama", tensors(packed), rf"{UNUSED}model.*they are of a quantised checkpoint"),
    # Tensors that would be left out.
    "scales alone": (
        "llama",
        extra("model.layers.1.mlp.up_proj.weight_scale"),
        rf"has a tensor {UNUSED}model.layers.1.mlp.up_proj.weight_scale \(F32 \[1\] in model.safetensors\)",
    ),
    "scales of inputs": ("qwen2", extra("model.layers.1.mlp.up_proj.input_scale"), rf"{UNUSED}.*up_proj.input_scale"),
    "scales of the cache": (
        "llama",
        extra("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"),
        rf"has 2 tensors {UNUSED}model.layers.0.self_attn.k_scale",
    ),
    "inverse scales": (
        "deepseek_v3",
        extra("model.layers.0.mlp.up_proj.weight_scale_inv"),
        r"up_proj.weight_scale_inv",
    ),
    "scales of experts": (
        "mixtral",
        extra(f"{EXPERT}_scale"),
        rf"{UNUSED}{EXPERT}_scale \(F32 \[1\] in model.safetensors\)",
    ),
    "biases": (
        "llama",
        extra("model.layers.3.self_attn.q_proj.bias", shape=(64,)),
        "config.json declares no such biases",
    ),
    "a fifth layer": (
        "llama",
        extra("model.layers.4.input_layernorm.weight", shape=(64,)),
        "config.json is of another model",
    ),
    "another family": ("qwen2", of_config("llama"), rf"has 12 tensors {UNUSED}model.layers.0.self_attn.k_proj.bias"),
    "an adapter's tensors": (
        "llama",
        extra("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        "they are of an adapter; merge it",
    ),
    "an adapter beside the model": (
        "llama",
        file("adapter_config.json"),
        r"has an adapter \(adapter_config.json\), which would",
    ),
    "an adapter alone": (
        "llama",
        an_adapter_alone,
        "has no config.json; it is an adapter: merge it into its base model",
    ),
    # Tensors that are not there, or not as they should be.
    "no such tensor": (
        "llama",
        without(QUERY),
        f"lacks a tensor that the model needs, such as {QUERY}; download the files again",
    ),
    "an expert too few": (
        "mixtral",
        without(EXPERT),
        f"lacks {EXPERT}, which is needed with the others of its kind",
    ),
    "an expert of another shape": (
        "mixtral",
        instead(EXPERT, torch.ones(3, 64)),
        rf"has {EXPERT} \(F32 \[3, 64\] in model.safetensors\) while others have shape \[64, 64\]",
    ),
    "another shape": (
        "llama",
        instead(QUERY, torch.ones(32, 64)),
        rf"has {QUERY} of shape \[32, 64\] in model.safetensors, where config.json asks for \[64, 64\]",
    ),
    "another width": ("qwen2", config(intermediate_size=128), r"of shape \[64, 64\] in .*asks for \[64, 128\]"),
    "another vocabulary": (
        "llama",
        config(vocab_size=100),
        r"lm_head.weight of shape \[97, 64\] in .*asks for \[100, 64\]",
    ),
    "NaN": ("llama", with_value(QUERY, torch.nan), f"has NaN in the tensor {QUERY}; download the files again"),
    "NaN in an expert": (
        "mixtral",
        with_value(EXPERT, torch.nan),
        "has NaN in the tensor model.layers.2.mlp.experts.gate_up",
    ),
    "infinite": ("qwen2", with_value(QUERY, -torch.inf), f"has infinite numbers in the tensor {QUERY}"),
    "a head of its own": (
        "gpt2",  # with two ranks on a CPU, the second would take other weights for its own
        tensors(lambda stored: stored.update({"lm_head.weight": 2 * stored["transformer.wte.weight"]})),
        "has lm_head.weight with values of its own, but config.json ties it .* set tie_word_embeddings to false",
    ),
    # Files.
    "cut off": ("llama", cut_off, r"has a broken or incomplete model.safetensors \(\d+ bytes: .*download it again"),
    "empty": ("llama", file("model.safetensors", ""), r"incomplete model.safetensors \(0 bytes"),
    "a page": ("llama", file("model.safetensors", "<!DOCTYPE html><html>" * 20), "incomplete model.safetensors"),
    "a pointer": (
        "llama",
        file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "a Git LFS pointer in place of model.safetensors; run: git lfs pull",
    ),
    "a shard too few": (
        "llama",
        both(sharded, lambda folder: (folder / "model-00002-of-00002.safetensors").unlink()),
        "lacks 1 of the 2 files of its model.safetensors.index.json, such as model-00002-of-00002.safetensors",
    ),
    "a shard cut off": (
        "llama",
        both(sharded, file("model-00002-of-00002.safetensors", "0" * 100)),
        "incomplete model-00002-of-00002.safetensors",
    ),
    "an index that is none": ("llama", both(sharded, file(INDEX, "{")), f"has a {INDEX} that cannot be read"),
    "shards without an index": (
        "llama",
        both(sharded, lambda folder: (folder / INDEX).unlink()),
        f"has model-00001-of-00002.safetensors, but neither model.safetensors nor {INDEX}",
    ),
    "a tensor in two shards": ("llama", in_two_shards, r"has the tensor .* in model-00001-\S* and in model-00002-"),
    "bin only": (
        "llama",
        saved_as("pytorch_model.bin"),
        r"has no \*.safetensors but pytorch_model.bin; convert it once: transformers.AutoModelForCausalLM",
    ),
    "Meta's files": (
        "llama",
        saved_as("consolidated.00.pth"),
        r"no \*.safetensors but consolidated.00.pth, which is not read",
    ),
    "no weights": (
        "llama",
        lambda folder: (folder / "model.safetensors").unlink(),
        r"has no \*.safetensors; save weights",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_is_refused_in_a_line(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """All but what takes the values to know (NaN, tied tensors) is found before a rank starts."""
    model_type, break_it, message = BROKEN[name]
    folder = copy_of(folders, model_type, tmp_path)
    break_it(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    line = str(caught.value)
    print(f"{name}: {line.replace(str(folder), 'DIR')}")
    assert "\n" not in line
    assert repr(str(folder)) in line
    assert re.search(message, line), line
    assert caught.value.field == "model"


def test_enough_checkpoints_are_tried() -> None:
    assert len(BROKEN) >= 30


def test_a_number_too_large_for_float16_names_the_way_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """It is finite in the file, and infinite as it was asked for."""
    folder = copy_of(folders, "llama", tmp_path)
    with_value(QUERY, 1e5)(folder)
    load(folder)
    with pytest.raises(ModelError, match=f"infinite numbers in the tensor {QUERY}; .* try dtype='bfloat16'"):
        load(folder, dtype="float16")


def test_dummy_weights_need_no_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders, "llama", tmp_path)
    both(quantisation("fp8"), cut_off)(folder)
    load(folder, load_format="dummy")


# --- What must go on being taken -------------------------------------------------------------------------------------


def without_prefix(stored: Tensors) -> None:
    for name in list(stored):
        stored[name.removeprefix("transformer.")] = stored.pop(name)


def with_further_layers(folder: Path) -> None:
    """DeepSeek-V3 carries a layer that predicts the token after the next, and declares it."""
    config(num_nextn_predict_layers=1)(folder)
    extra("model.layers.4.eh_proj.weight", "model.layers.4.shared_head.norm.weight")(folder)


TAKEN: dict[str, tuple[str, Break]] = {
    "as saved": ("llama", lambda folder: None),
    "experts": ("mixtral", lambda folder: None),
    "latents": ("deepseek_v3", lambda folder: None),
    "tied weights": ("gpt2", lambda folder: None),
    "tied weights that are stored": (
        "gpt2",
        tensors(lambda stored: stored.update({"lm_head.weight": stored["transformer.wte.weight"].clone()})),
    ),
    "shards": ("mixtral", sharded),
    "bin beside safetensors": ("llama", saved_as("model.safetensors")),
    "rotary frequencies": ("llama", extra("model.layers.0.self_attn.rotary_emb.inv_freq", shape=(8,))),
    "masks": (
        "gpt2",
        tensors(
            lambda stored: stored.update(
                {
                    "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
                    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
                }
            )
        ),
    ),
    "names without the model's prefix": ("gpt2", tensors(without_prefix)),
    "a layer that Transformers ignores": ("deepseek_v3", extra("model.layers.61.eh_proj.weight")),
    "a layer that predicts further": ("deepseek_v3", with_further_layers),
    "no quantisation": ("llama", config(quantization_config=None)),
    "double precision": ("llama", tensors(lambda stored: stored.update({QUERY: stored[QUERY].double()}))),
    "with another program's files": ("qwen2", file("training_args.bin", "")),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_checkpoint_is_taken(
    folders: dict[str, Path], models: dict[str, PreTrainedModel], tmp_path: Path, name: str
) -> None:
    """Its logits are those of the model that was saved."""
    model_type, change = TAKEN[name]
    folder = copy_of(folders, model_type, tmp_path)
    change(folder)
    ids = torch.arange(5, 25)[None]
    model = load(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, models[model_type](ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["AutoFP8", "scales alone", "bin only", "cut off"])
def test_models_says_the_same_without_loading(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model_type, break_it, message = BROKEN[name]
    folder = copy_of(folders, model_type, tmp_path)
    assert main(["models", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["served"] is True
    break_it(folder)
    assert main(["models", str(folder), "--json"]) == 1
    out, error = capsys.readouterr()
    verdict = json.loads(out)
    assert (verdict["model_type"], verdict["served"], error) == (model_type, False, "")
    assert re.search(message, verdict["reason"])
