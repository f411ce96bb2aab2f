"""Live progress of the current round."""

from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedllm_flwr.reporting.text import fixed, format_seconds

_BAR_WIDTH = 20


class Progress:
    """Progress of the current round, as a rich renderable and as text for logs.

    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.status = ""
        self._clock = clock
        self._round = 0
        self._total: int | None = None
        self._sampled = 0
        self._replies = 0
        self._losses: list[float] = []
        self._end_s: float | None = None  # estimated end, on the clock
        self._busy = False
        self._spinner: Spinner | None = None

    def start_round(self, round: int, total: int | None, sampled: int) -> None:
        """Round `round` of `total` starts with `sampled` clients."""
        self._round, self._total, self._sampled = round, total, sampled
        self._replies, self._losses = 0, []
        self.status, self._busy = "", True

    def reply(self, loss: float | None) -> None:
        """A client has replied; `loss` is None without a usable update."""
        self._replies += 1
        if loss is not None:
            self._losses.append(loss)

    def finish_round(self, eta_s: float | None) -> None:
        """The round has ended; `eta_s` is the estimated time until the run ends, in seconds."""
        self._busy, self.status = False, ""
        self._end_s = None if eta_s is None else self._clock() + eta_s

    def line(self) -> str:
        """round 3/12, 2/4 clients, loss 1.402, 1 min 20 s left."""
        if not self._busy:
            return ", ".join(part for part in (self.status, self._time_left()) if part)
        loss = fixed(sum(self._losses) / len(self._losses), 3) if self._losses else None
        parts = [
            f"round {self._round}" + (f"/{self._total}" if self._total else ""),
            f"{self._replies}/{self._sampled} clients",
            f"loss {loss}" if loss else "",
            self._time_left(),
            self.status,
        ]
        return ", ".join(part for part in parts if part)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A spinner, a bar over the round's clients, and the line."""
        if self._spinner is None:  # kept, because its frames count from its creation
            wide = console.encoding.lower().startswith("utf")
            self._spinner = Spinner("dots" if wide else "line", style="cyan")
        grid = Table.grid(padding=(0, 1))
        cells: list[Spinner | ProgressBar | Text] = [self._spinner]
        if self._busy and options.max_width > 70:
            done = min(self._replies, self._sampled)
            cells.append(ProgressBar(max(1, self._sampled), done, width=_BAR_WIDTH))
        text = Text(self.line(), style="dim", no_wrap=True, overflow="ellipsis")
        grid.add_row(" ", *cells, text)
        yield grid

    def _time_left(self) -> str:
        if self._end_s is None:
            return ""
        left = self._end_s - self._clock()
        return f"{format_seconds(left)} left" if left >= 1 else ""
