"""The last layer is skipped where its output is unused, and nowhere else."""

from typing import Any

import numpy as np
import pytest
import torch
from harness import generate, make_engine, prompt_logprobs, reference_continuation, reference_logprobs
from tiny_models import VOCAB_SIZE, tiny_config, tiny_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from twofold import SamplingParams
from twofold.engine.engine import LLMEngine
from twofold.models.decoder import DecoderModel
from twofold.models.transforms import last_layer
from twofold.models.transforms.compile import CompileLayers

PROMPT_LENS = (70, 9, 1)


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENS]


def count_tokens(engine: LLMEngine) -> list[tuple[list[int], list[int]]]:
    """Of each rank: tokens that the first layer's MLP sees in each step, and those that the last one's sees."""
    counts = []
    for model in engine.executor.models:  # type: ignore[attr-defined]
        of_first: list[int] = []
        of_last: list[int] = []
        for layer, seen in ((model.layers[0], of_first), (model.layers[-1], of_last)):
            layer.mlp.register_forward_hook(
                lambda _module, args, _out, seen=seen: seen.append(args[0].shape[1])  # type: ignore[misc]
            )
        counts.append((of_first, of_last))
    return counts


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_most_tokens_end_before_the_last_layer(num_ranks: int) -> None:
    """Chunks of 40 tokens, prompts of one and decodes meet in its steps; a rank's padding is a row, too."""
    model = tiny_model(tiny_config("llama"))
    engine = make_engine(model, num_ranks, max_num_batched_tokens=40)
    try:
        counts = count_tokens(engine)
        prompts = make_prompts()
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        outputs = generate(engine, prompts, params)
        for prompt, output in zip(prompts, outputs, strict=True):
            expected = reference_continuation(model, prompt, 4)
            assert output.outputs[0].token_ids[: len(expected)] == expected
        most_rows = 2 * len(prompts) + 1
        for of_first, of_last in counts:
            assert len(of_first) == len(of_last)
            assert max(of_last) <= most_rows < max(of_first)
            assert min(of_last) > 0
    finally:
        engine.shutdown()


def test_one_request_that_asks_has_all_tokens_read_as_long_as_its_prompt_is_computed() -> None:
    model = tiny_model(tiny_config("llama"))
    engine = make_engine(model, 1, max_num_batched_tokens=40)
    try:
        [(of_first, of_last)] = count_tokens(engine)
        rng = np.random.default_rng(4)
        prompts = [rng.integers(3, VOCAB_SIZE, length).tolist() for length in (20, 70)]
        asks, does_not = (SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=n) for n in (0, None))
        output, _ = generate(engine, prompts, [asks, does_not])
        assert output.prompt_logprobs is not None
        assert of_first[:3] == [20 + 20, 1 + 39, 1 + 11]
        assert of_last[:3] == [20 + 20, 1 + 1, 1 + 1]
    finally:
        engine.shutdown()


class ScaledParts(LlamaDecoderLayer):
    """A layer that gets one number for each part of its input's width: [1, parts, 1], whatever the tokens."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, part_scales: torch.Tensor, **kwargs: Any) -> Any:
        parts = hidden_states.unflatten(-1, (part_scales.shape[1], -1))  # [1, T, parts, X]
        return super().forward((parts * part_scales[:, None]).flatten(-2), *args, **kwargs)


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_only_what_grows_with_the_tokens_is_cut(num_parts: int) -> None:
    """Arguments were cut by their shape at run time: any [1, T, ...] counted as one of tokens.

    A step of as many tokens as a constant argument has parts cut the argument, too: with 2 or 4 parts, prompts of 2 or
    4 tokens got other answers than Transformers' (the step in which the cut was verified had 8). With 8 parts the
    model lost its cut.
    """
    model = tiny_model(tiny_config("llama"))
    scales = torch.linspace(0.5, 1.5, num_parts).view(1, num_parts, 1)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"part_scales": scales}), with_kwargs=True
    )
    for layer in model.model.layers:
        layer.__class__ = ScaledParts
    rng = np.random.default_rng(num_parts)
    for num_ranks in (1, 2):
        engine = make_engine(model, num_ranks)
        assert engine.executor.models[0].last_layer is not None  # type: ignore[attr-defined]
        try:
            for length in (num_parts, 2 * num_parts, num_parts + 1, 21):
                prompt = rng.integers(3, VOCAB_SIZE, length).tolist()
                [output] = generate(engine, [prompt], SamplingParams(temperature=0, max_tokens=3, logprobs=0))
                expected = reference_continuation(model, prompt, 3)
                assert output.outputs[0].token_ids[: len(expected)] == expected
                logits = model(torch.tensor([prompt])).logits[0, -1]
                assert output.outputs[0].logprobs is not None
                [first] = output.outputs[0].logprobs[0].values()
                assert first.logprob == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)
        finally:
            engine.shutdown()


def test_prompt_logprobs_read_all_tokens() -> None:
    model = tiny_model(tiny_config("llama"))
    engine = make_engine(model, 2)
    try:
        counts = count_tokens(engine)
        prompts = make_prompts()
        for found, prompt in zip(prompt_logprobs(engine, prompts), prompts, strict=True):
            np.testing.assert_allclose(found, reference_logprobs(model, prompt), rtol=0, atol=1e-4)
        for of_first, of_last in counts:
            assert of_first == of_last
            assert max(of_last) > 20
    finally:
        engine.shutdown()


class OtherRope(LlamaDecoderLayer):
    """Rotates `num_tokens` tokens by the positions of others; with more or fewer it is a Llama's layer."""

    num_tokens: int

    def forward(self, hidden_states: torch.Tensor, *args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] == self.num_tokens:
            position_embeddings = tuple(part.roll(1, dims=1) for part in position_embeddings)
        return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [len(lens) for lens in last_layer.PROMPT_LENS])
