"""FedDyn on quadratics, whose optimum is known."""

import numpy as np
from fedllm_feddyn.rule import FedDyn

from fedllm_flwr.federation.rule import Counts
from fedllm_flwr.federation.state import ServerState
from fedllm_flwr.training.local_terms import LocalResult

CURVATURE, TARGET = np.array([0.5, 1.0, 3.0]), np.array([-1.0, 2.0, 0.5])
OPTIMUM = (CURVATURE * TARGET).sum() / CURVATURE.sum()


def test_the_fixed_point_is_the_optimum_of_the_sum() -> None:
    """Each client solves its regularised problem exactly, as the analysis of the paper assumes."""
    rule, memory = FedDyn(alpha=1.0), [{}, {}, {}]
    state = ServerState(0, {"w": np.zeros(1)})
    for _ in range(60):
        deltas = []
        for i in range(3):
            terms = rule.local_terms({"params": state.params}, memory[i])
            offset = 0.0 if terms.offset is None else terms.offset["w"]
            pull = CURVATURE[i] * TARGET[i] + terms.mu * state.params["w"] - offset
            w_i = {"w": pull / (CURVATURE[i] + terms.mu)}
            delta = {"w": w_i["w"] - state.params["w"]}
            result = LocalResult(w_i, delta, {}, 1, 0.1, "sgd")
            memory[i] = rule.finish(result, {}, memory[i], dict).memory
            deltas.append(delta["w"])
        mean = {"delta": {"w": np.mean(deltas, axis=0)}}
        state = rule.step(state, mean, Counts(replied=3, clients=3, weight=3.0))
    assert abs(float(state.params["w"][0]) - OPTIMUM) < 1e-6
