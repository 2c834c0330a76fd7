"""Sharded weights: a rank keeps its part of each layer's weights, and fetches the rest where it needs whole ones.

    by heads     modules use the rank's own parts, which lie in memory that all ranks read
    by tokens    weights of layer l are views of buffer l % 2, filled before the layer runs (`parallel/fetch.py`)

What divides is what the model by heads divides (`heads.py`). The rest of a layer (norms, routers, biases), the
embedding and the head are whole on every rank: for Llama-3.1-70B 4.2 of 141 GB.

No rank ever has a whole model. So the model is first built, examined, transformed and divided with *stand-ins*: random
numbers that all layers share, since what modules compute does not depend on the numbers. Then each rank reads the real
weights, one tensor at a time, and keeps its part. At last both ways are compared once more, with the real ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch.nn import Module, ModuleList, Parameter
from transformers import PreTrainedModel

from twofold.attention.spec import AttentionSpec
from twofold.errors import ModelError
from twofold.models.checkpoint import check_numbers
from twofold.models.decoder import DecoderModel
from twofold.models.transforms.packing import Part
from twofold.models.transforms.stand_in import StandIn
from twofold.parallel.fetch import ALIGNMENT, Fetch, PartCopy, dense_strides
from twofold.parallel.mesh import Mesh
from twofold.parallel.peer_memory import PeerMemory

Take = Callable[[str, torch.Tensor], None]  # gets a tensor and its name in Transformers' model


# --- Stand-ins -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def use_stand_ins(model: PreTrainedModel, device: torch.device) -> None:
    """Replaces the weights by random ones on `device`, the same on every rank, which all layers share.

    So the model takes the memory of its largest layer, its embedding and its head.
    """
    layers = _main_list(model)
    place_of = {id(module): name for layer in layers for name, module in layer.named_modules()}
    tensors: dict[Any, torch.Tensor] = {}
    tied: dict[int, Parameter] = {}
    for name, module in model.named_modules():
        for field_name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in tied:
                place = (place_of.get(id(module), f"outside {name}"), field_name, parameter.shape, parameter.dtype)
                if place not in tensors:
                    tensors[place] = _random(parameter, device, seed=len(tensors))
                tied[id(parameter)] = Parameter(tensors[place].view_as(tensors[place]), requires_grad=False)
            setattr(module, field_name, tied[id(parameter)])


def _main_list(model: PreTrainedModel) -> Iterable[Module]:
    """The list of modules with most of the weights."""
    lists = [module for module in model.modules() if isinstance(module, ModuleList)]
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=())


def _random(like: torch.Tensor, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
    if not tensor.is_floating_point():
        return tensor.zero_()
    if tensor.dim() < 2:
        return tensor.normal_(1.0, 0.1, generator=generator)
    return tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


# --- Parts -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _View:
    """What the model by heads uses of a weight; several tensors may be the same view."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in the whole weight
    start: int
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def of(self, whole: torch.Tensor, start: int | None = None) -> torch.Tensor:
        """The view of a dense tensor like the whole weight; of another rank's part if it starts elsewhere."""
        offset = whole.storage_offset() + (self.start if start is None else start)
        return whole.as_strided(self.shape, self.strides, offset)


@dataclass(slots=True)
class _Weight:
    """A weight of a layer by tokens, with all views of it."""

    parameter: Parameter
    views: list[_View]
    is_divided: bool = False
    parts: list[list[torch.Tensor]] = field(default_factory=list)  # of each view, of each rank

    @classmethod
    def of(cls, parameter: Parameter, tensors: Iterable[torch.Tensor], num_ranks: int) -> "_Weight":
        views: dict[Any, _View] = {}
        for tensor in tensors:
            view = _View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
            views.setdefault((view.shape, view.strides, view.start), view).tensors.append(tensor)
        parts = [view for view in views.values() if view.num_elements < parameter.numel()]
        is_whole = sum(view.num_elements for view in parts) * num_ranks == parameter.numel()
        if parameter.dim() > 1 and parameter.is_contiguous() and is_whole:
            return cls(parameter, parts, is_divided=True)
        return cls(parameter, list(views.values()))


