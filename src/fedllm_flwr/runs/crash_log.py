"""Report of an unexpected error: one line, and the traceback in a file."""

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
    """Directory of tracebacks: below $FEDLLM_CACHE, otherwise below the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "fedllm-flwr"
    return Path(os.environ.get("FEDLLM_CACHE", default)).expanduser() / "errors"


def explain_crash(error: BaseException, arguments: Sequence[str] = ()) -> str:
    """One line on an unexpected error; its traceback is written to the file that the line names."""
    text, is_defect = " ".join(str(error).split()), False
    file = getattr(error, "filename", None)
    if getattr(error, "errno", None) in _DISK_FULL or "No space left" in text:
        cause = f"no space left on the disk{f' of {file}' if file else ''}; make room there"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        cause = _OUT_OF_MEMORY
    elif isinstance(error, OSError) and error.strerror:
        cause = f"{f'{file}: ' if file else ''}{error.strerror}"
    else:
        cause = f"unforeseen {type(error).__name__}: {text[:300] or 'without a message'}"
        is_defect = True
    head = f"fedllm-flwr {__version__}: fedllm {' '.join(arguments)}\n\n"
    trace = head + "".join(traceback.format_exception(error))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (log_folder(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(trace, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        report = ", which belongs into a report of this defect" if is_defect else ""
        return f"{cause} (the trace is in {folder / name}{report})."
    return f"{cause} (its trace could not be written)."
