"""The example of a plug-in, installed in an environment of its own and run from its README."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tiny_runs import TINY

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that adds the plug-in to all that this one has."""
    folder = tmp_path_factory.mktemp("plugin") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    [site, parent] = [
        subprocess.run([some, "-c", where], capture_output=True, text=True, check=True).stdout
        for some in (python, sys.executable)
    ]
    Path(site.strip(), "parent.pth").write_text(f"import site; site.addsitedir({parent.strip()!r})")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", PLUGIN], check=True)
    return python


def run(python: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(python), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_own_test_passes(python: Path) -> None:
    done = run(python, "-m", "pytest", "-q", "-c", os.devnull, PLUGIN / "tests")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_algorithm_is_listed_and_runs(python: Path, tmp_path: Path) -> None:
    fedllm = ("-m", "fedllm_flwr.commands.main")
    assert "feddyn" in run(python, *fedllm, "config", "--list").stdout
    output = tmp_path / "run"
    tiny = [text for text in TINY if not text.startswith("federation.num_rounds")]
    done = run(
        python,
        *(*fedllm, "run", "algorithm=feddyn", "algorithm.options.alpha=0.5"),
        *("federation.engine=inprocess", "federation.num_rounds=3", f"output_dir={output}", *tiny),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "feddyn" in done.stdout
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_a_setting_that_it_lacks_is_refused(python: Path) -> None:
    typo = "algorithm.options.alhpa=0.5"
    done = run(python, "-m", "fedllm_flwr.commands.main", "run", "algorithm=feddyn", typo)
    assert (done.returncode, "algorithm=feddyn has no such setting" in done.stderr) == (2, True)


def test_without_the_plugin_the_name_is_unknown() -> None:
    done = run(Path(sys.executable), "-m", "fedllm_flwr.commands.main", "run", "algorithm=feddyn")
    assert done.returncode == 2
    assert "algorithm=feddyn: no such choice." in done.stderr
