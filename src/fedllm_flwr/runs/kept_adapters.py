"""Finds the adapter that a command names: a run's final, best or other round's, or a PEFT adapter.

Notation, for every command that takes an adapter::

    outputs/RUN                 the final adapter; for an unfinished run, that of the newest round
    outputs/RUN@best            the adapter of the round with the lowest loss on held-out records
    outputs/RUN@round=8         the adapter of a round whose checkpoint is kept
    outputs/RUN@client=retail   a client's own adapter (algorithm=local, fedsa, ditto)
    outputs/RUN/adapter         any directory with an adapter_config.json

Parts after ``@`` may be combined: ``outputs/RUN@best,client=retail``. The module imports no heavy
libraries, so that a wrong path is rejected at once.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.compose import load_run
from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import LoraConfig, ModelConfig
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.factors import joined
from fedllm_flwr.federation.round_store import RoundStore, folder_name
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.state import (
    FROZEN_GROUP,
    kept_rounds,
    newest_readable,
    read_state,
    state_file,
)
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.models.tokenizer import model_source
from fedllm_flwr.params import Params
from fedllm_flwr.runs.directory import RunDirectory, best_round, is_finished
from fedllm_flwr.runs.local_adapters import LocalAdapters

_NOTATION = "DIR, DIR@best, DIR@round=N or DIR@client=NAME"


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter on disk, and the configuration that it was trained with.

    Args:
        label: name to show: ``final``, ``best (round 8)``, ``round 8``, or a directory's name.
        config: base model, LoRA settings and template.
        path: a PEFT directory, or a file with a group of tensors.
        group: name of that group; None for a directory.
        run: directory of the run that trained it, if it is inside one.
        client: its client, if each client has its own adapter.
        unfinished: remark for the user if the run has not finished; otherwise "".
        memory: file of a client's memory, if its adapter is combined from both files.
    """

    label: str
    config: Config
    path: Path
    group: str | None = None
    run: Path | None = None
    client: str | None = None
    unfinished: str = ""
    memory: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The files with its weights and settings."""
        if self.group is not None:
            return [self.path] if self.memory is None else [self.path, self.memory]
        return [self.path / "adapter_model.safetensors", self.path / "adapter_config.json"]

    def tensors(self) -> Params | None:
        """Its tensors, if they are in a checkpoint; None for a PEFT directory."""
        if self.group is None:
            return None
        groups, _ = load_params(self.path)
        if self.memory is not None:
            rule = find_rule(self.config.algorithm)
            return rule.personal_adapter(groups, load_params(self.memory)[0])
        return joined(groups[self.group], groups.get(FROZEN_GROUP, {}))


@dataclass(frozen=True)
class _Wanted:
    """The part after the ``@``."""

    best: bool = False
    round: int | None = None
    client: str | None = None


def find_adapter(typed: str, base: str | None = None, template: str | None = None) -> KeptAdapter:
    """The single adapter that `typed` names.

    Args:
        typed: see the notation above.
        base, template: base model and template of an adapter outside of a run.

    Raises:
        ConfigError: there is no such adapter, or several.
    """
    found = find_adapters(typed, base, template)
    if len(found) > 1:
        names = ", ".join(str(item.client) for item in found)
        joint = "," if "@" in typed else "@"
        raise ConfigError(
            f"{typed}: each client has an adapter of its own; choose one, such as "
            f"{typed}{joint}client={found[0].client} (of {names})."
        )
    return found[0]


def find_adapters(
    typed: str, base: str | None = None, template: str | None = None
) -> list[KeptAdapter]:
    """As `find_adapter`; for a run with ``algorithm=local``, the adapters of all clients.

    Raises:
        ConfigError: there is no such adapter.
    """
    path, wanted = _parsed(typed)
    if (path / "adapter_config.json").is_file():
        if wanted != _Wanted():
            raise ConfigError(f"{typed}: {path} is an adapter itself; drop the part after '@'.")
        return [_of_directory(path, typed, base, template)]
    if (path / "compare.json").is_file() or (path / "sweep.json").is_file():
        run = next((file.parent for file in sorted(path.glob("**/config.yaml"))), path / "<run>")
        raise ConfigError(f"{typed}: holds several runs; give one of them, such as {run}.")
    if path.exists() and not (path / "config.yaml").is_file():
        raise ConfigError(
            f"{typed}: holds no run (no config.yaml) and no adapter (no adapter_config.json); give "
            "the directory of one."
        )
    config = load_run(path, typed)
    if base is not None:
        config = replace(config, model=base_model(base))
    if template is not None:
        config = changed(config, data={"template": template})
    if config.algorithm.name == "local":
        return _of_clients(RunDirectory(path), config, wanted, typed)
    if wanted.client is not None and find_rule(config.algorithm).personal is not None:
        return [_personal(RunDirectory(path), config, wanted, wanted.client, typed)]
    if wanted.client is not None:
        raise ConfigError(
            f"{typed}: algorithm={config.algorithm.name} has one adapter for all clients; drop "
            f"client={wanted.client}."
        )
    return [_of_run(RunDirectory(path), config, wanted, typed)]


def check_output(path: Path) -> None:
    """Reject an output directory that exists or cannot be created.

    Raises:
        ConfigError: names the directory.
    """
    if path.exists():
        raise ConfigError(f"{path} exists; give a directory that does not.")
    if beside := next((p for p in path.parents if p.exists() and not p.is_dir()), None):
        raise ConfigError(f"{path}: {beside} is a file; give another directory to write.")


def _parsed(typed: str) -> tuple[Path, _Wanted]:
    """Directory and selection; an ``@`` in the name of an existing directory belongs to it."""
    whole = Path(typed).expanduser()
    if "@" not in typed or whole.exists():
        return whole, _Wanted()
    directory, _, choice = typed.rpartition("@")
    wanted = _Wanted()
    for part in choice.split(","):
        key, _, value = part.partition("=")
        if part == "best":
            wanted = replace(wanted, best=True)
        elif key == "round" and value.isdecimal():
            wanted = replace(wanted, round=int(value))
        elif key == "client" and value:
            wanted = replace(wanted, client=value)
        elif part != "final":
            raise ConfigError(f"{typed}: '@{choice}' names no adapter; give {_NOTATION}.")
    if wanted.best and wanted.round is not None:
        raise ConfigError(f"{typed}: give best or round={wanted.round}, not both.")
    return Path(directory).expanduser(), wanted


def _of_run(directory: RunDirectory, config: Config, wanted: _Wanted, typed: str) -> KeptAdapter:
    best, run = best_round(directory), directory.path
    if wanted.best:
        if best is None:
            raise ConfigError(
                f"{typed}: no best adapter there, for no round has been scored on held-out "
                f"records; kept: {_kept(directory)}."
            )
        return KeptAdapter(f"best (round {best})", config, directory.adapter_best, run=run)
    finished = is_finished(directory, config)
    if wanted.round is None and finished:
        return KeptAdapter("final", config, directory.adapter, run=run)
    number = newest_readable(directory.checkpoints) if wanted.round is None else wanted.round
    if number is not None and (file := state_file(directory.checkpoints, number)).is_file():
        note = "" if wanted.round is not None else _note(directory, config, number)
        return KeptAdapter(f"round {number}", config, file, "params", run, unfinished=note)
    if number is not None and (file := state_file(directory.kept_adapters, number)).is_file():
        return KeptAdapter(f"round {number}", config, file, "params", run)
    if number is not None and number == best:
        return KeptAdapter(f"round {number}", config, directory.adapter_best, run=run)
    if number is None:
        raise ConfigError(
            f"{typed}: no adapter there, the run stopped before its first checkpoint."
        )
    raise ConfigError(
        f"{typed}: round {number} is not kept; kept: {_kept(directory)} (checkpoint.keep=N keeps "
        "the newest N, checkpoint.adapters=all every one)."
    )


def _of_clients(
    directory: RunDirectory, config: Config, wanted: _Wanted, typed: str
) -> list[KeptAdapter]:
    """The clients' own adapters (algorithm=local): of all clients, or of the selected one."""
    number, note, run = wanted.round, "", directory.path
    if wanted.best:
        if best_round(directory) is None:
            raise ConfigError(f"{typed}: no best adapters there, for no round has been scored.")
        label, folders = f"best (round {best_round(directory)})", directory.adapters_best
    elif number is None and is_finished(directory, config):
        label, folders = "final", directory.adapters
    else:
        kept = kept_rounds(directory.checkpoints)
        if number is None:
            number = newest_readable(directory.checkpoints)
            note = "" if number is None else _note(directory, config, number)
        if number is None or number not in kept:
            raise ConfigError(f"{typed}: round {number} is not kept; kept: {_kept(directory)}.")
        label, folders = f"round {number}", directory.local_adapters
    found = []
    if label.startswith("round"):
        state = read_state(state_file(directory.checkpoints, number or 0))
        for client, acknowledged in sorted(state.clients.items()):
            file = RoundStore(folders / folder_name(client)).file(acknowledged.round)
            if file.is_file():
                found.append(KeptAdapter(label, config, file, "adapter", run, client, note))
    else:
        for folder in sorted(folders.iterdir()) if folders.is_dir() else []:
            if folder.is_dir():
                client = LocalAdapters.name_of(folder.name)
                found.append(KeptAdapter(label, config, folder, None, run, client))
    if not found:
        raise ConfigError(f"{typed}: no client has trained an adapter there.")
    if wanted.client is None:
        return found
    chosen = [item for item in found if item.client == wanted.client]
    if not chosen:
        names = ", ".join(str(item.client) for item in found)
        raise ConfigError(f"{typed}: no client {wanted.client!r} there; choose from {names}.")
    return chosen


