"""A text stream that never fails: closed pipes and narrow encodings are absorbed."""

import contextlib
import os
from typing import TextIO

_ASCII = str.maketrans({"·": "-", "±": "~", "…": "...", "━": "-", "╸": "-", "╺": "-"})


class SafeStream:
    """Wraps a stream, for writing reports that must not end the run they report on.

    Characters outside the stream's encoding are replaced. Once the reader has gone, what follows
    is dropped, and the descriptor leads to the null device, so that the interpreter's own flush
    at exit does not complain either.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open = True

    @property
    def encoding(self) -> str:
        """Encoding of the wrapped stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write what the encoding can show; the rest is replaced."""
        if self._open:
            try:
                self._stream.write(self._encodable(text))
            except (OSError, ValueError):
                self._abandon()
        return len(text)

    def flush(self) -> None:
        """Flush, unless the reader has gone."""
        if self._open:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._abandon()

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        with contextlib.suppress(ValueError, OSError):
            return self._open and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Descriptor of the wrapped stream."""
        return self._stream.fileno()

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            narrow = text.translate(_ASCII)
            return narrow.encode(self.encoding, "replace").decode(self.encoding)
        return text

    def _abandon(self) -> None:
        self._open = False
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
