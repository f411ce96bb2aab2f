"""The directory of a run: file names, creation and resumption."""

import contextlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import load_run, to_yaml
from fedllm_flwr.config.names import shown
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.federation.state import newest_readable, newest_round
from fedllm_flwr.files import write_atomically
from fedllm_flwr.reporting.metrics import has_converged, read_metrics
from fedllm_flwr.tasks import task_of
from fedllm_flwr.training.schedule import cosine_learning_rate

# Options that may change when a stopped run is resumed. The rule: none of them affects which client
# trains on which records, or a number that is trained or aggregated, so that the run ends with the
# same bits as if it had the new value from the start. Exceptions are explicit wishes of the user:
# more rounds or an earlier end, the learning-rate schedule over them, and the number of replies
# that a round needs. All other keys, including new ones, cannot change. For example,
# evaluation.clients and data.eval_path affect which records are held out from training.
_FREE_TO_CHANGE = {
    "federation.num_rounds",
    "federation.engine",
    "federation.min_clients",
    "federation.min_replies",
    "federation.round_timeout_s",
    "federation.start_timeout_s",
    "federation.client_gpus",
    "federation.ray_address",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.adapters",
    "evaluation.central",
    "evaluation.every",
    "evaluation.contribution",
    "evaluation.batch_tokens",  # except with a reference model, see TrainingTask.fixed_keys
    "evaluation.answers",
    "evaluation.max_new_tokens",
    "evaluation.suites",
    "evaluation.suite_subset",
    "evaluation.data_root",
    "tracking.figures",
    "tracking.report",
    "tracking.tensorboard",
    "tracking.wandb",
    "tracking.mlflow",
    "tracking.trackio",
    "tracking.project",
    "tracking.group",
    "tracking.tags",
    "training.early_stopping",
    "training.schedule_rounds",
    "output_dir",
    "resume",
}
SCORE_FILE = "score.json"  # round and scores of the best adapter, in its directory
_DEFAULT_PARENT = Path("outputs")


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside the directory of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON record per round."""
        return self.path / "metrics.jsonl"

    @property
    def data(self) -> Path:
        """Digests of the records that the run was started with."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the server state."""
        return self.path / "checkpoints"

    @property
    def kept_adapters(self) -> Path:
        """Adapters of rounds that ``checkpoint.adapters`` keeps, named as states are."""
        return self.path / "kept-adapters"

    @property
    def client_states(self) -> Path:
        """Client memory of simulated clients."""
        return self.path / "clients"

    @property
    def known_clients(self) -> Path:
        """The server's copies of client memory: SCAFFOLD's control variates."""
        return self.path / "known"

    @property
    def local_adapters(self) -> Path:
        """The clients' own adapters (algorithm=local), by client and round."""
        return self.path / "alone"

    @property
    def adapters(self) -> Path:
        """The clients' own final adapters (algorithm=local), in PEFT's format."""
        return self.path / "adapters"

    @property
    def adapter(self) -> Path:
        """The final adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def adapter_best(self) -> Path:
        """The adapter of the round with the best validation score so far, in PEFT's format."""
        return self.path / "adapter-best"

    @property
    def adapters_best(self) -> Path:
        """As `adapter_best`, with algorithm=local: one directory per client."""
        return self.path / "adapters-best"

    @property
    def summary(self) -> Path:
        """The run's result as one JSON object."""
        return self.path / "summary.json"

    @property
    def answers(self) -> Path:
        """DPO: answers to held-out prompts, of the base model and of the adapter."""
        return self.path / "answers.md"

    @property
    def curves(self) -> Path:
        """Figure of losses and scores over the rounds."""
        return self.path / "curves.png"

    @property
    def report(self) -> Path:
        """The report of the run as one HTML page, see `runs.report`."""
        return self.path / "report.html"

    @property
    def lock(self) -> Path:
        """Lock of the run's process; removed when the run completes."""
        return self.path / "run.lock"

    @property
    def current_round(self) -> Path:
        """Live status of the current round."""
        return self.path / "round.json"

    @property
    def clients(self) -> Path:
        """Table of the clients' sizes and labels."""
        return self.path / "clients.csv"


