"""Tensors of a GGUF file, each made when Transformers wants it; by itself Transformers makes all before it uses one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import modeling_gguf_pytorch_utils as of_transformers

# What changes one tensor into one; others make several of one, or one of several.
ONE_TO_ONE = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor")


class _OnDemand:
    """What Transformers takes for a slice of a safetensors file."""

    def __init__(self, make: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> None:
        self._make, self.shape = make, shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._make()[index]

    def get_dtype(self) -> str:
        return "F32"


@contextmanager
def one_by_one() -> Iterator[None]:
    """Within it `from_pretrained` makes tensors of GGUF files one by one, as it copies them into the model.

    Files of experts are read as before, all tensors at once: their tensors are put together.
    """
    load = of_transformers.load_gguf_checkpoint

    def load_on_demand(path: str, return_tensors: bool = False, model_to_load: Any = None, **kwargs: Any) -> Any:
        from gguf import GGUFReader

        found = load(path)
        if not return_tensors:
            return found
        reader = GGUFReader(path)
        architecture = of_transformers.read_field(reader, "general.architecture")[0]
        kind = of_transformers.TENSOR_PROCESSORS.get(architecture, of_transformers.TensorProcessor)
        if kind.__name__ not in ONE_TO_ONE:
            return load(path, return_tensors=True, model_to_load=model_to_load, **kwargs)
        processor = kind(config=found["config"])
        names = of_transformers.get_gguf_hf_weights_map(model_to_load, processor)
        found["tensors"] = {
            names[tensor.name]: _OnDemand(partial(_make, tensor, processor), tuple(tensor.shape[::-1].tolist()))
            for tensor in reader.tensors
            if tensor.name in names
        }
        return found

    of_transformers.load_gguf_checkpoint = load_on_demand
    try:
        yield
    finally:
        of_transformers.load_gguf_checkpoint = load


def _make(tensor: Any, processor: Any) -> torch.Tensor:
    from gguf import dequantize

    numbers = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.copy(processor.process(weights=numbers, name=tensor.name).weights))
