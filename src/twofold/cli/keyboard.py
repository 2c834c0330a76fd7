"""Lines that somebody types, some of them while the command is busy."""

import contextlib
import os
import re
import select
import sys
import termios
from collections import deque
from collections.abc import Iterator
from functools import partial

LOCAL_FLAGS = 3  # of the list that termios calls attributes
CONTROLS = re.compile(r"\x1b(\[[0-9;]*[A-Za-z~]|O[A-Z])")  # arrow keys and their like


class Keyboard:
    """Reads lines from the terminal. What is typed during an answer is not shown then, and not lost."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()  # typed ahead, with Enter
        self._begun = ""  # and without
        self._readline = None
        with contextlib.suppress(ImportError):
            import readline  # input() then has editing and a history

            self._readline = readline
        self._terminal = sys.stdin.fileno() if sys.stdin.isatty() else None

    def read_line(self, prompt: str) -> str:
        """Raises EOFError when the input ends."""
        if self._lines:
            print(prompt + self._lines[0])
            return self._lines.popleft()
        begun, self._begun = self._begun, ""
        if self._readline is None:
            return begun + input(prompt + begun)
        self._readline.set_startup_hook(partial(self._readline.insert_text, begun))  # it can be edited
        return input(prompt)

    @contextlib.contextmanager
    def typing_ahead(self) -> Iterator[None]:
        """Meanwhile the terminal shows nothing of what is typed, and Ctrl-C takes nothing of it away."""
        if self._terminal is None:
            yield
            return
        before = termios.tcgetattr(self._terminal)
        quiet = termios.tcgetattr(self._terminal)
        quiet[LOCAL_FLAGS] = quiet[LOCAL_FLAGS] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
        termios.tcsetattr(self._terminal, termios.TCSADRAIN, quiet)
        try:
            yield
        finally:
            self._keep_typed(self._terminal)
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, before)

    def _keep_typed(self, terminal: int) -> None:
        typed = b""
        while select.select([terminal], [], [], 0)[0] and (more := os.read(terminal, 4096)):
            typed += more
        text = self._begun
        for character in typed.decode(errors="replace"):
            text = text[:-1] if character in "\b\x7f" else text + character
        *lines, self._begun = text.split("\n")
        self._lines += [_printable(line) for line in lines]
        self._begun = _printable(self._begun)


def _printable(text: str) -> str:
    """Without arrow keys and other controls."""
    return "".join(filter(str.isprintable, CONTROLS.sub("", text)))
