"""The test on records of the training task, such as preference pairs, instead of a suite's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from fedllm_flwr.commands.compare.results import Difference
from fedllm_flwr.commands.evaluate.candidates import BASE, Candidate
from fedllm_flwr.commands.evaluate.comparison import LOCAL
from fedllm_flwr.commands.evaluate.scorer import loaded
from fedllm_flwr.commands.reproduce.document import seed_name
from fedllm_flwr.config import changed
from fedllm_flwr.errors import DataError
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.device import torch_threads
from fedllm_flwr.server.preparation import evaluation_threads, held_out_records
from fedllm_flwr.tasks.base import Scores

_TASK, _OVER = "pairs", "seeds"


def scored_on_records(candidates: Sequence[Candidate], subset: int | None) -> list[dict[str, Any]]:
    """Scores on records of ``data.test_path``, as records of a test's document.

    Intervals are Student's over the seeds; without a second seed they have no width.

    Args:
        subset: number of records, drawn at random; None: all.

    Raises:
        DataError: there are no records to score.
    """
    first = candidates[0].config
    test = {
        **{"eval_path": first.data.test_path, "eval_max_samples": subset, "eval_split": None},
        **{"near_duplicates": "keep", "test_path": None},
    }
    config = changed(replace(first, seed=0), data=test, evaluation={"answers": 0})
    held_out = held_out_records(config, load_model(config))
    if held_out is None:
        raise DataError(f"data.test_path={first.data.test_path}: holds no records.")
    by_row: dict[str, dict[int | None, list[Scores]]] = {}
    for candidate in candidates:
        with loaded(candidate) as model, torch_threads(evaluation_threads(config)):
            scores = held_out.score(model, config.evaluation.batch_tokens)
        by_row.setdefault(candidate.row, {}).setdefault(candidate.seed, []).append(scores)
        print(f"  {candidate.name:<32} accuracy {scores['accuracy']:.3f}", flush=True)
    found = []
    for metric in next(iter(by_row[BASE].values()))[0]:
        means = {
            row: {seed: fmean(one[metric] for one in some) for seed, some in by_seed.items()}
            for row, by_seed in by_row.items()
        }
        for row, by_seed in means.items():
            interval = Difference.of([*by_seed.values()])
            half = interval.half_width or 0.0 if interval else 0.0
            mean = fmean(by_seed.values())
            versus = {
                f"vs_{to}": _difference(by_seed, means[to]) if to in means and to != row else None
                for to in (BASE, LOCAL)
            }
            found.append(
                {
                    **{"suite": _TASK, "task": _TASK, "metric": metric, "model": row},
                    "headline": metric == "accuracy",
                    **{"chance": 0.5 if metric == "accuracy" else None, "interval_over": _OVER},
                    **{"value": mean, "low": mean - half, "high": mean + half},
                    **versus,
                    "by_seed": {seed_name(seed): value for seed, value in by_seed.items()},
                }
            )
    return found


def _difference(own: Mapping[Any, float], other: Mapping[Any, float]) -> tuple[Any, ...] | None:
    """As in the records of a suite: value, low, high, what the interval covers, p-value."""
    if None in other:
        other = dict.fromkeys(own, other[None])
    found = Difference.of([own[seed] - other[seed] for seed in own if seed in other])
    if found is None or found.half_width is None:
        return None
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return found.mean, low, high, _OVER, found.p_value
