"""talk to a running server, and see its progress with a long prompt

Type a message and press Enter; /help lists the commands. What is typed during an answer becomes the next message.
Ctrl-C stops an answer. With MESSAGE the command prints one answer on stdout and ends.
"""

import contextlib
import json
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from twofold.cli.keyboard import Keyboard
from twofold.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import httpx

BAR_WIDTH = 30
HELP = """\
/file PATH  put a file's text before the next message
/new        start a new conversation
/quit       end, as Ctrl-D does
Ctrl-C      stop an answer
What you type during an answer is shown after it, and becomes the next message."""


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("message", nargs="?", metavar="MESSAGE", help="ask this, print the answer and end")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server (default: %(default)s)")
    parser.add_argument("--api-key", default=None, help="key that the server asks for (default: $OPENAI_API_KEY)")
    parser.add_argument("--model", default=None, help="name of the model (default: the first that the server lists)")
    parser.add_argument("--system", default=None, metavar="TEXT", help="system message, before all others")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="text to put before the message")
    parser.add_argument(
        "--temperature", type=float, default=None, metavar="X", help="0 always takes the most likely token"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=None, metavar="N", help="largest number of tokens in an answer"
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="for sampling")


def run(args: Namespace) -> int:
    import httpx

    key = args.api_key or os.environ.get("OPENAI_API_KEY", "")
    timeout = httpx.Timeout(None, connect=10)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=args.url, headers=headers, timeout=timeout) as client:
        chat = Chat(client, args)
        files = [_read(path) for path in args.file]
        if args.message is not None:
            chat.ask("\n\n".join([*files, args.message]))
            return 0
        return _talk(chat, files)


def _talk(chat: "Chat", files: list[str]) -> int:
    """Answers messages from the terminal until its input ends → the exit code."""
    keyboard = Keyboard()
    chat.console.print(f"{chat.model}. /help lists the commands", style="dim")
    while True:
        try:
            line = keyboard.read_line("> ").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            chat.console.print("\n/quit or Ctrl-D ends", style="dim")
            continue
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return 0
            if command == "/help":
                chat.console.print(HELP, style="dim")
            elif command == "/new":
                chat.forget()
            elif command == "/file":
                files.append(_read(rest.strip()))
                chat.console.print(f"{len(files[-1])} characters", style="dim")
            elif command.startswith("/") and command[1:].isalpha():
                raise ConfigError(f"there is no command {command}; /help lists them")
            elif line:
                with keyboard.typing_ahead():
                    chat.ask("\n\n".join([*files, line]))
                files.clear()
        except (ConfigError, EngineError) as error:
            chat.console.print(f"error: {error}", style="red")
        except KeyboardInterrupt:
            chat.console.print("\nstopped", style="dim")


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read {path!r}: {reason}", field="file") from None


class Chat:
    """A conversation with a server."""

    def __init__(self, client: "httpx.Client", args: Namespace) -> None:
        self.client, self._system = client, args.system
        self.console = Console(stderr=True, highlight=False)
        with self._connected():
            models = self._checked(client.get("/v1/models")).json()["data"]
        self.model = args.model or models[0]["id"]
        given = {"temperature": args.temperature, "max_tokens": args.max_tokens, "seed": args.seed}
        self._sampling = {name: value for name, value in given.items() if value is not None}
        self.forget()

    def forget(self) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, message: str) -> None:
        """Prints the answer as it comes. Message and answer join the conversation if the answer is whole."""
        asked = [*self.messages, {"role": "user", "content": message}]
        body = {
            "model": self.model,
            "messages": asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        start = time.perf_counter()
        first, text = None, ""
        usage: dict[str, Any] = {}
        with self._connected(), self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            self._checked(response)
            for event in self._events(response):
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    piece = choice["delta"].get("content")
                    if piece:
                        first = first or time.perf_counter()
                        text += piece
                        print(piece, end="", flush=True)
        print(flush=True)
        self.messages = [*asked, {"role": "assistant", "content": text}]
        if first is not None and usage:
            self._tell_times(usage, first - start, time.perf_counter() - first)

    def _tell_times(self, usage: dict[str, Any], waited: float, wrote: float) -> None:
        cached, written = usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]
        speed = f", {(written - 1) / wrote:.1f} tokens/s" if written > 1 and wrote > 0 else ""
        self.console.print(
            f"{usage['prompt_tokens']} tokens ({cached} cached), first after {waited:.2f} s; {written} tokens{speed}",
            style="dim",
        )

    def _events(self, response: "httpx.Response") -> Iterator[dict[str, Any]]:
        """The events of a stream. Its comments are shown on the last line of the terminal until an event comes."""
        shown = False
        for line in response.iter_lines():
            if line.startswith(": ") and self.console.is_terminal:
                self._overwrite(_as_bar(line[2:]))
                shown = True
            elif line.startswith("data: ") and line != "data: [DONE]":
                if shown:
                    self._overwrite("")
                    shown = False
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise EngineError(event["error"]["message"])
                yield event

    def _overwrite(self, text: str) -> None:
        """Replaces the last line of the terminal."""
        self.console.file.write(f"\r\x1b[K{text}")
        self.console.file.flush()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.HTTPError as error:
            raise EngineError(f"no answer from {self.client.base_url}: {error}") from None

    def _checked(self, response: "httpx.Response") -> "httpx.Response":
        if response.is_error:
            try:
                message = json.loads(response.read())["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"the server answered {response.status_code}"
            raise EngineError(message)
        return response


def _as_bar(note: str) -> str:
    """Draws a bar for `prefill 4096/8192`; returns other notes unchanged."""
    done, _, total = note.removeprefix("prefill ").partition("/")
    if not (done.isdigit() and total.isdigit() and int(total)):
        return note
    width = BAR_WIDTH * int(done) // int(total)
    return f"prefill {'█' * width}{'░' * (BAR_WIDTH - width)} {int(done):,} of {int(total):,} tokens"