class Holding:
    """What one rank keeps of a model's weights."""

    def __init__(self, whole: DecoderModel, part: DecoderModel, mesh: Mesh, memory: PeerMemory | None) -> None:
        """Takes the place of stand-ins in both models. All ranks call it together; then they `load`.

        `memory` for their parts; None if ranks cannot read each other's.

        Raises:
            ModelError: the weights cannot be kept so.
            OSError: there is no room for the parts.
        """
        self._whole, self._part, self._mesh = whole, part, mesh
        self._device = whole.head.get_parameter("weight").device
        self._layers = [list(weights) for weights in self._find_weights()]
        self._place_of = {id(weight.parameter): weight for weights in self._layers for weight in weights}
        self._make_parts(memory)
        self._make_buffers()
        self.fetch = Fetch(list(self._copies()), mesh, self._device)
        assert whole.layers is not None
        for number, layer in enumerate(whole.layers):
            whole.layers[number] = FetchedLayer(layer, number, self.fetch)

    def _find_weights(self) -> Iterator[Iterator[_Weight]]:
        """Of each layer by tokens, its weights and what the layer by heads uses of them."""
        whole, part = self._whole, self._part
        if whole.layers is None or part.layers is None:
            raise ModelError("the list of layers was not found")
        of_layers = [parameter for layer in whole.layers for parameter in layer.parameters()]
        if len({id(parameter) for parameter in whole.model.parameters()} & {id(parameter) for parameter in of_layers}):
            raise ModelError("its head has weights of a layer")
        if len({id(parameter) for parameter in of_layers}) < len(of_layers):
            raise ModelError("layers share weights")
        for number, (layer, layer_part) in enumerate(zip(whole.layers, part.layers, strict=True)):
            parameters = {p.untyped_storage().data_ptr(): p for p in layer.parameters() if p.numel()}
            tensors: dict[int, list[torch.Tensor]] = {pointer: [] for pointer in parameters}
            of_specs = [*_tensors_in(whole.specs[number]), *_tensors_in(part.specs[number])]
            if any(tensor.untyped_storage().data_ptr() not in parameters for tensor in of_specs):
                raise ModelError(f"the attention of layer {number} has weights from elsewhere")
            found = {id(tensor): tensor for module in (layer, layer_part) for tensor in _tensors_of(module)}
            found |= {id(tensor): tensor for tensor in of_specs}
            for tensor in found.values():
                pointer = tensor.untyped_storage().data_ptr()
                if pointer in parameters and tensor is not parameters[pointer]:
                    tensors[pointer].append(tensor)
            yield (_Weight.of(p, tensors[pointer], self._mesh.size) for pointer, p in parameters.items())

    @property
    def _divided(self) -> list[_Weight]:
        return [weight for weights in self._layers for weight in weights if weight.is_divided]

    def _make_parts(self, memory: PeerMemory | None) -> None:
        """Memory for parts, in the same place on every rank, and for what is not divided."""
        divided = self._divided
        if not divided:
            raise ModelError("no weight of a layer divides")
        if memory is None:
            raise ModelError("the GPUs cannot read each other's memory")
        sizes = [_aligned(view.num_elements * w.parameter.itemsize) for w in divided for view in w.views]
        self.part_bytes, self.fetched_bytes = sum(sizes), sum(weight.parameter.nbytes for weight in divided)
        self._memory, everyones = memory, memory.allocate(self.part_bytes)
        offsets = iter(np.cumsum([0, *sizes]).tolist())
        for weight in divided:
            for view in weight.views:
                offset, like = next(offsets), view.tensors[0]
                weight.parts.append([_tensor_at(parts, offset, like) for parts in everyones])
                for tensor in view.tensors:
                    tensor.data = weight.parts[-1][self._mesh.rank]
        for weight in (weight for weights in self._layers for weight in weights if not weight.is_divided):
            weight.parameter.data = torch.empty_like(weight.parameter)
            for view in weight.views:
                for tensor in view.tensors:
                    tensor.data = view.of(weight.parameter)

    def _make_buffers(self) -> None:
        """The divided weights by tokens become views of two buffers."""
        layers = [[weight.parameter for weight in weights if weight.is_divided] for weights in self._layers]
        num_bytes = max(sum(_aligned(parameter.nbytes) for parameter in parameters) for parameters in layers)
        # NaN, until weights come: what uses others by mistake shows.
        buffers = [torch.full((num_bytes,), 255, dtype=torch.uint8, device=self._device) for _ in range(2)]
        for number, parameters in enumerate(layers):
            offset = 0
            for parameter in parameters:
                size = _aligned(parameter.nbytes)
                parameter.data = _tensor_at(buffers[number % 2], offset, parameter)
                offset += size
        self.buffer_bytes = 2 * num_bytes

    def _copies(self) -> Iterator[list[PartCopy]]:
        """Of each layer, all parts and their places in its buffer."""
        views = [view for weight in self._divided for view in weight.views]
        mine = torch.tensor([view.start for view in views], device=self._device)
        everyones = mine.new_empty(self._mesh.size * len(mine))
        self._mesh.all_gather(everyones, mine)
        starts = iter(everyones.view(self._mesh.size, -1).T.tolist())
        for weights in self._layers:
            yield [
                PartCopy(rank, parts[rank], view.of(weight.parameter, start))
                for weight in weights
                if weight.is_divided
                for view, parts in zip(weight.views, weight.parts, strict=True)
                for rank, start in enumerate(next(starts))
            ]

    @torch.no_grad()
    def load(self, read: Callable[[Take], None], source: str) -> None:
        """Fills what this rank keeps with what `read` hands over: all weights of the model, one by one.

        Raises:
            ModelError: the weights cannot be read, or a number is NaN or infinite.
        """
        self._taken: dict[str, torch.Tensor] = {}
        read(self._take)
        check_numbers(source, self._taken)
        del self._taken
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        flags = torch.zeros(self._mesh.size, device=self._device)
        self._mesh.all_gather(flags, flags[:1].clone())  # all parts are there, for everyone to fetch
        flags.tolist()

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps what this rank needs of a tensor, which has its `name` in Transformers' model."""
        path, _, field_name = name.rpartition(".")
        prefix = f"{self._whole.model.base_model_prefix}."
        is_of_body = f"{path}.".startswith(prefix)
        module = (self._whole.body if is_of_body else self._whole.model).get_submodule(
            path.removeprefix(prefix[:-1]).removeprefix(".") if is_of_body else path
        )
        if isinstance(module, Part):
            mine = self._take_packed(module, field_name, tensor)
        else:
            mine = self._take_whole(getattr(module, field_name), tensor)
        for number, taken in enumerate(mine):
            self._taken[f"{name} {number}" if number else name] = taken

    def _take_whole(self, target: torch.Tensor, tensor: torch.Tensor) -> list[torch.Tensor]:
        weight = self._place_of.get(id(target))
        if weight is None or not weight.is_divided:
            return [target.data.copy_(tensor)]
        tensor = tensor.contiguous()
        parts = zip(weight.views, weight.parts, strict=True)
        return [part[self._mesh.rank].copy_(view.of(tensor)) for view, part in parts]

    def _take_packed(self, module: Part, field_name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A projection's rows are some of every rank's rows of the packed weight."""
        packed = module.packed.get_parameter(field_name)
        weight, rows = self._place_of[id(packed)], tensor.unflatten(0, (module.num_parts, -1))
        if weight.is_divided:
            (parts,) = weight.parts
            return [parts[self._mesh.rank].narrow(0, module.start, module.size).copy_(rows[self._mesh.rank])]
        place = packed.data.unflatten(0, (module.num_parts, -1)).narrow(1, module.start, module.size)
        return [place.copy_(rows)]


class FetchedLayer(StandIn):
    """Stands in for a decoder layer by tokens: its weights come before it runs."""

    def __init__(self, layer: Module, number: int, fetch: Fetch) -> None:
        super().__init__(layer)
        self.number, self._fetch = number, fetch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._fetch.begin(self.number)
        out = self.layer(*args, **kwargs)
        self._fetch.end(self.number)
        return out


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _tensor_at(memory: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A dense tensor like another one, at `offset` bytes of `memory`."""
    flat = memory[offset : offset + like.numel() * like.itemsize].view(like.dtype)
    return flat.as_strided(like.shape, dense_strides(like), flat.storage_offset())


def _tensors_of(module: Module) -> Iterator[torch.Tensor]:
    """All tensors that a module or one within it keeps, whatever it calls them."""
    for each in module.modules():
        yield from _tensors_in({name: value for name, value in vars(each).items() if name != "_modules"})


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)
    elif isinstance(value, AttentionSpec):
        yield from _tensors_in([getattr(value, each.name) for each in fields(value)])
