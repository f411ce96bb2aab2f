"""What a command says of an error that nobody foresaw: one line, and the trace in a file."""

import errno
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from fedllm_flwr import __version__

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_MEMORY = (
    "out of memory; lower training.micro_batch_size or training.max_length, or set "
    "training.gradient_checkpointing=true"
)


def log_folder() -> Path:
    """Where traces are kept: below $FEDLLM_CACHE, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "fedllm-flwr"
    return Path(os.environ.get("FEDLLM_CACHE", default)).expanduser() / "errors"


def explain_crash(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """One line on an unforeseen error; its trace is written to the file that the line names."""
    cause, is_defect = _cause(error)
    path = _write_trace(error, arguments)
    where = "its trace could not be written" if path is None else f"the trace is in {path}"
    report = ", which belongs into a report of this defect" if is_defect and path else ""
    return f"{cause} ({where}{report})."


def _cause(error: BaseException) -> tuple[str, bool]:
    """What went wrong, in words, and whether the program is to blame."""
    text = " ".join(str(error).split())
    full_disk = getattr(error, "errno", None) in _DISK_FULL or "No space left" in text
    if full_disk:
        file = getattr(error, "filename", None)
        return f"no space left on the disk{f' of {file}' if file else ''}; make room there", False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _OUT_OF_MEMORY, False
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror}", False
    return f"unforeseen {type(error).__name__}: {text[:300] or 'without a message'}", True


def _write_trace(error: BaseException, arguments: Sequence[str]) -> Path | None:
    """The file with the trace; None where no folder can be written."""
    head = f"fedllm-flwr {__version__}: fedllm {' '.join(arguments)}\n\n"
    text = head + "".join(traceback.format_exception(error))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (log_folder(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return folder / name
    return None
