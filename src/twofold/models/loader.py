"""From a model's name to modules with weights on this rank's device, ready for a forward pass without a cache."""

import os
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from twofold.config import EngineConfig, ModelSource
from twofold.errors import ModelError
from twofold.models.checkpoint import check_loaded, check_numbers, check_tied
from twofold.models.support import refusal
from twofold.parallel.mesh import Mesh
from twofold.parallel.shared_memory import all_or_none, map_file, reserve


def load_model(
    config: EngineConfig,
    source: ModelSource,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> PreTrainedModel:
    """The model with its weights on `device`.

    Raises:
        ModelError: the model is not served (with the reason), or its weights cannot be read.
    """
    if reason := refusal(model_config, config.trust_remote_code):
        raise ModelError(f"model {config.model!r} ({model_config.model_type}) is not served: {reason}", field="model")
    try:
        if config.load_format == "dummy":
            model = empty_model(model_config, dtype, device, config.trust_remote_code)
            fill_randomly(model, config.seed)
        else:
            model, found = AutoModelForCausalLM.from_pretrained(
                source.path,
                config=None if source.gguf_file else model_config,
                dtype=dtype,
                device_map=None if device.type == "cpu" else {"": device},
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loaded` says it by name
                **source.arguments,
            )
            check_loaded(source.path, model.config, found)
            check_numbers(source.path, model)
            # Other ranks make the modules from `model_config`, and use these weights.
            expected = empty_model(model_config, dtype, torch.device("meta"), config.trust_remote_code)
            check_tied(source.path, model, expected)
    except ModelError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the weights of model {source.path!r}: {line}", field="model") from error
    model.eval()
    model.requires_grad_(False)
    fix_rope(model, max_model_len)
    return model


def empty_model(
    model_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model with uninitialised weights; its buffers (RoPE frequencies) are as Transformers makes them."""
    with no_init_weights(), device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def fill_randomly(model: PreTrainedModel, seed: int) -> None:
    """Draws dummy weights, the same on every rank, so that activations neither vanish nor explode."""
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(seed * 100_003 + number)
        if parameter.dim() < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


def fix_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Chooses RoPE frequencies once, by `max_model_len`, as vLLM does.

    Transformers chooses them in each forward pass, by its longest position. That position differs between ranks, chunks
    and batches, and the answer must not depend on it.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        names = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if not any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names):
            continue
        last = torch.tensor([[max_model_len - 1]], device=next(model.parameters()).device)
        x = torch.zeros(1, dtype=torch.float32, device=last.device)
        for kind in kinds if isinstance(kinds, dict) else [None]:
            module(x, last) if kind is None else module(x, last, kind)
        module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def share_weights(model: PreTrainedModel, mesh: Mesh, file: int) -> None:
    """Lets all ranks of one machine use the first one's weights: every rank maps `file`, a descriptor of the same file.

    The other ranks' `model` comes from `empty_model`, so their own weights never took memory.

    Raises:
        OSError: there is no room in memory. Every rank raises it, and the first one's model is as good as before.
    """
    once = {id(t): t for t in [*model.parameters(), *_saved_buffers(model)]}  # tied tensors are one
    tensors, total = [], 0  # tensors with their offsets
    for tensor in once.values():
        tensors.append((tensor, total))
        total += -(-tensor.nbytes // 64) * 64
    with all_or_none(mesh):
        if mesh.rank == 0:
            os.ftruncate(file, total)
            memory = map_file(file, total)
            for tensor, offset in tensors:  # one by one, so that never more than one is there twice
                reserve(file, offset, tensor.nbytes)
                tensor.data = _like(tensor, memory, offset).copy_(tensor)
    if mesh.rank != 0:
        memory = map_file(file, total)
        for tensor, offset in tensors:
            tensor.data = _like(tensor, memory, offset)


def _like(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor of the same shape at `offset` bytes of `memory`."""
    shared = torch.empty(0, dtype=tensor.dtype)
    return shared.set_(memory.untyped_storage(), offset // tensor.itemsize, tensor.shape, tensor.stride())


def _saved_buffers(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    saved = set(model.state_dict(keep_vars=True))
    return (buffer for name, buffer in model.named_buffers() if name in saved)
