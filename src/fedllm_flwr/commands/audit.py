"""``fedllm audit``: privacy attacks that measure what a run reveals about its training records."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedllm_flwr.config import Config, changed
from fedllm_flwr.data.canaries import canaries
from fedllm_flwr.data.client_data import encode_records, simulated_data
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.data.federated import has_eval_source, load_unused_data
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.inversion import first_layer, tokens_recovered
from fedllm_flwr.evaluation.membership import (
    Attack,
    Interval,
    attack,
    attack_scores,
    judge,
    mean_of,
)
from fedllm_flwr.evaluation.memorisation import exposures
from fedllm_flwr.federation.mechanism import ReleaseLog
from fedllm_flwr.files import write_atomically
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.privacy.one_run import guessed_bound
from fedllm_flwr.reporting.metrics import read_metrics
from fedllm_flwr.runs.adapter_files import load_kept
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.kept_adapters import KeptAdapter
from fedllm_flwr.server.preparation import evaluation_threads
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import LocalWork
from fedllm_flwr.training.batches import RoundBatches

FILE = "audit.json"
_FEWEST = 50  # minimum number of members and of non-members for a meaningful interval
_FEWEST_CANARIES = 20
_DELTA = 1e-5  # for runs without differential privacy
_UPDATES = (("one", 40), ("batch", 20))  # gradients that are attacked, by size of the batch


@dataclass(frozen=True)
class _Audited:
    """A run under attack, and a model with its adapter.

    Args:
        records: training records without canaries (members).
        others: records that were not trained on (non-members).
        others_are: description of the non-members, for the report.
    """

    config: Config
    model: AdaptedModel
    records: Encoded
    others: Encoded
    others_are: str


def audit(kept: KeptAdapter, run: Path, most: int) -> Iterator[str]:
    """Attack a simulated run in three ways; yield the lines of a report.

    Membership inference: training records against records that were not trained on. Canaries, if
    the run has any: their exposure, and a lower bound on epsilon. Gradient inversion: tokens that
    can be recovered from the gradient of a step.

    Args:
        run: the run's directory, to which ``audit.json`` is written.
        most: maximum number of members and of non-members, drawn by the run's seed.

    Raises:
        ConfigError: the attacks do not apply to the run's task, or its records are not here.
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
    if 0 < config.privacy.canaries < _FEWEST_CANARIES:
        raise ConfigError(
            f"privacy.canaries={config.privacy.canaries} are too few for an audit; run with at "
            f"least {_FEWEST_CANARIES}."
        )
    spent = next(
        (
            {"epsilon": record["epsilon"], "delta": record["delta"]}
            for record in reversed(read_metrics(run / "metrics.jsonl"))
            if "epsilon" in record
        ),
        None,
    )
    with torch_threads(evaluation_threads(config)):
        audited = _open(kept, config, most)
        delta = (config.privacy.delta or _DELTA) if spent is None else spent["delta"]
        found: dict[str, Any] = {"spent": spent, "delta": delta}
        yield from _membership(audited, found)
        if config.privacy.canaries:
            yield from _canaries(audited, found)
        yield from _updates(audited, RunDirectory(run), found)
    write_atomically(run / FILE, json.dumps(found, indent=2).encode())


def _open(kept: KeptAdapter, config: Config, most: int) -> _Audited:
    kind, model = task_of(config).records, load_model(config)
    data = simulated_data(config, kind, model.tokenizer)
    others: Records | None
    if not has_eval_source(config.data):
        others, others_are = data.source.eval, "held-out records drawn from the same file"
    else:
        others = load_unused_data(config, kind) if config.data.max_samples is not None else None
        others_are = "records left out by data.max_samples"
        if others is None or len(others) < _FEWEST:
            others, others_are = data.source.eval, "held-out records of another file"
    held_out = encode_records(config, kind, model.tokenizer, others)
    planted = sum(canary.planted for canary in canaries(config))
    members = np.flatnonzero(data.encoded.source < len(data.source.train) - planted)
    rng = np.random.default_rng(config.seed)
    chosen = []
    for name, encoded, among in (
        ("training", data.encoded, members),
        ("other", held_out, np.arange(len(held_out))),
    ):
        if len(among) < _FEWEST:
            raise DataError(f"{len(among)} {name} records are too few; give at least {_FEWEST}.")
        kept_ones = among[np.sort(rng.permutation(len(among))[:most])]
        chosen.append(cast(Encoded, encoded.take(kept_ones)))  # the type of task=sft
    model.load(load_kept(kept, model))
    return _Audited(config, model, chosen[0], chosen[1], others_are)


