"""What a rank remembers of each request between steps: the same on every rank. Written in place, never rebuilt."""

import numpy as np
import torch
from numpy.typing import NDArray

from twofold.contract import Step
from twofold.sampling_params import SamplingParams

FREE = -1


def counts_tokens(params: SamplingParams) -> bool:
    """Whether sampling looks at the tokens so far."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def takes_the_best(params: SamplingParams) -> bool:
    """Whether the next token is simply that of the largest logit, and nothing else is asked for."""
    changes = counts_tokens(params) or params.min_tokens or params.logit_bias or params.is_masked
    return params.greedy and not changes and params.logprobs is None


class RequestStates:
    """Arrays of `max_num_seqs` request states; the scheduler gives out their indices. One more is for padding."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.max_num_seqs = max_num_seqs
        max_num_blocks = -(-max_model_len // block_size)
        self.numbers = np.full(max_num_seqs, FREE, np.int64)  # request that has the state
        # Large, but memory is taken only when it is first written.
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.block_tables = np.zeros((max_num_seqs, max_num_blocks), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)  # known on the CPU
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_blocks = np.zeros(max_num_seqs, np.int64)
        self.seeds = np.zeros(max_num_seqs, np.uint64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.counts_tokens = np.zeros(max_num_seqs, bool)  # penalties: sampling looks at the tokens so far
        self.takes_the_best = np.zeros(max_num_seqs, bool)
        # The newest sampled token of each request: the next step reads it here, without waiting for the CPU.
        self.last_sampled = torch.zeros(max_num_seqs + 1, dtype=torch.long, device=device)

    def apply(self, step: Step) -> None:
        """Brings the states up to the step's start."""
        for i in step.removed:
            self.numbers[i], self.params[i], self.counts_tokens[i] = FREE, None, False
        for new in step.new:
            i = new.state_idx
            self.numbers[i] = new.number
            self.token_ids[i, : len(new.token_ids)] = new.token_ids
            self.num_tokens[i] = len(new.token_ids)
            self.num_prompt_tokens[i] = new.num_prompt_tokens
            self.seeds[i] = new.seed % 2**64
            self.params[i] = new.sampling_params
            self.counts_tokens[i] = counts_tokens(new.sampling_params)
            self.takes_the_best[i] = takes_the_best(new.sampling_params)
            self.num_blocks[i] = 0
            self._append_blocks(i, new.block_ids)
        for i, block_ids in step.new_block_ids.items():
            self._append_blocks(i, block_ids)

    def _append_blocks(self, i: int, block_ids: list[int]) -> None:
        start = self.num_blocks[i]
        self.block_tables[i, start : start + len(block_ids)] = block_ids
        self.num_blocks[i] += len(block_ids)

    def append_sampled(
        self, state_idx: NDArray[np.int64], numbers: NDArray[np.int64], token_ids: NDArray[np.int64]
    ) -> None:
        """Notes one sampled token each on the CPU, all [S].

        The next step may be applied already, so a state may belong to another request by now.
        """
        same = self.numbers[state_idx] == numbers
        i = state_idx[same]
        self.token_ids[i, self.num_tokens[i]] = token_ids[same]
        self.num_tokens[i] += 1

    def __len__(self) -> int:
        return int((self.numbers != FREE).sum())
