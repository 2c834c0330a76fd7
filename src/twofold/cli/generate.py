"""answer prompts: text or JSON on stdout, progress on stderr

Prompts are answered together; answers are printed in the order of the prompts. A prompt that cannot be served is
reported in one line on stderr, and the others are answered. With --json each prompt gives one line on stdout:
prompt_token_ids, token_ids, text, finish_reason and metrics (ttft and e2e in seconds, num_prompt_tokens,
num_cached_tokens), or error alone.
"""

import json
import logging
import sys
import time
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from tqdm import tqdm

from twofold import ConfigError, RequestError, RequestOutput, SamplingParams
from twofold.config import EngineConfig
from twofold.engine.drive import Drive
from twofold.engine_args import EngineArgs
from twofold.errors import GIVEN_UP, EngineError, TwofoldError
from twofold.flags import add_engine_arguments, add_fields, chosen

if TYPE_CHECKING:
    from twofold import LLM

DEFAULTS = {"temperature": 0, "max_tokens": 256}  # where the model has no others; SamplingParams has others, too
SAMPLING_HELP = {
    "max_tokens": "largest number of tokens in an answer",
    "min_tokens": "smallest number of tokens in an answer",
    "temperature": "0 always takes the most likely token",
    "top_k": "sample from the N most likely tokens; 0 is off",
    "top_p": "sample from the most likely tokens that have this probability together",
    "min_p": "sample from tokens at least this likely, relative to the most likely one",
    "presence_penalty": "penalty for tokens that are in the answer already",
    "frequency_penalty": "penalty for each time that a token is in the answer already",
    "repetition_penalty": "factor against tokens that are in the prompt or the answer already; 1 is off",
    "stop": "text that ends an answer; may be given more than once",
    "stop_token_ids": "token that ends an answer; may be given more than once",
    "ignore_eos": "continue after the end-of-sequence token",
}


class _Source(NamedTuple):
    """A prompt on the command line."""

    flag: str
    value: str