def _membership(audited: _Audited, found: dict[str, Any]) -> Iterator[str]:
    model, tokens = audited.model, audited.config.evaluation.batch_tokens
    members = attack_scores(model, audited.records, tokens)
    others = attack_scores(model, audited.others, tokens)
    attacks = judge(members, others, audited.config.seed)
    counts = {"members": len(members["loss"]), "non_members": len(others["loss"])}
    yield (
        f"{counts['members']} training records against {counts['non_members']} "
        f"{audited.others_are}; an AUC of 0.5 is guessing"
    )
    yield f"  {'attack':<12}{'AUC':>24}{'TPR at 1 % FPR':>28}"
    for name, each in attacks.items():
        yield f"  {name:<12}{_shown(each.auc):>24}{_shown(each.tpr):>28}"
    yield from _verdict(attacks)
    found |= {**counts, "attacks": {name: asdict(each) for name, each in attacks.items()}}


def _verdict(attacks: dict[str, Attack]) -> Iterator[str]:
    base = attacks["base"].auc
    if not base.low <= 0.5 <= base.high:
        yield (
            "note: the base model already separates both kinds of records; an attack is "
            "successful only above the base model's interval"
        )
    guessing = max(0.5, base.high if base.low > 0.5 else 0.5)
    above = [name for name in ("loss", "min-k", "calibrated") if attacks[name].auc.low > guessing]
    yield f"above guessing: {', '.join(above)}" if above else "no attack is above guessing"


def _canaries(audited: _Audited, found: dict[str, Any]) -> Iterator[str]:
    all_of_them, seed = canaries(audited.config), audited.config.seed
    planted = np.array([canary.planted for canary in all_of_them])
    scores = exposures(audited.model, audited.config, all_of_them)
    told = attack(scores.surprise[planted], scores.surprise[~planted], seed)
    bits = [mean_of(scores.bits[chosen], seed) for chosen in (planted, ~planted)]
    bound, guesses, right = guessed_bound(scores.surprise, planted, found["delta"])
    yield f"{planted.sum()} inserted canaries against {(~planted).sum()} others"
    yield f"  exposure, bits: {_shown(bits[0])} inserted, {_shown(bits[1])} others; guessing: 1.44"
    yield f"  AUC {_shown(told.auc)}; {right} of {guesses} guesses are correct"
    promise = (
        ""
        if found["spent"] is None
        else f"; the run's guarantee is {found['spent']['epsilon']:.3g}"
    )
    yield f"epsilon is above {bound:.3g} at delta {found['delta']:.2g} (95 %){promise}"
    found["canaries"] = {
        "planted": int(planted.sum()),
        "of": len(planted),
        "exposure": asdict(bits[0]),
        "exposure_not_planted": asdict(bits[1]),
        "auc": asdict(told.auc),
        "guesses": guesses,
        "right": right,
        "epsilon_above": bound,
    }


def _updates(audited: _Audited, run: RunDirectory, found: dict[str, Any]) -> Iterator[str]:
    config, model, records = audited.config, audited.model, audited.records
    layer = first_layer(model)
    if not layer.names:
        yield "no matrix with the first layer's input is trained: gradients reveal no tokens"
        return
    if config.privacy.unit == "record":
        log = ReleaseLog(run.known_clients / "releases.jsonl").releases()
        [noise] = {each.noise_multiplier for several in log.values() for each in several}
        config = changed(config, privacy={"noise_multiplier": noise})
    size = config.training.batch_size * config.training.gradient_accumulation_steps
    every = np.arange(len(records))
    work = LocalWork(config, model, records, every, RoundBatches([], 1, size, 1, 1), 1.0, 0)
    losses = task_of(config).example_losses(work, {})
    rng, kept = np.random.default_rng(config.seed), {}
    yield "fraction of a step's tokens recovered from its gradient (control: of other records)"
    for name, count in _UPDATES:
        examples = 1 if name == "one" else min(size, len(records) // 2)
        batches = [rng.choice(every, examples, replace=False).tolist() for _ in range(count)]
        shares = tokens_recovered(model, losses, records, layer, batches, config)
        own, control = (mean_of(share, config.seed) for share in shares)
        yield f"  {f'{examples} records' if examples > 1 else '1 record':<12}{_shown(own):>24}"
        yield f"  {'control':<12}{_shown(control):>24}"
        kept[name] = {"records": examples, "own": asdict(own), "control": asdict(control)}
    found["updates"] = kept


def _shown(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
