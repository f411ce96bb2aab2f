"""Three sites with privacy accounts of their own: one whose budget is used up refuses by itself."""

from pathlib import Path

import pytest

from deployments import rounds_of, running_federation
from fedllm_flwr.privacy.accounting import Release, default_delta, epsilon
from processes import wait_for

pytestmark = pytest.mark.slow

SITES = ("ant", "bees", "crane")
EACH = 40  # records of a site, see `deployments.every_other_record`
RUN = [
    *("data=jsonl", "data.path=at-the-sites", "data.columns.label=output"),
    *("federation.engine=deployment", "federation.num_clients=3", "federation.sample_fraction=1.0"),
    *("federation.num_rounds=2", "federation.min_replies=2", "evaluation.central=false"),
    *("training.max_steps=2", "training.batch_size=4", "data.validation_fraction=0"),
    *("privacy.unit=record", "privacy.noise_multiplier=1.0"),
]


def spent(rounds: int) -> float:
    """Epsilon of a site after so many rounds of two steps, whatever the run."""
    return epsilon({Release(1.0, "poisson", 4, EACH): 2 * rounds}, default_delta(EACH))


def test_the_third_run_is_refused_by_the_site_whose_budget_is_used_up(tmp_path: Path) -> None:
    limit = (spent(4) + spent(5)) / 2  # two runs of two rounds, and not one round more
    policies = {name: ["privacy=record"] for name in SITES}
    policies["crane"].append(f"max_epsilon={limit}")
    outputs = [tmp_path / name for name in ("first", "second", "third")]
    with running_federation(tmp_path, dict.fromkeys(SITES), policies=policies) as federation:
        assert wait_for(lambda: federation.nodes() == ["online"] * 3, 180)
        for output in outputs:
            done = federation.submit([*RUN, f"output_dir={output}"])
            assert done.returncode == 0, done.stderr
            assert wait_for((output / "summary.json").exists, 900), rounds_of(output)
        ledgers = {
            name: federation.run("fedllm", "site", "ledger", str(tmp_path / name)).stdout
            for name in SITES
        }
    for output in outputs[:2]:
        assert all(set(record["clients"]) == set(SITES) for record in rounds_of(output)[1:])
    third = rounds_of(outputs[2])[1:]
    assert [set(record["clients"]) for record in third] == [{"ant", "bees"}] * 2
    for record in third:
        assert f"above its max_epsilon ({limit:g}; {spent(4):.3g} is spent)" in str(
            record["failures"]["crane"]
        )
    assert ledgers["ant"].startswith(f"epsilon {spent(6):.3g} at delta")
    assert ledgers["ant"].count("  run ") == 3
    left = f"{limit - spent(4):.3g}"
    assert ledgers["crane"].startswith(f"epsilon {spent(4):.3g} of {limit:g}, {left} left at delta")
    assert ledgers["crane"].count("2 rounds per record, noise 1 x clip") == 2
    print(ledgers, [record["failures"] for record in third])
