"""Runs a program, timestamps each line of its output and copies it to a rotated log file.

``python -m fedllm_flwr.deployment.logged logs/superlink.log sh start-superlink.sh``: output and
errors are still written to their original streams. Signals are forwarded to the program, and this
process ends with the program's status. If this process is killed, the program is terminated too.
"""

import ctypes
import logging
import logging.handlers
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LARGEST_FILE = 10 * 2**20  # bytes
_OLD_FILES = 5
_PATIENCE_S = 2.0  # for output of children that outlive the program
_PR_SET_PDEATHSIG = 1  # Linux
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run_logged(file: Path, command: Sequence[str]) -> int:
    """Run `command` to its end; return its exit status, or 128 + n after a signal n."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a closed terminal or a full disk must not stop a site
    kept = logging.handlers.RotatingFileHandler(
        file, maxBytes=_LARGEST_FILE, backupCount=_OLD_FILES, encoding="utf-8"
    )

    def end_with_parent() -> None:  # in the program, before it begins
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # a terminal's Ctrl-C reaches it once, through this process
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: process.send_signal(received))
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=_copy, args=(source, target, kept), daemon=True)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    status = process.wait()
    for reader in readers:
        reader.join(_PATIENCE_S)
    return 128 - status if status < 0 else status


def _copy(source: IO[bytes], target: IO[str], kept: logging.Handler) -> None:
    """Write each line of `source`, with its time, to `target` and to the log."""
    formatter = logging.Formatter("%(asctime)s %(message)s")
    shown = logging.StreamHandler(target)
    for handler in (shown, kept):
        handler.setFormatter(formatter)
    for line in source:
        text = _COLOURS.sub("", line.decode("utf-8", "replace").rstrip("\r\n"))
        record = logging.LogRecord("", logging.INFO, "", 0, text, None, None)
        shown.handle(record)
        kept.handle(record)


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(run_logged(Path(sys.argv[1]), sys.argv[2:]))
