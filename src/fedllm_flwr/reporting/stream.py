"""A text stream that tolerates closed pipes and narrow encodings."""

import contextlib
import os
from typing import TextIO

_ASCII = str.maketrans({"·": "-", "±": "~", "…": "...", "━": "-", "╸": "-", "╺": "-"})


class SafeStream:
    """Wraps a text stream so that writing to it never raises.

    Characters outside the stream's encoding are replaced. After the reader has closed the pipe,
    output is dropped and the descriptor points to the null device, so the interpreter's flush at
    exit also succeeds.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open = True

    @property
    def encoding(self) -> str:
        """Encoding of the wrapped stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text`, with characters outside the encoding replaced."""
        encodable = text
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            ascii_marks = text.translate(_ASCII)
            encodable = ascii_marks.encode(self.encoding, "replace").decode(self.encoding)
        if self._open:
            try:
                self._stream.write(encodable)
            except (OSError, ValueError):
                self._abandon()
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless the reader has closed the pipe."""
        if self._open:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._abandon()

    def isatty(self) -> bool:
        """Whether the stream is an open terminal."""
        with contextlib.suppress(ValueError, OSError):
            return self._open and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Descriptor of the wrapped stream."""
        return self._stream.fileno()

    def _abandon(self) -> None:
        self._open = False
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