def test_a_last_layer_that_comes_out_differently_stays(
    num_tokens: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """In a step of either length."""
    model = tiny_model(tiny_config("llama")).to(dtype)
    model.model.layers[-1].__class__ = OtherRope
    model.model.layers[-1].num_tokens = num_tokens
    with caplog.at_level("INFO", logger="twofold"):
        decoder = DecoderModel(model)
    assert "transform 'last layer' is not used: results would change by" in caplog.text
    assert decoder.last_layer is None
    assert decoder.layers is not None
    assert not any(isinstance(layer, last_layer.LastLayer) for layer in decoder.layers)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v2", "gemma2", "gpt_oss"])
def test_bfloat16_does_not_hide_that_nothing_changes(model_type: str) -> None:
    assert DecoderModel(tiny_model(tiny_config(model_type)).to(torch.bfloat16)).last_layer is not None


def test_a_last_layer_that_comes_out_as_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN compares as neither more nor less than the tolerance."""

    def broken(self: last_layer.LastLayer, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        return out if self._attention is None else out * torch.nan

    forward = last_layer.LastLayer.forward
    monkeypatch.setattr(last_layer.LastLayer, "forward", broken)
    assert DecoderModel(tiny_model(tiny_config("llama"))).last_layer is None


class SquareArgument(LlamaDecoderLayer):
    """Gets a number for each pair of tokens, [1, T, T]."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, pairs: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(hidden_states * pairs.diagonal(dim1=1, dim2=2)[..., None], *args, **kwargs)


def test_an_argument_that_grows_otherwise_keeps_the_last_layer_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tiny_config("llama"))
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"pairs": torch.ones(1, *[kwargs["input_ids"].shape[1]] * 2)}),
        with_kwargs=True,
    )
    for layer in model.model.layers:
        layer.__class__ = SquareArgument
    with caplog.at_level("INFO", logger="twofold"):
        assert DecoderModel(model).last_layer is None
    assert "of (8, 11) tokens it gets an argument of (1, 8, 8), (1, 11, 11)" in caplog.text


def test_a_compiled_last_layer_is_cut() -> None:
    """The exception that ends its first run passes through compiled code; the second run has fewer tokens."""
    model = tiny_model(tiny_config("llama"))
    engine = make_engine(model, 1)
    [decoder] = engine.executor.models  # type: ignore[attr-defined]
    seen: list[int] = []
    decoder.last_layer.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for layer in CompileLayers(decoder.layers).layers:
        layer.compile(backend="aot_eager", dynamic=True)
    prompts = make_prompts()
    try:
        outputs = generate(engine, prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    finally:
        engine.shutdown()
        torch._dynamo.reset()
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference_continuation(model, prompt, 4)
        assert output.outputs[0].token_ids[: len(expected)] == expected
    assert seen == [sum(PROMPT_LENS), len(prompts), *[len(prompts)] * 3]


def test_families_find_what_they_look_for_in_a_layer() -> None:
    """Some ask a layer what kind of attention it has, before they call it."""
    layer = torch.nn.Linear(2, 3)
    stand_in = last_layer.LastLayer(layer)
    assert stand_in.out_features == 3
    with pytest.raises(AttributeError, match="attention_type"):
        _ = stand_in.attention_type
