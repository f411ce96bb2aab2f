"""``fedllm export``: write an adapter for PEFT, as a merged model, as GGUF, or to the hub."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import ConfigError, FederationError, first_line
from fedllm_flwr.reporting.metrics import read_metrics, summarise
from fedllm_flwr.reporting.text import format_bytes
from fedllm_flwr.runs.directory import SCORE_FILE, RunDirectory
from fedllm_flwr.runs.kept_adapters import KeptAdapter, check_output

TARGETS = ("peft", "merged", "gguf", "hub")
_CONVERTER = "convert_hf_to_gguf.py"  # of llama.cpp
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def check_export(target: str, output: str, converter: str | None) -> None:
    """Reject invalid options before a model is loaded.

    Raises:
        ConfigError: the output exists, is not a repository name, or there is no GGUF converter.
    """
    if target == "hub":
        if not _REPOSITORY.fullmatch(output):
            raise ConfigError(f"{output}: --to hub writes to a repository; give OWNER/NAME.")
        return
    check_output(Path(output).expanduser())
    if target == "gguf":
        find_converter(converter)


def find_converter(given: str | None) -> Path:
    """llama.cpp's converter: as given by the user, in $LLAMA_CPP, or on the PATH.

    Raises:
        ConfigError: it was not found; says how to get it.
    """
    if given is not None:
        if not Path(given).expanduser().is_file():
            raise ConfigError(f"--converter {given}: no such file; give llama.cpp's {_CONVERTER}.")
        return Path(given).expanduser()
    beside = Path(os.environ.get("LLAMA_CPP", "")) / _CONVERTER
    if "LLAMA_CPP" in os.environ and beside.is_file():
        return beside
    if found := shutil.which(_CONVERTER):
        return Path(found)
    raise ConfigError(
        f"--to gguf needs llama.cpp's {_CONVERTER}: git clone "
        "https://github.com/ggml-org/llama.cpp, "
        f"pip install gguf, and give --converter llama.cpp/{_CONVERTER}."
    )


def export(
    kept: KeptAdapter,
    target: str,
    output: str,
    onto: str = "full",
    converter: str | None = None,
    outtype: str = "auto",
) -> Iterator[str]:
    """Write the adapter `kept` as `target`, with a model card; yield progress lines.

    Args:
        output: output directory, which must not exist.
        onto: weights to merge a quantized run's adapter into, see `merge.merge`.
        converter, outtype: for GGUF: llama.cpp's converter, and the type of the weights.

    Raises:
        FedLLMError: the adapter cannot be loaded or written.
    """
    path = Path(output).expanduser()
    if target == "peft":
        write_peft(kept, path)
        yield f"adapter written to {path}; load it with PeftModel.from_pretrained"
        return
    from fedllm_flwr.commands.merge import merge

    if target == "merged":
        yield from merge(kept, path, onto)
        return
    program = find_converter(converter)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        merged, fresh = Path(folder) / "merged", Path(folder) / path.name
        yield from (line for line in merge(kept, merged, onto) if "written to" not in line)
        fresh.mkdir()
        file = fresh / f"{path.name}.gguf"
        options = ["--outfile", str(file), "--outtype", outtype]
        command = [sys.executable, str(program), str(merged), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not file.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise FederationError(f"{program} has failed: {said}")
        if (merged / "README.md").is_file():
            shutil.copy(merged / "README.md", fresh)
        shutil.move(fresh, path)
    size = format_bytes((path / file.name).stat().st_size)
    yield f"{path / file.name} written ({size}); llama-cli -m {path / file.name}"


def write_peft(kept: KeptAdapter, path: Path) -> None:
    """Write the adapter in PEFT's format, as a copy or from a checkpoint.

    Raises:
        FederationError: it cannot be written.
    """
    if kept.group is None:
        try:
            shutil.copytree(kept.path, path, ignore=shutil.ignore_patterns(SCORE_FILE))
        except (OSError, shutil.Error) as error:
            raise FederationError(f"cannot write {path}: {error}.") from error
        return
    from fedllm_flwr.models.adapted_model import load_beside
    from fedllm_flwr.runs.adapter_files import load_kept, save_adapter

    model = load_beside(kept.config)
    save_adapter(
        path, model, load_kept(kept, model), kept.config, summary_of(kept) or summarise([], {})
    )


def summary_of(kept: KeptAdapter) -> Mapping[str, Any] | None:
    """Scores and costs of the run up to the adapter's round, for a model card; None without one."""
    if kept.run is None:
        return None
    records = read_metrics(RunDirectory(kept.run).metrics)
    number = re.search(r"round (\d+)", kept.label)
    if number is not None:
        records = [record for record in records if record["round"] <= int(number[1])]
    return summarise(records, {"rounds": sum(float(r.get("seconds", 0.0)) for r in records)})


def upload(
    kept: KeptAdapter, repository: str, merged: bool, onto: str, public: bool, dry_run: bool
) -> Iterator[str]:
    """Write the adapter, or the merged model, to a repository of the Hugging Face Hub.

    Args:
        public: whether a new repository is public.
        dry_run: show what would be uploaded, but upload nothing.

    Raises:
        FedLLMError: it cannot be created, or the hub rejects it.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="fedllm-") as folder:
        path = Path(folder) / "model"
        lines = export(kept, "merged" if merged else "peft", str(path), onto)
        yield from (line for line in lines if "written to" not in line)
        for file in sorted(path.rglob("*")):
            yield f"  {file.relative_to(path)}   {format_bytes(file.stat().st_size)}"
        kind = "public" if public else "private"
        if dry_run:
            yield f"dry run: nothing was uploaded; {repository} would be a {kind} repository"
            return
        try:
            api = HfApi()
            api.create_repo(repository, private=not public, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=path, commit_message=f"fedllm export: {kept.label}"
            )
        except Exception as error:  # from requests, the hub or the file system
            raise FederationError(
                f"{repository}: the hub rejected the upload ({first_line(error)}); hf auth "
                "login, or check the name."
            ) from error
        yield f"uploaded: {commit}"
