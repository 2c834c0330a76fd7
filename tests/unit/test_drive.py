"""The offline loop: it leaves nothing behind, also when it is interrupted, and puts each answer together once."""

from collections.abc import Iterator
from itertools import count

import pytest
from harness import make_engine
from tiny_models import tiny_config, tiny_model

from twofold import RequestError, RequestOutput, SamplingParams
from twofold.engine.drive import Drive
from twofold.engine.engine import LLMEngine
from twofold.engine.output_processor import OutputProcessor
from twofold.sampling_params import RequestOutputKind

PROMPTS = [[5, 6, 7], list(range(20, 90)), [8]]
PARAMS = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(params=[1, 2], ids=["one-step", "two-steps"])
def engine(request: pytest.FixtureRequest) -> Iterator[LLMEngine]:
    engine = make_engine(tiny_model(tiny_config("llama")), 2, max_num_batched_tokens=24, steps_in_flight=request.param)
    yield engine
    engine.shutdown()


ids = map(str, count())


def answer(engine: LLMEngine, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY) -> list[list[int]]:
    """The tokens of each answer."""
    names, tokens = [next(ids) for _ in PROMPTS], {}
    with Drive(engine, output_kind=kind) as drive:
        for name, prompt in zip(names, PROMPTS, strict=True):
            drive.add(name, prompt, PARAMS)
        for outputs in drive:
            tokens |= {output.request_id: output.outputs[0].token_ids for output in outputs if output.finished}
    return [tokens[name] for name in names]


def test_answers_are_put_together_once(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of an offline answer once copied the whole answer into an output that was never read."""
    expected = answer(engine, RequestOutputKind.CUMULATIVE)
    assert [len(tokens) for tokens in expected] == [6, 6, 6]
    made = count()
    output = OutputProcessor.output

    def counted(self: OutputProcessor, request_id: str) -> RequestOutput:
        next(made)
        return output(self, request_id)

    monkeypatch.setattr(OutputProcessor, "output", counted)
    assert answer(engine) == expected
    assert next(made) == len(PROMPTS)
    assert engine.is_idle


@pytest.mark.parametrize("step_number", range(1, 6))
def test_an_interrupt_leaves_the_engine_usable(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, step_number: int
) -> None:
    """Guards who presses Ctrl-C and asks again: nothing of the first call is left, and the answers are right."""
    expected = answer(engine)
    step, steps = engine.step, count(1)

    def interrupted() -> list[RequestOutput]:
        if next(steps) == step_number:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(engine)
    assert not engine.has_unfinished_requests
    assert answer(engine) == expected
    assert engine.is_idle


def test_a_caller_that_fails_leaves_nothing_behind(engine: LLMEngine) -> None:
    """Guards the next caller from requests of one that raised in the midst of its own loop, or never began it."""

    def fail_between_steps() -> None:
        with Drive(engine) as drive:
            drive.add("a", PROMPTS[1], PARAMS)
            next(drive)
            raise ZeroDivisionError

    def add_a_wrong_prompt() -> None:
        with Drive(engine) as drive:
            drive.add("b", PROMPTS[1], PARAMS)
            drive.add("c", [], PARAMS)

    with pytest.raises(ZeroDivisionError):
        fail_between_steps()
    with pytest.raises(RequestError, match="empty"):
        add_a_wrong_prompt()
    assert not engine.has_unfinished_requests
    assert len(answer(engine)) == len(PROMPTS)


def test_an_id_in_use_is_left_to_whose_it_is(engine: LLMEngine) -> None:
    """Guards another caller's request from the clean-up of one that chose the same id."""
    engine.add_request("a", PROMPTS[0], PARAMS)

    def add_again() -> None:
        with Drive(engine) as drive:
            drive.add("a", PROMPTS[1], PARAMS)

    with pytest.raises(RequestError, match="in use") as refusal:
        add_again()
    assert refusal.value.field == "request_id"
    assert engine.has_unfinished_requests
    assert len(answer(engine)) == len(PROMPTS)


def test_the_bar_counts_prompts_and_answers(engine: LLMEngine, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the totals with several answers to a prompt: each of them has the prompt's tokens."""
    with Drive(engine, show_progress=True) as drive:
        drive.add("a", [5, 6, 7], SamplingParams(n=2, seed=1, max_tokens=4))
        drive.add("b", [8], PARAMS)
        for _ in drive:
            pass
    error = capsys.readouterr().err
    assert "7/7" in error
    assert "answers 2/2, 14 tokens" in error
