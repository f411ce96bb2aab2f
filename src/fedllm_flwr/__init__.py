"""Federated fine-tuning of large language models with Flower."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm_flwr.api import Comparison, Evaluation, Run, compare, evaluate, run
    from fedllm_flwr.errors import FedLLMError

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "Evaluation",
    "FedLLMError",
    "Run",
    "__version__",
    "compare",
    "evaluate",
    "run",
]


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is first used."""
    if name in __all__:
        from fedllm_flwr import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
