"""Time decode steps at batch 32 with and without structured outputs: the same prompts, the same number of tokens.

    python benchmarks/structured_steps.py --model demo --output-json F
    python benchmarks/structured_steps.py --model configs/Llama-3.1-8B --load-format dummy --tokenizer DIR

A tokenizer for a shape that has none comes from train_tokenizer.py. Every round has a batch without a form before and
after each batch with one. A form's cost is its median step over the median step of these two, less 1; the figure is the
median over rounds. The temperature is 1. No form ever ends.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from twofold import LLM
from twofold.bench.latency import start_drive
from twofold.bench.report import describe, environment
from twofold.config import EngineConfig
from twofold.engine.engine import LLMEngine
from twofold.flags import add_engine_arguments, chosen
from twofold.sampling_params import SamplingParams, StructuredOutputsParams

BATCH = 32
NUM_STEPS_ASIDE = 6  # at the start of a batch, while requests arrive and pipelines fill
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["person", "place", "thing"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 1000},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,10}$"}, "maxItems": 4},
        "at": {"type": "object", "properties": {"x": {"type": "number"}, "seen": {"type": "boolean"}}},
    },
    "required": ["name", "kind", "count", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {  # what requests of a timed step ask for
    "json schema": {
        "structured_outputs": StructuredOutputsParams(json={"type": "array", "minItems": 100_000, "items": RECORD})
    },
    "regex": {"structured_outputs": StructuredOutputsParams(regex="([A-Za-z]+[ ,])+!")},
    "bad_words": {"bad_words": ["the", "New York"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser)
    parser.add_argument("--num-steps", type=int, default=64, help="of a batch, of which the median is taken")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not timed")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    arguments = {"max_model_len": args.num_steps + 64, "max_num_seqs": BATCH} | chosen(args, EngineConfig)
    with LLM(**arguments) as llm:
        result = time_steps(llm.engine, args.num_steps, args.rounds)
        result |= {"settings": describe(llm.engine), "environment": environment()}
    print(json.dumps(result, indent=1))
    if args.output_json:
        args.output_json.write_text(json.dumps(result, indent=1) + "\n")


def time_steps(engine: LLMEngine, num_steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a decode step by form, of making its masks, and what the form adds to a step in percent."""
    masks = TimedMasks(engine)
    free_ms: list[float] = []
    steps_ms: dict[str, list[float]] = {name: [] for name in FORMS}
    costs: dict[str, list[float]] = {name: [] for name in FORMS}
    masks_ms: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(rounds + 1):
        before = median_step(engine, num_steps, {})
        for name, form in FORMS.items():
            masks.ms.clear()
            step = median_step(engine, num_steps, form)
            of_masks = masks.ms[NUM_STEPS_ASIDE:]
            after = median_step(engine, num_steps, {})
            if number:
                free_ms.append(after)
                steps_ms[name].append(step)
                costs[name].append((2 * step / (before + after) - 1) * 100)
                masks_ms[name] += of_masks
            before = after
    result: dict[str, Any] = {"batch": BATCH, "num_steps": num_steps, "rounds": rounds, "vocab_size": engine.vocab_size}
    result["no form"] = {"ms_per_step": round(statistics.median(free_ms), 3)}
    for name in FORMS:
        result[name] = {
            "ms_per_step": round(statistics.median(steps_ms[name]), 3),
            "cost_percent": round(statistics.median(costs[name]), 2),
            "cost_percent_of_rounds": [round(cost, 2) for cost in costs[name]],
            "masks_ms": {"median": round(statistics.median(masks_ms[name]), 3), "most": round(max(masks_ms[name]), 3)},
        }
    return result


class TimedMasks:
    """Times the masks of an engine's steps, in `ms`."""

    def __init__(self, engine: LLMEngine) -> None:
        self.ms: list[float] = []
        self._make = engine.masks.make
        engine.masks.make = self._timed  # type: ignore[method-assign]

    def _timed(self, *args: Any) -> Any:
        begin = time.perf_counter()
        masks = self._make(*args)
        self.ms.append((time.perf_counter() - begin) * 1e3)
        return masks


def median_step(engine: LLMEngine, num_steps: int, form: dict[str, Any]) -> float:
    """Milliseconds between two tokens of a batch whose requests ask for the form."""
    times = []
    with start_drive(engine) as drive:
        for number in range(BATCH):
            params = SamplingParams(max_tokens=num_steps, seed=number, ignore_eos=True, **form)
            drive.add(f"{number}", f"The city number {number} is", params)
        end = time.perf_counter()
        for outputs in drive:
            begin, end = end, time.perf_counter()
            if len(outputs) == BATCH:
                times.append((end - begin) * 1e3)
    return statistics.median(times[NUM_STEPS_ASIDE:-2])


if __name__ == "__main__":
    main()
