"""Standard output and standard error of a command: text that cannot be written ends no run."""

import io
import os
import sys
from typing import TextIO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class PatientFile(io.FileIO):
    """A file that becomes the null device when its reader, such as `head`, has gone."""

    def write(self, data: "ReadableBuffer", /) -> int | None:
        """Write, or drop what nobody reads any more."""
        try:
            return super().write(data)
        except BrokenPipeError:
            # The descriptor itself is replaced, also for libraries and subprocesses that print.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def keep_writing() -> None:
    """Let Python's own standard output and standard error accept any text, whoever reads it.

    Streams that were redirected inside Python, as in a notebook, stay as they are.
    """
    if sys.stdout is sys.__stdout__:
        # One character for one, so that the columns of a table stay aligned.
        sys.stdout = patient(sys.stdout, "replace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = patient(sys.stderr, "backslashreplace")


def patient(stream: TextIO, errors: str) -> TextIO:
    """Return a stream to the same file that outlives its reader.

    Args:
        stream: A stream of the operating system. It is None in a process without a terminal.
        errors: How characters are written that the encoding of the stream lacks.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if os.name == "nt":
        # A console of Windows is written through functions of its own, and no pipe breaks there.
        stream.reconfigure(errors=errors)
        return stream
    stream.flush()
    file = PatientFile(stream.fileno(), "w", closefd=False)
    # Line by line: a log that lags behind by a block of 8 KiB shows no progress.
    return io.TextIOWrapper(
        io.BufferedWriter(file), encoding=stream.encoding, errors=errors, line_buffering=True
    )
