"""From logits to token ids, for the rows that a rank owns, or for all rows where a rank has a part of the vocabulary.

Each token's randomness is one number, a hash of (request seed, position, token), so a draw does not depend on the
batch, the rank or earlier draws. The number becomes Gumbel noise on the token's logit, and the largest sum wins.
Rounding differs between a prefill and a decode of the same tokens. It changes such a draw about as rarely as a greedy
choice. With a cumulative distribution, rounding would move every boundary, and change one draw in a thousand.

With the vocabulary in descending order every filter keeps a prefix of it, so top-k, top-p and min-p are three bounds on
a count.

Ranks that divide the vocabulary exchange candidates: `best_of_part` on each, an all-gather, then `choose` on each.
P=2, V=6 example: rank 0 has ids [0 1 2], rank 1 [3 4 5]. A greedy row's candidates are 2 tokens, one of each rank. With
top_k=2 they are 4; the 2 best of all 6 tokens are among them. Either way the token is that of `sample` on all logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from twofold.contract import TokenLogprobs
from twofold.sampling_params import SamplingParams

MAX_CANDIDATES = 128  # of a row on one rank; with a larger top-k, ranks gather all logits
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What S sampled rows ask for; every array is [S] on the CPU. A feature that no row uses costs nothing."""

    temperature: NDArray[np.float32]  # 0 is greedy
    top_k: NDArray[np.int32]  # 0 is off
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    presence_penalty: NDArray[np.float32]
    frequency_penalty: NDArray[np.float32]
    repetition_penalty: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    positions: NDArray[np.int64]  # index in its sequence of the token to be sampled
    prompt_token_ids: Sequence[NDArray[np.int32]]  # read only for rows with penalties
    output_token_ids: Sequence[NDArray[np.int32]]
    forbidden_token_ids: Sequence[tuple[int, ...]]  # what would stop a row before its min_tokens
    logit_bias: Sequence[Mapping[int, float]]  # token id -> what is added to its logit
    mask_idx: NDArray[np.int64]  # row -> its mask, or -1
    masks: torch.Tensor | None  # int32 [M, W], beside the logits: bit i % 32 of word i // 32 says that token i may come
    num_logprobs: int | None  # the largest number asked for; None if no row asked

    @classmethod
    def build(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int] | NDArray[np.uint64],
        positions: Sequence[int] | NDArray[np.int64],
        prompt_token_ids: Sequence[NDArray[np.int32]],
        output_token_ids: Sequence[NDArray[np.int32]],
        forbidden_token_ids: Sequence[tuple[int, ...]],
        mask_idx: NDArray[np.int64] | None = None,
        masks: torch.Tensor | None = None,
    ) -> Self:
        """The batch of rows that ask for `params`. Seeds are taken modulo 2**64."""

        def floats(name: str) -> NDArray[np.float32]:
            return np.array([getattr(p, name) for p in params], np.float32)

        return cls(
            temperature=np.array([0.0 if p.greedy else p.temperature for p in params], np.float32),
            top_k=np.array([max(p.top_k, 0) for p in params], np.int32),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            presence_penalty=floats("presence_penalty"),
            frequency_penalty=floats("frequency_penalty"),
            repetition_penalty=floats("repetition_penalty"),
            seeds=np.array([int(seed) % 2**64 for seed in seeds], np.uint64),
            positions=np.asarray(positions, np.int64),
            prompt_token_ids=prompt_token_ids,
            output_token_ids=output_token_ids,
            forbidden_token_ids=forbidden_token_ids,
            logit_bias=[p.logit_bias or {} for p in params],
            mask_idx=np.full(len(params), -1) if mask_idx is None else mask_idx,
            masks=masks,
            num_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
        )

    def __len__(self) -> int:
        return len(self.temperature)

    @property
    def drawn(self) -> NDArray[np.bool_]:
        """Which rows [S] are not greedy."""
        return self.temperature > 0

    @property
    def filtered(self) -> NDArray[np.bool_]:
        """Which rows [S] are drawn from the head of their order."""
        return self.drawn & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """`TokenLogprobs` as tensors, on the device first."""

    token_ids: torch.Tensor  # int32 [N, K + 1]
    logprobs: torch.Tensor  # float32 [N, K + 1]
    ranks: torch.Tensor  # int32 [N]

    def to_cpu(self) -> "LogprobTensors":
        """The same on the CPU, once the work that is enqueued now is done."""
        return LogprobTensors(*(x.to("cpu", non_blocking=True) for x in (self.token_ids, self.logprobs, self.ranks)))

    def to_numpy(self) -> TokenLogprobs:
        """Of tensors on the CPU."""
        return TokenLogprobs(self.token_ids.numpy(), self.logprobs.numpy(), self.ranks.numpy())


