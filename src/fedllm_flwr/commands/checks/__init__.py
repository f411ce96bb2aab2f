"""Single checks of the environment, for ``fedllm doctor``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One finding; `status` is ok, warn or fail, `remedy` one line, empty when all is well."""

    name: str
    status: str
    detail: str
    remedy: str = ""
