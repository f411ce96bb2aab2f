"""SCAFFOLD: control variates against client drift.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
Algorithm 1, https://arxiv.org/abs/1910.06378
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedllm_flwr.federation.algorithms.fedavg import FedAvg
from fedllm_flwr.federation.rule import Aftermath, Counts, Weighting
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.params import Groups, Params, add, full_like, subtract
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms


@dataclass(frozen=True, kw_only=True)
class Scaffold(FedAvg):
    """Clients step along g + c - c_i; w <- w + eta mean_i(D_i), c <- c + sum_i(dc_i) / N.

    Args:
        eta: the paper's eta_g.

    c is the server's control variate (initially zero). c_i is client i's, kept on its own disk, and
    dc_i = c_i+ - c_i. N counts all clients, sampled or not; mean_i is the unweighted mean over the
    clients that replied.

    c is the mean of the c_i that the server has accepted. A client starts from the c_i of its last
    acknowledged round, so a reply that is lost, late or refused changes neither c nor c_i. A client
    that has lost its c_i starts from zero and reports it; the server then subtracts the client's
    old share from c.

    c_i+ = c_i - c + (w - w_i) / (K lr) (option II), which under SGD is the mean raw gradient over
    the K local steps. Under AdamW, w - w_i is not a sum of gradients, so clients compute that mean
    directly.

    In the ``openfedllm`` variant clients correct after each optimizer step, w_i -= lr (c - c_i),
    use option II with every optimizer, and D is weighted by n_i.
    """

    weighting: ClassVar[Mapping[str, Weighting]] = {"paper": "uniform", "openfedllm": "examples"}
    sends: ClassVar[frozenset[str]] = frozenset({"control"})
    contributes: ClassVar[Mapping[str, str]] = {"control_delta": "control"}
    remembers: ClassVar[frozenset[str]] = frozenset({"control"})
    takes_factors: ClassVar[frozenset[str]] = frozenset({"both"})

    def start(self, state: ServerState, num_clients: int) -> ServerState:
        """The state with c (float64): zero in a new run; rescaled to the new N on resume.

        A client that joins when a run is resumed has c_i = 0; an absent client keeps its share.
        """
        control = state.tensors.get("control")
        if control is None:
            control = full_like(state.params, 0.0)
        elif state.clients and num_clients > len(state.clients):
            share = len(state.clients) / num_clients
            control = {name: value * share for name, value in control.items()}
        return replace(state, tensors={**state.tensors, "control": control})

    def send(self, state: ServerState, client: str) -> Groups:
        """Send c."""
        return {"control": state.tensors["control"]}

    def step(self, state: ServerState, combined: Groups, counts: Counts) -> ServerState:
        """w + eta D, and c + sum(dc_i) / N."""
        control = add(state.tensors["control"], combined["control_delta"])
        state = super().step(state, combined, counts)
        return replace(state, tensors={**state.tensors, "control": control})

    def local_terms(self, received: Groups, memory: Groups) -> LocalTerms:
        """Correct every local step by c - c_i."""
        return replace(
            super().local_terms(received, memory),
            offset=subtract(received["control"], _own(received, memory)),
            averages_gradient=True,
        )

    def finish(
        self,
        result: LocalResult,
        received: Groups,
        memory: Groups,
        as_received: Callable[[Params], Params],
    ) -> Aftermath:
        """Send dc_i, and keep c_i+ as c_i plus dc_i as the server will receive it.

        If a gradient scaler has skipped all steps, there is no gradient to learn from, and c_i
        does not change.
        """
        own, control = _own(received, memory), received["control"]
        if not result.steps:
            new = own
        elif result.optimizer == "sgd" or self.as_openfedllm:
            scale = result.steps * result.learning_rate
            new = {
                name: (value - control[name] - result.delta[name] / scale).astype(value.dtype)
                for name, value in own.items()
            }
        else:
            new = dict(result.mean_gradient)
        change = as_received(subtract(new, own))
        return Aftermath({"control_delta": change}, {"control": add(own, change)})


def _own(received: Groups, memory: Groups) -> Params:
    """c_i, or zero if the client remembers none."""
    zero = {name: np.zeros_like(value) for name, value in received["control"].items()}
    return dict(memory.get("control", zero))
