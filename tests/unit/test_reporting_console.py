"""What the console prints, parsed back; with and without a terminal."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr.reporting.console import HEARTBEAT_S, LOG_WIDTH, Console, print_error
from fedllm_flwr.reporting.plan import Plan, plan_lines

PLAN = Plan(
    version="0.1",
    algorithm="fedavg",
    variant="paper",
    task="sft",
    model_name="tiny",
    model_parameters=1_900_000,
    data_name="demo",
    num_clients=10,
    trainable_parameters=41_472,
    bytes_down=82_944,
    bytes_up=82_944,
    wire_dtype="bfloat16",
    num_rounds=12,
    sampled=4,
    batch_size=16,
    device="cpu",
    threads=2,
    output_dir="outputs/run",
    divided_by="desk",
    steps_per_round=10,
    eval_records=600,
    eval_every=5,
    eval_metrics=("loss", "accuracy"),
    model_note="embedded",
    client_names=["banking", "energy", "metals-and-mining"],
)
START: dict[str, Any] = {
    "round": 0,
    "seconds": 0.0,
    "eval": {"loss": 2.8712, "accuracy": 0.341, "macro_f1": 0.2},
}
SUMMARY: dict[str, Any] = {
    "base": {"loss": 2.871, "accuracy": 0.341, "macro_f1": 0.214},
    "final": {"loss": 0.431, "accuracy": 0.911, "macro_f1": 0.902},
    "best": {"round": 12, "loss": 0.431},
    "rounds": 12,
    "seconds": 58.2,
    "phases": {
        "training": 33.3,
        "start-up": 9.4,
        "evaluation": 8.3,
        "federation": 4.4,
        "rest": 2.8,
    },
    "failures": 0,
}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def trained(round: int, losses: dict[str, float], **more: Any) -> dict[str, Any]:
    clients = {name: {"loss": loss, "num_examples": 160} for name, loss in losses.items()}
    mean = sum(losses.values()) / len(losses)
    sizes = {"bytes_up": 82_944 * len(losses), "bytes_down": 82_944 * 4}
    return {"round": round, "loss": mean, "clients": clients, "seconds": 3.14, **sizes, **more}


def rows_of(text: str) -> list[dict[str, str]]:
    """The table of rounds: each row by the titles of its columns, cut where the titles end."""
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith(" round  clients"))
    ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", header)]
    ends[1] = header.index("loss") - 4  # the clients column is the one that is left-aligned
    starts = [0, *ends[:-1]]
    titles = [header[a:b].strip() for a, b in zip(starts, ends, strict=True)]
    return [
        {t: line[a:b].strip() for t, a, b in zip(titles, starts, ends, strict=True)}
        for line in lines
        if re.match(r" +\d+  \S", line)
    ]


def test_plan_shows_every_number() -> None:
    out = io.StringIO()
    Console(out).plan(PLAN)

    text = out.getvalue()
    for part in (
        "fedllm-flwr 0.1  ·  fedavg  ·  sft  ·  tiny (1.9 M parameters, embedded)",
        "demo (10 clients by desk)",
        "41,472 LoRA parameters (2.2 %)",
        "82.9 kB down + 82.9 kB up per client and round (bfloat16)",
        "12 x 4 of 10 clients, 10 steps of 16",
        "600 records, every 5 rounds",
        "cpu, 2 threads",
        "outputs/run",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= LOG_WIDTH


def test_plan_says_when_all_clients_take_part() -> None:
    lines = "\n".join(plan_lines(replace(PLAN, algorithm="local", sampled=10), 200))
    assert "12 x all 10 clients, 10 steps of 16" in lines
    alone = "\n".join(plan_lines(replace(PLAN, num_clients=1, sampled=1), 200))
    assert "12 x 1 of 1 client, 10 steps of 16" in alone


def test_plan_says_whose_records_are_scored_where_they_may_be_foreign() -> None:
    lines = plan_lines(replace(PLAN, eval_name="embedded"), 200)
    assert "600 records of data.eval_path=embedded, every 5 rounds" in "\n".join(lines)


def test_plan_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with Console(out) as console:
        console.plan(PLAN)

    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue())
    assert max(map(len, plain.splitlines())) <= 80


def test_rows_hold_the_records() -> None:
    out = io.StringIO()
    console = Console(out)
    console.plan(PLAN)
    console.round(START)
    console.round(trained(1, {"banking": 2.5, "energy": 2.3, "a": 2.4, "b": 2.4}), eta_s=34.4)
    console.round(
        trained(5, {"banking": 0.4}, eval={"loss": 0.4321, "accuracy": 0.876}), eta_s=95.0
    )

    first, second, third = rows_of(out.getvalue())
    assert first == {
        "round": "0",
        "clients": "-",
        "loss": "-",
        "eval loss": "2.871",
        "accuracy": "0.34",
        "seconds": "-",
        "MB": "-",
        "left": "-",
    }
    # 4 replies up and 4 tasks down of 82,944 bytes each: 0.664 MB (0.633 MiB).
    assert (second["clients"], second["loss"], second["seconds"]) == ("4/4", "2.400", "3.1")
    assert (second["eval loss"], second["accuracy"]) == (".", ".")
    assert (second["MB"], second["left"]) == ("0.7", "34 s")
    assert (third["eval loss"], third["accuracy"], third["left"]) == ("0.432", "0.88", "1 min 35 s")


def test_columns_without_content_are_left_out() -> None:
    out = io.StringIO()
    console = Console(out)
    console.round(trained(1, {"a": 1.0}, client_eval={"loss": 1.25}))

    [row] = rows_of(out.getvalue())
    assert list(row) == ["round", "clients", "loss", "client eval", "seconds", "MB", "left"]
    assert row["client eval"] == "1.250"


def test_failures_stand_under_their_round_by_name() -> None:
    out = io.StringIO()
    console = Console(out)
    console.plan(PLAN)
    refused = {"metals-and-mining": "update refused: 'lora_B' holds\nNaN"}
    console.round(trained(1, {"a": 1.0}, failures=refused))
    console.round(trained(2, {"a": 1.0}, failures={"b": "no reply within 60 s"}))
    console.round(trained(3, {"a": 1.0}, failures={"b": "out of memory", "c": "x"}))

    first, second, third = rows_of(out.getvalue())
    assert first["clients"] == "1/2 (metals-and-mining: refused)"
    assert second["clients"] == "1/2 (b: left)"
    assert third["clients"] == "1/3 (2 failed)"
    assert "        metals-and-mining: update refused: 'lora_B' holds NaN\n" in out.getvalue()
    assert {len(line) for line in out.getvalue().splitlines() if re.match(r" +\d+  ", line)} <= {
        len(next(line for line in out.getvalue().splitlines() if line.startswith(" round"))),
    }


def test_a_name_too_long_for_the_column_does_not_move_the_others() -> None:
    out = io.StringIO()
    console = Console(out)
    console.round(trained(1, {"a": 1.0}))
    name = "university-hospital-of-the-north-and-the-islands"
    console.round(trained(2, {"a": 1.0}, failures={name: "no reply within 60 s"}))

    assert rows_of(out.getvalue())[1]["loss"] == "1.000"
    assert f"{name}: no reply" in out.getvalue()


def closed(summary: dict[str, Any], **more: Any) -> str:
    out = io.StringIO()
    run = Path("outputs/run")
    paths = {"adapter": run / "adapter", "curves": run / "curves.png"}
    Console(out).closing(summary, paths, **more)
    return out.getvalue()


def test_closing_table_and_times() -> None:
    text = closed(
        SUMMARY,
        rows=[("local (mean)", {"loss": 1.1})],
        next_commands=["fedllm generate outputs/run 'x'"],
    )

    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["loss", "accuracy", "macro F1"] in cells
    assert ["base", "2.871", "0.34", "0.21"] in cells
    assert ["local (mean)", "1.100", "-", "-"] in cells
    assert ["federated", "0.431", "0.91", "0.90"] in cells
    line = next(line for line in text.splitlines() if line.startswith("Finished"))
    total, *parts = [int(number) for number in re.findall(r"(\d+) s", line)]
    assert (total, sum(parts), len(parts)) == (58, 58, 5)
    assert "adapter   outputs/run/adapter" in text
    assert "curves   .../curves.png" in text
    assert "next      fedllm generate outputs/run 'x'" in text
    assert "missing" not in text


def test_closing_names_what_training_started_from() -> None:
    names = [
        line.split()[0] for line in closed(SUMMARY, first="start").splitlines() if line.strip()
    ]
    assert "start" in names
    assert "base" not in names


def test_closing_after_a_stop_counts_both() -> None:
    text = closed(SUMMARY, since_resumed=21.0)
    assert "Finished in 58 s over all starts, 21 s since it was resumed: " in text


def test_closing_without_labels_or_evaluation() -> None:
    unlabelled = SUMMARY | {"base": {"loss": 2.0}, "final": {"loss": 1.0}, "best": None}
    assert "accuracy" not in closed(unlabelled)
    without = closed(SUMMARY | {"base": None, "final": None, "best": None, "failures": 3})
    assert "federated" not in without
    assert "3 client replies were missing or refused." in without


def test_closing_points_at_a_better_earlier_round() -> None:
    best = {"round": 8, "loss": 0.35, "accuracy": 0.95}
    assert "best (round 8)" in closed(SUMMARY | {"best": best})
    assert "best" not in closed(SUMMARY)


def drive(console: Console) -> None:
    with console:
        console.plan(PLAN)
        console.status("starting 2 workers ...")
        console.round(START)
        console.start_round(1, ["banking", "energy"])
        console.reply(1, "banking", 2.5)
        console.reply(1, "energy", None)
        console.status("evaluating ...")
        console.round(trained(1, {"banking": 2.5}, failures={"energy": "x"}), eta_s=9.0)
        console.closing(SUMMARY, {"adapter": Path("a")})


def test_logs_are_plain_text() -> None:
    out = io.StringIO()
    drive(Console(out))

    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert "starting 2 workers ...\n" in out.getvalue()
    assert "evaluating" not in out.getvalue()  # it would break the table apart


def test_a_terminal_shows_progress_and_is_given_back() -> None:
    out = Terminal()
    clock = Clock()
    console = Console(out, clock=clock)
    console.plan(PLAN)
    console.start_round(3, ["banking", "energy", "autos"])
    console.reply(3, "banking", 2.0)
    console.reply(3, "energy", 1.0)
    console.round(trained(3, {"banking": 2.0}), eta_s=120.0)
    console.start_round(4, ["banking"])
    clock.now = 40.0
    console.close()
    console.close()

    text = out.getvalue()
    assert "round 4/12, 0/1 clients, 1 min 20 s left" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is visible again


def test_a_slow_round_shows_a_sign_of_life_in_a_log() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    console.start_round(2, ["a", "b", "c"])
    console.reply(2, "a", 2.0)
    assert out.getvalue() == ""
    clock.now = HEARTBEAT_S
    console.reply(2, "b", 1.0)
    console.reply(2, "c", 1.0)

    assert out.getvalue() == "        round 2, 2/3 clients, loss 1.500, waiting for c\n"


def test_quiet_prints_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    out = Terminal()
    console = Console(out, quiet=True)
    drive(console)
    console.error("no space")

    assert out.getvalue() == ""
    assert capsys.readouterr().err == "error: no space\n"


def test_an_error_is_one_line_and_red_on_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    print_error("bad [key]\n  value")
    assert capsys.readouterr().err == "error: bad [key] value\n"

    terminal = Terminal()
    print_error("bad [key]", terminal)
    assert terminal.getvalue() == "\x1b[31merror: bad [key]\x1b[0m\n"


def test_a_narrow_encoding_replaces_the_dots() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(stream)
    console.plan(PLAN)
    console.round(trained(1, {"a": 1.0}, failures={"Göteborg": "no reply"}))

    text = raw.getvalue().decode("ascii")
    assert "fedllm-flwr 0.1  -  fedavg  -  sft" in text
    assert "G?teborg: no reply" in text


def test_a_closed_stream_is_no_error() -> None:
    stream = io.StringIO()
    console = Console(stream)
    stream.close()
    drive(console)
    console.error("one more line")  # goes elsewhere, and the run goes on
    assert stream.closed
    assert console.width == 140


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    done = tmp_path / "done"
    script = (
        "from pathlib import Path\n"
        "from fedllm_flwr.reporting.console import Console\n"
        "console = Console()\n"
        "for i in range(20000):\n"
        "    console.round({'round': i, 'loss': 1.0, 'clients': {'a': {}}, 'seconds': 1.0})\n"
        f"Path({str(done)!r}).write_text('finished')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()

    assert process.wait(timeout=60) == 0
    assert errors == b""
    assert done.read_text() == "finished"
