"""Adapters as matrices: for each module the product B A of two factors. NumPy only.

An adapter of any rank is a factorisation: `Params` with A (r, in) and B (out, r) of each module
under their PEFT names. Sums of adapters are formed by stacking factors, sizes and best
approximations are computed from factors; a matrix of shape (out, in) is never formed. The scale
s = alpha / r is the same for all adapters of a run and stands outside of these products.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import Array, Params

Weight = float | Array

_FACTOR = re.compile(r"(.*)\.lora_(embedding_)?([AB])(\.weight)?")
_NOTHING = 2.0**-25  # fraction of ||B|| ||A|| below which singular values are rounding errors


def is_a(name: str) -> bool:
    """Whether a tensor is a factor A, of shape (r, in)."""
    return (found := _FACTOR.fullmatch(name)) is not None and found[3] == "A"


def is_b(name: str) -> bool:
    """Whether a tensor is a factor B, of shape (out, r)."""
    return (found := _FACTOR.fullmatch(name)) is not None and found[3] == "B"


def core_of(name_b: str) -> str:
    """Name of the core R, (r, r), of the module whose factor B has this name; see `folded`."""
    return name_b.replace(".lora_B", ".lora_R")


def is_core(name: str) -> bool:
    """Whether a tensor is a core R, of shape (r, r)."""
    return ".lora_R" in name


class Folded(Mapping[str, Array]):
    """An adapter of products B R A as an adapter (B R) A, computed tensor by tensor on access.

    Raises:
        FederationError: a core has no factor B, or its shape is not (r, r).
    """

    def __init__(self, adapter: Mapping[str, Array]) -> None:
        self._adapter = adapter
        self._cores = {n.replace(".lora_R", ".lora_B"): adapter[n] for n in adapter if is_core(n)}
        for name, core in self._cores.items():
            b = adapter.get(name)
            if b is None or b.ndim != 2 or core.shape != 2 * (b.shape[1],):
                raise FederationError(f"{core_of(name)[:100]!r} of shape {core.shape} fits no B")

    def __getitem__(self, name: str) -> Array:
        """A, or B R."""
        value = self._adapter[name]
        return value @ self._cores[name] if name in self._cores else value

    def __iter__(self) -> Iterator[str]:
        """The names of the factors."""
        return (name for name in self._adapter if not is_core(name))

    def __len__(self) -> int:
        """The number of factors."""
        return len(self._adapter) - len(self._cores)


def folded(adapter: Params) -> Params:
    """An adapter of products B R A as an adapter (B R) A; any other adapter is unchanged.

    Raises:
        FederationError: as `Folded`.
    """
    return dict(Folded(adapter)) if any(map(is_core, adapter)) else adapter


def pairs(adapter: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names of A and B of each module, in module order.

    Raises:
        ValueError: a tensor is not a factor, or its counterpart is missing.
    """
    found: dict[str, dict[str, str]] = {}
    for name in adapter:
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no factor of an adapter")
        found.setdefault(match[1], {})[match[3]] = name
    for module in sorted(found):
        yield found[module]["A"], found[module]["B"]


def rank_of(adapter: Mapping[str, Array]) -> int:
    """The rank r of an adapter, common to all modules; 0 if it has no tensors."""
    return next((value.shape[0] for name, value in adapter.items() if is_a(name)), 0)


def kept_rank(rank: int, share: float) -> int:
    """The rank that pruning keeps of `rank`, at least 1."""
    return max(1, int(share * rank))


def cut(adapter: Mapping[str, Array], rank: int) -> Params:
    """The first `rank` rows of each A and columns of each B."""
    return {
        n: v[:rank] if is_a(n) else np.ascontiguousarray(v[:, :rank]) for n, v in adapter.items()
    }


def rest(adapter: Mapping[str, Array], rank: int) -> Params:
    """The rows of each A and columns of each B after the first `rank`."""
    return {
        n: v[rank:] if is_a(n) else np.ascontiguousarray(v[:, rank:]) for n, v in adapter.items()
    }


def padded(adapter: Mapping[str, Array], rank: int) -> Params:
    """The same products as factors of a larger `rank`, padded with zeros."""
    if (more := rank - rank_of(adapter)) <= 0:
        return cut(adapter, rank)
    return {
        name: np.pad(value, ((0, more), (0, 0)) if is_a(name) else ((0, 0), (0, more)))
        for name, value in adapter.items()
    }


