"""What an algorithm adds to a client's own objective."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalCorrection:
    """Terms added to a client's gradient: ``mu (w_i - w)`` and ``control_variates``: ``c - c_i``.

    ``as_openfedllm`` asks for OpenFedLLM's forms of both: ``mu/2 ||w_i - w||^2`` is a part of the
    loss and clipped with its gradient; after each optimizer step ``w_i -= lr (c - c_i)``, and c_i
    follows option II whatever the optimizer.
    """

    mu: float = 0.0
    control_variates: bool = False
    as_openfedllm: bool = False