# Files of a run that stopped before its first checkpoint.
_OWN_FILES = (
    *(
        "clients.csv",
        "data.json",
        "*.png",
        "report.html",
        "clients",
        "metrics.jsonl",
        "run.lock",
        "round.json",
        "alone",
    ),
    *("tensorboard", "wandb", "trackers.json", ".*"),
)


@dataclass(frozen=True)
class PlannedRun:
    """One of several runs, with a configuration that sets ``output_dir``."""

    config: Config = field(kw_only=True)

    @property
    def directory(self) -> RunDirectory:
        """Output directory of the run."""
        return RunDirectory(Path(str(self.config.output_dir)))

    @property
    def done(self) -> bool:
        """Whether the run has finished."""
        return self.directory.summary.is_file()

    def begin(self) -> Config:
        """The configuration to run: resumes the run if it has a checkpoint, otherwise starts it."""
        if newest_round(self.directory.checkpoints) is not None:
            return replace(self.config, resume=str(self.directory.path))
        self.directory.config.unlink(missing_ok=True)  # stopped before its first checkpoint
        return self.config


def refuse_other_files(folder: Path, typed: str, own: Sequence[str] = (".*",)) -> None:
    """Require that a directory, if it exists, contains only names that match a pattern of `own`.

    Args:
        typed: the option and its value, for the message.

    Raises:
        ConfigError: lists other files.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in own)]
    if others:
        raise ConfigError(
            f"{typed} holds other files ({', '.join(others[:3])}{', ...' * (len(others) > 3)}); "
            "give a new or an empty directory."
        )


def create(config: Config) -> RunDirectory:
    """Create the directory of a new run and write its configuration.

    Raises:
        ConfigError: it already contains a run or other files, or cannot be written.
    """
    if config.output_dir is None:
        # outputs/<month day-hour minute>-<algorithm>-<data>, numbered if that exists
        name = f"{datetime.now():%m%d-%H%M}-{config.algorithm.name}-{config.data.name}"
        path = first = _DEFAULT_PARENT / re.sub(r"[^\w.-]+", "_", name)
        number = 2
        while path.exists():
            path, number = first.with_name(f"{first.name}-{number}"), number + 1
    else:
        path = Path(config.output_dir)
    directory = RunDirectory(path.expanduser())
    if directory.config.exists() or directory.checkpoints.exists():
        raise ConfigError(
            f"output_dir={path} holds a run already; give another directory, or resume it: "
            f"resume={path}."
        )
    refuse_other_files(directory.path, f"output_dir={path}", _OWN_FILES)
    try:
        write_atomically(directory.config, to_yaml(config).encode())
    except FederationError as error:
        raise ConfigError(f"output_dir={path}: {error} Give another.") from error
    return directory


def reopen(config: Config) -> tuple[RunDirectory, list[str]]:
    """The directory of the run ``config.resume``, if `config` may resume it, and remarks.

    Writes nothing; see `continue_with`.

    Raises:
        ConfigError: it contains no run, or an option differs that would change the result.
    """
    directory = RunDirectory(Path(str(config.resume)).expanduser())
    saved = load_run(directory.path, f"resume={shown(config.resume)}")
    for key, (old, new) in differences(asdict(saved), asdict(config)).items():
        if key not in _FREE_TO_CHANGE or key in task_of(config).fixed_keys:
            raise ConfigError(
                f"{key}={shown(new)}: the run in {directory.path} was made with "
                f"{key}={shown(old)}, and going on with another value would mix two experiments; "
                "drop it (the run's other options need not be repeated), or start a new run."
            )
    if config.output_dir not in (None, saved.output_dir, str(config.resume)):
        raise ConfigError(
            f"output_dir={config.output_dir}: a run is resumed in its own directory; drop it."
        )
    last = newest_round(directory.checkpoints)
    if last is None:
        raise FederationError(
            f"resume={directory.path}: the run stopped before its first checkpoint; start a new "
            "one, in another directory or after deleting this one."
        )
    if config.federation.num_rounds < last:
        raise ConfigError(
            f"federation.num_rounds={config.federation.num_rounds}: the run in {directory.path} "
            f"has done {last} rounds; ask for more, or drop it."
        )
    return directory, _about_schedule(saved, config, last)


def continue_with(directory: RunDirectory, config: Config) -> None:
    """Write `config`, which `reopen` has checked, as the run's configuration."""
    saved = load_run(directory.path, str(directory.path))
    goes_on = replace(config, output_dir=saved.output_dir, resume=None)
    write_atomically(directory.config, to_yaml(goes_on).encode())


