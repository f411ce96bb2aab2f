"""What will happen, shown before the first round."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedllm_flwr.reporting.text import format_bytes, format_count

SEPARATOR = "  ·  "


@dataclass(frozen=True)
class Plan:
    """Everything worth knowing before a run; sizes in bytes, counts in units."""

    version: str
    algorithm: str
    variant: str
    task: str
    model_name: str
    model_parameters: int
    data_name: str
    num_clients: int  # of the whole federation
    trainable_parameters: int
    bytes_down: int  # to one client in one round
    bytes_up: int
    wire_dtype: str
    num_rounds: int
    sampled: int  # clients per round
    batch_size: int  # examples per optimizer step
    device: str
    threads: int  # per client
    output_dir: str
    divided_by: str | None = None  # "desk"; None for an even split
    steps_per_round: int | None = None  # None: `epochs` of the client's records
    epochs: float = 1.0
    eval_records: int = 0
    eval_name: str | None = None  # of records that may not be the user's own
    eval_every: int = 0  # rounds; 0: at the start and at the end only
    eval_metrics: tuple[str, ...] = ("loss",)  # what will be known of them
    client_eval: bool = False  # whether clients score the adapter, too
    model_note: str | None = None  # "embedded", "nf4"
    first_round: int = 1  # above 1 for a resumed run
    client_names: list[str] = field(default_factory=list)  # where known; sets column widths
    warnings: list[str] = field(default_factory=list)


def plan_lines(plan: Plan, width: int) -> list[str]:
    """The plan as lines of at most `width` columns where words allow; without the warnings."""
    return [*_wrapped(_title(plan), width), *_grid(_cells(plan), width)]


def _title(plan: Plan) -> list[str]:
    model_notes = [f"{format_count(plan.model_parameters)} parameters", plan.model_note]
    clients = f"{plan.num_clients} client{_plural(plan.num_clients)}"
    clients += f" by {plan.divided_by}" if plan.divided_by else ""
    algorithm = plan.algorithm if plan.variant == "paper" else f"{plan.algorithm} ({plan.variant})"
    return [
        f"fedllm-flwr {plan.version}",
        algorithm,
        plan.task,
        f"{plan.model_name} ({', '.join(note for note in model_notes if note)})",
        f"{plan.data_name} ({clients})",
    ]


def _cells(plan: Plan) -> list[tuple[str, str]]:
    percent = 100 * plan.trainable_parameters / max(1, plan.model_parameters)
    share = f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"
    if plan.steps_per_round is None:
        work = f"{plan.epochs:g} epoch{_plural(plan.epochs)} in steps of {plan.batch_size}"
    else:
        count = plan.steps_per_round
        work = f"{count} step{_plural(count)} of {plan.batch_size}"
    several = plan.num_clients > 1 and plan.sampled == plan.num_clients
    chosen = "all" if several else f"{plan.sampled} of"
    clients = f"{plan.num_clients} client{_plural(plan.num_clients)}"
    rounds = f"{plan.num_rounds} x {chosen} {clients}, {work}"
    if plan.first_round > 1:
        rounds += f", from round {plan.first_round}"
    often = f"every {plan.eval_every} rounds" if plan.eval_every > 1 else "every round"
    often = often if plan.eval_every else "at the start and the end"
    whose = f" of data.eval_path={plan.eval_name}" if plan.eval_name else ""
    records = f"{plan.eval_records:,} records{whose}"
    return [
        ("trainable", f"{plan.trainable_parameters:,} LoRA parameters ({share} %)"),
        (
            "wire",
            f"{format_bytes(plan.bytes_down)} down + {format_bytes(plan.bytes_up)} up "
            f"per client and round ({plan.wire_dtype})",
        ),
        ("rounds", rounds),
        ("evaluation", f"{records}, {often}" if plan.eval_records else "none"),
        ("device", f"{plan.device}, {plan.threads} thread{_plural(plan.threads)} per client"),
        ("output", plan.output_dir),
    ]


def _wrapped(parts: Sequence[str], width: int) -> list[str]:
    """Parts joined by dots, continued on indented lines."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(SEPARATOR) + len(part) <= width:
            lines[-1] += SEPARATOR + part
        else:
            lines.append(f"  {part}")
    return lines


def _grid(cells: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Two aligned columns of label and value, or one where two do not fit."""
    label = max(len(name) for name, _ in cells) + 2
    texts = [f"{name:<{label}}{value}" for name, value in cells]
    left = max(len(text) for text in texts[::2])
    pairs = [f"  {a:<{left}}   {b}" for a, b in zip(texts[::2], texts[1::2], strict=True)]
    if max(len(line) for line in pairs) <= width:
        return pairs
    return [f"  {text}" for text in texts]


def _plural(count: float) -> str:
    return "" if count == 1 else "s"
