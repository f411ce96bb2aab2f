"""What an algorithm adds to a client's own objective, and what comes out of local training.

NumPy only: rules (`federation.rule`) state these terms, `training.drift` applies them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedllm_flwr.params import Params


@dataclass(frozen=True)
class LocalTerms:
    """One client's local training, as a rule wants it.

    Args:
        start: adapter that local training starts from, and that the proximal term pulls towards.
        mu: weight of the proximal term ``mu/2 ||w_i - start||^2``; 0 for none.
        offset: added to the gradient of every step, by tensor name: ``c - c_i`` in SCAFFOLD.
        as_openfedllm: the proximal term is a part of the loss and clipped with its gradient, and
            the offset is not added to the gradient: after each step ``w_i -= lr * offset``.
        averages_gradient: whether the mean of the client's own gradients is wanted afterwards.
        trains: which tensors are trained, by name; None: all of them.
        anchor: what the proximal term pulls towards in the place of `start`.
        tail: (strength, share): strength ||B[:, k:]|| ||A[k:]|| is a part of the loss, for each
            module, with k = share x rank.
    """

    start: Params
    mu: float = 0.0
    offset: Params | None = None
    as_openfedllm: bool = False
    averages_gradient: bool = False
    trains: Callable[[str], bool] | None = None
    anchor: Params | None = None
    tail: tuple[float, float] | None = None


@dataclass(frozen=True)
class LocalResult:
    """What local training has led to.

    Args:
        params: the client's adapter w_i afterwards.
        delta: D_i = w_i - w, its difference from the global adapter that was sent.
        mean_gradient: mean over the steps of the client's own gradient, clipped, without the
            rule's terms; empty unless `LocalTerms.averages_gradient`.
        steps: K, optimizer steps without those that a gradient scaler has skipped.
        learning_rate: the local one, the same in all steps.
        optimizer: ``training.optimizer``.
    """

    params: Params
    delta: Params
    mean_gradient: Params
    steps: int
    learning_rate: float
    optimizer: str
