"""Models of types that Transformers does not know, with code of their own: served if it is trusted and probed."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from harness import make_engine
from transformers import AutoModelForCausalLM

from twofold import LLM, ModelError, SamplingParams
from twofold.cli.main import main
from twofold.config import EngineConfig
from twofold.models.loader import load_model
from twofold.runtime import settle

CONFIGURATION = """
    from transformers import PretrainedConfig


    class FoldConfig(PretrainedConfig):
        model_type = "fold"

        def __init__(self, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **kwargs):
            self.vocab_size, self.hidden_size = vocab_size, hidden_size
            self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
            self.max_position_embeddings = 128
            super().__init__(**kwargs)
"""
MODEL = """
    import torch
    from torch import nn
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    from .configuration_fold import FoldConfig


    class FoldLayer(nn.Module):
        # Attention and a gate, with positions that were embedded.
        is_causal = True

        def __init__(self, config, layer_idx):
            super().__init__()
            self.config, self.layer_idx, size = config, layer_idx, config.hidden_size
            self.head_dim = size // config.num_attention_heads
            self.scaling, self.num_key_value_groups = self.head_dim**-0.5, 1
            self.norm, self.qkv, self.out = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)
            self.gate = nn.Linear(size, size)

        def forward(self, x, attention_mask):
            shape = (*x.shape[:2], -1, self.head_dim)
            q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            MIX
            attended, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0)
            x = x + self.out(attended.flatten(2))
            return x + torch.tanh(self.gate(x))


    class FoldPreTrainedModel(PreTrainedModel):
        config_class = FoldConfig
        base_model_prefix = "model"
        _supports_sdpa = True


    class FoldModel(FoldPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.layers = nn.ModuleList(FoldLayer(config, i) for i in range(config.num_hidden_layers))
            self.post_init()

        def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            x = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
            mask = create_causal_mask(self.config, x, attention_mask, None, position_ids=position_ids)
            for layer in self.layers:
                x = layer(x, mask)
            return BaseModelOutputWithPast(last_hidden_state=x)


    class FoldForCausalLM(FoldPreTrainedModel, GenerationMixin):
        def __init__(self, config):
            super().__init__(config)
            self.model = FoldModel(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self):
            return self.model.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, input_ids=None, **kwargs):
            outputs = self.model(input_ids, **kwargs)
            return CausalLMOutputWithPast(logits=self.lm_head(outputs.last_hidden_state))
"""
MIXING = "x = x + 0.1 * x.roll(1, dims=1)"  # of a token's neighbour, outside attention


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers keeps models' code here, not in the user's cache; so do the ranks."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setenv("HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def save_model(folder: Path, mix: str = "pass", attention: str | None = None) -> Path:
    """A model of a type that Transformers does not know, with its code and random weights."""
    folder.mkdir()
    code = textwrap.dedent(MODEL).replace("MIX", mix)
    if attention is not None:
        line = next(line for line in code.splitlines() if "attend = " in line)
        code = code.replace(line, line.partition("attend = ")[0] + f"attend = {attention}")
        code = "\n".join(line for line in code.splitlines() if "ALL_ATTENTION_FUNCTIONS" not in line)
    # Transformers tells classes of two models apart by this file; a rank never has two.
    (folder / "configuration_fold.py").write_text(textwrap.dedent(CONFIGURATION) + f"# {folder}")
    (folder / "modeling_fold.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_fold.FoldConfig", "AutoModelForCausalLM": "modeling_fold.FoldForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "fold", "auto_map": auto_map, "dtype": "float32"}))
    model = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    config = (folder / "config.json").read_text()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(config)
    return folder


PROMPTS = [[5], [7, 8, 9], list(range(3, 60))]
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def test_a_model_that_brings_its_code_is_served(tmp_path: Path, modules: None) -> None:
    """`trust_remote_code` promised types that were refused all the same. Ranks must find the code, too: a process is
    sent the configuration before it knows of any model.
    """
    folder = save_model(tmp_path / "fold")
    reference = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa").eval()
    expected = [
        reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6, use_cache=False)[0].tolist()
        for prompt in PROMPTS
    ]
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "trust_remote_code": True, "device": "cpu"}
    arguments["dtype"] = "float32"
    for num_ranks in (1, 2):
        with LLM(str(folder), prefill_context_parallel_size=num_ranks, **arguments) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        found = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
        assert found == expected, f"{num_ranks} ranks"


def loaded(folder: Path, **arguments: Any) -> Any:
    runtime, _ = settle(EngineConfig(model=str(folder), skip_tokenizer_init=True, device="cpu", **arguments))
    return load_model(runtime.engine, runtime.source, runtime.model_config, torch.float32, torch.device("cpu"), 64)


def test_a_model_that_brings_its_code_is_probed(tmp_path: Path, modules: None) -> None:
    """In this process, so that the reason can be read: its code mixes neighbours, and no name gives that away."""
    folder = save_model(tmp_path / "fold", mix=MIXING)
    with pytest.raises(ModelError, match="FoldForCausalLM is not served: its tokens see each other outside attention"):
        make_engine(loaded(folder, trust_remote_code=True), 1)


def test_code_that_attends_by_itself_is_refused_early(
    tmp_path: Path, modules: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "fold", attention="eager_attention_forward")
    # What it takes from Llama goes through the interface; that is what the probe is for.
    with pytest.raises(ModelError, match="0 of its 2 layers attend through the attention interface"):
        make_engine(loaded(folder, trust_remote_code=True), 1)
    code = (folder / "modeling_fold.py").read_text()
    line = "from transformers.models.llama.modeling_llama import eager_attention_forward"
    own = "def eager_attention_forward(module, q, k, v, mask, scaling, dropout):\n    return v.transpose(1, 2), None"
    (folder / "modeling_fold.py").write_text(code.replace(line, own))
    with pytest.raises(ModelError, match=r"\(fold\) is not served: its attention does not go through Transformers'"):
        loaded(folder, trust_remote_code=True)
    assert main(["models", str(folder), "--trust-remote-code", "--json"]) == 1
    assert "does not go through" in json.loads(capsys.readouterr().out)["reason"]


def test_code_is_not_run_without_trust(tmp_path: Path, modules: None) -> None:
    folder = save_model(tmp_path / "fold")
    (folder / "configuration_fold.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(
        ModelError, match="it comes with code of its own; set trust_remote_code=True to run it"
    ) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "model"


def test_code_that_fails_is_a_line(tmp_path: Path, modules: None) -> None:
    folder = save_model(tmp_path / "fold")
    (folder / "modeling_fold.py").write_text("import no_such_library")
    with pytest.raises(ModelError, match=r"cannot run the code of model .*no_such_library") as caught:
        loaded(folder, trust_remote_code=True)
    assert "\n" not in str(caught.value)
