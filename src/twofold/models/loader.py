"""From a model's name to modules with weights on this rank's device, ready for a forward pass without a cache."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from twofold.config import EngineConfig
from twofold.errors import ModelError
from twofold.models.source import ModelSource
from twofold.models.support import refusal


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
    if reason := refusal(model_config):
        raise ModelError(f"model {config.model!r} ({model_config.model_type}) is not served: {reason}")
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
                **source.arguments,
            )
            if missing := sorted(found["missing_keys"]):  # Transformers would draw them at random
                raise ModelError(
                    f"the weights of model {source.path!r} lack {len(missing)} tensors, {missing[0]} among them; "
                    "save the model anew"
                )
    except ModelError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the weights of model {source.path!r}: {line}") from error
    model.eval()
    model.requires_grad_(False)
    fix_rope(model, max_model_len)
    return model


def empty_model(
    model_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The modules in memory that nothing was written to; buffers (rope frequencies) are as Transformers makes them."""
    with no_init_weights(), device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def fill_randomly(model: PreTrainedModel, seed: int) -> None:
    """Dummy weights: the same on every rank. Matrices are drawn so that activations neither vanish nor explode."""
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(seed * 100_003 + number)
        if parameter.dim() < 2:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


def fix_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Settles rotary frequencies that Transformers would choose anew from the longest position of each forward pass.

    On a rank, in a chunk or in a batch that position is another than in the whole prompt, and the answer must not
    depend on it. Like vLLM, the choice is made once, by `max_model_len`.
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


def share_weights(model: PreTrainedModel, folder: Path, is_writer: bool, barrier: Callable[[], None]) -> None:
    """Puts the weights of all ranks of one machine into the same memory: the writer's, mapped by everyone.

    The others' `model` comes from `empty_model`, so its weights were never given memory of their own. The file has no
    name any more once everyone has mapped it, and is gone with the last rank.
    """
    tensors = {id(t): t for t in [*model.parameters(), *_saved_buffers(model)]}.values()  # tied ones once, in order
    path, offsets, total = folder / "weights", [], 0
    for tensor in tensors:
        offsets.append(total)
        total += -(-tensor.nbytes // 64) * 64
    storage: Any = None
    if is_writer:
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=total)
    barrier()
    if not is_writer:
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=total)
    for tensor, offset in zip(tensors, offsets, strict=True):
        shared = torch.empty(0, dtype=tensor.dtype)
        shared.set_(storage, offset // tensor.itemsize, tensor.shape, tensor.stride())
        if is_writer:
            shared.copy_(tensor)
        tensor.data = shared
    barrier()
    if is_writer:
        path.unlink()


def _saved_buffers(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    saved = set(model.state_dict(keep_vars=True))
    return (buffer for name, buffer in model.named_buffers() if name in saved)
