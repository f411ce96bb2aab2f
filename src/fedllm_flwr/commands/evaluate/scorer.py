"""Scores candidates on tasks: loads the base model once, swaps adapters, and caches samples."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm_flwr.commands.evaluate.candidates import Candidate
from fedllm_flwr.evaluation.coding.code_suite import run_code_task
from fedllm_flwr.evaluation.judging.open_ended import run_open_ended_task
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask
from fedllm_flwr.evaluation.suites.harness import HarnessTasks
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.requested import harness_version
from fedllm_flwr.evaluation.suites.samples import Samples
from fedllm_flwr.evaluation.suites.score_cache import (
    SamplesCache,
    files_identity,
    key_of,
    task_identity,
)
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import cpu_count, torch_threads
from fedllm_flwr.models.tokenizer import model_source
from fedllm_flwr.runs.adapter_files import load_kept
from fedllm_flwr.runs.kept_adapters import KeptAdapter

# candidate name -> task name -> scored examples
Scored = dict[str, dict[str, Samples]]
# Scores the tasks of a suite, by the name of its ``runner`` in ``suite.yaml``
Runners = Mapping[str, Callable[[SuiteTask, TextModel, RunOptions], Samples]]


@dataclass(frozen=True)
class Scorer:
    """Settings by which candidates are scored.

    Args:
        prompt: trained, raw or chat.
        work_dir: runners' progress, to resume an interrupted evaluation; a folder per model.
    """

    options: RunOptions
    prompt: str
    cache: SamplesCache
    work_dir: Path

    def score(self, candidates: Sequence[Candidate], tasks: Sequence[SuiteTask]) -> Scored:
        """Score every candidate on every task, and print a line for each."""
        runners = {
            "harness": HarnessTasks().run,
            "open_ended": run_open_ended_task,
            "code": run_code_task,
        }
        return {item.name: self._candidate(item, tasks, runners) for item in candidates}

    def _candidate(
        self, candidate: Candidate, tasks: Sequence[SuiteTask], runners: Runners
    ) -> dict[str, Samples]:
        identity = self._identity(candidate)
        keys = {
            task.name: key_of(
                **identity,
                task=task_identity(task, self.options),
                harness=harness_version() if task.runner == "harness" else None,
            )
            for task in tasks
        }
        found = {name: self.cache.get(key) for name, key in keys.items()}
        missing = [task for task in tasks if found[task.name] is None]
        for task in tasks:
            if found[task.name] is not None:
                _report(candidate, task, "cached")
        if missing:
            with loaded(candidate) as adapted, torch_threads(cpu_count()):
                folder = self.work_dir / key_of(**identity)[:16]
                options = replace(self.options, work_dir=folder)
                for task in missing:
                    started = time.monotonic()
                    model = TextModel(
                        adapted,
                        prompt=self.prompt,
                        template=candidate.config.data.template,
                        batch_tokens=self.options.batch_tokens,
                        seed=self.options.seed,
                        source=model_source(candidate.config.model),
                        adapter=None if candidate.adapter is None else candidate.adapter.path,
                    )
                    samples = runners[task.runner](task, model, options)
                    notes = {
                        "prompts": model.prompts,
                        "cut": model.cut,
                        "examples_left_out": model.examples_left_out,
                        **samples.notes,
                    }
                    seconds = time.monotonic() - started
                    samples = replace(samples, notes=notes, seconds=seconds)
                    self.cache.put(keys[task.name], samples)
                    found[task.name] = samples
                    _report(candidate, task, f"{samples.seconds:.0f} s")
        return {name: samples for name, samples in found.items() if samples is not None}

    def _identity(self, candidate: Candidate) -> dict[str, Any]:
        """Everything that determines a model's answers."""
        config = candidate.config
        return {
            "base": base_identity(config.model.path, model_source(config.model)),
            "revision": config.model.revision,
            "quantization": config.quantization,
            "dtype": config.training.dtype,
            "adapter": adapter_identity(candidate.adapter),
            "prompt": self.prompt,
            "template": config.data.template,
        }


def _report(candidate: Candidate, task: SuiteTask, state: str) -> None:
    print(f"  {candidate.name:<32} {task.name:<22} {state}", flush=True)


@contextlib.contextmanager
def loaded(candidate: Candidate) -> Iterator[AdaptedModel]:
    """The candidate's model; the base model is kept for the next candidate."""
    config = replace(candidate.config, seed=0)  # the same initial adapter for all
    model = load_model(config)
    if candidate.adapter is None:
        with model.peft.disable_adapter():
            yield model
    else:
        model.load(load_kept(candidate.adapter, model))
        yield model


def base_identity(typed: str, source: str) -> str:
    """Identity of a base model's weights: a digest of its files, or its name on the hub."""
    folder = Path(source)
    if not folder.is_dir():
        return typed
    names = ("*.safetensors", "*.json", "*.jinja")
    return files_identity(sorted(path for name in names for path in folder.glob(name)))


def adapter_identity(adapter: KeptAdapter | None) -> str:
    """Identity of an adapter's weights and settings."""
    if adapter is None:
        return "base"
    return files_identity(adapter.files)