class Stacked(Mapping[str, Array]):
    """sum_i weight_i B_i A_i, with the A_i stacked by rows and weight_i B_i by columns, in float64.

    Tensors are computed on access, so that only one module's tensors are in memory at a time.
    """

    def __init__(self, terms: Sequence[tuple[Mapping[str, Array], Weight]]) -> None:
        self._terms = terms

    def __getitem__(self, name: str) -> Array:
        """The stacked factor of that name."""
        if is_a(name):
            return np.concatenate([a[name].astype(np.float64) for a, _ in self._terms])
        return np.concatenate([w * a[name].astype(np.float64) for a, w in self._terms], axis=1)

    def __iter__(self) -> Iterator[str]:
        """The names of the factors."""
        return iter(self._terms[0][0] if self._terms else ())

    def __len__(self) -> int:
        """The number of factors."""
        return len(self._terms[0][0]) if self._terms else 0


def stacked(adapters: Sequence[Mapping[str, Array]], weights: Sequence[Weight]) -> Stacked:
    """sum_i weight_i B_i A_i as one adapter; adapters without tensors add nothing.

    Args:
        weights: of the adapters, or of the columns of their B, (r_i,).
    """
    return Stacked([(a, w) for a, w in zip(adapters, weights, strict=True) if a])


def joined(adapter: Params, frozen: Mapping[str, Array]) -> Params:
    """The sum of both adapters as one: the factors of `adapter`, followed by those of `frozen`."""
    if not frozen:
        return adapter
    return {
        name: np.concatenate([value, frozen[name].astype(value.dtype)], 0 if is_a(name) else 1)
        for name, value in adapter.items()
    }


def aggregation_error(
    adapters: Sequence[Mapping[str, Array]],
    shares: Sequence[float],
    before: Mapping[str, Array],
    after: Mapping[str, Array],
) -> float | None:
    """||F + sum_i p_i B_i A_i - B A|| / ||sum_i p_i B_i A_i|| over all modules; None for 0 / 0.

    Args:
        adapters, shares: A_i and B_i of the clients of a round, and p_i.
        before: F, the frozen factors that all of them applied in addition.
        after: A and B of the global adapter after the round, including its frozen factors.
    """
    difference = stacked([after, before, *adapters], [-1.0, 1.0, *shares])
    size = distance = 0.0
    for name_a, name_b in pairs(difference):
        grams = _grams(difference[name_a], difference[name_b])
        first = sum(len(params[name_a]) for params in (after, before) if params)
        distance += max(0.0, float(grams.sum()))
        size += max(0.0, float(grams[first:, first:].sum()))
    return float(np.sqrt(distance / size)) if size else None


def module_norms(adapter: Mapping[str, Array]) -> dict[str, float]:
    """||B A||^2 of each module, by the name of its A."""
    squares = {}
    for name_a, name_b in pairs(adapter):
        a, b = adapter[name_a].astype(np.float64), adapter[name_b].astype(np.float64)
        squares[name_a] = max(0.0, float(np.sum(_grams(a, b))))
    return squares


def _grams(a: Array, b: Array) -> Array:
    """(B'B) * (AA'), (r, r): entry i, j is the inner product of b_i a_i and b_j a_j."""
    grams: Array = (b.T @ b) * (a @ a.T)
    return grams


def truncated(adapter: Mapping[str, Array], rank: int, exactly: bool = False) -> Params:
    """The best approximation of each B A by a product of rank `rank`, in float64.

    With the singular value decomposition B A = U S V', the new B is U S and the new A is V', so
    that the rows of A are orthonormal. Only a matrix of the factors' rank is decomposed: with
    B = Q R and A' = P T, it is R T'.

    Args:
        exactly: always return `rank` rows and columns; otherwise only as many as a module needs.
    """
    found: Params = {}
    most = 0
    for name_a, name_b in pairs(adapter):
        u, s, v, needed = _decomposed(adapter[name_a], adapter[name_b], rank)
        found |= {name_a: v, name_b: u * s}
        most = max(most, needed)
    return cut({name: found[name] for name in adapter}, rank if exactly else min(rank, most))


def _decomposed(a: Array, b: Array, rank: int) -> tuple[Array, Array, Array, int]:
    """The first `rank` of U (out, k), S (k,) and V' (k, in) of B A; and the numerical rank.

    The largest entry of each row of V' is positive, which makes the signs unique.
    """
    q, r = np.linalg.qr(np.asarray(b, np.float64))
    p, t = np.linalg.qr(np.asarray(a, np.float64).T)
    u, s, v = np.linalg.svd(r @ t.T, full_matrices=False)
    needed = int(np.sum(s > _NOTHING * np.linalg.norm(r) * np.linalg.norm(t)))
    u, s, v = q @ u[:, :rank], s[:rank], v[:rank] @ p.T
    signs = np.where(v[np.arange(len(v)), np.abs(v).argmax(1)] < 0, -1.0, 1.0)
    return u * signs, s, v * signs[:, None], needed
