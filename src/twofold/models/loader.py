"""From a model's name to modules with weights on this rank's device, ready for a forward pass without a cache."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from twofold.config import EngineConfig, ModelSource
from twofold.errors import ModelError
from twofold.models import gguf
from twofold.models.checkpoint import check_loaded, check_numbers, check_tied
from twofold.models.holding import Take, use_stand_ins
from twofold.models.support import refusal
from twofold.parallel.mesh import Mesh
from twofold.parallel.shared_memory import all_or_none, map_file, reserve

IN_LIST = re.compile(r"\.\d+(\.|$)")  # the path of a module that is in a list, or in one of its modules


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
    with _loading(config, source, model_config):
        if config.load_format == "dummy":
            model = empty_model(model_config, dtype, device, config.trust_remote_code)
            fill_randomly(model, config.seed)
        else:
            model = _from_checkpoint(config, source, model_config, dtype, device)
            check_numbers(source.path, model.state_dict(keep_vars=True))
    model.eval()
    model.requires_grad_(False)
    fix_rope(model, max_model_len)
    return model


def model_of_stand_ins(
    config: EngineConfig,
    source: ModelSource,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> PreTrainedModel:
    """The model on `device` without its weights: see `holding.use_stand_ins`.

    Raises:
        ModelError: the model is not served (with the reason).
    """
    with _loading(config, source, model_config):

        def leave_out(module: torch.nn.Module, name: str, parameter: Parameter | None) -> Any:
            if parameter is None or parameter.is_meta:  # tied to one that was left out
                return parameter
            return Parameter(parameter.to("meta"), requires_grad=False)

        # Buffers are made on the device, as in `empty_model`: RoPE frequencies depend on where they are computed.
        hook = register_module_parameter_registration_hook(leave_out)
        try:
            model = empty_model(model_config, dtype, device, config.trust_remote_code)
        finally:
            hook.remove()
        use_stand_ins(model, device)
    fix_rope(model, max_model_len)
    return model


def read_weights(
    config: EngineConfig,
    source: ModelSource,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    take: Take,
) -> None:
    """Hands over all weights, one by one, with their names in Transformers' model.

    They are dummy weights on `device`, the same as in `load_model`, or views of the checkpoint's files: only what is
    copied of them is read. Tensors that Transformers converts (experts that it stacks) are made first, one at a time.

    Raises:
        ModelError: they cannot be read.
    """
    with _loading(config, source, model_config):
        if config.load_format == "dummy":
            shapes = empty_model(model_config, dtype, torch.device("meta"), config.trust_remote_code)
            for number, (name, shape) in enumerate(shapes.named_parameters()):
                parameter = torch.empty_like(shape, device=device)
                _fill_randomly(parameter, config.seed, number)
                take(name, parameter)
            return
        with _handing_over(take):
            rest = _from_checkpoint(config, source, model_config, dtype, torch.device("cpu"))
        for name, tensor in rest.state_dict(keep_vars=True).items():
            if not tensor.is_meta:  # else it was handed over
                take(name, tensor.detach())


@contextmanager
def _loading(config: EngineConfig, source: ModelSource, model_config: PretrainedConfig) -> Iterator[None]:
    """Makes ModelErrors of all that goes wrong."""
    if reason := refusal(model_config, config.trust_remote_code):
        raise ModelError(f"model {config.model!r} ({model_config.model_type}) is not served: {reason}", field="model")
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot load the weights of model {source.path!r}: {line}", field="model") from error


def _from_checkpoint(
    config: EngineConfig,
    source: ModelSource,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    with gguf.one_by_one():
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
    # Other ranks make the modules from `model_config`, and use these weights.
    expected = empty_model(model_config, dtype, torch.device("meta"), config.trust_remote_code)
    check_tied(source.path, model, expected)
    return model


@contextmanager
def _handing_over(take: Take) -> Iterator[None]:
    """Takes each weight of a list's module away from a model as soon as `from_pretrained` has loaded it.

    What is left of it has no memory. Embeddings and head stay, because Transformers compares tied ones.
    """
    parents: dict[int, tuple[torch.nn.Module, str, torch.nn.Module]] = {}  # id of a module -> parent, name, itself

    def note(parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        if module is not None:
            parents[id(module)] = (parent, name, module)

    def path_of(module: torch.nn.Module) -> str:
        names = []
        while id(module) in parents:
            module, name, _ = parents[id(module)]
            names.append(name)
        return ".".join(reversed(names))

    def hand_over(module: torch.nn.Module, name: str, parameter: Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or not IN_LIST.search(path := path_of(module)):
            return parameter
        take(f"{path}.{name}", parameter.detach())
        left = Parameter(parameter.to("meta"), requires_grad=False)
        left._is_hf_initialized = True  # type: ignore[attr-defined]  # as Transformers marks what it has loaded
        return left

    one_by_one = "HF_DEACTIVATE_ASYNC_LOAD"  # else Transformers reads ahead, as fast as it can
    before = os.environ.get(one_by_one)
    hooks = [register_module_module_registration_hook(note), register_module_parameter_registration_hook(hand_over)]
    os.environ[one_by_one] = "1"
    try:
        yield
    finally:
        del os.environ[one_by_one]
        if before is not None:
            os.environ[one_by_one] = before
        for hook in hooks:
            hook.remove()


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
        _fill_randomly(parameter, seed, number)


def _fill_randomly(parameter: torch.Tensor, seed: int, number: int) -> None:
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
