"""How answers are written and graded: the options of the open-ended suite."""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedllm_flwr.errors import ConfigError, DataError
from fedllm_flwr.evaluation.judging.endpoint import EndpointJudge
from fedllm_flwr.evaluation.judging.judge import Judge
from fedllm_flwr.evaluation.judging.local import LocalJudge
from fedllm_flwr.evaluation.suites.results import RunOptions


@dataclass(frozen=True)
class JudgeOptions:
    """How answers are written and graded.

    Args:
        model: name at the endpoint, or a directory; None: no judge, scores by rule alone.
        concurrency: requests to an endpoint at once.
        attempts: how often a judge is asked for a verdict in all.
        price: in some currency per million prompt and completion tokens.
        reference: file of answers to be better than.
        backend: torch | vllm.
    """

    model: str | None = None
    concurrency: int = 4
    timeout_s: float = 120.0
    attempts: int = 3
    stream: bool = False
    price: tuple[float, float] | None = None
    reference: str | None = None
    reference_digest: str = ""
    backend: str = "torch"
    max_new_tokens: int = 1024
    batch_size: int = 16

    def as_extra(self) -> dict[str, Any]:
        """What goes into ``RunOptions.extra``.

        Raises:
            DataError: the reference file cannot be read.
        """
        digest = ""
        if self.reference is not None:
            try:
                content = Path(self.reference).expanduser().read_bytes()
            except OSError as error:
                raise DataError(f"--reference {self.reference}: {error.strerror}.") from error
            digest = hashlib.sha256(content).hexdigest()
        return asdict(replace(self, reference_digest=digest))

    @classmethod
    def of(cls, options: RunOptions) -> "JudgeOptions":
        """From ``RunOptions.extra``; other runners' options are passed over."""
        known = {name: options.extra[name] for name in asdict(cls()) if name in options.extra}
        return cls(**known)

    def make_judge(self) -> Judge | None:
        """The judge of `model`; a directory that is there means a local one."""
        if self.model is None:
            return None
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            return LocalJudge(folder)
        if self.model.startswith(("/", "./", "../", "~")):
            raise ConfigError(f"--judge-model {self.model}: no such directory.")
        return EndpointJudge(self.model, self.concurrency, self.timeout_s, self.stream)
