"""Rules about A and B on the tiny model: what travels, what is exact, what is exported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedllm_flwr.config.compose import compose
from fedllm_flwr.errors import FederationError, RunInterrupted
from fedllm_flwr.factors import rank_of
from fedllm_flwr.federation.state import newest_readable, read_state, state_file
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.models.adapted_model import load_beside
from fedllm_flwr.runs.adapter_files import load_kept
from fedllm_flwr.runs.kept_adapters import find_adapter
from tiny_runs import interrupting, outcome, records, resume, run_intercepted, run_tiny, tiny

RANKS = "lora.ranks=[*1:4,*2:2]"
FAMILY = {
    "ffa": ["algorithm=ffa"],
    "rolora": ["algorithm=rolora"],
    "ffa_adam": ["algorithm=fedadam", "algorithm.factors=b"],
    "lora_fair": ["algorithm=lora_fair"],
    "fedex": ["algorithm=fedex"],
    "flexlora": ["algorithm=flexlora", RANKS],
    "raflora": ["algorithm=flexlora", "algorithm.options.by_rank=true", RANKS],
    "hetlora": ["algorithm=hetlora", RANKS],
    "hetlora_pruned": ["algorithm=hetlora", RANKS, "algorithm.options={gamma: 0.5, strength: 1.0}"],
    "flora": ["algorithm=flora", RANKS],
    "fedsa": ["algorithm=fedsa"],
    "ditto": ["algorithm=ditto"],
}
INEXACT = (
    "ffa_adam",
    "lora_fair",
    "raflora",
    "hetlora",
    "hetlora_pruned",
    "ditto",
)  # FlexLoRA: 4 + 2 fit into rank 8
BY_DEFAULT = ("flora",)
SOME_SLOWLY = [
    name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILY
]


def final_state(directory):
    number = newest_readable(directory.checkpoints)
    return read_state(state_file(directory.checkpoints, number))


@pytest.mark.parametrize("name", SOME_SLOWLY)
def test_two_rounds_and_the_same_bits_after_a_stop(name: str, tmp_path: Path) -> None:
    whole = run_tiny(tmp_path / "whole", *FAMILY[name])
    with pytest.raises(RunInterrupted):
        run_intercepted(tmp_path / "stopped", interrupting(2, after=1), *FAMILY[name])
    assert outcome(resume(tmp_path / "stopped")) == outcome(whole)
    rounds = records(whole)[1:]
    assert not any(record["failures"] for record in rounds)
    _assert_errors(name, rounds)
    kept = find_adapter(str(whole.path))
    model = load_beside(kept.config)
    params = load_kept(kept, model)
    np.testing.assert_equal(params, final_state(whole).adapter)
    _assert_peft_reads(whole, model, params)


def _assert_errors(name, rounds):
    """FedSA has none: the server never sees a B."""
    errors = [record.get("aggregation_error", 0.0) for record in rounds]
    assert all(error > 1e-4 if name in INEXACT else error < 1e-6 for error in errors)
    assert all(("aggregation_error" in record) is (name != "fedsa") for record in rounds)


def _assert_peft_reads(directory, model, params):
    """The exported adapter on a fresh base gives the logits of the adapter as it is loaded."""
    model.load(params)
    model.peft.eval()
    tokens = torch.arange(10, 42)[None]
    with torch.inference_mode():
        expected = model.peft(input_ids=tokens).logits
        base = load_beside(compose(tiny(f"output_dir={directory.path}-base"))).peft.unload()
        exported = PeftModel.from_pretrained(base, str(directory.adapter)).eval()
        torch.testing.assert_close(exported(input_ids=tokens).logits, expected, atol=1e-4, rtol=0)


def test_what_travels(tmp_path: Path) -> None:
    """FFA: B alone, in both directions. Clients of a smaller rank: as much less."""
    whole = compose(tiny("algorithm=fedavg"))
    initial = load_beside(whole).initial
    per_value = 2 * 2  # bytes, clients
    b = sum(value.size for name, value in initial.items() if "lora_B" in name)
    everything = sum(value.size for value in initial.values())
    directory = run_tiny(tmp_path / "ffa", "algorithm=ffa")
    for record in records(directory)[1:]:
        assert record["bytes_up"] == record["bytes_down"] == per_value * b
    start, end = load_beside(whole).initial, final_state(directory).params
    assert all(start[n].tobytes() == v.tobytes() for n, v in end.items() if "lora_A" in n)
    ranks = "lora.ranks=[*:2]"
    directory = run_tiny(tmp_path / "ranks", "algorithm=flexlora", ranks)
    for record in records(directory)[1:]:
        assert record["bytes_up"] == record["bytes_down"] == per_value * everything // 4
    assert rank_of(final_state(directory).params) == whole.lora.r


@pytest.mark.parametrize("name", ["fedsa", pytest.param("ditto", marks=pytest.mark.slow)])
def test_personal_adapters_stay_at_the_clients_and_are_scored(name: str, tmp_path: Path) -> None:
    directory = run_tiny(tmp_path, *FAMILY[name], "federation.sample_clients=3")
    state = final_state(directory)
    last = records(directory)[-1]
    for client, scores in last["client_eval"]["clients"].items():
        kind = "adapter" if name == "fedsa" else "personal"
        [file] = (directory.path / "clients").glob(f"{client}/round-00002.safetensors")
        own = load_params(file)[0][kind]
        gain = scores["loss"] - scores["personal_loss"]
        assert gain > 1 if name == "fedsa" else gain  # FedSA's global adapter is the base model
        expected = {
            key: state.params[key] if name == "fedsa" and "lora_A" in key else value
            for key, value in own.items()
        }
        np.testing.assert_equal(
            find_adapter(f"{directory.path}@client={client}").tensors(), expected
        )
    if name == "fedsa":  # B stays: not a value of it has reached the server
        assert not any(v.any() for key, v in state.params.items() if "lora_B" in key)
        a = sum(v.size for key, v in state.params.items() if "lora_A" in key)
        assert last["bytes_up"] == last["bytes_down"] == 2 * 3 * a


def test_a_start_that_clients_do_not_draw_alike_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fedllm_flwr.client.local_round.digest", lambda params: "another")
    with pytest.raises(FederationError, match="install one version of torch on both"):
        run_tiny(tmp_path, "algorithm=ffa")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "kto"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_rule_with_every_task(name: str, task: str, tmp_path: Path) -> None:
    directory = run_tiny(tmp_path, *FAMILY[name], f"task={task}")
    _assert_errors(name, records(directory)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["ffa", "fedex", "flora"])
def test_quantized_bases_stay_as_they_are(name: str, quantization: str, tmp_path: Path) -> None:
    directory = run_tiny(tmp_path, *FAMILY[name], f"quantization={quantization}")
    assert all(record["aggregation_error"] < 1e-6 for record in records(directory)[1:])
