"""Standard streams that were closed, for example by `>&-`: another file must not get their numbers.

A socket that gets number 1 would receive all that a library of ours, or of a rank's, prints.
"""

import os
from typing import TextIO


def reserve_numbers() -> None:
    """Opens /dev/null in the place of each closed standard stream, for this process and its ranks."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one


def failing_stream() -> TextIO:
    """A stream for results, in the place of a closed one: they must not get lost without an error."""
    return open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")


def flush_or_drop(stream: TextIO) -> OSError | None:
    """Writes what is in the stream's buffer → why that failed; then nothing is left to fail when Python ends."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
