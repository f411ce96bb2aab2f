"""Moments of server optimizers, in float64.

float64, because v adds squares of adapter updates (about 1e-6, squared 1e-12) to a sum that
starts at tau^2 and grows: float32 would drop them. Checkpoints keep all bits.
"""

from fedllm_flwr.params import Params


def moving_average(
    previous: Params | None, delta: Params, beta: float, undamped_start: bool
) -> Params:
    """``beta m + (1 - beta) D`` with m_-1 = 0; with `undamped_start`, the first m is D itself."""
    if previous is None:
        weight = 1.0 if undamped_start else 1.0 - beta
        return {name: weight * value for name, value in delta.items()}
    return {name: beta * previous[name] + (1.0 - beta) * value for name, value in delta.items()}
