"""Streaming, validated aggregation of one round's updates."""

from collections.abc import Callable, Mapping

from fedllm_flwr.errors import FederationError
from fedllm_flwr.federation.messages import Update
from fedllm_flwr.federation.replies import check_metrics
from fedllm_flwr.params import Params, RunningMean, check_like


class Aggregator:
    """Adds valid updates to running sums and drops them; refuses the others.

    Args:
        reference: the adapter, for names and shapes.
        sizes: numbers of examples that the clients have announced, by name.
        weight_of: weight of a client's update in the mean.
        control_change: what a client's update adds to the sum of the control variates; None
            without them.
    """

    def __init__(
        self,
        reference: Params,
        sizes: Mapping[str, int],
        weight_of: Callable[[str, Update], float],
        control_change: Callable[[str, Update], Params] | None,
    ) -> None:
        self._reference = reference
        self._sizes = sizes
        self._weight_of = weight_of
        self._control_change = control_change
        self.delta = RunningMean()
        self.control_delta = RunningMean()

    def add(self, name: str, update: Update) -> None:
        """Validate one update, all of it, and only then add it.

        Raises:
            FederationError: says what is wrong with the update.
        """
        if not 1 <= update.num_examples <= self._sizes[name]:
            raise FederationError(
                f"num_examples={update.num_examples} is not in 1..{self._sizes[name]}, the number "
                "it announced"
            )
        check_metrics(update.metrics)
        check_like(update.delta, self._reference)
        if self._control_change is not None:
            self._add_control(name, update, self._control_change)
        self.delta.add(update.delta, self._weight_of(name, update))

    def _add_control(
        self, name: str, update: Update, change: Callable[[str, Update], Params]
    ) -> None:
        if update.control_delta is None:
            raise FederationError("its control variate is missing")
        try:
            check_like(update.control_delta, self._reference)
            self.control_delta.add(change(name, update), 1.0)
        except FederationError as error:
            raise type(error)(f"control variate: {error}") from error
