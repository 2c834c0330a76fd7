"""The command on machines that refuse something: it works, or it says in one line why not, with the right exit code."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "twofold.cli.main"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def shell(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a script whose "$@" is a command line of Twofold's."""
    line = ["sh", "-c", script, "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def generate(model: Path) -> Sequence[str | Path]:
    flags = ("--prompt-token-ids", "5,6,7", "--max-tokens", "2", "--ignore-eos", "--json", "-q", "-pcp", "2")
    return ("generate", "--model", model, *flags)


@pytest.mark.parametrize(
    ("redirection", "error"),
    [
        (">&-", "error: cannot write to stdout: Bad file descriptor\n"),
        (">/dev/full", "error: cannot write to stdout: No space left on device\n"),
        ("<&- >&- 2>&-", ""),
    ],
)
def test_output_that_cannot_be_written_is_a_failure(redirection: str, error: str) -> None:
    """A closed stdout was a trace, or success without an answer."""
    done = shell(f'"$@" {redirection}', "explain", "--lens", "8,5")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)


def test_a_mistake_has_its_exit_code_without_stderr() -> None:
    """A message for a closed stderr went to stdout, among the results."""
    done = shell('"$@" 2>&-', "explain", "--lens", "x")
    assert (done.returncode, done.stdout) == (2, "")


def test_nothing_is_mixed_into_what_ranks_send(tiny_model: Path) -> None:
    """With a closed stdout, a socket to a rank could get its number, and get all that the rank printed."""
    done = shell('"$@" >&-', *generate(tiny_model))
    assert (done.returncode, done.stderr) == (1, "error: cannot write to stdout: Bad file descriptor\n")


def test_little_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    """Guards machines with 64 file descriptors, a home that cannot be written to, and no room in /dev/shm."""
    script = 'ulimit -n 64; exec "$@"'
    if shutil.which("unshare") and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0:
        mounts = f"mount -t tmpfs -o ro none {tmp_path} && mount -t tmpfs -o size=4k none /dev/shm"
        script = f"exec unshare -m sh -c 'export HOME={tmp_path}; {mounts} && {script}' sh \"$@\""
    done = shell(script, *generate(tiny_model))
    assert (done.returncode, done.stderr) == (0, "")
    assert '"finish_reason": "length"' in done.stdout


def test_too_few_file_descriptors_are_one_line(tiny_model: Path) -> None:
    """EMFILE was a trace."""
    done = shell('ulimit -n 10; exec "$@"', *generate(tiny_model))
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Too many open files" in done.stderr


def test_a_server_needs_nobody_who_reads_its_messages(tiny_model: Path) -> None:
    """`twofold serve 2>&1 | head -1` could not be ended by SIGTERM: the message that says so failed, and the drain with
    it.
    """
    with subprocess.Popen(
        [*COMMAND, "serve", str(tiny_model), "--port", "0"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "listening on" not in process.stderr.readline():
            assert process.poll() is None
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