def _personal(
    directory: RunDirectory, config: Config, wanted: _Wanted, client: str, typed: str
) -> KeptAdapter:
    """A simulated client's personal adapter as of the newest checkpoint."""
    number = newest_readable(directory.checkpoints) if wanted.round is None else wanted.round
    state = None if number is None else read_state(state_file(directory.checkpoints, number))
    if wanted.best:
        raise ConfigError(f"{typed}: clients keep their newest adapters only; drop best.")
    if state is None or number is None:
        raise ConfigError(
            f"{typed}: give DIR@client=NAME or DIR@round=N,client=NAME; kept: {_kept(directory)}."
        )
    acknowledged = state.clients.get(client)
    memory = RoundStore(directory.client_states / folder_name(client))
    if acknowledged is None or not (file := memory.file(acknowledged.round)).is_file():
        names = ", ".join(name for name, known in state.clients.items() if known.round)
        why = "has not taken part" if client in state.clients else "is no client of this run"
        raise ConfigError(f"{typed}: {shown(client)} {why}; choose from {names}.")
    path = state_file(directory.checkpoints, number)
    label = f"{client}, round {number}"
    return KeptAdapter(label, config, path, "params", directory.path, client, memory=file)


def _of_directory(path: Path, typed: str, base: str | None, template: str | None) -> KeptAdapter:
    """An adapter in PEFT's format; inside a run's directory, it gets the run's settings."""
    file = path / "adapter_config.json"
    try:
        saved: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{typed}: {file} cannot be read ({error}).") from error
    run = next((p for p in path.resolve().parents[:2] if (p / "config.yaml").is_file()), None)
    if run is not None and base is None:
        config = load_run(run, str(run))
    else:
        run, source = None, base or saved.get("base_model_name_or_path")
        if not source:
            raise ConfigError(f"{typed}: it names no base model; add --base <model>.")
        if saved.get("peft_type", "LORA") != "LORA" or "r" not in saved:
            raise ConfigError(
                f"{typed}: peft_type={saved.get('peft_type')} is no LoRA adapter; give one of "
                "LoRA's."
            )
        targets = saved.get("target_modules")
        lora = LoraConfig(
            r=saved["r"],
            alpha=saved["lora_alpha"],
            target_modules=sorted(targets) if isinstance(targets, list) else targets,
            rslora=bool(saved.get("use_rslora")),
            dora=bool(saved.get("use_dora")),
        )
        config = Config(model=base_model(source), lora=lora)
    if template is not None:
        config = changed(config, data={"template": template})
    name = path.resolve().name
    label = "final" if run is not None and name == "adapter" else name
    return KeptAdapter(label, config, path, run=run)


def base_model(path: str) -> ModelConfig:
    """The configuration of a base model by hub id, directory or ``embedded``.

    Raises:
        ModelError: the directory does not exist or contains no model.
    """
    name = "tiny" if path == "embedded" else "custom"
    model = ModelConfig(name=name, path=path)
    model_source(model)
    return model


def _note(directory: RunDirectory, config: Config, number: int) -> str:
    total = config.federation.num_rounds
    return f"{directory.path} has not finished: the adapter of round {number} of {total} is used"


def _kept(directory: RunDirectory) -> str:
    """The rounds whose adapters are kept, as text."""
    rounds = {*kept_rounds(directory.checkpoints), *kept_rounds(directory.kept_adapters)}
    parts = [f"round {number}" for number in sorted(rounds, reverse=True)]
    if (best := best_round(directory)) is not None:
        parts.append(f"best (round {best})")
    return ", ".join(parts) or "none"