def sample(logits: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, LogprobTensors | None]:
    """Next tokens, int64 [S], of rows with `logits` [S, V] in any float type, and their log-probabilities if asked for.

    Applied in vLLM's order: logit bias, penalties, masks and forbidden tokens, temperature, min-p, top-k, top-p.
    Log-probabilities are those of the raw logits. Among equal logits the lower id comes first. `logits` is left as it
    is.
    """
    scores = _adjust(logits, batch)
    drawn, filtered = batch.drawn, batch.filtered
    token_ids = logits.new_empty(len(batch), dtype=torch.int64) if drawn.all() else scores.argmax(dim=-1)
    for rows, way in ((drawn & ~filtered, _draw), (filtered, _draw_filtered)):
        if rows.any():
            row_idx, idx, scaled = _scale(scores, batch, rows)
            token_ids[idx] = way(scaled, batch, row_idx)
    if batch.num_logprobs is None:
        return token_ids, None
    return token_ids, compute_logprobs(logits, token_ids, batch.num_logprobs)


def needs_all_logits(batch: SamplingBatch) -> bool:
    """Whether ranks with parts of the vocabulary must gather all logits for `sample`, because candidates do not tell.

    Top-p and min-p without top-k may keep any number of tokens. Log-probabilities are of all logits.
    """
    top_k = batch.top_k[batch.filtered]
    return batch.num_logprobs is not None or bool(((top_k == 0) | (top_k > MAX_CANDIDATES)).any())


def best_of_part(logits: torch.Tensor, first_id: int, batch: SamplingBatch) -> torch.Tensor:
    """A rank's candidates for all rows, from `logits` [S, C] of the C >= 1 token ids from `first_id`.

    Returns int32 [2, S, K]: scores, as the bits of float32, and token ids. They are one tensor, for one exchange.
    K is the largest top-k of `batch`, or 1. A row with filters has its part's K best tokens in order, before noise.
    Another row has the winner of its part. What is left holds -inf and `first_id`.
    """
    assert not needs_all_logits(batch)
    part = _adjust(logits, batch, first_id)
    drawn, filtered = batch.drawn, batch.filtered
    max_num_best = int(batch.top_k[filtered].max(initial=1))
    candidates = logits.new_zeros((2, len(batch), max_num_best), dtype=torch.int32)
    scores, ids = candidates[0].view(torch.float32), candidates[1]
    if max_num_best > 1:
        scores.fill_(-torch.inf)
    if not drawn.all():
        scores[:, 0], ids[:, 0] = part.max(dim=-1)
    if (drawn & ~filtered).any():
        row_idx, idx, scaled = _scale(part, batch, drawn & ~filtered)
        scores[idx, 0], winners = _add_noise(scaled, batch, row_idx, first_id).max(dim=-1)
        ids[idx, 0] = winners.int()
    if filtered.any():
        _, idx, scaled = _scale(part, batch, filtered)
        best, order = _sort(scaled, max_num_best)
        scores[idx, : best.shape[-1]], ids[idx, : best.shape[-1]] = best, order.int()
    ids += first_id
    return candidates


