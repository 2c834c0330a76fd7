"""From sampled token ids to what the user sees: text, log-probabilities, reasons, times."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from twofold.contract import PromptTokenLogprobs, TokenLogprobs
from twofold.engine.detokenizer import Detokenizer, to_logprobs
from twofold.engine.request import Request, RequestStatus
from twofold.outputs import CompletionOutput, Logprobs, PromptLogprobs, RequestMetrics, RequestOutput
from twofold.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Sequence:
    """One of a request's `n` answers."""

    index: int
    request: Request
    detokenizer: Detokenizer
    logprobs: Logprobs | None
    cumulative_logprob: float = 0.0
    num_delivered: int = 0  # tokens that outputs had, where these are deltas


@dataclass(slots=True)
class UserRequest:
    """What a user sent: one prompt and its `n` sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    @property
    def finished(self) -> bool:
        return all(sequence.request.finished for sequence in self.sequences)


class OutputProcessor:
    """Keeps the users' requests that are not finished, and turns each step's tokens into their outputs."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.tokenizer = tokenizer
        self.user_requests: dict[str, UserRequest] = {}
        self._sequence_of: dict[int, tuple[UserRequest, Sequence]] = {}  # by number of the request

    def add(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        requests: list[Request],
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
    ) -> None:
        """Takes a user's request, as the scheduler's `requests`: one for each answer."""
        prompt_token_ids = requests[0].prompt_token_ids.tolist()
        user = UserRequest(
            request_id,
            prompt,
            prompt_token_ids,
            params,
            RequestMetrics(requests[0].arrival_time, num_prompt_tokens=len(prompt_token_ids)),
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(prompt_token_ids),
            output_kind=output_kind,
        )
        for index, request in enumerate(requests):
            detokenizer = Detokenizer(self.tokenizer, prompt_token_ids, params)
            sequence = Sequence(index, request, detokenizer, None if params.logprobs is None else [])
            user.sequences.append(sequence)
            self._sequence_of[request.number] = (user, sequence)
        self.user_requests[request_id] = user

    def add_prompt_logprobs(self, piece: PromptTokenLogprobs) -> None:
        """Takes log-probabilities of prompt tokens; after a preemption they come twice."""
        if (entry := self._sequence_of.get(piece.number)) is None:
            return
        user, _ = entry
        assert user.prompt_logprobs is not None
        assert user.params.prompt_logprobs is not None
        rows = to_logprobs(piece.logprobs, user.params.prompt_logprobs, self.tokenizer)
        user.prompt_logprobs[piece.position : piece.position + len(rows)] = rows

    def add_token(self, request: Request, token: int, logprobs: TokenLogprobs | None, row: int) -> str | None:
        """Takes a sampled token, and row `row` of the step's log-probabilities; the stop string that it completes."""
        user, sequence = self._sequence_of[request.number]
        if user.metrics.first_token_time is None:
            user.metrics.first_token_time = time.time()
            user.metrics.num_cached_tokens = request.num_cached_tokens
        if sequence.logprobs is not None and logprobs is not None:
            one = TokenLogprobs(
                logprobs.token_ids[row : row + 1], logprobs.logprobs[row : row + 1], logprobs.ranks[row : row + 1]
            )
            sequence.cumulative_logprob += float(one.logprobs[0, 0])
            assert user.params.logprobs is not None
            sequence.logprobs += to_logprobs(one, user.params.logprobs, self.tokenizer)
        ends = request.status is RequestStatus.FINISHED_STOPPED
        if not ends or user.params.include_stop_str_in_output:
            return sequence.detokenizer.append([token])
        return None

    def is_due(self, request_id: str) -> bool:
        """Whether a request that changed gives an output now."""
        user = self.user_requests[request_id]
        return user.finished or user.output_kind is not RequestOutputKind.FINAL_ONLY

    def output(self, request_id: str) -> RequestOutput:
        """A user's request as it stands; once it is finished it is forgotten here."""
        user = self.user_requests[request_id]
        for sequence in user.sequences:
            if sequence.request.finished:
                sequence.detokenizer.finish()
        if user.finished:
            user.metrics.finished_time = time.time()
            user.metrics.num_output_tokens = sum(one.request.num_output_tokens for one in user.sequences)
            self.forget(request_id)
        return RequestOutput(
            request_id=user.request_id,
            prompt=user.prompt,
            prompt_token_ids=user.prompt_token_ids,
            prompt_logprobs=user.prompt_logprobs,
            outputs=[
                _delta(sequence) if user.output_kind is RequestOutputKind.DELTA else _completion(sequence)
                for sequence in user.sequences
            ],
            finished=user.finished,
            metrics=user.metrics,
            num_cached_tokens=user.metrics.num_cached_tokens,
        )

    def user_of(self, request: Request) -> UserRequest:
        return self._sequence_of[request.number][0]

    def forget(self, request_id: str) -> None:
        user = self.user_requests.pop(request_id)
        for sequence in user.sequences:
            del self._sequence_of[sequence.request.number]


def _completion(sequence: Sequence) -> CompletionOutput:
    request = sequence.request
    return CompletionOutput(
        index=sequence.index,
        text=sequence.detokenizer.text,
        token_ids=np.asarray(request.output_token_ids).tolist(),
        cumulative_logprob=None if sequence.logprobs is None else sequence.cumulative_logprob,
        logprobs=sequence.logprobs,
        finish_reason=request.finish_reason,  # type: ignore[arg-type]
        stop_reason=request.stop_reason,
    )


def _delta(sequence: Sequence) -> CompletionOutput:
    """What is new since the last one. Text that may turn out to begin a stop string is held back."""
    request, start = sequence.request, sequence.num_delivered
    sequence.num_delivered = request.num_output_tokens
    return CompletionOutput(
        index=sequence.index,
        text=sequence.detokenizer.delta(),
        token_ids=request.output_token_ids[start:].tolist(),
        cumulative_logprob=None if sequence.logprobs is None else sequence.cumulative_logprob,
        logprobs=None if sequence.logprobs is None else sequence.logprobs[start:],
        finish_reason=request.finish_reason,  # type: ignore[arg-type]
        stop_reason=request.stop_reason,
    )
