"""Checks of the files that a configuration names on this machine."""

import difflib
from pathlib import Path

from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import EMBEDDED_DATA, Config, value_of
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.plugins import TASKS


def adapter_keys() -> list[str]:
    """Keys that name an adapter's directory on the server: the start's, and those of the tasks."""
    tasks = [TASKS.find(name) for name in TASKS.names()]
    return ["init_adapter", *(key for task in tasks for key in task.adapters.values())]


def validate_paths(config: Config) -> None:
    """Check the files that the configuration names on this machine.

    Raises:
        ConfigError: names the key and the path that is missing.
    """
    sites_own = config.federation.engine == "deployment"  # data.path is each site's own
    if not config.data.path and not config.data.hub_id and not sites_own:
        raise ConfigError(f"data={shown(config.data.name)} needs data.path=<file or directory>.")
    files = {"data.eval_path": config.data.eval_path}
    files |= {} if sites_own else {"data.path": config.data.path}
    for key, path in files.items():
        if path and path not in EMBEDDED_DATA:
            _check_exists(key, path)
    _check_eval_is_other(config)
    if config.model.path.startswith(("/", "./", "../", "~")):
        _check_exists("model.path", config.model.path)
    if config.evaluation.data_root and config.evaluation.suites:
        _check_exists("evaluation.data_root", config.evaluation.data_root)
    if config.resume:
        _check_exists("resume", config.resume)
    for key in adapter_keys():
        adapter = value_of(config, key)
        if adapter and not (Path(adapter).expanduser() / "adapter_config.json").is_file():
            raise ConfigError(
                f"{key}={shown(adapter)}: no adapter_config.json there; give the adapter/ "
                "directory of a run."
            )


def _check_eval_is_other(config: Config) -> None:
    """Refuse scores on the records that are trained on."""
    data = config.data
    if config.federation.engine == "deployment" or not data.path or not data.eval_path:
        return
    if data.path in EMBEDDED_DATA or data.eval_path in EMBEDDED_DATA:
        return
    train, held_out = Path(data.path).expanduser(), Path(data.eval_path).expanduser()
    if train.samefile(held_out) and data.eval_split in (None, data.split):
        raise ConfigError(
            f"data.eval_path={shown(data.eval_path)} is data.path: the scores would be of records "
            "that were learnt; give other records, or drop data.eval_path, and "
            f"data.validation_fraction={data.validation_fraction:g} of them is held out."
        )


def _check_exists(key: str, path: str) -> None:
    """Refuse a path that is not there, with the closest name that is."""
    file = Path(path).expanduser()
    try:
        if file.exists():
            return
        beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{key}={shown(path)}: {error.strerror}; give another path.") from error
    close = difflib.get_close_matches(file.name, beside, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else " Give one that is there."
    raise ConfigError(f"{key}={shown(path)}: no such file or directory.{hint}")
