"""Robust combiners in whole runs, and where they are refused."""

from pathlib import Path

import pytest

from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import ConfigError, RunInterrupted
from tiny_runs import interrupting, outcome, resume, run_intercepted, run_tiny


@pytest.mark.slow
def test_centred_clipping_goes_on_with_its_centre_and_the_clients_momenta(tmp_path: Path) -> None:
    chosen = ("algorithm=fedadam", "algorithm.combiner=centred_clip", "federation.num_rounds=3")
    whole = run_tiny(tmp_path / "whole", *chosen)
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(3, after=1), *chosen)
    found = outcome(resume(tmp_path / "stopped"))
    assert any("state.centre" in name for name in found)
    assert any("momentum" in name for name in found)
    assert found == outcome(whole)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm=scaffold"], "does not bound the further sums of algorithm=scaffold .control"),
        (["algorithm=local"], "has nothing to combine with algorithm=local"),
        (["federation.sample_clients=4"], r"needs 2 f \+ 3 = 5 clients .* f = 1 attackers.* has 4"),
        (["robust.liars=0.5"], "robust.liars"),
    ],
)
def test_a_robust_combiner_is_refused_where_it_would_not_decide(
    overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(["algorithm.combiner=krum", "federation.num_clients=10", *overrides])
