"""``fedllm audit``: what an adapter gives away about the records it was trained on."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np

from fedllm_flwr.data.client_data import encode_records, simulated_data
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.membership import Attack, Interval, attack_scores, judge
from fedllm_flwr.files import write_atomically
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.runs.adapter_files import load_kept
from fedllm_flwr.runs.kept_adapters import KeptAdapter
from fedllm_flwr.server.preparation import evaluation_threads
from fedllm_flwr.tasks import task_of

FILE = "audit.json"
_FEWEST = 50  # records of either kind, below which an interval says nothing


def audit(kept: KeptAdapter, run: Path, most: int) -> Iterator[str]:
    """Attack the adapter of a simulated run; yields the lines of a table.

    Members are training records of all clients, non-members the held-out records.

    Args:
        run: directory of the run, where ``audit.json`` is written.
        most: records of either kind that are scored, drawn by the run's seed.

    Raises:
        ConfigError: a run whose records or task this cannot attack.
        DataError: there are too few records.
    """
    config = kept.config
    if config.task.name != "sft":
        raise ConfigError(f"task={config.task.name}: fedllm audit attacks runs of task=sft.")
    if config.federation.engine == "deployment":
        raise ConfigError(
            "federation.engine=deployment: the records are at the sites; fedllm audit attacks "
            "simulated runs."
        )
    kind, model = task_of(config).records, load_model(config)
    data = simulated_data(config, kind, model.tokenizer)
    if data.source.eval is None:
        raise DataError("the run has no held-out records to compare with.")
    held_out = encode_records(config, kind, model.tokenizer, data.source.eval)
    rng = np.random.default_rng(config.seed)
    scores = []
    for name, encoded in (("training", data.encoded), ("held-out", held_out)):
        if len(encoded) < _FEWEST:
            raise DataError(
                f"{len(encoded)} {name} records are too few to tell; {_FEWEST} at least."
            )
        chosen = np.sort(rng.permutation(len(encoded))[:most])
        with torch_threads(evaluation_threads(config)):
            params = load_kept(kept, model)
            tokens = config.evaluation.batch_tokens
            records = cast(Encoded, encoded.take(chosen))  # as task=sft makes them
            scores.append(attack_scores(model, params, records, tokens))
    members, others = scores
    attacks = judge(members, others, config.seed)
    counts = {"members": len(members["loss"]), "non_members": len(others["loss"])}
    yield (
        f"{counts['members']} training records against {counts['non_members']} held-out ones; an "
        "AUC of 0.5 is guessing"
    )
    yield f"  {'attack':<12}{'AUC':>24}{'found at 1 % errors':>28}"
    for name, attack in attacks.items():
        yield f"  {name:<12}{_shown(attack.auc):>24}{_shown(attack.tpr):>28}"
    yield from _verdict(attacks)
    found = {name: asdict(attack) for name, attack in attacks.items()}
    write_atomically(run / FILE, json.dumps({**counts, "attacks": found}, indent=2).encode())


def _verdict(attacks: dict[str, Attack]) -> Iterator[str]:
    base = attacks["base"].auc
    if not base.low <= 0.5 <= base.high:
        yield (
            "note: the base model alone tells both kinds apart; they differ by themselves, and an "
            "attack counts only above the base model's interval"
        )
    guessing = max(0.5, base.high if base.low > 0.5 else 0.5)
    above = [name for name in ("loss", "min-k", "calibrated") if attacks[name].auc.low > guessing]
    yield f"above guessing: {', '.join(above)}" if above else "no attack is above guessing"


def _shown(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
