"""Options of running tasks; fields have the names of the command line."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True)
class JudgeOptions:
    """Options of generating and judging open-ended answers.

    Args:
        judge_model: the judge's name at the endpoint; None: no judge, scores by rule only.
        judge_concurrency: maximum number of concurrent requests to an endpoint.
        judge_timeout: seconds per attempt of a request.
        judge_attempts: maximum number of requests for one verdict.
        judge_stream: receive replies token by token.
        judge_price: prices per million prompt tokens and per million completion tokens, in any
            currency.
        reference: file of baseline answers.
        writer_url: endpoint that generates the answers; None: generate in this process.
        max_new_tokens: maximum number of tokens of an answer.
        answer_batch: number of answers generated in one batch.
    """

    judge_model: str | None = None
    judge_concurrency: int = 4
    judge_timeout: float = 120.0
    judge_attempts: int = 3
    judge_stream: bool = False
    judge_price: tuple[float, float] | None = None
    reference: Path | None = None
    writer_url: str | None = None
    max_new_tokens: int = 1024
    answer_batch: int = 16


@dataclass(frozen=True)
class CodeOptions:
    """Options of generating and running code.

    Args:
        allow_code_execution: whether generated programs may be run.
        samples: number of answers per problem; pass@k needs k of them.
        temperature: sampling temperature; 0 is greedy and allows one answer only. None: greedy for
            one answer, 0.8 for several (Chen et al. 2021).
    """

    allow_code_execution: bool = False
    samples: int = 1
    temperature: float | None = None

    @property
    def heat(self) -> float:
        """The sampling temperature."""
        if self.temperature is None:
            return 0.8 if self.samples > 1 else 0.0
        return self.temperature

    def check(self) -> None:
        """Check the options.

        Raises:
            ConfigError: names the option and the remedy.
        """
        if self.samples < 1:
            raise ConfigError(f"--samples must be > 0, got {self.samples}.")
        if self.samples > 1 and self.heat <= 0:
            raise ConfigError(
                f"--temperature {self.heat:g} gives the same answer {self.samples} times; "
                "give --temperature 0.8, or --samples 1."
            )
        if self.heat < 0:
            raise ConfigError(f"--temperature must be >= 0, got {self.heat:g}.")


@dataclass(frozen=True)
class RunOptions:
    """Options of running tasks.

    Args:
        limit: maximum number of examples of each (harness) task, from the first on; None: all.
        subset: number of examples of each (harness) task, drawn at random; None: all.
        shots: number of few-shot examples; None: as each task defines.
        data_root: folder of local data files; None: use the Hugging Face Hub.
        work_dir: where a runner saves its progress, to resume an interrupted evaluation.
        batch_tokens: prompt tokens per forward pass.
        seed: seed of all random draws.
    """

    limit: int | None = None
    subset: int | None = None
    shots: int | None = None
    data_root: Path | None = None
    work_dir: Path | None = None
    batch_tokens: int = 4096
    seed: int = 0
    judging: JudgeOptions = JudgeOptions()
    code: CodeOptions = CodeOptions()

    def check(self) -> None:
        """Check how many examples and shots are asked for.

        Raises:
            ConfigError: names the option and the remedy.
        """
        for name, count in (("--limit", self.limit), ("--subset", self.subset)):
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be > 0, got {count}.")
        if self.limit is not None and self.subset is not None:
            raise ConfigError("give --limit (the first examples) or --subset (drawn), not both.")
        if self.shots is not None and self.shots < 0:
            raise ConfigError(f"--shots must be >= 0, got {self.shots}.")

    def places(self, count: int) -> list[int]:
        """Places of the examples to score among `count`, in the order of the data.

        A larger subset contains a smaller one.
        """
        if self.subset is None:
            return list(range(count))[: self.limit]
        drawn = np.random.default_rng(self.seed).permutation(count)
        return sorted(drawn[: self.subset].tolist())
