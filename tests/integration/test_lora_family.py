"""Rules about A and B on the tiny model: what travels, what is exact, what is exported."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedllm_flwr.config.compose import compose, load_run
from fedllm_flwr.deployment.audit import AuditLog, settings_digest
from fedllm_flwr.deployment.ledger import Ledger
from fedllm_flwr.deployment.personal import personal_adapter
from fedllm_flwr.deployment.policy import Policy
from fedllm_flwr.deployment.site_state import SiteState
from fedllm_flwr.errors import ConfigError, FederationError, RunInterrupted
from fedllm_flwr.factors import core_of, folded, is_b, rank_of
from fedllm_flwr.federation.state import newest_readable, read_state, state_file
from fedllm_flwr.federation.tensor_files import load_params
from fedllm_flwr.models.adapted_model import load_beside
from fedllm_flwr.runs.adapter_files import load_kept
from fedllm_flwr.runs.directory import RunDirectory
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
    "fed_sb": ["algorithm=fed_sb", "federation.num_rounds=4"],
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
    """FedSA has none: the server never sees a B. Nor have the rounds in which nothing moves."""
    rounds = rounds[2:] if name == "fed_sb" else rounds
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


def test_a_residual_of_zero_needs_no_frozen_factors(tmp_path: Path) -> None:
    """With B = 0, one step changes no A, so the mean of the first round is exact."""
    run = run_tiny(tmp_path, "algorithm=fedex", "training.max_steps=1", "checkpoint.keep=2")
    first, second = (
        read_state(state_file(run.checkpoints, number)).tensors["frozen"] for number in (1, 2)
    )
    assert rank_of(first) == 0 < rank_of(second)


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
    directory = run_tiny(tmp_path / "fed_sb", *FAMILY["fed_sb"])
    cores = whole.lora.r**2 * sum("lora_B" in name for name in initial)
    for record in records(directory)[3:]:
        assert record["bytes_up"] == per_value * cores
    with pytest.raises(ConfigError, match="algorithm=fed_sb starts from a base"):
        run_tiny(tmp_path / "again", *FAMILY["fed_sb"], f"init_adapter={directory.adapter}")
    ranks = "lora.ranks=[*:2]"
    directory = run_tiny(tmp_path / "ranks", "algorithm=flexlora", ranks)
    for record in records(directory)[1:]:
        assert record["bytes_up"] == record["bytes_down"] == per_value * everything // 4
    assert rank_of(final_state(directory).params) == whole.lora.r


def a_site(folder: Path, name: str, run: RunDirectory, memory: Path) -> Path:
    """A site's directory after Flower's run 77, which has left this file in its memory."""
    state = SiteState(folder / "state")
    node = f'client-name = "{name}"\nstate-dir = "{state.root}"\ndevice = "cpu"\n'
    state.folder("own", name).mkdir(parents=True)
    (folder / "node.toml").write_text(node)
    shutil.copy(memory, state.folder("own", name))
    config = load_run(run.path, "run")
    Ledger(state.ledger).count("77", config, Policy(), "own")
    settings = asdict(config)
    entry = {"run": "77", "settings_digest": settings_digest(settings)}
    AuditLog(folder / "audit").append(entry, settings)
    return folder


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
        site = a_site(tmp_path / client, client, directory, file)
        np.testing.assert_equal(personal_adapter(site, "77").tensors(), own)
    with pytest.raises(ConfigError, match="no run of this id in the audit log"):
        personal_adapter(site, "78")
    if name == "fedsa":  # B stays: not a value of it has reached the server
        assert not any(v.any() for key, v in state.params.items() if "lora_B" in key)
        a = sum(v.size for key, v in state.params.items() if "lora_A" in key)
        assert last["bytes_up"] == last["bytes_down"] == 2 * 3 * a


def test_a_start_that_clients_do_not_draw_alike_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fedllm_flwr.client.local_round.digest", lambda params: "another")
    with pytest.raises(FederationError, match="install the same version of torch on both"):
        run_tiny(tmp_path, "algorithm=ffa")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "kto"])
@pytest.mark.parametrize("name", FAMILY)
def test_every_rule_with_every_task(name: str, task: str, tmp_path: Path) -> None:
    directory = run_tiny(tmp_path, *FAMILY[name], f"task={task}")
    _assert_errors(name, records(directory)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", ["ffa", "fedex", "flora", "fed_sb"])
def test_quantized_bases_stay_as_they_are(name: str, quantization: str, tmp_path: Path) -> None:
    directory = run_tiny(tmp_path, *FAMILY[name], f"quantization={quantization}")
    _assert_errors(name, records(directory)[1:])


def test_a_core_is_trained_between_b_and_a() -> None:
    """Logits are those of (B R) A, and dR = B' d(B R)."""
    config = compose(tiny("algorithm=fed_sb", "lora.dropout=0"))
    model, rng = load_beside(config), np.random.default_rng(0)
    factors = {n: rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in model.initial.items()}
    cores = {
        core_of(n): rng.normal(0, 1, 2 * (config.lora.r,)).astype(np.float32)
        for n in factors
        if is_b(n)
    }
    tokens, found = torch.arange(10, 42)[None], []
    for params in ({**factors, **cores}, folded({**factors, **cores})):
        model.load(params)
        np.testing.assert_equal(model.params(), params)
        model.peft.zero_grad()
        loss = model.peft(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad.numpy() for n, p in model.trainable().items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name in filter(is_b, factors):
        expected = factors[name].T @ found[1][1][name]
        np.testing.assert_allclose(found[0][1][core_of(name)], expected, rtol=1e-3, atol=1e-6)
    assert not any("core" in name for name, _ in model.peft.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["client", "record"])
def test_fed_sb_under_privacy(unit: str, tmp_path: Path) -> None:
    """The rounds of the estimate are bounded, noised and accounted for as all."""
    noise = ("privacy.noise_multiplier=1", "privacy.delta=1e-3", f"privacy.unit={unit}")
    spent = [
        record["epsilon"] for record in records(run_tiny(tmp_path, *FAMILY["fed_sb"], *noise))[1:]
    ]
    assert spent[0] > 0
    assert spent == sorted(spent)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["federation.num_rounds=2"], "federation.num_rounds=2: with algorithm=fed_sb"),
        (["lora.dora=true"], "lora.dora=true does not work with algorithm=fed_sb"),
        (["lora.ranks=[a:4]"], "lora.ranks does not work with algorithm=fed_sb"),
        (["algorithm.options.estimation=3"], "estimation must be an even number"),
    ],
)
def test_what_fed_sb_cannot_do_is_said(overrides, said, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run_tiny(tmp_path, "algorithm=fed_sb", *overrides)
