"""Console output of a run: plan, progress, table of rounds, results and errors."""

import atexit
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from fedllm_flwr.reporting.metrics import RoundRecord, cut_lines
from fedllm_flwr.reporting.plan import Plan, plan_lines
from fedllm_flwr.reporting.progress import Progress
from fedllm_flwr.reporting.stream import SafeStream
from fedllm_flwr.reporting.table import (
    Metrics,
    RoundTable,
    closing_table,
    finished_line,
    next_lines,
    path_lines,
    summary_rows,
)
from fedllm_flwr.reporting.text import one_line

LOG_WIDTH = 140  # columns, without a terminal
HEARTBEAT_S = 30.0  # minimum interval between progress lines in a log
_MOST_NAMED = 5  # list missing clients by name only up to this number


class Console:
    """Prints the output of a run, with live progress on a terminal and plain lines elsewhere.

    A closed pipe or a narrow encoding never ends the run. Use it as a context manager or call
    `close`, which restores the terminal.

    Args:
        stream: output stream; None: standard output.
        interactive: animate the progress; None: only if the stream is a terminal.
        quiet: print only errors.
        clock: monotonic clock, in seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = SafeStream(stream or sys.stdout)
        if interactive is None:
            interactive = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._interactive = interactive
        self._quiet = quiet
        self._clock = clock
        self._rich = _rich_console(self._stream, interactive)
        self._live: Live | None = None
        self._progress = Progress(clock)
        self._table: RoundTable | None = None
        self._plan: Plan | None = None
        self._names: set[str] = set()
        self._waiting: list[str] = []  # clients of this round without a reply
        self._last_output_s = clock()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the animation and restore the cursor; may be called twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            atexit.unregister(self.close)

    @property
    def width(self) -> int:
        """Columns of the terminal; `LOG_WIDTH` without one."""
        columns = shutil.get_terminal_size((LOG_WIDTH, 24)).columns
        return columns if self._interactive else LOG_WIDTH

    def plan(self, plan: Plan) -> None:
        """Print the plan."""
        self._plan = plan
        self._names |= set(plan.client_names)
        title, *rest = plan_lines(plan, self.width)
        self._print(title, "bold")
        for line in rest:
            self._print(line)
        for warning in plan.warnings:
            self._print(f"  warning: {one_line(warning)}", "yellow")
        self._print("")

    def note(self, text: str) -> None:
        """Print one line."""
        self._print(one_line(text))

    def status(self, text: str) -> None:
        """Show the current activity; in a log, only before the first round."""
        if self._interactive:
            self._progress.status = text
            self._animate()
        elif self._table is None and text:
            self._print(f"  {one_line(text)}")

    def start_round(self, round: int, names: Sequence[str]) -> None:
        """A round has started with these clients."""
        self._names |= set(names)
        self._waiting = list(names)
        total = self._plan.num_rounds if self._plan else None
        self._progress.start_round(round, total, len(names))
        self._animate()

    def reply(self, round: int, name: str, loss: float | None) -> None:
        """A client has replied; `loss` is None without a usable update."""
        self._progress.reply(loss)
        self._waiting = [other for other in self._waiting if other != name]
        if not self._interactive and self._clock() - self._last_output_s >= HEARTBEAT_S:
            few = 0 < len(self._waiting) <= _MOST_NAMED
            rest = f", waiting for {one_line(', '.join(self._waiting))}" if few else ""
            self._print(f"        {self._progress.line()}{rest}")

    def round(self, record: RoundRecord, eta_s: float | None = None) -> None:
        """Print a row of the table; `eta_s` is the estimated time left in seconds."""
        if self._table is None:
            plan = self._plan
            planned = plan.eval_metrics if plan and plan.eval_records else ()
            self._table = RoundTable(
                [*self._names, *(record.get("failures") or {})],
                metrics=[*(record.get("eval") or {}), *planned],
                client_eval="client_eval" in record or bool(plan and plan.client_eval),
                time_left=not self._interactive,
                promises=bool(plan and plan.privacy),
            )
            self._print(self._table.header(), "bold")
        self._progress.finish_round(eta_s)
        self._print(self._table.row(record, eta_s))
        for line in self._table.failures(record):
            self._print(line, "yellow")

    def closing(
        self,
        summary: Mapping[str, Any],
        paths: Mapping[str, Path],
        rows: Sequence[tuple[str, Metrics]] = (),
        next_commands: Sequence[str] = (),
        label: str = "federated",
        first: str = "base",
        since_resumed: float | None = None,
    ) -> None:
        """Print the scores before and after training, the durations, and the written files.

        Args:
            summary: from `summarise`.
            paths: written files by label; paths in the first one's folder are shortened.
            rows: additional rows between the start and the result.
            next_commands: commands to suggest.
            label: label of the result's row.
            first: label of the scores before training.
            since_resumed: duration of this start in seconds, for a resumed run.
        """
        self.close()
        if table := summary_rows(summary, rows, label, first):
            header, *lines = closing_table(table)
            self._print("")
            self._print(header, "bold")
            for line in lines:
                self._print(line)
        self._print("")
        self._print(finished_line(summary, since_resumed))
        if failures := summary.get("failures"):
            noun = "reply was" if failures == 1 else "replies were"
            self._print(f"  {failures} client {noun} missing or refused.", "yellow")
        for line in cut_lines(summary.get("cut", {})):
            self._print(f"  {one_line(line)}.", "yellow")
        for line in [*path_lines(paths, self.width), *next_lines(next_commands, self.width)]:
            self._print(line)

    def error(self, message: str) -> None:
        """Stop the animation and print one line on standard error."""
        self.close()
        print_error(message)

    def _animate(self) -> None:
        if self._live is None and self._interactive and not self._quiet:
            self._live = Live(
                self._progress, console=self._rich, transient=True, refresh_per_second=5
            )
            self._live.start()
            atexit.register(self.close)

    def _print(self, line: str, style: str = "") -> None:
        if self._quiet:
            return
        self._last_output_s = self._clock()
        if self._interactive:
            self._rich.print(Text(line, style=style), soft_wrap=True)
        else:
            self._stream.write(line.rstrip() + "\n")
            self._stream.flush()


def print_error(message: str, stream: TextIO | None = None) -> None:
    """Print ``error: ...`` as one line on standard error, red on a terminal."""
    safe = SafeStream(stream or sys.stderr)
    line = f"error: {one_line(message)}"
    if safe.isatty():
        _rich_console(safe, True).print(Text(line, style="red"), soft_wrap=True)
    else:
        safe.write(f"{line}\n")
        safe.flush()


def _rich_console(stream: SafeStream, interactive: bool) -> RichConsole:
    return RichConsole(
        file=cast(IO[str], stream), force_terminal=interactive, highlight=False, markup=False
    )
