"""Suites scored by lm-evaluation-harness: its task definitions, with this package's model and data.

The harness makes prompts and parses answers; models, batches, intervals and files are this
package's. It is an optional dependency, imported when the first task runs.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import DataError, first_line
from fedllm_flwr.evaluation.suites.catalogue import SuiteTask, suites_dir
from fedllm_flwr.evaluation.suites.local_data import local_settings
from fedllm_flwr.evaluation.suites.options import RunOptions
from fedllm_flwr.evaluation.suites.requested import harness_version
from fedllm_flwr.evaluation.suites.samples import Sample, Samples
from fedllm_flwr.evaluation.suites.suite_model import TextModel
from fedllm_flwr.models.generation import Decoding

_FEW_SHOT_SEED = 1234  # the harness' default
_DEFAULT_NEW_TOKENS = 256  # the harness' default
_ROOM = 16  # tokens reserved for an answer that is scored by likelihood


class HarnessTasks:
    """The harness tasks of suites, loaded once for all models."""

    def __init__(self) -> None:
        self._loaded: dict[Any, dict[str, Any]] = {}

    def run(self, task: SuiteTask, model: TextModel, options: RunOptions) -> Samples:
        """Score a model on a task.

        Raises:
            DataError: the data are missing.
            ModelError: the harness is not installed.
        """
        harness_version()
        with _quiet():
            from lm_eval.evaluator import evaluate

            loaded = self._load(task, options, model.prompt)
            rooms = [
                _decoding(one.config.generation_kwargs or {}).max_new_tokens
                if one.config.output_type == "generate_until"
                else _ROOM
                for one in loaded.values()
            ]
            found = evaluate(
                _HarnessModel(model, max(rooms)),
                {"tasks": loaded},
                samples={name: options.places(len(one.eval_docs)) for name, one in loaded.items()},
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
            )
        samples: dict[str, Sample] = {}  # each filter logs an example separately
        for name in loaded:
            for logged in found["samples"][name]:
                sample = _sample(name, logged)
                samples.setdefault(sample["id"], {}).update(sample)
        prompt = found["samples"][next(iter(loaded))][0]["arguments"][0][0]
        return Samples(list(samples.values()), prompt)

    def questions(self, task: SuiteTask, options: RunOptions) -> list[str]:
        """Each example's question, followed by its right answer."""
        harness_version()
        texts = []
        with _quiet():
            for loaded in self._load(task, options, "trained").values():
                for row in loaded.eval_docs:
                    target = loaded.doc_to_target(row)
                    if isinstance(target, int) and loaded.config.output_type == "multiple_choice":
                        target = loaded.doc_to_choice(row)[target]
                    answers = target if isinstance(target, list) else [target]
                    texts.append(" ".join(map(str, [loaded.doc_to_text(row), *answers])))
        return texts

    def _load(self, task: SuiteTask, options: RunOptions, prompt: str) -> dict[str, Any]:
        key = (task.suite, task.name, options.data_root, options.shots, prompt)
        if key not in self._loaded:
            own = {**task.overrides, **(task.raw if prompt == "raw" else {})}
            self._loaded[key] = _load(task, options, own)
        return self._loaded[key]


def _load(task: SuiteTask, options: RunOptions, overrides: dict[str, Any]) -> dict[str, Any]:
    """Harness tasks by name, with their data."""
    import lm_eval.tasks

    own = suites_dir() / task.suite
    folder = Path(lm_eval.tasks.__file__).parent / task.folder if task.folder else own
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    members = []
    for name in task.harness:
        member: dict[str, Any] = {"task": name, **overrides}
        if options.data_root is not None:
            member |= local_settings(task, name, options.data_root)
        members.append(member)
    try:
        loaded = manager.load([{"group": task.name, "task": members}])["tasks"]
    except DataError:
        raise
    except Exception as error:  # datasets and the hub raise many types
        remedy = (
            "give local files with --data-root"
            if options.data_root is None
            else f"check its files in {options.data_root}: {', '.join(task.files)}"
        )
        raise DataError(
            f"{task.name}: its data ({task.source}) cannot be loaded: "
            f"{first_line(error)[:200]}; {remedy}."
        ) from error
    for found in loaded.values():
        _check_targets(task, found)
        shots = task.shots if options.shots is None else options.shots
        found.set_config(key="num_fewshot", value=shots)
        found.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    return dict(loaded)


