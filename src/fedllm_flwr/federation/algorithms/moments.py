"""Moments of server optimizers, in float64.

v sums squares of adapter updates (about 1e-6, squared 1e-12), starting from tau^2; in float32 such
small terms would be rounded away. Checkpoints store the moments in float64 too.
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
