"""Executes the runs of a sweep with one of Hydra's launchers, such as joblib's or submitit's.

This is a separate program, ``python -m fedllm_flwr.commands.launched``. The sweep has composed and
checked each run's configuration and written it to a file; this program is a Hydra application whose
only choice is the number of that file. Launchers therefore work as in any Hydra application, and
the runs are the same as without a launcher.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from fedllm_flwr.commands.compare.jobs import carry_out_one
from fedllm_flwr.config.compose import load_yaml, to_yaml
from fedllm_flwr.config.overrides import quoted
from fedllm_flwr.environment import prepare_environment
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.files import write_atomically
from fedllm_flwr.runs.directory import PlannedRun

_FOLDER = "launched"  # in the sweep's directory: configurations, errors, the launcher's files


def check_launcher(overrides: Sequence[str]) -> None:
    """Reject a launcher whose plug-in is not installed.

    Raises:
        ConfigError: names it and the package.
    """
    for text in overrides:
        key, _, name = text.partition("=")
        plugin = f"hydra_plugins.hydra_{name.partition('_')[0]}_launcher"
        try:
            missing = importlib.util.find_spec(plugin) is None
        except ModuleNotFoundError:
            missing = True
        if key == "hydra/launcher" and name != "basic" and missing:
            package = f"hydra-{name.partition('_')[0]}-launcher"
            raise ConfigError(f"{text}: no such launcher is installed; pip install {package}.")


def launch(root: Path, runs: Sequence[PlannedRun], overrides: Sequence[str]) -> dict[int, str]:
    """Execute runs with Hydra's launcher; return errors by run number.

    Args:
        overrides: Hydra's own, such as ``hydra/launcher=joblib`` and ``hydra.launcher.n_jobs=4``.

    Raises:
        FederationError: the launcher failed.
    """
    folder = (root / _FOLDER).resolve()
    numbers = [number for number, run in enumerate(runs) if not run.done]
    if not numbers:
        return {}
    for number in numbers:
        write_atomically(folder / f"{number}.yaml", to_yaml(runs[number].config).encode())
        (folder / f"{number}.error").unlink(missing_ok=True)
    own = [
        *("hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null"),
        *(f"hydra.sweep.dir={quoted(str(folder))}", "hydra.job.chdir=false"),
        *(f"folder={quoted(str(folder))}", f"number={','.join(map(str, numbers))}"),
    ]
    command = [sys.executable, "-m", "fedllm_flwr.commands.launched", "-m", *own, *overrides]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise FederationError(f"Hydra's launcher has failed: {said}")
    files = {number: folder / f"{number}.error" for number in numbers}
    return {number: file.read_text("utf-8") for number, file in files.items() if file.is_file()}


def main() -> None:
    """The Hydra application."""
    import hydra
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store("launched", {"folder": None, "number": None})
    hydra.main(version_base="1.3", config_path=None, config_name="launched")(_carry_out)()


def _carry_out(node: DictConfig) -> None:
    prepare_environment()
    folder, number = Path(node.folder), int(node.number)
    error = carry_out_one(PlannedRun(config=load_yaml(folder / f"{number}.yaml")))
    if error is not None:
        write_atomically(folder / f"{number}.error", error.encode())


if __name__ == "__main__":
    main()
