"""Simulated attackers, which replace their own updates.

Replies are replaced in the simulation before the server reads them, so attackers know each other's
honest updates, as ALIE assumes. SCAFFOLD's control variates stay honest.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.federation.channel import Reply
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.params import Params, derive_seed

_SCALES = {"sign_flip": 4.0, "scale": 20.0, "gaussian": 20.0}


def attacked(
    replies: Iterable[Reply], config: Config, attackers: Collection[str], server_round: int
) -> Iterator[Reply]:
    """The replies of a round as they arrive, then the modified replies of the attackers."""
    if config.attack.name in ("none", "label_flip", "backdoor"):
        yield from replies
        return
    honest: dict[str, Update] = {}  # the attackers' honest updates
    others = 0
    for reply in replies:
        if reply.client in attackers and isinstance(reply.answer, Update):
            honest[reply.client] = reply.answer
        else:
            others += isinstance(reply.answer, Update)
            yield reply
    for name, update in sorted(honest.items()):
        if config.attack.name == "alie":
            deltas = [honest[other].delta for other in sorted(honest)]
            delta = a_little(deltas, others + len(honest), config.attack.scale)
        else:
            seed = derive_seed(config.seed, "attack", server_round, name)
            delta = distorted(update.delta, config, seed)
        yield Reply(name, replace(update, delta=delta))


def distorted(delta: Params, config: Config, seed: int) -> Params:
    """-scale D, scale D, or Gaussian noise of scale times the root mean square of D."""
    kind = config.attack.name
    scale = config.attack.scale or _SCALES[kind]
    if kind == "gaussian":
        rng = np.random.default_rng(seed)
        size = sum(value.size for value in delta.values())
        squares = sum(float(np.square(value, dtype=np.float64).sum()) for value in delta.values())
        deviation = scale * (squares / size) ** 0.5
        return {
            name: rng.normal(0.0, deviation, value.shape).astype(value.dtype)
            for name, value in sorted(delta.items())
        }
    factor = -scale if kind == "sign_flip" else scale
    return {name: (factor * value).astype(value.dtype) for name, value in delta.items()}


def a_little(deltas: list[Params], count: int, z: float | None) -> Params:
    """mean - z std of the attackers' honest updates, per coordinate.

    z is the largest value at which enough honest updates lie further from the mean than the
    attackers' to hide them: Phi(z) = (n - f - s) / (n - f) with s = floor(n / 2 + 1) - f.
    Baruch et al. 2019, "A Little Is Enough", https://arxiv.org/abs/1902.06156, Algorithm 3.

    Args:
        count: n, the number of replies in the round, f of them from attackers.
    """
    honest = count - len(deltas)
    if z is None:
        needed = count // 2 + 1 - len(deltas)
        share = (honest - needed) / honest if honest > 0 else 0.5
        z = NormalDist().inv_cdf(min(max(share, 0.5), 1 - 1e-6))
    result = {}
    for name, value in deltas[0].items():
        stacked = np.stack([delta[name] for delta in deltas]).astype(np.float64)
        result[name] = (stacked.mean(axis=0) - z * stacked.std(axis=0)).astype(value.dtype)
    return result