def choose(candidates: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Next tokens, int64 [S], from the `candidates` [P, 2, S, K] of all ranks, in the order of their parts."""
    scores, ids = candidates[:, 0].view(torch.float32), candidates[:, 1].long()  # each [P, S, K]
    token_ids = ids[..., 0].gather(0, scores[..., 0].argmax(dim=0, keepdim=True))[0]
    if batch.filtered.any():
        row_idx = np.flatnonzero(batch.filtered)
        idx = _to(row_idx, scores)
        # [P, S, K] -> [D, P * K]: equal scores stay in the order of their ids.
        scores, ids = (x[:, idx].transpose(0, 1).flatten(1) for x in (scores, ids))
        best, order = _sort(scores, candidates.shape[-1])
        token_ids[idx] = _draw_sorted(best, ids.gather(-1, order), batch, row_idx)
    return token_ids


def compute_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [N] and of the `num_logprobs` most likely tokens under `logits` [N, V].

    Takes 12 bytes of scratch per logit, so callers with many rows call it in chunks. K is at most V.
    """
    logits = logits.float()
    keys = _sort_keys(logits)
    own = token_ids.long()[:, None]
    best = keys.topk(min(num_logprobs, logits.shape[-1]), dim=-1).indices
    ids = torch.cat((own, best), dim=-1)
    return LogprobTensors(
        token_ids=ids.int(),
        logprobs=logits.gather(-1, ids) - logits.logsumexp(dim=-1, keepdim=True),
        ranks=(keys > keys.gather(-1, own)).sum(dim=-1, dtype=torch.int32) + 1,
    )


def row_keys(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each (seed, position): element `position` of the SplitMix64 stream that `seed` begins."""
    return _mix(_mix(seeds + _GOLDEN) + positions.astype(np.uint64) * _GOLDEN)


def gumbel(keys: NDArray[np.uint64], token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise float32 [D, W] for `token_ids` [D, W] or [W] of rows with `keys` [D]; the same on every device.

    A 32-bit hash of multiplications and shifts ("lowbias32") with one half of the key before it and one within.
    """
    before, within = _to(keys.view(np.int32).reshape(-1, 2).T, token_ids)[..., None]  # each [D, 1]
    x = token_ids.int() * -0x61C88647 ^ before
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x += within
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF
    # An exponential variate is precise where it is small: there the race is decided.
    u: torch.Tensor = (x & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits in which every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _scale(
    scores: torch.Tensor, batch: SamplingBatch, rows: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]:
    """Indices [D] of `rows`, on the CPU and beside `scores` [S, V], and their scores over temperature [D, V]."""
    row_idx = np.flatnonzero(rows)
    idx = _to(row_idx, scores)
    return row_idx, idx, scores[idx].float() / _to(batch.temperature[row_idx], scores)[:, None]


def _add_noise(
    scaled: torch.Tensor, batch: SamplingBatch, row_idx: NDArray[np.int64], first_id: int = 0
) -> torch.Tensor:
    """`scaled` [D, V] of the V token ids from `first_id`, plus their noise."""
    ids = torch.arange(first_id, first_id + scaled.shape[-1], device=scaled.device)
    return scaled + gumbel(row_keys(batch.seeds[row_idx], batch.positions[row_idx]), ids)


def _draw(scaled: torch.Tensor, batch: SamplingBatch, row_idx: NDArray[np.int64]) -> torch.Tensor:
    """A token of each row [D] from all of `scaled` [D, V]; needs no order, so none is made."""
    return _add_noise(scaled, batch, row_idx).argmax(dim=-1)


def _draw_filtered(scaled: torch.Tensor, batch: SamplingBatch, row_idx: NDArray[np.int64]) -> torch.Tensor:
    """A token of each row [D] from what min-p, top-k and top-p leave of `scaled` [D, V]."""
    top_k = batch.top_k[row_idx]
    best, ids = _sort(scaled, int(top_k.max()) if top_k.all() else scaled.shape[-1])
    return _draw_sorted(best, ids, batch, row_idx)


def _draw_sorted(
    best: torch.Tensor, ids: torch.Tensor, batch: SamplingBatch, row_idx: NDArray[np.int64]
) -> torch.Tensor:
    """As `_draw_filtered`, from the `best` [D, W] of the scaled logits in descending order, and their `ids` [D, W]."""
    width = best.shape[-1]
    top_k, top_p, min_p = batch.top_k[row_idx], batch.top_p[row_idx], batch.min_p[row_idx]
    top_k = np.where(top_k > 0, np.minimum(top_k, width), width).astype(np.int64)
    weights = (best - best[:, :1]).exp()  # the most likely token weighs 1
    mass = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    num_kept = _to(top_k, best)[:, None]
    if (min_p > 0).any():
        likely = weights >= _to(min_p, best)[:, None]
        num_kept = num_kept.minimum(likely.sum(dim=-1, keepdim=True)).clamp_(min=1)  # NaN is not likely
    if (top_p < 1).any():  # a token stays while the mass before it falls short of top_p
        enough = mass.gather(-1, num_kept - 1) * _to(top_p, best)[:, None]
        num_kept = num_kept.minimum(torch.searchsorted(mass, enough) + 1)
    scores = best + gumbel(row_keys(batch.seeds[row_idx], batch.positions[row_idx]), ids)
    scores.masked_fill_(torch.arange(width, device=best.device) >= num_kept, -torch.inf)
    return ids.gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0]


def _sort(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest values of `x` float32 [N, V] in descending order, equal ones by index, and their indices."""
    if width < x.shape[-1]:
        order = _sort_keys(x).topk(width, dim=-1).indices
        return x.gather(-1, order), order
    values, order = x.sort(dim=-1, descending=True, stable=True)
    return values, order


def _sort_keys(x: torch.Tensor) -> torch.Tensor:
    """int64 [N, V] that orders `x` float32 [N, V] by value, then lower id first. No two are equal, so any top-k agrees.

    A float's bits, read as an integer, ascend with it; those of negative floats descend.
    """
    bits = (x + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ascending.long() << 32) - torch.arange(x.shape[-1], device=x.device)


def _adjust(logits: torch.Tensor, batch: SamplingBatch, first_id: int = 0) -> torch.Tensor:
    """`logits` [S, V] of the V token ids from `first_id`, after bias and penalties, without tokens that may not come.

    It is `logits` itself if nothing changes, else a float32 copy.
    """
    part = range(first_id, first_id + logits.shape[-1])
    forbidden = [(row, i - first_id) for row, ids in enumerate(batch.forbidden_token_ids) for i in ids if i in part]
    biased = any(batch.logit_bias)
    repeats = batch.repetition_penalty != 1
    penalised = np.flatnonzero(repeats | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0))
    masked = np.flatnonzero(batch.mask_idx >= 0)
    if not forbidden and not biased and not penalised.size and not masked.size:
        return logits
    scores = logits.to(torch.float32, copy=True)
    if biased:
        _add_bias(scores, batch.logit_bias, first_id)
    if penalised.size:
        idx = _to(penalised, logits)
        x = scores[idx]  # [P, V]
        rows, ids, ones = _flatten([batch.output_token_ids[row] for row in penalised.tolist()], x, first_id)
        counts = torch.zeros_like(x).index_put_((rows, ids), ones, accumulate=True)
        used = counts > 0
        repetition, presence, frequency = (
            _to(penalty[penalised], logits)[:, None]
            for penalty in (batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty)
        )
        if repeats.any():
            nothing = np.empty(0, np.int32)
            prompts = [batch.prompt_token_ids[row] if repeats[row] else nothing for row in penalised.tolist()]
            rows, ids, ones = _flatten(prompts, x, first_id)
            seen = used.index_put((rows, ids), ones.bool())
            x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        scores[idx] = x - frequency * counts - presence * used
    if masked.size:
        assert batch.masks is not None
        idx = _to(masked, logits)
        limits = _limits(batch.masks[_to(batch.mask_idx[masked], logits)], part)
        if len(masked) == len(batch):
            scores.clamp_(max=limits)
        else:
            scores[idx] = scores[idx].clamp_(max=limits)
    if forbidden:
        rows, ids = _to(np.array(forbidden, np.int64).T, logits)
        scores[rows, ids] = -torch.inf
    return scores


def _add_bias(scores: torch.Tensor, logit_bias: Sequence[Mapping[int, float]], first_id: int) -> None:
    """Adds each row's bias to `scores` [S, V] of the V token ids from `first_id`."""
    rows = np.repeat(np.arange(len(logit_bias)), [len(bias) for bias in logit_bias])
    columns = np.concatenate([np.fromiter(bias, np.int64) for bias in logit_bias]) - first_id
    values = np.concatenate([np.fromiter(bias.values(), np.float32) for bias in logit_bias])
    inside = (columns >= 0) & (columns < scores.shape[-1])
    scores[_to(rows[inside], scores), _to(columns[inside], scores)] += _to(values[inside], scores)


def _limits(masks: torch.Tensor, part: range) -> torch.Tensor:
    """float32 [M, V]: the most that a part's scores may be: inf, or -inf for tokens that may not come.

    `masks` is [M, W]; beyond their last word no token may come. On a CPU a `masked_fill` takes three times as long.
    """
    first_word, end_word = part.start // 32, -(-part.stop // 32)
    in_bytes = masks[:, first_word:end_word].contiguous().view(torch.uint8)
    limits = _limits_of_byte(masks.device).index_select(0, in_bytes.flatten().int()).view(len(masks), -1)
    limits = limits[:, part.start - 32 * first_word :][:, : len(part)]
    missing = len(part) - limits.shape[1]
    return F.pad(limits, (0, missing), value=-torch.inf) if missing else limits


@cache
def _limits_of_byte(device: torch.device) -> torch.Tensor:
    """float32 [256, 8]: for each byte of a mask, the limits of its bits."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return torch.where(bits.bool(), torch.inf, -torch.inf).to(device)


def _flatten(
    token_ids: Sequence[NDArray[np.int32]], like: torch.Tensor, first_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and ones, all of one length, for those `token_ids` that `like` [P, V] has from `first_id` on."""
    rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
    columns = np.concatenate(token_ids).astype(np.int64) - first_id
    inside = (columns >= 0) & (columns < like.shape[-1])
    row_tensor = _to(rows[inside], like)
    return row_tensor, _to(columns[inside], like), like.new_ones(row_tensor.shape)


def _to(array: NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)
