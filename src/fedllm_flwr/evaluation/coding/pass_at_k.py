"""pass@k: the chance that one of k answers to a problem passes its tests."""


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate from n >= k samples of which c passed: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1, as the product of n-c < i <= n of 1 - k/i, in
    which nothing overflows.

    Raises:
        ValueError: k or c do not fit n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"pass@{k} of {num_passed} passed among {num_samples} is not defined")
    none_passes = 1.0
    for i in range(num_samples - num_passed + 1, num_samples + 1):
        none_passes *= max(0.0, 1.0 - k / i)
    return 1.0 - none_passes
