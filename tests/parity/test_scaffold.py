"""SCAFFOLD against Algorithm 1 of Karimireddy et al. 2020 in float64, also where replies are lost.

A client whose reply the server does not accept is, to the algorithm, a client that was not sampled.
One that lost its c_i is one whose c_i is zero; c = (1/N) sum_i c_i is the algorithm's invariant.
"""

from pathlib import Path

import numpy as np
import pytest

from quadratics import LEARNING_RATE, SIZE, STEPS, Federation, QuadraticClient, config_of


class Algorithm1:
    """Algorithm 1, option II, eta_g = 1, on the clients' quadratics."""

    def __init__(self, clients: list[QuadraticClient]) -> None:
        self.curvatures = [client.curvature for client in clients]
        self.targets = [client.target.astype(np.float64) for client in clients]
        self.x, self.c = np.zeros(SIZE), np.zeros(SIZE)
        self.own = [np.zeros(SIZE) for _ in clients]

    def round(self, sampled: list[int]) -> None:
        moves, changes = [], []
        for i in sampled:
            y = self.x.copy()
            for _ in range(STEPS):
                g = self.curvatures[i] * (y - self.targets[i])
                y = y - LEARNING_RATE * (g - self.own[i] + self.c)
            plus = self.own[i] - self.c + (self.x - y) / (STEPS * LEARNING_RATE)
            moves.append(y - self.x)
            changes.append(plus - self.own[i])
            self.own[i] = plus
        self.x = self.x + np.mean(moves, axis=0)
        self.c = self.c + len(sampled) / len(self.own) * np.mean(changes, axis=0)


@pytest.mark.parametrize("fate", ["ok", "lost", "late", "refused", "idle"])
def test_trajectory_of_algorithm_1(fate: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path, config_of(), num_clients=3)
    paper = Algorithm1(list(federation.clients.values()))
    for server_round in range(1, 13):
        struck = server_round in (2, 3, 7)
        federation.round(client_1=fate if struck else "ok")
        paper.round([0, 2] if struck and fate != "ok" else [0, 1, 2])
        state = federation.strategy.state
        np.testing.assert_allclose(state.params["w"], paper.x, rtol=0, atol=2e-6)
        np.testing.assert_allclose(state.tensors["control"]["w"], paper.c, rtol=0, atol=1e-5)


def test_trajectory_with_a_client_that_loses_its_disk(tmp_path: Path) -> None:
    federation = Federation(tmp_path, config_of(), num_clients=3)
    paper = Algorithm1(list(federation.clients.values()))
    for server_round in range(1, 13):
        if server_round == 5:
            federation.wipe("client-2")
        federation.round()
        # The round goes by the c of before; the share is taken out with the round's replies.
        before = paper.c
        if server_round == 5:
            paper.own[2] = np.zeros(SIZE)
        paper.round([0, 1, 2])
        if server_round == 5:
            assert np.linalg.norm(before) > 0.01
            paper.c = np.mean(paper.own, axis=0)
        state = federation.strategy.state
        np.testing.assert_allclose(state.params["w"], paper.x, rtol=0, atol=2e-6)
        np.testing.assert_allclose(state.tensors["control"]["w"], paper.c, rtol=0, atol=1e-5)
