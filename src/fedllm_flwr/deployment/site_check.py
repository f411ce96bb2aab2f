"""``fedllm site check``: shows a site's operator what will be learned from the site's data."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr import tasks
from fedllm_flwr.config.schema import ModelConfig, TrainingConfig
from fedllm_flwr.data.columns import AttributeColumn
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.deployment.datasets import SiteDataset, site_datasets
from fedllm_flwr.deployment.node import node_config, site_folder, site_rank
from fedllm_flwr.deployment.policy import Policy, site_policy
from fedllm_flwr.deployment.site_views import printable
from fedllm_flwr.errors import DataError
from fedllm_flwr.reporting.text import shorten

_EXAMPLES = 5
_SHOWN_CHARACTERS = 800  # of an example
_MOST_LABELS = 20
_NO_LIMIT = 2**24  # tokens: avoids truncation when lengths are measured
_BOLD, _PLAIN = "\033[1m", "\033[0m"


def check_site(
    directory: str | Path,
    model: str | None = None,
    template: str = "alpaca",
    max_length: int = TrainingConfig().max_length,
    dataset: str | None = None,
) -> list[str]:
    """Read a site's data as training would, and report on them.

    Args:
        model: directory of the tokenizer to use; None: the site's own copy of the model, otherwise
            the small model of the package.
        template: data.template to assume.
        max_length: training.max_length to assume, in tokens.
        dataset: name of the data set to check; None: all.

    Raises:
        ConfigError: not a site directory, or its node config or policy cannot be read.
        DataError: no task can use a data set.
    """
    from fedllm_flwr.models.tokenizer import load_tokenizer

    folder = site_folder(directory)
    node = node_config(folder)
    policy = site_policy(node)
    rank = site_rank(node)
    path = model or str(node.get("model-path", "embedded"))
    tokenizer = load_tokenizer(ModelConfig(path=path))
    lines: list[str] = []
    for name, found in site_datasets(node).items():
        if dataset in (None, name):
            lines += dataset_lines(found, policy, tokenizer, template, max_length)
    pinned = policy.allowed_models is None or any("@" in m for m in policy.allowed_models)
    unlike = path == "embedded" and pinned
    note = ", which counts other tokens than the model you will train" if unlike else ""
    lines.append(f"tokenizer   {path}{note}")
    if rank is not None:
        lines.append(f"lora-rank   {rank}: adapters trained here have at most this rank")
    return [*lines, *policy_lines(policy)]


def dataset_lines(
    dataset: SiteDataset, policy: Policy, tokenizer: Any, template: str, max_length: int
) -> list[str]:
    """Report on a data set for every task that the policy allows.

    Raises:
        DataError: none of these tasks can use it.
    """
    from fedllm_flwr.data.sources import open_source

    config = dataset.config(template=template)
    name = config.columns.label
    label = None if name is None else AttributeColumn(name, "columns.label", required=False)
    called = f" ({dataset.name})" if dataset.name else ""
    lines = [f"data        {config.path}{called}"]
    errors: list[str] = []
    for task in policy.tasks or tasks.names():
        kind = tasks.find(task).records
        try:
            source = open_source(config, kind, label=label)
            scan = source.scan()
        except DataError as error:
            errors.append(f"  {task:<10}{error}")
            continue
        report, records = scan.report, list(source.read(scan.numbers))
        lost = {
            "empty": report.empty,
            "equal": report.equal,
            "bad": report.bad,
            "duplicate": report.duplicates,
        }
        left_out = ", ".join(f"{count} {why}" for why, count in lost.items() if count)
        where = f" ({', '.join(report.left_out)})" if report.left_out else ""
        lines.append(
            f"  {task:<10}{report.usable:,} of {report.read:,} records usable"
            + (f"; left out: {left_out}{where}" if left_out else "")
        )
        lines.append(f"  columns   used: {', '.join(report.used_columns)}")
        if report.unused_columns:
            lines.append(f"            NOT used: {', '.join(report.unused_columns)}")
        lines += label_lines(records)
        rows = [tuple(getattr(r, name) for name in kind.codec.columns) for r in records]
        encoded = kind.codec.encode(rows, tokenizer, template, _NO_LIMIT, "right")
        lengths = np.asarray(encoded.lengths)
        longer = int((lengths > max_length).sum())
        lines.append(
            f"  length    {int(np.median(lengths))} tokens in the median, {int(lengths.max())} at "
            f"most; {longer:,} of {len(lengths):,} are longer than {max_length} and would be cut"
        )
        lines += rendered_lines(records, kind, template, tokenizer)
    if len(lines) == 1:
        raise DataError("; ".join(line.strip() for line in errors))
    return lines


def label_lines(records: Sequence[Any]) -> list[str]:
    """Counts of each label, or of each answer if there are few distinct ones."""
    labels = Counter(record.label for record in records if record.label)
    what = "labels"
    if not labels and hasattr(records[0], "choice"):
        labels, what = Counter(record.messages[-1]["content"] for record in records), "answers"
    if not 1 < len(labels) <= _MOST_LABELS or len(labels) > len(records) // 2:
        return []
    width = max(len(shorten(label, 40)) for label in labels)
    return [
        f"  {what if number == 0 else '':<10}{shorten(label, 40):<{width}}  {count:>7,}  "
        f"{count / len(records):.0%}"
        for number, (label, count) in enumerate(labels.most_common())
    ]


def rendered_lines(
    records: Sequence[Any], kind: RecordKind, template: str, tokenizer: Any
) -> list[str]:
    """Evenly spaced examples as the model sees them; supervised text is in bold or in [[ ]]."""
    begin, end = (_BOLD, _PLAIN) if sys.stdout.isatty() else ("[[", "]]")
    count = min(_EXAMPLES, len(records))
    lines = [f"  rendered  {count} examples; what is learned is {begin}marked{end}"]
    for number in np.linspace(0, len(records) - 1, count).astype(int):
        record = records[number]
        for label, segments in kind.rendered(record, template, tokenizer):
            lines.append(f"  --- record {number + 1} {label}".rstrip())
            left = _SHOWN_CHARACTERS
            text = ""
            for segment in segments:
                shown = shorten(segment.text, left) if left > 3 else ""
                left -= len(shown)
                text += f"{begin}{shown}{end}" if segment.supervised and shown else shown
            lines += [f"  | {line}" for line in text.split("\n")]
    return lines


def policy_lines(policy: Policy) -> list[str]:
    """A policy as text, one limit per line."""
    lines: list[str] = []
    for field in fields(policy):
        value = getattr(policy, field.name)
        text = _WORDS.get(field.name, field.name.replace("_", " ") + ": {}")
        if value is None:
            said = "no limit"
        elif isinstance(value, tuple):
            said = ", ".join(value)
        elif isinstance(value, bool):
            said = "yes" if value else "no"
        else:
            said = f"{value:,g}" if isinstance(value, int | float) else str(value)
        lines.append(printable(f"{'' if lines else 'policy':<12}{text.format(said)}"))
    return lines


_WORDS = {
    "allowed_models": "models: {}",
    "optimizers": "optimizers: {}",
    "datasets": "data sets a server may ask for: {}",
    "target_modules": "layers an adapter may change: {}",
    "min_records_per_step": "records behind one step, at least: {}",
    "min_records_per_round": "different records behind one update, at least: {}",
    "min_records_per_score": "held-out records behind one score, at least: {}",
    "min_length": "tokens of one example, at least: {}",
    "max_length": "tokens of one example, at most: {}",
    "max_steps": "steps of one round, at most: {}",
    "max_epochs": "passes over the data in one round, at most: {}",
    "max_batch_size": "records of one step, at most: {}",
    "max_rounds": "rounds of a run, at most: {}",
    "max_lora_rank": "rank of the adapter, at most: {}",
    "only_secure": "only runs under secure aggregation: {}",
    "privacy": "differential privacy of a run: {}",
    "max_epsilon": "epsilon spent on your records over all runs, at most: {}",
    "min_noise_multiplier": "noise of a private run, at least: {} x clip",
    "secret_draws": "which records are drawn depends on a secret of yours: {}",
    "approval": "runs that wait for you: {}",
}
