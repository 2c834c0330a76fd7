"""The `twofold` command. Each sub-command is a module of this package, and imports PyTorch only when it runs.

Exit codes: see EXIT_CODES. An error is one line on stderr.
"""

import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from io import TextIOWrapper
from typing import Any, NoReturn

from twofold import EngineError, UserError, __version__, streams
from twofold.cli import bench, chat, explain, generate, models, plan, serve

COMMANDS = {
    "generate": generate, "serve": serve, "chat": chat, "plan": plan, "explain": explain, "models": models,
    "bench": bench,
}  # fmt: skip
RANKS = dict.fromkeys(("-tp", "--tensor-parallel-size"), "-pcp")  # what vLLM's users ask for first
EXIT_CODES = """\
exit codes: 0 success; 1 a prompt was refused or the engine failed;
            2 wrong arguments, configuration or model; 130 interrupted (Ctrl-C)"""


class Parser(ArgumentParser):
    """Reports a wrong argument in one line, and says which one may have been meant."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what is not known here. argparse would leave a command's flags to its parent, which has none."""
        self._given = sys.argv[1:] if args is None else list(args)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}{self._did_you_mean(message)} (see {self.prog} --help)\n")

    def _did_you_mean(self, message: str) -> str:
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            words, known = [wrong[1]], re.findall(r"[\w-]+", wrong[2])
        else:
            words = [word.partition("=")[0] for word in self._given if word.startswith("-")]
            known = re.findall(r"(?<![\w-])--?\w[\w-]*", self.format_usage())
        for word in words:
            near = [RANKS[word]] if word in RANKS else get_close_matches(word, known, 1, cutoff=0.65)
            if word not in known and near and near[0] in known:
                return f"; did you mean {near[0]} in place of {word}?"
        return ""


def make_parser() -> ArgumentParser:
    parser = Parser(
        prog="twofold",
        description="Fast answers to long prompts: each prompt's prefill is split over several ranks.",
        epilog=EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"twofold {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = str(module.__doc__).partition("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=EXIT_CODES,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line → the exit code."""
    _open_streams()
    try:
        code = _run(argv)
    except OSError as error:
        code = _fail(error, 1) if streams.flush_or_drop(sys.stdout) is None else _lose_output(error)
    else:
        if (lost := streams.flush_or_drop(sys.stdout)) is not None:
            code = _lose_output(lost)
    streams.flush_or_drop(sys.stderr)
    return code


def _open_streams() -> None:
    streams.reserve_numbers()
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or streams.failing_stream()
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, TextIOWrapper):  # in any locale, since answers can have any character
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = make_parser().parse_args(argv)
        code: int = args.run(args)
        return code
    except SystemExit as stop:  # argparse: a wrong argument, or --help
        return int(stop.code or 0)
    except UserError as error:
        return _fail(error, 2)
    except EngineError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _lose_output(error: OSError) -> int:
    """Ends a command whose output cannot be written. A reader that has closed its pipe wants to hear nothing of it."""
    return 1 if isinstance(error, BrokenPipeError) else _fail(f"cannot write to stdout: {error.strerror}", 1)


def _fail(error: Exception | str, code: int) -> int:
    with suppress(OSError):
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
