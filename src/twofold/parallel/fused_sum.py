"""Sums over GPUs by kernels of our own: each rank pushes its part into its peers' memory, then adds up all parts.

    x ──push──► my part of every peer's buffer, my flag there = number of this sum, wait for all flags here
    parts ──add──► sum (──► + residual)                    `PushSum.__call__`
    parts ──add──► sum + residual ──norm──► normed         `PushSum.add_norm`

Program b of a kernel waits for program b of the same kernel on the peers, and for no other.

There are two buffers, used in turn. A rank that pushes its part of sum n + 2 has finished kernel n + 1, which saw flags
n + 1 of all peers. A peer sets those when its kernel n has ended, and so has read all parts of sum n. The number of the
sum is kept on the device, and the kernels count it up. So it does not matter which graphs are replayed in which order,
and what is launched between them.
"""

import torch
import torch.distributed._symmetric_memory as symmetric_memory
import triton
import triton.language as tl

from twofold.parallel.mesh import ProcessMesh

MAX_PROGRAMS = 256  # of a kernel; all must run at the same time
BLOCK = 2048  # numbers that a program adds up
FLAG_BYTES = 8


@triton.jit  # type: ignore[untyped-decorator]
def _exchange(
    values: tl.tensor,
    offsets: tl.tensor,
    inside: tl.tensor,
    buffers: tl.tensor,
    counts: tl.tensor,
    flags_bytes: tl.constexpr,
    part_bytes: tl.constexpr,
    rank: tl.constexpr,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    max_programs: tl.constexpr,
) -> tl.tensor:
    """My `values`, which are at `offsets` of x → their sum over all ranks, rounded once."""
    program = tl.program_id(0)
    number = tl.load(counts + program) + 1
    turn = (number % 2) * (size * part_bytes) + flags_bytes
    for distance in tl.static_range(1, size):  # no two ranks push to the same peer at the same time
        part = tl.load(buffers + (rank + distance) % size) + turn + rank * part_bytes
        pushed = tl.multiple_of(part.to(tl.pointer_type(values.dtype)), 16)  # so that 16 bytes travel together
        tl.store(pushed + offsets, values, mask=inside)

    # All threads have pushed before one of them says so; the release covers what the barrier has ordered before it.
    tl.debug_barrier()
    peers = tl.arange(0, padded_size)
    theirs = tl.load(buffers + peers, mask=peers < size, other=0).to(tl.pointer_type(tl.int64))
    is_peer = (peers < size) & (peers != rank)
    tl.atomic_xchg(theirs + program * size + rank, number, mask=is_peer, sem="release", scope="sys")

    mine = tl.load(buffers + rank)
    flags = mine.to(tl.pointer_type(tl.int64)) + program * size
    for distance in tl.static_range(1, size):
        flag = flags + (rank + distance) % size
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < number:
            pass
    tl.debug_barrier()

    total = values.to(tl.float32)
    for source in tl.static_range(size):
        part = values
        if source != rank:
            address = mine + turn + source * part_bytes
            pushed = tl.multiple_of(address.to(tl.pointer_type(values.dtype)), 16)
            part = tl.load(pushed + offsets, mask=inside, other=0.0, cache_modifier=".cg")
        if source == 0:
            total = part.to(tl.float32)
        else:
            total += part.to(tl.float32)

    # Every kernel counts for all programs: each for itself, and the first one for those that this kernel does not have.
    programs = tl.arange(0, max_programs)
    absent = tl.where(program == 0, tl.num_programs(0), max_programs)
    tl.store(counts + programs, number + tl.zeros_like(programs), mask=(programs == program) | (programs >= absent))
    return total.to(values.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    buffers: tl.tensor,
    counts: tl.tensor,
    numel: tl.tensor,
    flags_bytes: tl.constexpr,
    part_bytes: tl.constexpr,
    rank: tl.constexpr,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    max_programs: tl.constexpr,
    has_residual: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (blocks of x)."""
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    inside = offsets < numel
    values = tl.load(x + offsets, mask=inside, other=0.0)
    if has_residual:
        before = tl.load(residual + offsets, mask=inside, other=0.0)  # arrives while this rank waits for its peers
    total = _exchange(
        values, offsets, inside, buffers, counts, flags_bytes, part_bytes, rank, size, padded_size, max_programs
    )
    if has_residual:
        total = _add(total, before)
    tl.store(out + offsets, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add(total: tl.tensor, before: tl.tensor) -> tl.tensor:
    return (total.to(tl.float32) + before.to(tl.float32)).to(total.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(after: tl.tensor, scale: tl.tensor, epsilon: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """The norm of one row after [block], in which width numbers are no padding; rounded where Llama's modules do."""
    wide = after.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / width
    unit = (wide * tl.rsqrt(mean_square + epsilon)).to(after.dtype)
    return (unit.to(tl.float32) * scale.to(tl.float32)).to(after.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    added: tl.tensor,
    normed: tl.tensor,
    buffers: tl.tensor,
    counts: tl.tensor,
    epsilon: tl.tensor,
    width: tl.constexpr,
    flags_bytes: tl.constexpr,
    part_bytes: tl.constexpr,
    rank: tl.constexpr,
    size: tl.constexpr,
    padded_size: tl.constexpr,
    max_programs: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (rows of x)."""
    column = tl.arange(0, block)
    inside = column < width
    offsets = tl.program_id(0) * width + column
    values = tl.load(x + offsets, mask=inside, other=0.0)
    before = tl.load(residual + offsets, mask=inside, other=0.0)  # these arrive while this rank waits for its peers
    scale = tl.load(weight + column, mask=inside, other=0.0)
    total = _exchange(
        values, offsets, inside, buffers, counts, flags_bytes, part_bytes, rank, size, padded_size, max_programs
    )
    after = _add(total, before)
    tl.store(added + offsets, after, mask=inside)
    tl.store(normed + offsets, _norm(after, scale, epsilon, width), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm_kernel(
    total: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    added: tl.tensor,
    normed: tl.tensor,
    epsilon: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Grid (rows of total)."""
    column = tl.arange(0, block)
    inside = column < width
    offsets = tl.program_id(0).to(tl.int64) * width + column
    here = tl.load(total + offsets, mask=inside, other=0.0)
    before = tl.load(residual + offsets, mask=inside, other=0.0)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    after = _add(here, before)
    tl.store(added + offsets, after, mask=inside)
    tl.store(normed + offsets, _norm(after, scale, epsilon, width), mask=inside)


def add_norm(
    total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of `PushSum.add_norm`, after a sum of any size."""
    total, residual = total.contiguous(), residual.contiguous()
    added, normed, width = torch.empty_like(total), torch.empty_like(total), total.shape[-1]
    _add_norm_kernel[(total.numel() // width,)](
        total, residual, weight, added, normed, epsilon,
        width=width, block=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return added, normed


class PushSum:
    """Sums of up to `max_num_bytes`, with or without the residual and the norm that follow."""

    def __init__(self, mesh: ProcessMesh, device: torch.device, max_num_bytes: int) -> None:
        size = mesh.size
        self.max_num_bytes = max_num_bytes
        flags_bytes, part_bytes = MAX_PROGRAMS * size * FLAG_BYTES, -(-max_num_bytes // 128) * 128
        self._buffer = symmetric_memory.empty(flags_bytes + 2 * size * part_bytes, dtype=torch.uint8, device=device)
        self._buffer.zero_()
        self._handle = symmetric_memory.rendezvous(self._buffer, mesh.group)
        addresses = [self._handle.get_buffer(peer, (1,), torch.uint8).data_ptr() for peer in range(size)]
        self._buffers = torch.tensor(addresses, device=device)  # [P]
        self._counts = torch.zeros(MAX_PROGRAMS, dtype=torch.long, device=device)  # program -> sums so far
        self._constants = {
            "flags_bytes": flags_bytes, "part_bytes": part_bytes, "rank": mesh.rank, "size": size,
            "padded_size": triton.next_power_of_2(size), "max_programs": MAX_PROGRAMS,
        }  # fmt: skip
        self._handle.barrier(channel=0)  # no flag is set before all are zero
        torch.cuda.synchronize(device)

    def fits(self, x: torch.Tensor) -> bool:
        return x.nbytes <= self.max_num_bytes and x.numel() <= MAX_PROGRAMS * BLOCK

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., W] of this rank → the sum over all ranks, in float32 in the order of ranks, rounded once.

        Then residual [..., W] of the same type is added, if there is one.
        """
        x, numel = x.contiguous(), x.numel()
        given = x if residual is None else residual.contiguous()
        out = torch.empty_like(x)
        _sum_kernel[(triton.cdiv(numel, BLOCK),)](
            x, given, out, self._buffers, self._counts, numel,
            has_residual=residual is not None, block=BLOCK, num_warps=8, **self._constants,
        )  # fmt: skip
        return out

    def fits_rows(self, x: torch.Tensor) -> bool:
        return x.nbytes <= self.max_num_bytes and x.numel() <= MAX_PROGRAMS * x.shape[-1]

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., W] of this rank, residual [..., W], weight [W] → the sum over all ranks + residual, and its RMS norm.

        All are of one type. The norm is that of Llama.
        """
        x, residual, width = x.contiguous(), residual.contiguous(), x.shape[-1]
        added, normed = torch.empty_like(x), torch.empty_like(x)
        _sum_norm_kernel[(x.numel() // width,)](
            x, residual, weight, added, normed, self._buffers, self._counts, epsilon,
            width=width, block=triton.next_power_of_2(width), num_warps=8, **self._constants,
        )  # fmt: skip
        return added, normed
