"""What a rank remembers of each request between steps: the same on every rank. Written in place, never rebuilt."""

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.contract import Step
from twofold.sampling_params import SamplingParams


class RequestStates:
    """Arrays with one line a request; `index_of` finds it. M lines, and one more that padding may write to."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.max_num_seqs = max_num_seqs
        max_num_blocks = -(-max_model_len // block_size)
        # Large but mostly untouched: the system gives memory to the pages that are written.
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.block_tables = np.zeros((max_num_seqs, max_num_blocks), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)  # known on the CPU
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.wants_prompt_logprobs = np.zeros(max_num_seqs, bool)
        self.num_blocks = np.zeros(max_num_seqs, np.int64)
        self.seeds = np.zeros(max_num_seqs, np.uint64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        # The newest sampled token of each request: the next step reads it here, without waiting for the CPU.
        self.last_sampled = torch.zeros(max_num_seqs + 1, dtype=torch.long, device=device)
        self._index_of: dict[str, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def apply(self, step: Step) -> None:
        """Brings the state up to the step's start."""
        for request_id in step.removed:
            index = self._index_of.pop(request_id)
            self.params[index] = None
            self._free.append(index)
        for new in step.new:
            index = self._index_of[new.request_id] = self._free.pop()
            self.token_ids[index, : len(new.token_ids)] = new.token_ids
            self.num_tokens[index] = len(new.token_ids)
            self.num_prompt_tokens[index] = new.num_prompt_tokens
            self.seeds[index] = new.seed % 2**64
            self.params[index] = new.sampling_params
            self.wants_prompt_logprobs[index] = new.sampling_params.prompt_logprobs is not None
            self.num_blocks[index] = 0
            self._append_blocks(index, new.block_ids)
        for request_id, block_ids in step.new_block_ids.items():
            self._append_blocks(self._index_of[request_id], block_ids)

    def _append_blocks(self, index: int, block_ids: list[int]) -> None:
        start = self.num_blocks[index]
        self.block_tables[index, start : start + len(block_ids)] = block_ids
        self.num_blocks[index] += len(block_ids)

    def append_sampled(self, request_ids: tuple[str, ...], token_ids: NDArray[np.int64]) -> None:
        """Notes sampled tokens on the CPU, of the requests that are still here. token_ids [len(request_ids)]."""
        known = [(self._index_of[r], t) for r, t in zip(request_ids, token_ids, strict=True) if r in self._index_of]
        if known:
            index, tokens = np.array(known).T
            self.token_ids[index, self.num_tokens[index]] = tokens
            self.num_tokens[index] += 1

    def indices(self, request_ids: tuple[str, ...]) -> NDArray[np.int64]:
        """request of the step -> line of the arrays."""
        return np.array([self._index_of[request_id] for request_id in request_ids], np.int64)

    def __len__(self) -> int:
        return len(self._index_of)
