"""Recorder of a run: evaluation, metrics log, checkpoints and console."""

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.errors import FederationError
from fedllm_flwr.evaluation.central import evaluate
from fedllm_flwr.federation.recorder import Recorder, RoundReport
from fedllm_flwr.federation.round_store import folder_name
from fedllm_flwr.federation.state import (
    ServerState,
    kept_rounds,
    read_state,
    save_state,
    state_file,
)
from fedllm_flwr.federation.tensor_files import save_params
from fedllm_flwr.models.device import cpu_count, torch_threads
from fedllm_flwr.params import Params
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.reporting.metrics import (
    MetricsLog,
    RoundRecord,
    best_record,
    has_converged,
    read_metrics,
    summarise,
)
from fedllm_flwr.reporting.trackers import open_trackers
from fedllm_flwr.runs.adapter_files import recover, save_best
from fedllm_flwr.runs.directory import RunDirectory, best_round
from fedllm_flwr.runs.local_adapters import LocalAdapters
from fedllm_flwr.runs.lock import RoundBoard
from fedllm_flwr.runs.timings import Timings
from fedllm_flwr.server.preparation import Prepared, evaluation_threads
from fedllm_flwr.tasks.base import Scores
from fedllm_flwr.training.schedule import cosine_learning_rate


class RunRecorder(Recorder):
    """Writes the metrics log, checkpoints and best adapter of a run, and shows its progress.

    Args:
        first_round: the first round to run, above 1 for a resumed run.
        refused: clients that cannot take part, and why; written to this start's first record.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        prepared: Prepared,
        console: Console,
        timings: Timings,
        first_round: int,
        refused: Mapping[str, str],
    ) -> None:
        self._config = config
        self._directory = directory
        self._prepared = prepared
        self._console = console
        self._board = RoundBoard(directory)
        self.timings = timings
        resumed = first_round - 1 if first_round > 1 else None
        self._log = MetricsLog(directory.metrics, resumed)
        self.records: list[RoundRecord] = read_metrics(directory.metrics)
        self._trackers = open_trackers(config, directory.path)
        self._started = time.monotonic()
        self._first_round = first_round
        self._refused = dict(refused)
        self._counted = timings.earlier  # seconds by phase that are in records already
        self.local_adapters = LocalAdapters(directory.local_adapters, prepared.initial)

    def on_start_round(self, round: int, names: list[str]) -> None:
        """Show the sampled clients."""
        self._board.start_round(round, names)
        self._console.start_round(round, names)

    def on_reply(self, round: int, name: str, loss: float | None) -> None:
        """Show that a client has answered."""
        self._board.reply(round, name, loss)
        self._console.reply(round, name, loss)

    def on_update(self, round: int, name: str, delta: Params, acknowledged: int) -> None:
        """Keep a client's own adapter."""
        self.local_adapters.store(round, name, delta, acknowledged, self.oldest_checkpoint())

    def oldest_checkpoint(self) -> int:
        """Round of the oldest checkpoint on disk."""
        return min(kept_rounds(self._directory.checkpoints), default=0)

    def start(self, state: ServerState) -> None:
        """Score the initial adapter, and save it as round 0."""
        record: RoundRecord = {"round": 0, "seconds": 0.0}
        if self._prepared.evaluation is not None:
            record["eval"] = self._evaluate(state.adapter)
        self._add(record)
        with self.timings.phase("checkpoints"):
            save_state(self._directory.checkpoints, state, self._config.checkpoint.keep)
        if self._is_best(0):
            self._save_best(state)

    def on_round(self, state: ServerState, report: RoundReport) -> None:
        """Evaluate if due, write the round's record, then save the state.

        In this order, a round that was recorded but not saved is run again, and none is lost.
        """
        config = self._config
        last = report.is_last or report.round == config.federation.num_rounds
        every = config.evaluation.every
        record = _record(report, config)
        # The round's time is split into the clients' parallel computation and the rest.
        parallel = (
            1
            if config.federation.engine == "inprocess"
            else max(1, cpu_count() // config.federation.client_cpus)
        )
        computed = sum(metrics.get("seconds", 0.0) for metrics in report.metrics.values())
        training = min(report.seconds, computed / parallel)
        self.timings.seconds["training"] += training
        self.timings.seconds["federation"] += report.seconds - training
        if last or (every and report.round % every == 0):
            record |= self._scores(state)
            record |= self._contributions(record, report)
        self._add(record)
        last = last or self.has_converged()
        is_best = self._is_best(report.round)
        if last or is_best or report.round % config.checkpoint.every == 0:
            with self.timings.phase("checkpoints"):
                save_state(self._directory.checkpoints, state, config.checkpoint.keep)
        if config.checkpoint.keeps_adapter(report.round):
            with self.timings.phase("checkpoints"):
                save_params(
                    state_file(self._directory.kept_adapters, report.round),
                    {"params": state.adapter},
                    {"round": str(report.round)},
                )
        if is_best:  # after the state, so that a resumed run finds it in the checkpoint
            self._save_best(state)

    def has_converged(self) -> bool:
        """Whether ``training.early_stopping`` ends the run here."""
        return has_converged(self.records, self._config.training.early_stopping)

    def restore_best(self) -> list[str]:
        """After a stop, restore the best adapter according to the records; return warnings.

        The two differ if the process was killed between two files, or if rounds are run again.
        """
        best, path = best_record(self.records), self._best_path
        recover(path)
        if best is None or best["round"] == best_round(self._directory):
            return []
        try:
            self._save_best(read_state(state_file(self._directory.checkpoints, best["round"])))
        except FederationError:
            shutil.rmtree(path, ignore_errors=True)
            return [f"the adapter of round {best['round']}, the best so far, is not kept"]
        return []

    @property
    def _best_path(self) -> Path:
        local = self._config.algorithm.name == "local"
        return self._directory.adapters_best if local else self._directory.adapter_best

    def _is_best(self, server_round: int) -> bool:
        best = best_record(self.records)
        return best is not None and best["round"] == server_round

    def _save_best(self, state: ServerState) -> None:
        adapters: Params | dict[str, Params] = state.adapter
        if self._config.algorithm.name == "local":
            adapters = {
                folder_name(name): self.local_adapters.load(name, client)
                for name, client in state.clients.items()
                if client.round
            }
            if not adapters:  # no client has trained yet
                return
        records = [record for record in self.records if record["round"] <= state.round]
        summary = summarise(records, self.timings.seconds)
        with self.timings.phase("checkpoints"):
            save_best(self._best_path, self._prepared.model, adapters, self._config, summary)

    def on_failed_round(self, report: RoundReport) -> None:
        """Record the failures of a round that ends the run; the run resumes at this round."""
        record = _record(report, self._config) | {"failed": True}
        with contextlib.suppress(FederationError):  # the run's own error reports a full disk
            self._log.append(record)

    def close(self, succeeded: bool) -> None:
        """End the trackers."""
        self._trackers.close(succeeded)

    def _add(self, record: RoundRecord) -> None:
        now = dict(self.timings.seconds)
        spent = {name: now[name] - self._counted.get(name, 0.0) for name in now}
        record["phases"] = {name: seconds for name, seconds in spent.items() if seconds > 0}
        self._counted = now
        if self._refused:
            record["refused"], self._refused = self._refused, {}
        self.records.append(record)
        self._log.append(record)
        self._trackers.log(self.records)
        done = record["round"] - self._first_round + 1
        per_round = (time.monotonic() - self._started) / max(1, done)
        left = per_round * (self._config.federation.num_rounds - record["round"])
        self._console.round(record, left if done > 0 else None)

    def _scores(self, state: ServerState) -> RoundRecord:
        """The adapter's scores; for local baselines, each client's scores and their mean."""
        if self._prepared.evaluation is None:
            return {}
        if self._config.algorithm.name != "local":
            return {"eval": self._evaluate(state.adapter)}
        each = self.local_adapters.scores(state.clients, self._evaluate)
        names = next(iter(each.values())).keys()
        mean = {name: fmean(scores[name] for scores in each.values()) for name in names}
        return {"eval": mean, "local": each}

    def _contributions(self, record: RoundRecord, report: RoundReport) -> RoundRecord:
        """The contributions of `evaluation.contribution` by client; empty if there are no losses.

        Omits a client if the combiner has too few updates without it.
        """
        if report.adapter_with is None or self._prepared.evaluation is None:
            return {}
        found: dict[str, float] = {}
        alone = self._config.evaluation.contribution == "alone"
        for name in sorted(report.metrics):
            chosen = [each for each in report.metrics if (each == name) == alone]
            try:
                loss = self._evaluate(report.adapter_with(chosen), suites=False)["loss"]
            except FederationError:
                continue
            found[name] = loss if alone else loss - record["eval"]["loss"]
        return {"update_alone" if alone else "leave_one_out": found} if found else {}

    def _evaluate(self, params: Params, suites: bool = True) -> Scores:
        assert self._prepared.evaluation is not None
        self._console.status("evaluating")
        threads = evaluation_threads(self._config)
        with self.timings.phase("evaluation"):
            scores = evaluate(
                self._prepared.model,
                params,
                self._prepared.evaluation,
                self._config.evaluation.batch_tokens,
                threads,
            )
            if (
                suites and self._prepared.suites is not None
            ):  # with the adapter that was just loaded
                with torch_threads(threads):
                    scores |= self._prepared.suites.score(self._prepared.model)
        return scores


def _record(report: RoundReport, config: Config) -> RoundRecord:
    """A round as plain data, see `reporting.metrics`."""
    record: dict[str, Any] = {
        "round": report.round,
        "learning_rate": cosine_learning_rate(
            config.training, report.round, config.federation.num_rounds
        ),
        "loss": report.loss,
        "clients": {
            name: {**metrics, "num_examples": report.num_examples[name]}
            for name, metrics in sorted(report.metrics.items())
        },
        "failures": dict(sorted(report.failures.items())),
        "seconds": report.seconds,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
    }
    if report.aggregation_error is not None:
        record["aggregation_error"] = report.aggregation_error
    if report.ignored:
        record["ignored"] = report.ignored
    if report.lost:
        record["lost"] = dict(sorted(report.lost.items()))
    if report.attackers:
        record["attackers"] = report.attackers
    if report.cut:
        record["cut"] = report.cut
    for key, measured in (("update_norm", report.norms), ("update_cosine", report.cosines)):
        if measured:
            record[key] = dict(sorted(measured.items()))
    if report.refused:
        record["refused_updates"] = sorted(report.refused)
    if report.spent is not None:
        record["epsilon"], record["delta"] = report.spent
    if report.is_last:
        record["budget_spent"] = True
    if report.score_failures:
        record["evaluation_failures"] = dict(sorted(report.score_failures.items()))
    if report.score is not None:
        record["client_eval"] = {"loss": report.score, "clients": report.scores}
    return record
