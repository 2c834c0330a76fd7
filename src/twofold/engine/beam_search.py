"""Beam search over an engine: the engine gives each beam's most likely next tokens, and knows nothing of beams.

As in Transformers: of the 2 B most likely continuations of all beams, those among the first B that end are answers, and
the first B that do not end are the next beams. It is over when B answers are better than what the best beam may become.
"""

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from twofold.engine.drive import Drive
from twofold.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from twofold.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from twofold.engine.engine import LLMEngine

Beam = tuple[float, list[int]]  # log-probability and tokens of the answer


@dataclass(slots=True)
class _Search:
    """One prompt's."""

    prompt: list[int]
    beams: list[Beam] = field(default_factory=lambda: [(0.0, [])])
    answers: list[tuple[float, Beam]] = field(default_factory=list)  # score; the best one first


def beam_search(
    engine: "LLMEngine", prompts: list[Any], params: BeamSearchParams, *, show_progress: bool = False
) -> list[BeamSearchOutput]:
    """Answers each prompt with its `beam_width` best answers.

    Raises:
        RequestError: a prompt cannot be served, or `max_logprobs` is below twice the `beam_width`.
    """
    searches = [_Search([int(token) for token in engine.tokenize(prompt)[1]]) for prompt in prompts]
    eos = frozenset() if params.ignore_eos else engine.runtime.eos_token_ids
    one_token = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * params.beam_width, detokenize=False)
    for length in range(1, params.max_tokens + 1):
        open_ones = [search for search in searches if search.beams]
        if not open_ones:
            break
        answers = iter(_next_tokens(engine, open_ones, one_token, show_progress))
        for search in open_ones:
            found = [(beam, next(answers)) for beam in search.beams]
            has_room = len(search.prompt) + length + 1 < engine.scheduler.max_num_tokens
            _advance(search, found, eos, params, is_last=length == params.max_tokens or not has_room)
    return [
        BeamSearchOutput([_sequence(engine, search, beam, eos, params) for _, beam in search.answers])
        for search in searches
    ]


def _next_tokens(
    engine: "LLMEngine", searches: list[_Search], params: SamplingParams, show_progress: bool
) -> list[RequestOutput]:
    """One token of each beam of each search."""
    ids = count()
    finished: dict[str, RequestOutput] = {}
    with Drive(engine, show_progress=show_progress) as drive:
        for search in searches:
            for _, tokens in search.beams:
                drive.add(f"beam-{next(ids)}", search.prompt + tokens, params)
        for outputs in drive:
            finished.update((output.request_id, output) for output in outputs)
    return [finished[f"beam-{number}"] for number in range(next(ids))]


def _advance(
    search: _Search,
    found: list[tuple[Beam, RequestOutput]],
    eos: frozenset[int],
    params: BeamSearchParams,
    *,
    is_last: bool,
) -> None:
    width = params.beam_width
    continued: list[Beam] = []
    for (logprob, tokens), output in found:
        assert output.outputs[0].logprobs is not None
        best = list(output.outputs[0].logprobs[0].items())[: 2 * width]
        continued += [(logprob + one.logprob, [*tokens, token]) for token, one in best]
    continued = sorted(continued, key=lambda beam: -beam[0])[: 2 * width]
    ended = [beam for beam in continued[:width] if beam[1][-1] in eos]
    search.beams = [beam for beam in continued if beam[1][-1] not in eos][:width]
    if is_last:
        ended += search.beams
    search.answers += [(_score(beam, params), beam) for beam in ended]
    search.answers = sorted(search.answers, key=lambda answer: -answer[0])[:width]
    is_full = len(search.answers) == width
    if is_last or (is_full and search.beams and _score(search.beams[0], params) <= search.answers[-1][0]):
        search.beams = []


def _score(beam: Beam, params: BeamSearchParams) -> float:
    logprob, tokens = beam
    return logprob / float(len(tokens) ** params.length_penalty)


def _sequence(
    engine: "LLMEngine", search: _Search, beam: Beam, eos: frozenset[int], params: BeamSearchParams
) -> BeamSearchSequence:
    logprob, tokens = beam
    ended = tokens[-1] in eos
    if ended and not params.include_stop_str_in_output:
        tokens = tokens[:-1]
    tokens = search.prompt + tokens
    text = None if engine.tokenizer is None else engine.tokenizer.decode(tokens, skip_special_tokens=True)
    return BeamSearchSequence(tokens, logprob, text, "stop" if ended else "length")
