"""Options by which tasks are run; fields are called as on the command line."""

from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True)
class JudgeOptions:
    """Options of writing open-ended answers and having them graded.

    Args:
        judge_model: name at the endpoint; None: no judge, scores by rule only.
        judge_concurrency: requests to an endpoint at once.
        judge_timeout: seconds, of one try of one request.
        judge_attempts: how often a judge is asked for a verdict in all.
        judge_stream: take replies token by token.
        judge_price: in some currency per million prompt and completion tokens.
        reference: file of answers to be better than.
        writer_url: endpoint that writes the answers; None: the model in this process does.
        max_new_tokens: of an answer.
        answer_batch: answers that are written at once.
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
    """Options of generated code.

    Args:
        allow_code_execution: whether generated programs may be run.
        samples: answers to each problem; pass@k needs k of them.
        temperature: of sampling; 0 is greedy, and then one answer is all there is. None: greedy
            for one answer, 0.8 for several (Chen et al. 2021).
    """

    allow_code_execution: bool = False
    samples: int = 1
    temperature: float | None = None

    @property
    def heat(self) -> float:
        """Temperature of sampling."""
        if self.temperature is None:
            return 0.8 if self.samples > 1 else 0.0
        return self.temperature

    def check(self) -> None:
        """Refuse what does not fit together.

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
    """Options by which tasks are run.

    Args:
        limit: examples of each (harness) task, the first ones; None: all.
        shots: solved examples in the prompt; None: as each task says.
        data_root: folder of local data files; None: the Hugging Face Hub.
        work_dir: where a runner may keep what lets a stopped evaluation go on.
        batch_tokens: prompt tokens of one forward pass.
        seed: of everything drawn at random.
    """

    limit: int | None = None
    shots: int | None = None
    data_root: Path | None = None
    work_dir: Path | None = None
    batch_tokens: int = 4096
    seed: int = 0
    judging: JudgeOptions = JudgeOptions()
    code: CodeOptions = CodeOptions()
