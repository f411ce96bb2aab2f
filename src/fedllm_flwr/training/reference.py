"""Log-probabilities of DPO's reference model, each pair's once in a run.

The reference is the base model, or a given adapter on it, from the first round to the last; never
a copy of the global adapter of some round.
"""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.pairs import EncodedPairs
from fedllm_flwr.errors import FederationError
from fedllm_flwr.params import Params
from fedllm_flwr.training.log_probs import answer_log_probs
from fedllm_flwr.training.model import AdaptedModel
from fedllm_flwr.versions import newest_usable, store_version

LogProbs = NDArray[np.float32]

_KIND = "reference"


def reference_log_probs(
    model: AdaptedModel, reference: Params | None, pairs: EncodedPairs, batch_tokens: int
) -> LogProbs:
    """log p_ref(answer | context) of chosen and rejected answers, (pairs, 2), in nats.

    Args:
        reference: adapter of the reference model; None: the base model alone. The model is left
            with this adapter in it.
    """
    if reference is not None:
        model.load(reference)
    with nullcontext() if reference is not None else model.peft.disable_adapter():
        return answer_log_probs(model, pairs.rows, batch_tokens).reshape(-1, 2)


@dataclass(frozen=True)
class ReferenceCache:
    """A client's reference log-probabilities, kept on its disk from round to round.

    Only pairs that a round draws are computed, and only those that no earlier round has drawn: the
    reference costs at most one forward pass a pair in a whole run. What a round computes depends
    on the rounds before alone, so that a repeated round gives the same bits.
    """

    directory: Path
    server_round: int
    batch_tokens: int
    keep: int = 2

    def of(
        self,
        model: AdaptedModel,
        reference: Params | None,
        pairs: EncodedPairs,
        drawn: NDArray[np.int64],
    ) -> LogProbs:
        """Values of the `drawn` pairs in an array for all, (pairs, 2); the model is left changed.

        Raises:
            FederationError: they cannot be stored.
        """
        identity = _identity(model, reference, pairs)
        values, known = self._load(pairs, identity)
        missing = np.setdiff1d(drawn, np.flatnonzero(known))
        if len(missing):
            values[missing] = reference_log_probs(
                model, reference, pairs.take(missing), self.batch_tokens
            )
            known[missing] = True
            stored = {"values": values, "known": known.astype(np.float32), "identity": identity}
            store_version(self.directory, _KIND, self.server_round, stored, self.keep)
        return values

    def _load(
        self, pairs: EncodedPairs, identity: NDArray[np.float32]
    ) -> tuple[LogProbs, NDArray[np.bool_]]:
        def check(params: Params) -> None:
            if not np.array_equal(params.get("identity", ()), identity):
                raise FederationError("it belongs to other pairs or another reference model")

        stored = newest_usable(self.directory, _KIND, self.server_round, check)
        if stored is None:
            return np.zeros((len(pairs), 2), np.float32), np.zeros(len(pairs), np.bool_)
        return stored["values"].copy(), stored["known"].astype(np.bool_)


def _identity(
    model: AdaptedModel, reference: Params | None, pairs: EncodedPairs
) -> NDArray[np.float32]:
    """What tells these pairs under this reference model from others: a digest's bytes, (32,).

    A site may keep one state directory for several runs, which differ in any of this.
    """
    base = model.peft.get_base_model().config
    quantization = getattr(base, "quantization_config", None)
    described = (base.name_or_path, model.num_base_parameters, model.dtype, quantization)
    digest = hashlib.sha256(repr(described).encode())
    for array in (pairs.rows.tokens, pairs.rows.supervised, pairs.rows.offsets):
        digest.update(array.tobytes())
    for name, value in sorted((reference or {}).items()):
        digest.update(name.encode() + value.tobytes())
    return np.frombuffer(digest.digest(), np.uint8).astype(np.float32)
