"""Every line of a program gets a time and is kept; signals and the exit status go through."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from fedllm_flwr.deployment import logged
from processes import wait_for

COMMAND = [sys.executable, "-P", "-m", logged.__name__]
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "


def test_lines_get_a_time_and_go_to_file_and_stream(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "part.log"
    script = "echo out; echo err >&2; printf 'no end'; exit 7"
    done = subprocess.run(
        [*COMMAND, str(file), "/bin/sh", "-c", script], capture_output=True, text=True, check=False
    )

    assert done.returncode == 7
    assert re.fullmatch(f"{TIME}out\n{TIME}no end\n", done.stdout)
    assert re.fullmatch(f"{TIME}err\n", done.stderr)
    kept = sorted(re.sub(TIME, "", line) for line in file.read_text().splitlines())
    assert kept == ["err", "no end", "out"]
    assert file.stat().st_mode & 0o077 == 0


def test_files_are_rotated(tmp_path: Path) -> None:
    file = tmp_path / "part.log"
    code = (
        "import sys; from pathlib import Path; from fedllm_flwr.deployment import logged; "
        "logged._LARGEST_FILE = 1000; "
        f"sys.exit(logged.run_logged(Path({str(file)!r}), ['seq', '1000']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    kept = sorted(tmp_path.glob("part.log*"))
    assert len(kept) == 6
    assert all(0 < part.stat().st_size <= 1000 for part in kept)
    assert file.read_text().splitlines()[-1].endswith(" 1000")


def start(tmp_path: Path, script: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, str(tmp_path / "part.log"), "/bin/sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_sigterm_reaches_the_program(tmp_path: Path) -> None:
    with start(tmp_path, "trap 'echo ended; exit 3' TERM; echo ready; sleep 60 & wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("ready\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 3
        assert process.stdout.read().endswith("ended\n")


def test_program_that_a_signal_ends_gives_its_number(tmp_path: Path) -> None:
    with start(tmp_path, "kill -9 $$") as process:
        assert process.wait(20) == 128 + 9


def test_program_ends_with_the_process_that_keeps_its_log(tmp_path: Path) -> None:
    with start(tmp_path, "echo ready; exec sleep 60") as process:
        assert process.stdout is not None
        process.stdout.readline()
        [child] = psutil.Process(process.pid).children()
        process.kill()
        assert wait_for(lambda: not child.is_running() or child.status() == "zombie", 20)
