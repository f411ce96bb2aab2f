"""Three real sites over TLS: one goes or lies, and they add the noise in shares."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from deployments import Federation, command_of, rounds_of, running_federation
from processes import relatives, wait_for

pytestmark = pytest.mark.slow

LIAR = "crane"
SITES = ("ant", "bees", LIAR)
RUN = [
    *("data=jsonl", "data.path=at-the-sites", "data.columns.label=output"),
    *("federation.engine=deployment", "federation.num_clients=3", "evaluation.central=false"),
    *("federation.sample_fraction=1.0", "training.batch_size=4"),
]
HOOKS = f'''
"""Imported by every Python process of the federation."""
import sys
from pathlib import Path

ROOT, ARGUMENTS = Path(__file__).parent, " ".join(sys.orig_argv)


def lie():
    """One site sends the opposite of its update, four times as long, where that can be seen."""
    from dataclasses import replace

    import fedllm_flwr.client.local_round as local_round

    honest = local_round.train_locally

    def train_locally(assignment, data, memory):
        update = honest(assignment, data, memory)
        if data.name != "{LIAR}" or assignment.session:
            return update
        return replace(update, delta={{name: -4 * v for name, v in update.delta.items()}})

    local_round.train_locally = train_locally


def note_and_leave():
    """Vectors before they are masked, and the unmasked sums, as files; one site goes away."""
    import numpy as np

    from fedllm_flwr.errors import FederationError
    from fedllm_flwr.federation.secure.server import MaskedSum
    from fedllm_flwr.federation.secure.site import SecureSite

    mask, unmask, unmasked = SecureSite.mask, SecureSite.unmask, MaskedSum.unmasked

    def at(site, session, point):
        number = int(session.split("/")[1])
        where = ROOT / "leaving" / f"{{number}} {{point}}"
        if where.exists() and site._name == "{LIAR}":
            raise FederationError("gone", "gone")
        return number

    def noting(self, session, words):
        number = at(self, session.id, "before sending")
        if (ROOT / "leaving").exists():
            np.save(ROOT / "leaving" / f"{{number}} {{self._name}}.npy", words)
        sealed = mask(self, session, words)
        at(self, session.id, "after masking")
        return sealed

    def opening(self, question):
        at(self, question.session, "before unmasking")
        return unmask(self, question)

    def checked(self):
        words = unmasked(self)
        if (ROOT / "leaving").exists():
            number = self.session.id.split("/")[1]
            names = " ".join(self.survivors)
            np.save(ROOT / "leaving" / f"sum {{number}} of {{names}}.npy", words)
        return words

    SecureSite.mask, SecureSite.unmask, MaskedSum.unmasked = noting, opening, checked


if "client.resident" in ARGUMENTS:
    lie()
if any(name in ARGUMENTS for name in ("client.resident", "flwr-clientapp", "flwr-serverapp")):
    note_and_leave()
'''


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("untrusting")
    (root / "sitecustomize.py").write_text(HOOKS, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root))
        with running_federation(root, dict.fromkeys(SITES)) as running:
            assert wait_for(lambda: running.nodes() == ["online"] * 3, 180)
            yield running


def submitted(federation: Federation, name: str, *overrides: str) -> Path:
    output = federation.folder.parent / name
    done = federation.submit([*RUN, *overrides, f"output_dir={output}"])
    assert done.returncode == 0, done.stderr
    return output


def trainers(root: Path, name: str) -> list[psutil.Process]:
    """The processes that train at a site."""
    return [
        process
        for process in relatives(root)
        if "client.resident" in command_of(process)
        and f"{root / name}" in f"{command_of(process)} {process.cwd()}"
    ]


def test_sites_add_the_noise_in_shares_and_a_trainer_dies(federation: Federation) -> None:
    """A new trainer does the round, which was not masked yet; the sites' accounts are charged."""
    root = federation.folder.parent
    output = submitted(
        federation,
        "private",
        *("privacy.secure_aggregation=true", "privacy.unit=client", "privacy.sampling=visible"),
        *("privacy.noise_multiplier=2", "privacy.delta=1e-3", "algorithm=scaffold"),
        *("federation.num_rounds=2", "training.max_steps=40"),
    )
    assert wait_for(lambda: len(rounds_of(output)) >= 2, 600), rounds_of(output)
    [trainer] = trainers(root, "bees")
    before = trainer.cpu_times().user
    assert wait_for(lambda: trainer.cpu_times().user > before + 0.3, 120)  # it trains
    trainer.kill()
    assert wait_for(lambda: (output / "summary.json").exists(), 900), rounds_of(output)
    last = rounds_of(output)[-1]
    assert sorted(last["clients"]) == sorted(SITES)
    assert trainers(root, "bees") != [trainer]
    assert last["epsilon"] == pytest.approx(2.330, abs=0.005)
    assert all("loss" not in metrics for metrics in last["clients"].values())
    told = federation.run("fedllm", "site", "ledger", str(root / "bees")).stdout
    # A round that is asked for again is charged again.
    assert "3 rounds per client, noise 2 x clip" in told or "2 rounds per client" in told


def test_sums_are_the_plain_ones_bit_for_bit_whenever_a_site_goes(federation: Federation) -> None:
    """One of three, the most that may, at each point of the protocol; none in round 1."""
    folder = federation.folder.parent / "leaving"
    folder.mkdir()
    for number, point in enumerate(("before sending", "after masking", "before unmasking"), 2):
        (folder / f"{number} {point}").touch()
    output = submitted(
        federation,
        "bits",
        *("privacy.secure_aggregation=true", "algorithm=scaffold", "federation.num_rounds=4"),
        *("training.max_steps=2", "federation.min_replies=2"),
    )
    assert wait_for(lambda: (output / "summary.json").exists(), 900), rounds_of(output)
    others = [name for name in SITES if name != LIAR]
    for number, survivors in ((1, SITES), (2, others), (3, others), (4, SITES)):
        found = np.load(folder / f"sum {number} of {' '.join(survivors)}.npy")
        each = [np.load(folder / f"{number} {name}.npy") for name in survivors]
        np.testing.assert_array_equal(found, np.sum(each, axis=0, dtype=np.uint32))
        assert sorted(rounds_of(output)[number]["clients"]) == list(survivors)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_a_site_that_lies_is_named(federation: Federation) -> None:
    output = submitted(
        federation,
        "robust",
        *("algorithm.combiner=median", "robust.liars=0.34", "federation.num_rounds=4"),
        "training.max_steps=2",
    )
    assert wait_for(lambda: (output / "summary.json").exists(), 900), rounds_of(output)
    assert rounds_of(output)[-1]["cut"][LIAR] > 0.5
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    assert summary["cut"] == {LIAR: {"cut": 4, "of": 4}}
    told = federation.run("fedllm", "status", str(output)).stdout
    assert f"{LIAR}: its updates were cut or refused in 4 of 4 rounds" in told
    page = output / "report.html"
    assert federation.run("fedllm", "report", str(output)).returncode == 0
    assert f"{LIAR}: its updates were cut or refused in 4 of 4 rounds" in page.read_text("utf-8")
