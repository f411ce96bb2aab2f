"""Client momentum, which prevents attacks that are coordinated over several rounds.

Karimireddy et al. 2021, "Learning from History for Byzantine Robust Optimization",
https://arxiv.org/abs/2012.10333, Algorithm 2, with a round's update instead of a gradient.
"""

from fedllm_flwr.config import Config
from fedllm_flwr.params import Params

MOMENTUM = "momentum"  # kind of client memory
_DEFAULT = 0.9


def worker_momentum(config: Config) -> float:
    """beta of ``robust.momentum``; 0 if there is no momentum."""
    if config.robust.momentum is not None:
        return config.robust.momentum
    return _DEFAULT if config.algorithm.combiner == "centred_clip" else 0.0


def with_momentum(delta: Params, before: Params | None, decay: float) -> Params:
    """m <- (1 - beta) D + beta m, by name; m = D in the first round."""
    if before is None:
        return delta
    return {
        name: ((1 - decay) * value + decay * before[name]).astype(value.dtype)
        for name, value in delta.items()
    }
