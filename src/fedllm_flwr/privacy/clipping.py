"""Joint L2 norm and clipping of all tensors of a contribution, in float64."""

import math

import numpy as np

from fedllm_flwr.errors import NotFiniteError
from fedllm_flwr.params import Groups, Params


def joint_norm(groups: Groups) -> float:
    """L2 norm over all tensors of all groups; infinite if it exceeds the range of float64.

    Values are divided by the largest absolute value before squaring, so that neither huge nor tiny
    values leave the range.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    largest, scaled = _scaled_norm(groups)
    return largest * scaled


def clipped(groups: Groups, bound: float) -> dict[str, Params]:
    """`groups` scaled by min(1, bound / norm), with the joint norm; unchanged within the bound.

    The norm is at most `bound` even after rounding to the tensors' dtype.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    largest, scaled = _scaled_norm(groups)
    result = {group: dict(params) for group, params in groups.items()}
    if largest * scaled <= bound:
        return result
    factor = bound / scaled  # for values divided by the largest, so nothing leaves the range
    shrink = max(
        float(np.finfo(value.dtype).eps) for params in groups.values() for value in params.values()
    )
    while True:
        for group, params in groups.items():
            result[group] = {
                name: (value.astype(np.float64) / largest * factor).astype(value.dtype)
                for name, value in params.items()
            }
        if joint_norm(result) <= bound:
            return result
        factor *= 1 - shrink  # rounding raised the norm above the bound
        shrink = min(0.5, 2 * shrink)


def _scaled_norm(groups: Groups) -> tuple[float, float]:
    """The largest absolute value, and the L2 norm of all values divided by it."""
    values = [
        value.astype(np.float64, copy=False)
        for params in groups.values()
        for value in params.values()
        if value.size
    ]
    largest = max((float(np.abs(value).max()) for value in values), default=0.0)
    if any(not np.isfinite(value).all() for value in values):
        raise NotFiniteError("its update holds NaN or infinity")
    if not largest:
        return 0.0, 0.0
    return largest, math.sqrt(sum(float(np.square(value / largest).sum()) for value in values))
