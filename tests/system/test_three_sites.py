"""Three sites with files of their own, TLS and registered keys, against the same in one process."""

import csv
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deployments import Federation, command_of, rounds_of, running_federation
from fedllm_flwr.config.compose import compose
from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.federation.state import load_state
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.reporting.console import Console
from fedllm_flwr.server.run import run_simulation
from processes import relatives, wait_for

pytestmark = pytest.mark.slow

SITES = ("banking", "energy", "health")  # desks of the embedded data
LIMIT_S = 1500  # of a run; each message starts a process at its site
EACH = 48  # records of a site, by task
SHORT = ["training.max_steps=2", "training.batch_size=4", "evaluation.every=0"]
INSTRUCTIONS = ["data=jsonl", "data.columns.label=output"]
PAIRS = ["task=dpo", "data=preferences", "data.columns.label=kind"]


def lines_of(name: str, file: str) -> list[str]:
    lines = (DEMO / file).read_text("utf-8").splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["desk"] == name][:EACH]


def records_of(name: str) -> list[str]:
    """A site's file: its desk's instructions and its pairs, with every column in each line."""
    rows = [json.loads(line) for line in lines_of(name, "train.jsonl")]
    pairs = [json.loads(line) for line in lines_of(name, "preferences_train.jsonl")]
    return [json.dumps({**row, **pair}) + "\n" for row, pair in zip(rows, pairs, strict=True)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Server and three sites, each with the records of one desk."""
    root = tmp_path_factory.mktemp("three")
    with running_federation(root, {name: records_of(name) for name in SITES}) as running:
        assert wait_for(lambda: running.nodes() == ["online"] * 3, 90)
        yield running


def deployed(federation: Federation, output: Path, overrides: Sequence[str]) -> Path:
    """A finished run of all three sites."""
    own = ["federation.engine=deployment", "federation.num_clients=3", f"output_dir={output}"]
    done = federation.submit([*overrides, *own, "federation.sample_fraction=1.0"])
    assert done.returncode == 0, done.stderr
    assert wait_for(lambda: (output / "summary.json").exists(), LIMIT_S), rounds_of(output)
    return output


def simulated(output: Path, overrides: Sequence[str]) -> Path:
    """The same in one process: all files as one, divided again by the desk."""
    together = output.with_suffix(".jsonl")
    together.write_text("".join(line for name in SITES for line in records_of(name)), "utf-8")
    own = [f"data.path={together}", "partition=natural", "partition.column=desk"]
    own += ["federation.engine=inprocess", "federation.sample_fraction=1.0"]
    config = compose([*overrides, *own, f"output_dir={output}"])
    run_simulation(config, Console(quiet=True), 0.0)
    return output


def tensors_of(file: Path, label: str) -> dict[str, bytes]:
    return {
        f"{label}/{group}/{name}": value.tobytes()
        for group, params in load_params(file)[0].items()
        for name, value in params.items()
    }


def computed(run: Path, clients: dict[str, Path]) -> dict[str, Any]:
    """What training has computed: server state, exported adapter, losses, the clients' own state.

    Args:
        clients: where each keeps its state of this run.
    """
    tensors = tensors_of(max(run.glob("checkpoints/round-*")), "server")
    for name, folder in clients.items():
        if files := sorted(folder.glob("*.safetensors")):
            tensors |= tensors_of(files[-1], name)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    losses = [
        {name: (client["loss"], client["num_examples"]) for name, client in item["clients"].items()}
        for item in rounds_of(run)[1:]
    ]
    return {**tensors, "adapter": adapter, "losses": losses}


# Before the tests that share a federation, whose sites have the same names and ports.
RANKS = {"banking": 4, "energy": 8, "health": 16}
RANKED = ["algorithm=flora", "lora.r=16", "lora.alpha=32", "federation.num_rounds=3"]


def test_sites_of_different_ranks_killed_and_resumed(tmp_path: Path) -> None:
    """Adapters of ranks 4, 8 and 16, and the server's app killed: the bits of a simulation."""
    evaluation = [f"data.eval_path={DEMO / 'test.jsonl'}", "data.eval_max_samples=20"]
    common = [*INSTRUCTIONS, *evaluation, *SHORT, *RANKED]
    entries = ",".join(f"{name}:{rank}" for name, rank in RANKS.items())
    expected = simulated(tmp_path / "expected", [*common, f"lora.ranks=[{entries}]"])

    output = tmp_path / "real"
    own = ["data.path=at-the-sites", "federation.engine=deployment", "federation.num_clients=3"]
    own += ["federation.sample_fraction=1.0", f"output_dir={output}"]
    nodes = {name: f"lora-rank = {rank}\n" for name, rank in RANKS.items()}
    sites = {name: records_of(name) for name in RANKS}
    with running_federation(tmp_path / "three", sites, nodes=nodes) as federation:
        assert wait_for(lambda: federation.nodes() == ["online"] * 3, 90)
        command = ["fedllm", "server", "run", str(federation.folder)]
        with ThreadPoolExecutor(1) as pool:
            submitted = pool.submit(federation.run, *command, *common, *own)
            assert wait_for(lambda: len(rounds_of(output)) > 1, 400)
            root = federation.folder.parent
            [app] = [p for p in relatives(root) if "flwr-serverapp" in command_of(p)]
            app.kill()
            assert submitted.result().returncode == 1
        done = federation.run(*command, f"resume={output}")
        assert done.returncode == 0, done.stdout + done.stderr

    found, wanted = (max(run.glob("checkpoints/round-*")) for run in (output, expected))
    assert tensors_of(found, "server") == tensors_of(wanted, "server")
    adapters = [run / "adapter" / "adapter_model.safetensors" for run in (output, expected)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert "state.frozen" in load_params(found)[0]
    first, second, third = (record["aggregation_error"] for record in rounds_of(output)[1:])
    assert max(first, second) < 1e-6 < third  # 3 x (4 + 8 + 16) is above the cap of rank 64


@pytest.mark.parametrize(
    ("kind", "overrides", "num_rounds"),
    [
        (INSTRUCTIONS, ["algorithm=fedavg"], 3),
        (INSTRUCTIONS, ["algorithm=scaffold"], 10),
        (PAIRS, ["algorithm=fedavg"], 3),
        (INSTRUCTIONS, ["algorithm=scaffold", "privacy.secure_aggregation=true"], 2),
        (INSTRUCTIONS, ["algorithm=scaffold", "communication.downlink=int4"], 3),
        (INSTRUCTIONS, ["algorithm=fed_sb"], 4),
        (INSTRUCTIONS, ["algorithm=fed_sb", "privacy.secure_aggregation=true"], 3),
    ],
    ids=[
        *("fedavg", "scaffold-10-rounds", "dpo-3-rounds", "secure", "downlink"),
        *("fed_sb", "fed_sb-secure"),
    ],
)
def test_sites_train_as_simulated_clients_do(
    federation: Federation,
    tmp_path: Path,
    kind: list[str],
    overrides: list[str],
    num_rounds: int,
) -> None:
    """Bit for bit: adapter, server state, SCAFFOLD's control variate, every client's loss."""
    held_out = "test.jsonl" if kind is INSTRUCTIONS else "preferences_test.jsonl"
    evaluation = [f"data.eval_path={DEMO / held_out}", "data.eval_max_samples=20"]
    common = [*kind, *overrides, *evaluation, *SHORT, f"federation.num_rounds={num_rounds}"]

    real = deployed(federation, tmp_path / "real", [*common, "data.path=at-the-sites"])
    simulation = simulated(tmp_path / "expected", common)

    expected = computed(simulation, {name: simulation / "clients" / name for name in SITES})
    run = load_state(real / "checkpoints")[0].run
    root = federation.folder.parent
    found = computed(real, {name: root / name / "state" / "runs" / run / name for name in SITES})
    with_state = kind is PAIRS or "algorithm=scaffold" in overrides
    assert with_state == any(key.startswith(SITES) for key in found)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    assert [record["round"] for record in rounds_of(real)] == list(range(num_rounds + 1))
    assert all(sorted(record["clients"]) == list(SITES) for record in rounds_of(real)[1:])
    assert all(record["failures"] == {} for record in rounds_of(real)[1:])
    with (real / "clients.csv").open() as file:
        assert {row["client"]: row["examples"] for row in csv.DictReader(file)} == {
            name: str(EACH) for name in SITES
        }


def test_a_site_merges_its_personal_adapter(federation: Federation, tmp_path: Path) -> None:
    """With Ditto: the weights of the same client's adapter, merged after a simulation.

    With FedSA, a site has only its own A_i, and a simulation their mean.
    """
    evaluation = [f"data.eval_path={DEMO / 'test.jsonl'}", "data.eval_max_samples=20"]
    common = [*INSTRUCTIONS, "algorithm=ditto", *evaluation, *SHORT, "federation.num_rounds=2"]
    deployed(federation, tmp_path / "real", [*common, "data.path=at-the-sites"])
    simulation = simulated(tmp_path / "expected", common)

    site = federation.folder.parent / "energy"
    log = federation.run("fedllm", "site", "log", str(site), "--json").stdout.splitlines()
    run = [json.loads(line)["run"] for line in log if line.startswith("{")][-1]
    merged, expected = tmp_path / "merged", tmp_path / "wanted"
    done = federation.run("fedllm", "site", "merge", str(site), str(run), str(merged))
    assert done.returncode == 0, done.stderr
    done = federation.run("fedllm", "merge", f"{simulation}@client=energy", str(expected))
    assert done.returncode == 0, done.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (merged, expected)]
    assert weights[0] == weights[1]
