"""The terms that an algorithm adds to a client's objective, and the result of local training.

NumPy only: rules (`federation.rule`) define these terms, and `training.drift` applies them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedllm_flwr.params import Params


@dataclass(frozen=True)
class LocalTerms:
    """How a rule modifies one client's local training.

    Args:
        start: initial adapter, which the proximal term also pulls towards.
        mu: weight of the proximal term ``mu/2 ||w_i - start||^2``; 0 for none.
        offset: added to the gradient of every step, by tensor name: ``c - c_i`` in SCAFFOLD.
        as_openfedllm: the proximal term is part of the loss, and is clipped with its gradient; the
            offset is not added to the gradient, but ``w_i -= lr * offset`` after each step.
        averages_gradient: whether to compute the mean of the client's own gradients.
        trains: selects the tensors to train by name; None: all of them.
        anchor: adapter that the proximal term pulls towards instead of `start`.
        tail: (strength, share): adds strength ||B[:, k:]|| ||A[k:]|| to the loss for each module,
            with k = share x rank.
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
    """The result of local training.

    Args:
        params: w_i, the client's adapter after training.
        delta: D_i = w_i - w, its difference from the received global adapter.
        mean_gradient: mean over the steps of the client's own clipped gradient, without the
            rule's terms; empty unless `LocalTerms.averages_gradient`.
        steps: K, the number of optimizer steps, except those that a gradient scaler has skipped.
        learning_rate: local learning rate, the same in all steps.
        optimizer: ``training.optimizer``.
    """

    params: Params
    delta: Params
    mean_gradient: Params
    steps: int
    learning_rate: float
    optimizer: str
