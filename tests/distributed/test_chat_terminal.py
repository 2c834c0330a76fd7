"""`twofold chat` on a terminal: typing during an answer, Ctrl-C, and commands."""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# The terminal must be the one that Ctrl-C comes from: the first that a new session opens.
CHILD = (
    "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); from twofold.cli.main import main; sys.exit(main())"
)


class Endless(BaseHTTPRequestHandler):
    """Answers a message that ends with "!" at once. Any other answer begins, and does not end."""

    asked: list[str]
    done: threading.Event

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "stub"}]}))

    def do_POST(self) -> None:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = body["messages"][-1]["content"]
        self.asked.append(message)
        self._send("data: " + json.dumps({"choices": [{"delta": {"content": f"<answer to {message}>"}}]}) + "\n\n")
        if not message.endswith("!"):
            self.done.wait(30)

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


class Terminal:
    """`twofold chat` on a terminal of its own."""

    def __init__(self, url: str) -> None:
        self._screen, terminal = os.openpty()
        command = [sys.executable, "-c", CHILD, "chat", "--url", url]
        environment = os.environ | {"TERM": "dumb"}
        streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.process = subprocess.Popen(command, start_new_session=True, env=environment, **streams)
        os.close(terminal)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def interrupt(self, shown: str) -> None:
        """Presses Ctrl-C until this is shown. A signal that comes just before a system call is seen only after it."""
        for _ in range(5):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(shown, 3)
        raise AssertionError(self.shown)

    def wait_for(self, text: str, seconds: float = 20) -> None:
        """Reads what is shown until `text` comes, and forgets all up to it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._screen], [], [], 0.5)[0]:
                self.shown += os.read(self._screen, 4096).decode()
        self.shown = self.shown.partition(text)[2]

    def close(self) -> None:
        os.close(self._screen)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    Endless.asked, Endless.done = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        terminal = Terminal(f"http://127.0.0.1:{server.server_address[1]}")
        try:
            yield terminal
        finally:
            terminal.close()
            Endless.done.set()
            server.shutdown()
            thread.join()


def test_what_is_typed_during_an_answer_is_the_next_message(terminal: Terminal) -> None:
    """Ctrl-C once took the line with it that was being typed, as the kernel does unless told otherwise; and the line
    was shown in the middle of the answer.
    """
    terminal.wait_for("> ")
    terminal.type("first\n")
    terminal.wait_for("<answer to first>")
    terminal.type("secn\x7fond!\nthi\x1b[Drd")
    with pytest.raises(AssertionError):
        terminal.wait_for("thi", 0.5)  # it is not shown in the middle of the answer
    terminal.interrupt("stopped")
    terminal.wait_for("> second!")
    terminal.wait_for("<answer to second!>")
    terminal.wait_for("> third")  # it can be continued
    terminal.type(" one!\n")
    terminal.wait_for("<answer to third one!>")
    assert Endless.asked == ["first", "second!", "third one!"]


def test_commands(terminal: Terminal) -> None:
    """A mistyped command is no message, and Ctrl-C takes a line away but not the conversation."""
    terminal.wait_for("/help lists the commands")
    terminal.wait_for("> ")
    terminal.type("/help\n")
    terminal.wait_for("put a file's text before the next message")
    terminal.wait_for("> ")
    terminal.type("/hlep\n")
    terminal.wait_for("error: there is no command /hlep; /help lists them")
    terminal.wait_for("> ")
    terminal.type("/etc/hosts is a file!\n")
    terminal.wait_for("<answer to /etc/hosts is a file!>")
    terminal.wait_for("> ")
    terminal.type("nev")
    terminal.wait_for("nev")
    terminal.interrupt("/quit or Ctrl-D ends")
    terminal.type("more!\n")
    terminal.wait_for("<answer to more!>")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(10) == 0
    assert Endless.asked == ["/etc/hosts is a file!", "more!"]
