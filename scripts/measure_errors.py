"""Type each wrong input of tests/wrong_inputs.py in a process of its own, and time it.

    python scripts/measure_errors.py [--only WORD]

Prints seconds, status and message of each, and in the end how many took longer than they may: 6 s,
15 s where the model has to be looked at (on a quiet machine). The status is 1 if one did, showed a
trace or left something behind.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from wrong_inputs import (
    ADAPTERS,
    CLIENTS,
    COMPARE,
    DIRECTORIES,
    EVALUATE,
    MODELS,
    RECORDS,
    WRONG_INPUTS,
    WrongInput,
    make_place,
)

_PLAIN_S, _MODEL_S = 6.0, 15.0
_LOOK_AT_MODELS = {
    row
    for rows in (ADAPTERS, CLIENTS, COMPARE, DIRECTORIES, EVALUATE, MODELS, RECORDS)
    for row in rows
}


def main() -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows that hold this text")
    only = parser.parse_args().only
    rows = [row for some in WRONG_INPUTS.values() for row in some if only in row.typed + row.what]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_place(place)
        problems = [problem for row in rows for problem in _measure(row, place)]
    print(f"{len(rows)} wrong inputs, {len(problems)} problems")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


def _measure(row: WrongInput, place: Path) -> list[str]:
    """Type one; what is wrong with how it ended."""
    before = set(place.rglob("*"))
    started = time.monotonic()
    command = [sys.executable, "-m", "fedllm_flwr.commands.main", *row.arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    print(
        f"{seconds:6.1f} s  {done.returncode}  fedllm {row.typed}\n          {done.stderr.strip()}"
    )
    allowed = _MODEL_S if row in _LOOK_AT_MODELS else _PLAIN_S
    checks = {
        f"took {seconds:.1f} s, more than {allowed:g}": seconds > allowed,
        f"ended with status {done.returncode}": done.returncode != row.status,
        "showed a trace": "Traceback" in done.stderr + done.stdout,
        "says something else": row.says not in done.stderr,
        "left files behind": set(place.rglob("*")) != before,
    }
    return [f"fedllm {row.typed}: {what}" for what, is_so in checks.items() if is_so]


if __name__ == "__main__":
    sys.exit(main())
