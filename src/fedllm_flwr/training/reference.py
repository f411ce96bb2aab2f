"""Log-probabilities of DPO's reference model, each pair's once in a run.

The reference is the base model, or a given adapter on it, from the first round to the last; never
a copy of the global adapter of some round.
"""

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.pairs import EncodedPairs
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.scoring import score_examples
from fedllm_flwr.params import Params

LogProbs = NDArray[np.float32]

logger = logging.getLogger(__name__)


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
        return score_examples(model, pairs.rows, batch_tokens).log_probs.reshape(-1, 2)


@dataclass(frozen=True)
class ReferenceCache:
    """A client's reference log-probabilities, remembered from round to round.

    Only pairs that a round draws are computed, and only those that no acknowledged round has
    drawn: the reference costs one forward pass a pair in a whole run. What a round computes
    depends on the acknowledged rounds alone, so that a repeated round gives the same bits.
    """

    batch_tokens: int
    remembered: Params | None = None

    def of(
        self,
        model: AdaptedModel,
        reference: Params | None,
        pairs: EncodedPairs,
        drawn: NDArray[np.int64],
    ) -> tuple[LogProbs, Params]:
        """Values of the `drawn` pairs in an array for all, (pairs, 2), and what to remember.

        The model is left changed.
        """
        identity = _identity(model, reference, pairs)
        values = np.zeros((len(pairs), 2), np.float32)
        known = np.zeros(len(pairs), np.bool_)
        if self.remembered is not None:
            if np.array_equal(self.remembered.get("identity", ()), identity):
                values = self.remembered["values"].copy()
                known = self.remembered["known"].astype(np.bool_)
            else:
                logger.warning(
                    "remembered log-probabilities are not used: they are of other pairs or of "
                    "another reference model"
                )
        missing = np.setdiff1d(drawn, np.flatnonzero(known))
        if len(missing):
            values[missing] = reference_log_probs(
                model, reference, pairs.take(missing), self.batch_tokens
            )
            known[missing] = True
        return values, {"values": values, "known": known.astype(np.float32), "identity": identity}


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
