"""The plan of a run, printed before the first round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from fedllm_flwr.reporting.text import format_bytes, format_count

SEPARATOR = "  ·  "


@dataclass(frozen=True)
class Plan:
    """Model, data, communication and schedule of a run; sizes are in bytes."""

    version: str
    algorithm: str
    variant: str
    task: str
    model_name: str
    model_parameters: int
    data_name: str
    num_clients: int  # in the whole federation
    trainable_parameters: int  # of the adapter
    bytes_down: int  # per client and round
    bytes_up: int
    wire_dtype: str
    num_rounds: int
    sampled: int  # clients per round
    batch_size: int  # examples per optimizer step
    device: str
    threads: int  # per client
    output_dir: str
    divided_by: str | None = None  # column of the natural partition, such as "desk"
    steps_per_round: int | None = None  # None: `epochs` of local data
    epochs: float = 1.0
    eval_records: int = 0
    eval_name: str | None = None  # data.eval_path, if it is not the data set's own
    eval_every: int = 0  # in rounds; 0: only at the start and the end
    eval_metrics: tuple[str, ...] = ("loss",)  # scores on those records
    client_eval: bool = False  # clients score the adapter on their own held-out records
    model_note: str | None = None  # "embedded", "nf4"
    privacy: tuple[str, str] | None = None  # mechanism and guarantee, in words
    first_round: int = 1  # above 1 for a resumed run
    trained_parameters: int | None = None  # in a round; None: all of the adapter's
    ranks: Mapping[int, int] = field(default_factory=dict)  # rank -> clients, if they differ
    client_names: list[str] = field(default_factory=list)  # if known; for the column width
    warnings: list[str] = field(default_factory=list)


def plan_lines(plan: Plan, width: int) -> list[str]:
    """The plan without its warnings, wrapped at `width` columns if possible."""
    sizes = [f"{format_count(plan.model_parameters)} parameters", plan.model_note]
    divided = f" by {plan.divided_by}" if plan.divided_by else ""
    title, *rest = [
        f"fedllm-flwr {plan.version}",
        plan.algorithm if plan.variant == "paper" else f"{plan.algorithm} ({plan.variant})",
        plan.task,
        f"{plan.model_name} ({', '.join(note for note in sizes if note)})",
        f"{plan.data_name} ({_counted(plan.num_clients, 'client')}{divided})",
    ]
    lines = [title]
    for part in rest:
        if len(lines[-1]) + len(SEPARATOR) + len(part) <= width:
            lines[-1] += SEPARATOR + part
        else:
            lines.append(f"  {part}")
    settings = _settings(plan)
    label = max(map(len, settings)) + 2
    cells = [f"{name:<{label}}{value}" for name, value in settings.items()]
    left = max(len(cell) for cell in cells[::2])
    rows = zip_longest(cells[::2], cells[1::2], fillvalue="")
    pairs = [f"  {a:<{left}}   {b}".rstrip() for a, b in rows]
    fits = max(map(len, pairs)) <= width
    return lines + (pairs if fits else [f"  {cell}" for cell in cells])


def _settings(plan: Plan) -> dict[str, str]:
    percent = 100 * plan.trainable_parameters / max(1, plan.model_parameters)
    share = f"{percent:.2g}" if percent < 10 else f"{percent:.0f}"
    if plan.steps_per_round is None:
        work = f"{_counted(plan.epochs, 'epoch')} in steps of {plan.batch_size}"
    else:
        work = f"{_counted(plan.steps_per_round, 'step')} of {plan.batch_size}"
    everyone = plan.num_clients > 1 and plan.sampled == plan.num_clients
    sampled = "all" if everyone else f"{plan.sampled} of"
    resumed = f", from round {plan.first_round}" if plan.first_round > 1 else ""
    evaluation = "none"
    if plan.eval_records:
        source = f" of data.eval_path={plan.eval_name}" if plan.eval_name else ""
        every = f"every {plan.eval_every} rounds" if plan.eval_every > 1 else "every round"
        when = every if plan.eval_every else "at the start and the end"
        evaluation = f"{plan.eval_records:,} records{source}, {when}"
    privacy = dict(zip(("privacy", "promise"), plan.privacy or (), strict=False))
    ranks = [f"{rank} ({_counted(count, 'client')})" for rank, count in sorted(plan.ranks.items())]
    part = "" if plan.trained_parameters is None else f"{plan.trained_parameters:,} a round of "
    return {
        "trainable": f"{part}{plan.trainable_parameters:,} LoRA parameters ({share} %)",
        "wire": f"{format_bytes(plan.bytes_down)} down + {format_bytes(plan.bytes_up)} up "
        f"per client and round ({plan.wire_dtype})",
        "rounds": f"{plan.num_rounds} x {sampled} {_counted(plan.num_clients, 'client')}, "
        f"{work}{resumed}",
        "evaluation": evaluation,
        "device": f"{plan.device}, {_counted(plan.threads, 'thread')} per client",
        "output": plan.output_dir,
        **({"ranks": ", ".join(ranks)} if ranks else {}),
        **privacy,
    }


def _counted(count: float, noun: str) -> str:
    number = f"{count:g}" if isinstance(count, float) else str(count)
    return f"{number} {noun}{'' if count == 1 else 's'}"
