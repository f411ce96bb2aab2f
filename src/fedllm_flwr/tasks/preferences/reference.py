"""Log-probabilities of the reference model, computed once per answer and run.

The reference is the base model, or a given adapter on it, for the whole run. It is never a copy of
the global adapter of some round.
"""

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.scoring import score_examples
from fedllm_flwr.params import Kept, Params

LogProbs = NDArray[np.float32]

logger = logging.getLogger(__name__)


class Answered(Protocol):
    """Examples of one or more rows each; the supervised tokens of a row are its answer."""

    @property
    def rows(self) -> Encoded:
        """All rows; the rows of an example are consecutive."""

    def __len__(self) -> int:
        """Number of examples."""

    def take(self, examples: NDArray[np.int64]) -> Self:
        """The selected examples, in the given order."""


def reference_log_probs(
    model: AdaptedModel, reference: Params | None, rows: Encoded, batch_tokens: int
) -> LogProbs:
    """log p_ref(answer | context) of each row, (rows,), in nats.

    Args:
        reference: adapter of the reference model; None: the base model alone. The model keeps this
            adapter afterwards.
    """
    if reference is not None:
        model.load(reference)
    with nullcontext() if reference is not None else model.peft.disable_adapter():
        return score_examples(model, rows, batch_tokens).log_probs


@dataclass(frozen=True)
class ReferenceCache:
    """A client's reference log-probabilities, kept in its client memory.

    A round computes them only for drawn examples that no acknowledged round has drawn, which costs
    one forward pass per example in a whole run. What a round computes depends only on the
    acknowledged rounds, so a repeated round gives the same bits.
    """

    batch_tokens: int
    remembered: Kept | None = None

    def of(
        self,
        model: AdaptedModel,
        reference: Params | None,
        examples: Answered,
        drawn: NDArray[np.int64],
    ) -> Kept:
        """The client memory to keep: ``values`` (examples, rows per example), including `drawn`.

        ``known`` (examples,) marks the computed examples; the text identifies examples and model.

        Changes the adapter in the model.
        """
        identity = _identity(model, reference, examples.rows)
        per_example = len(examples.rows) // len(examples)
        values = np.zeros((len(examples), per_example), np.float32)
        known = np.zeros(len(examples), np.bool_)
        if self.remembered is not None:
            if self.remembered.about == identity:
                values = self.remembered.tensors["values"].copy()
                known = self.remembered.tensors["known"].astype(np.bool_)
            else:
                logger.warning(
                    "remembered log-probabilities are not used: they are of other answers or of "
                    "another reference model"
                )
        missing = np.setdiff1d(drawn, np.flatnonzero(known))
        if len(missing):
            rows = examples.take(missing).rows
            found = reference_log_probs(model, reference, rows, self.batch_tokens)
            values[missing] = found.reshape(-1, per_example)
            known[missing] = True
        return Kept({"values": values, "known": known.astype(np.uint8)}, identity)


def _identity(model: AdaptedModel, reference: Params | None, rows: Encoded) -> str:
    """A digest that identifies these answers under this reference model.

    A site may use one state directory for several runs that differ in either.
    """
    base = model.peft.get_base_model().config
    quantization = getattr(base, "quantization_config", None)
    described = (base.name_or_path, model.num_base_parameters, model.dtype, quantization)
    digest = hashlib.sha256(repr(described).encode())
    for array in (rows.tokens, rows.supervised, rows.offsets):
        digest.update(array.tobytes())
    for name, value in sorted((reference or {}).items()):
        digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()
