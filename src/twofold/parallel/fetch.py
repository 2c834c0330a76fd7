"""Sharded weights in steps by tokens: peers' parts of a layer come here while the layer before it computes.

    parts of rank 0 | 1 | ... of layer l + 1 ──copies──► buffer (l + 1) % 2        layer l computes from buffer l % 2

Parts never change once all ranks have loaded them, so ranks do not wait for each other. On CUDA the copies are copy
engines' work, on streams of their own, ordered by events:

    layer l computes     after ready[l % 2]: all parts of l have come
    parts of l + 2 come  after layer l was computed, which has used their buffer

A step begins with both buffers, whatever they held, and ends when all that it started to copy was used. So it can be
captured as a CUDA graph.

All experts of a layer come, not those that the step's tokens chose: they choose all. Of E experts, K a token, T tokens
leave one out with a chance of (1 - K / E)^T: 0.2 % for 6 of 64 and 64 tokens, and steps by tokens have a thousand.
"""

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from twofold.parallel.mesh import Mesh

ALIGNMENT = 256  # bytes, of each part and each weight in a buffer
COPY_ANY_KIND = 4  # cudaMemcpyDefault: the addresses say where memory is


@dataclass(frozen=True, slots=True)
class PartCopy:
    """A part on its way into the whole weight."""

    rank: int  # that keeps the part
    part: torch.Tensor  # dense
    place: torch.Tensor  # the same shape; a view of a buffer

    def start(self) -> None:
        """On CUDA on the current stream, by a copy engine."""
        if not self.place.is_cuda:
            self.place.copy_(self.part)
            return
        for part, place in _blocks(self.part, self.place):
            _copy_rows(part, place)


class Fetch:
    """Brings the parts of one layer after the other. A step by tokens calls `begin` and `end` for each layer."""

    def __init__(self, layers: Sequence[Sequence[PartCopy]], mesh: Mesh, device: torch.device) -> None:
        """`layers`: what each layer needs. Layers take turns with two buffers."""
        # No two ranks copy from the same peer at the same time.
        self._layers = [sorted(copies, key=lambda copy: (copy.rank - mesh.rank - 1) % mesh.size) for copies in layers]
        self._rank, self._layer = mesh.rank, 0
        self._cuda = _Streams(device) if device.type == "cuda" else None

    def begin(self, layer: int) -> None:
        """Work enqueued from now on sees the whole weights of `layer`."""
        if layer == 0:
            self._layer = 0
            for first in range(min(2, len(self._layers))):
                self._start(first)
        assert layer == self._layer, "layers run one after the other"
        if self._cuda is not None:
            self._cuda.wait_until_ready(layer % 2)

    def end(self, layer: int) -> None:
        """`layer` was computed: its buffer is free."""
        self._layer = layer + 1
        if layer + 2 < len(self._layers):
            self._start(layer + 2)

    def _start(self, layer: int) -> None:
        copies = self._layers[layer]
        theirs = [copy for copy in copies if copy.rank != self._rank]
        mine = [copy for copy in copies if copy.rank == self._rank]
        if self._cuda is not None:
            self._cuda.copy(theirs, mine, layer % 2)
            return
        for copy in (*theirs, *mine):
            copy.start()


class _Streams:
    """Two streams beside the current one: from peers, and from my own part."""

    def __init__(self, device: torch.device) -> None:
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
        self._free = torch.cuda.Event()
        self._ready = [[torch.cuda.Event() for _ in self._streams] for _ in range(2)]  # buffer -> of each stream

    def copy(self, theirs: Sequence[PartCopy], mine: Sequence[PartCopy], buffer: int) -> None:
        """Starts copies that overwrite what the work enqueued until now reads."""
        self._free.record()
        for stream, copies, ready in zip(self._streams, (theirs, mine), self._ready[buffer], strict=True):
            with torch.cuda.stream(stream):
                stream.wait_event(self._free)
                for copy in copies:
                    copy.start()
                ready.record()

    def wait_until_ready(self, buffer: int) -> None:
        for ready in self._ready[buffer]:
            torch.cuda.current_stream().wait_event(ready)


def dense_strides(tensor: torch.Tensor) -> list[int]:
    """Strides of a dense copy of a view, its dims in the order of memory as they are in the view."""
    strides, step = [0] * tensor.dim(), 1
    steps = tensor.stride()
    for dim in sorted(range(tensor.dim()), key=lambda dim: (steps[dim], tensor.shape[dim])):
        strides[dim] = step
        step *= tensor.shape[dim]
    return strides


def _blocks(part: torch.Tensor, place: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A dense part and its place, as pairs of [rows, columns] with consecutive columns."""
    strides = part.stride()
    order = sorted(range(part.dim()), key=lambda dim: (-strides[dim], -part.shape[dim]))
    sizes: list[int] = []  # of dims that cannot be joined, in the order of memory
    steps: list[int] = []  # their strides in `place`
    for dim in order:
        size, step = part.shape[dim], place.stride(dim)
        if size == 1:
            continue
        if sizes and steps[-1] == step * size:
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes, steps = [*sizes, size], [*steps, step]
    assert not steps or steps[-1] == 1, "a part's numbers lie side by side"
    if len(sizes) < 2:
        sizes, steps = [1, *(sizes or [1])], [math.prod(sizes), *(steps or [1])]
    dense = part.as_strided(sizes, [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))])
    spread = place.as_strided(sizes, steps)
    for outer in range(math.prod(sizes[:-2])):
        index = torch.unravel_index(torch.tensor(outer), sizes[:-2]) if sizes[:-2] else ()
        at = tuple(int(i) for i in index)
        yield dense[at], spread[at]


def _copy_rows(part: torch.Tensor, place: torch.Tensor) -> None:
    """part [rows, columns], dense, to place [rows, columns], whose rows lie any distance apart."""
    if place.is_contiguous() or (copy := _cuda_copy_2d()) is None:
        place.copy_(part)  # without the function below a kernel, on multiprocessors
        return
    rows, columns = part.shape
    width, size = columns * part.element_size(), part.element_size()
    status = copy(
        place.data_ptr(), place.stride(0) * size, part.data_ptr(), width, width, rows, COPY_ANY_KIND,
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cudaMemcpy2DAsync failed with {status}")


_copy_2d: list[Callable[..., int] | None] = []


def _cuda_copy_2d() -> Callable[..., int] | None:
    """CUDA's copy of rows, which copy engines do and PyTorch has no name for; None if it is not found."""
    if not _copy_2d:
        major = (torch.version.cuda or "").partition(".")[0]
        for library in (None, f"libcudart.so.{major}"):  # PyTorch has loaded it
            try:
                function = ctypes.CDLL(library).cudaMemcpy2DAsync
            except (OSError, AttributeError):
                continue
            function.restype = ctypes.c_int
            size, pointer = ctypes.c_size_t, ctypes.c_void_p
            function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
            _copy_2d.append(function)
            break
        else:
            _copy_2d.append(None)
    return _copy_2d[0]