def _about_schedule(saved: Config, config: Config, last: int) -> list[str]:
    """A remark if the learning rates of the remaining rounds differ from the original schedule."""
    old = saved.training.schedule_rounds or saved.federation.num_rounds
    new = config.training.schedule_rounds or config.federation.num_rounds
    if old == new or last >= config.federation.num_rounds:
        return []
    training = replace(config.training, schedule_rounds=None)
    then, now = (cosine_learning_rate(training, last + 1, span) for span in (old, new))
    if then == now:
        return []
    return [
        f"the learning rate now follows a cosine over {new} rounds instead of {old}: {now:.1e} in "
        f"round {last + 1}, where the curve so far has {then:.1e}; training.schedule_rounds={old} "
        "keeps that curve"
    ]


def is_finished(directory: RunDirectory, config: Config) -> bool:
    """Whether all rounds are completed and their results written."""
    trained = directory.adapter.is_dir() or directory.adapters.is_dir()
    if not (trained and directory.summary.is_file()):
        return False
    last = newest_round(directory.checkpoints)
    return last == config.federation.num_rounds or stopped_early(directory, config)


def stopped_early(directory: RunDirectory, config: Config) -> bool:
    """Whether early stopping, or a spent privacy budget, has ended the run at its checkpoint."""
    patience, last = config.training.early_stopping, newest_round(directory.checkpoints)
    promises = config.privacy.target_epsilon is not None
    if last is None or not (patience or promises) or not directory.metrics.is_file():
        return False
    done = [record for record in read_metrics(directory.metrics) if record["round"] <= last]
    return has_converged(done, patience) or (promises and "budget_spent" in done[-1])


def best_round(directory: RunDirectory) -> int | None:
    """The round whose adapter is kept as the best one; None if there is none."""
    for folder in (directory.adapter_best, directory.adapters_best):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((folder / SCORE_FILE).read_text("utf-8"))["round"])
    return None


def already_finished(directory: RunDirectory, config: Config) -> str:
    """A line for a user who resumes a finished run."""
    command = f"fedllm run {shlex.quote(f'resume={directory.path}')}"
    num_rounds, last = config.federation.num_rounds, newest_round(directory.checkpoints)
    if last != num_rounds:
        patience = config.training.early_stopping
        return (
            f"{directory.path}: already finished (training.early_stopping={patience} ended it "
            f"after round {last} of {num_rounds}); to continue: {command} "
            "training.early_stopping=null"
        )
    return (
        f"{directory.path}: already finished ({num_rounds} round{'s' * (num_rounds != 1)}); to go "
        f"on, raise their number: {command} federation.num_rounds={2 * num_rounds}"
    )


def how_to_go_on(directory: RunDirectory, command: str = "fedllm run") -> str | None:
    """The last saved round of a stopped run, and the command to resume it, if any."""
    last = newest_readable(directory.checkpoints)
    if last is None:
        return None
    kept = f"round {last} is saved" if last else "the start is saved"
    return f"{kept}; resume with: {command} {shlex.quote(f'resume={directory.path}')}"


def discard(directory: RunDirectory) -> None:
    """Remove the files of a run that stopped before its first checkpoint, and no others."""
    if newest_round(directory.checkpoints) is not None:
        return
    leftovers = (
        *(directory.config, directory.data, directory.clients),
        *(directory.metrics, directory.lock),
    )
    for path in leftovers:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it
        directory.path.rmdir()
        if directory.path.parent == _DEFAULT_PARENT:
            directory.path.parent.rmdir()


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; None for a missing key."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found[prefix + name] = (before, after)
    return found