def _check_targets(task: SuiteTask, loaded: Any) -> None:
    """Reject rows whose target is not among the choices.

    Raises:
        DataError: names the row, its target and the choices.
    """
    chosen = loaded.config.output_type == "multiple_choice"
    if not (task.labels or chosen):
        return
    for number, row in enumerate(loaded.eval_docs, start=1):
        target = loaded.doc_to_target(row)
        if task.labels:
            choices: Sequence[str] = task.labels
            known = str(target).strip().lower() in choices
        else:
            choices = loaded.doc_to_choice(row)
            places = range(len(choices))
            known = target in (places if isinstance(target, int) else choices)
        if not known:
            raise DataError(
                f"{task.name}: row {number} of its data has the target {target!r}, expected one of "
                f"{', '.join(map(str, choices))}; correct the file, or remove the row."
            )


class _HarnessModel:
    """The harness' model interface (its class LM) for a `TextModel`.

    Args:
        room: tokens of the context reserved for an answer.
    """

    rank, world_size = 0, 1
    tokenizer_name = "fedllm"

    def __init__(self, model: TextModel, room: int) -> None:
        self._model, self._room = model, model.answer_room(room)

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of the model (the method's name is the harness')."""
        return self._model.render_fitting(messages, self._room)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each (context, continuation)."""
        groups: dict[tuple[str, int], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.args[0], id(request.doc)), []).append(i)
        prompts = [prompt for prompt, _ in groups]
        answers = [[requests[i].args[1] for i in members] for members in groups.values()]
        scores = self._model.log_likelihoods(prompts, answers)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, some in zip(groups.values(), scores, strict=True):
            for i, score in zip(members, some, strict=True):
                found[i] = (score.log_prob, score.is_greedy)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each (context, settings)."""
        answers = [""] * len(requests)
        by_settings: dict[Decoding, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(_decoding(request.args[1]), []).append(i)
        for decoding, members in by_settings.items():
            written = self._model.generate([requests[i].args[0] for i in members], decoding)
            for i, text in zip(members, written, strict=True):
                answers[i] = text
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """No suite uses it."""
        raise NotImplementedError("perplexity tasks are not part of any suite")


def _decoding(settings: dict[str, Any]) -> Decoding:
    stop = settings.get("until", ())
    return Decoding(
        max_new_tokens=int(settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS)),
        temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
        top_p=float(settings.get("top_p", 1.0)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def _sample(part: str, logged: dict[str, Any]) -> Sample:
    """The sample of an example: its prompt and answers, and the fields of its metrics.

    Values of a named filter are called ``<metric>,<filter>``.
    """
    likelihoods = logged["resps"] and isinstance(logged["resps"][0][0], tuple)
    answer = [row[0][0] for row in logged["resps"]] if likelihoods else logged["resps"][0][0]
    read_by = "" if logged["filter"] == "none" else f",{logged['filter']}"
    kept = {f"{name}{read_by}": _plain(logged[name]) for name in logged["metrics"]}
    return {
        "id": f"{part}/{logged['doc_id']}",
        "part": part,
        "target": _plain(logged["target"]),
        "log_likelihoods" if likelihoods else "answer": _plain(answer),
        **kept,
    }


def _plain(value: Any) -> Any:
    """Convert NumPy scalars and tuples to JSON values."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the harness' progress bars and messages; errors are raised anyway."""
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    with contextlib.redirect_stderr(io.StringIO()):
        yield