def configure(parser: ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts; each flag may be given more than once")
    for flag, metavar, text in (
        ("--prompt", "TEXT", "a prompt"),
        ("--prompt-file", "FILE", "a file that is a prompt, in UTF-8; - is standard input"),
        ("--prompt-token-ids", "IDS", "a prompt as token ids: 1,2,3"),
    ):
        source = partial(_Source, flag)
        prompts.add_argument(flag, dest="prompts", action="append", metavar=metavar, help=text, type=source)
    prompts.add_argument(
        "--chat", action="store_true", help="apply the model's chat template: each prompt is a user's message"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one line of JSON for each prompt")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    add_fields(parser.add_argument_group("sampling"), SamplingParams, SAMPLING_HELP, DEFAULTS)
    add_engine_arguments(parser)


def run(args: Namespace) -> int:
    # All errors that need no model are reported before PyTorch is imported.
    config = EngineArgs.from_cli_args(args)
    given = chosen(args, SamplingParams)
    SamplingParams(**(DEFAULTS | given))
    if not args.prompts:
        raise ConfigError("no prompt; give --prompt, --prompt-file or --prompt-token-ids", field="prompt")
    answers = _Answers(args.prompts, args.json, args.quiet)
    prompts: dict[int, Any] = {}
    for number, source in enumerate(args.prompts):
        try:
            prompts[number] = _read(source)
        except RequestError as error:
            answers.refuse(number, error)
    if prompts:
        with _load(config, args.quiet) as llm:
            params = SamplingParams(**{**DEFAULTS, **llm.engine.runtime.sampling_defaults, **given})
            with Drive(llm.engine, show_progress=not args.quiet) as drive:
                for number, prompt in prompts.items():
                    try:
                        if args.chat and isinstance(prompt, str):
                            prompt = llm.chat_prompt([{"role": "user", "content": prompt}])
                        drive.add(str(number), prompt, params)
                    except RequestError as error:
                        answers.refuse(number, error)
                for outputs in drive:
                    for output in outputs:
                        answers.finish(int(output.request_id), output)
            answers.summarise()
    return 1 if answers.num_refused else 0


def _read(source: _Source) -> str | dict[str, Any]:
    """Reads a prompt: its text, or its token ids."""
    flag, value = source
    try:
        if flag == "--prompt-token-ids":
            return {"prompt_token_ids": [int(token) for token in value.split(",") if token.strip()]}
        if flag == "--prompt-file":
            data = sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()
        else:
            data = value.encode(errors="surrogateescape")  # as it came on the command line
        return data.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        message = f"it is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        raise RequestError(message, field="prompt") from None
    except OSError as error:
        raise RequestError(f"it cannot be read: {error.strerror}", field="prompt") from None
    except ValueError:
        message = f"token ids must be integers with commas between them, got {value!r}"
        raise RequestError(message, field="prompt") from None


def _load(config: EngineConfig, quiet: bool) -> "LLM":
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    start = time.perf_counter()
    with console.status("loading PyTorch and Transformers") as status:
        from twofold import LLM

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each attempt to reach the hub
        imports = time.perf_counter() - start
        num_ranks = config.prefill_context_parallel_size
        ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
        status.update(f"loading {config.model} on {ranks}")
        llm = LLM(**vars(config))
    runtime, seconds = llm.engine.runtime, time.perf_counter() - start
    reports = llm.engine.reports
    phases = {name: max(report.seconds.get(name, 0.0) for report in reports) for name in reports[0].seconds}
    console.print(
        f"{config.model} is ready on {ranks} ({runtime.device}, {str(runtime.dtype).removeprefix('torch.')}) after "
        f"{seconds:.1f} s: imports {imports:.1f}, starting {seconds - imports:.1f}"
        + (f" (of that {', '.join(f'{name} {phases[name]:.1f}' for name in phases)})" if phases else "")
    )
    return llm


class _Answers:
    """Prints each answer as soon as those of all earlier prompts are printed."""

    def __init__(self, prompts: list[_Source], as_json: bool, quiet: bool) -> None:
        self._names = [
            f"prompt {number}" + (f" ({source.value})" if source.flag == "--prompt-file" else "")
            for number, source in enumerate(prompts, 1)
        ]
        self._json, self._quiet = as_json, quiet
        self._done: dict[int, RequestOutput | TwofoldError] = {}
        self._num_printed = 0

    @property
    def num_refused(self) -> int:
        return sum(isinstance(done, TwofoldError) for done in self._done.values())

    def refuse(self, number: int, error: TwofoldError) -> None:
        message = " ".join(str(error).split())
        print(f"error: {self._names[number]}: {message}", file=sys.stderr)
        self._take(number, error)

    def finish(self, number: int, output: RequestOutput) -> None:
        if output.outputs[0].finish_reason == "error":
            self.refuse(number, EngineError(GIVEN_UP))
        else:
            self._take(number, output)

    def summarise(self) -> None:
        """Prints a line on stderr for each answer: its numbers of tokens, and its times."""
        for number, done in sorted(self._done.items()):
            if isinstance(done, RequestOutput) and done.metrics is not None and not self._quiet:
                metrics, answer = done.metrics, done.outputs[0]
                print(
                    f"{self._names[number]}: {metrics.num_prompt_tokens} tokens ({metrics.num_cached_tokens} cached), "
                    f"first token after {metrics.ttft:.2f} s, "
                    f"{len(answer.token_ids)} tokens after {metrics.e2e:.2f} s, {answer.finish_reason}",
                    file=sys.stderr,
                )

    def _take(self, number: int, done: RequestOutput | TwofoldError) -> None:
        self._done[number] = done
        while self._num_printed in self._done:
            line = self._line(self._num_printed)
            if line is not None:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            self._num_printed += 1

    def _line(self, number: int) -> str | None:
        done = self._done[number]
        if self._json:
            return json.dumps(_as_json(done), ensure_ascii=False)
        if isinstance(done, TwofoldError):
            return None
        header = f"=== {self._names[number]}\n" if len(self._names) > 1 else ""
        return header + done.outputs[0].text


def _as_json(done: RequestOutput | TwofoldError) -> dict[str, Any]:
    if isinstance(done, TwofoldError):
        return {"error": str(done)}
    answer, metrics = done.outputs[0], done.metrics
    assert metrics is not None
    return {
        "prompt_token_ids": done.prompt_token_ids,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "metrics": {
            "ttft": metrics.ttft,
            "e2e": metrics.e2e,
            "num_prompt_tokens": metrics.num_prompt_tokens,
            "num_cached_tokens": metrics.num_cached_tokens,
        },
    }
