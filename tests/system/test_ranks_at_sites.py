"""Three sites with adapters of ranks 4, 8 and 16, their server killed: the bits of a simulation."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_three_sites import INSTRUCTIONS, SHORT, records_of, simulated, tensors_of

from deployments import command_of, rounds_of, running_federation
from fedllm_flwr.data.sources import DEMO
from fedllm_flwr.federation.tensor_files import load_params
from processes import relatives, wait_for

pytestmark = pytest.mark.slow

RANKS = {"banking": 4, "energy": 8, "health": 16}
RUN = ["algorithm=flora", "lora.r=16", "lora.alpha=32", "federation.num_rounds=3"]


def test_sites_of_different_ranks_killed_and_resumed(tmp_path: Path) -> None:
    evaluation = [f"data.eval_path={DEMO / 'test.jsonl'}", "data.eval_max_samples=20"]
    common = [*INSTRUCTIONS, *evaluation, *SHORT, *RUN]
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
    assert all(record["aggregation_error"] < 1e-6 for record in rounds_of(output)[1:])
