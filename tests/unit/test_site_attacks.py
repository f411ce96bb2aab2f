"""What an active server sends to a site to read its records; each message goes through `answer`.

The sites are real: a tiny model, records on disk, messages as they come off the wire.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from safetensors.torch import load_file

from fedllm_flwr.client import local_round as local
from fedllm_flwr.client.requests import answer
from fedllm_flwr.client.site import Site
from fedllm_flwr.commands import main as cli
from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import ColumnsConfig, FederationConfig
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.deployment.audit import AuditLog
from fedllm_flwr.errors import FedLLMError
from fedllm_flwr.federation.messages import Assignment, ClientInfo, Failure, Update
from fedllm_flwr.federation.wire import (
    pack_assignment,
    pack_query,
    unpack_failure,
    unpack_info,
    unpack_update,
)
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.tokenizer import EMBEDDED
from fedllm_flwr.params import Params
from fedllm_flwr.privacy.accounting import Release, default_delta, epsilon

NUM_RECORDS = 100
COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
SECRET = "Sauerbrey"


def asking(**changes: object) -> Config:
    """What an honest server would ask of a site, with some keys changed: section__key=value."""
    config = Config(federation=FederationConfig(engine="deployment", num_clients=1))
    config = changed(
        config,
        training={"max_steps": 4, "batch_size": 16, "max_length": 64},
        communication={"dtype": "float32"},
    )
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config = changed(config, **{section: {name: value}})
    return config


def write_records(file: Path, count: int = NUM_RECORDS) -> Path:
    """Records of different lengths, one with a secret in it."""
    rows = [
        {"instruction": f"Question {i}?", "output": "Because. " * (1 + i % 5)} for i in range(count)
    ]
    rows[7]["output"] = f"The patient Iphigenie {SECRET} is ill."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site whose operator has written no policy: the package's own limits hold."""
    node = {
        "client-name": "ward",
        "data-path": str(write_records(tmp_path / "notes.jsonl")),
        "state-dir": str(tmp_path / "state"),
        "device": "cpu",
    }
    return Site(node, run_id=1, node_id=7)


@pytest.fixture
def with_policy(site: Site, tmp_path: Path) -> Callable[..., Site]:
    """The site of an operator who has written these lines into policy.yaml."""

    def make(*lines: str, run_id: int = 1) -> Site:
        file = tmp_path / "policy.yaml"
        file.write_text("\n".join([*lines, "approval: automatic"]))
        return Site({**site.node_config, "policy-path": str(file)}, run_id, site.node_id)

    return make


def next_run(site: Site) -> Site:
    """The same site, asked in another run of Flower."""
    return replace(site, run_id=site.run_id + 1)


def announced(site: Site, config: Config) -> ClientInfo:
    """The site's answer to a query."""
    reply = answer("query", pack_query(config), site)
    assert (failure := unpack_failure(reply)) is None, failure
    return unpack_info(reply)


def trained(site: Site, content: RecordDict) -> Update:
    """The site's answer to a task."""
    reply = answer("train", content, site)
    assert (failure := unpack_failure(reply)) is None, failure
    return unpack_update(reply)


def initial(config: Config) -> Params:
    """The adapter that an honest server starts from."""
    return load_model(replace(config, training=replace(config.training, device="cpu"))).initial


def task(config: Config, server_round: int = 1, **fields: object) -> RecordDict:
    """A task as it comes off the wire."""
    values = {"params": initial(config), "run": "honest", **fields}
    return pack_assignment(Assignment(server_round, learning_rate=1e-3, config=config, **values))  # type: ignore[arg-type]


def refused(reply: RecordDict) -> Failure:
    """The site's refusal."""
    failure = unpack_failure(reply)
    assert failure is not None, "the site did what it was asked to"
    return failure


BASE_TENSORS = {  # of the embedded model -> as PEFT names them
    "model.embed_tokens.weight": "base_model.model.model.embed_tokens.weight",
    "model.norm.weight": "base_model.model.model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight": (
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    ),
}


def test_base_weights_are_not_overwritten(site: Site) -> None:
    """A weight of the base model, once overwritten, stayed for every later task of the process."""
    config, weights = asking(), load_file(EMBEDDED / "model.safetensors")
    before = trained(site, task(config)).delta
    for original, name in BASE_TENSORS.items():
        value = np.full(tuple(weights[original].shape), 7.0, np.float32)
        foreign = initial(config) | {name: value}
        for where in ("params", "control", "reference"):
            fields = {where: foreign} if where == "params" else {"sent": {where: foreign}}
            algorithm = "scaffold" if where == "control" else "fedavg"
            wanted = asking(algorithm__name=algorithm)
            site = next_run(site)  # a run goes on with the algorithm it began with
            reason = refused(answer("train", task(wanted, **fields), site)).reason
            assert reason in (
                f"{where} does not fit the base model and the LoRA settings: {name!r} is not a "
                "tensor of this adapter.",
                "it contains 'reference', which neither the algorithm nor the task uses",
                f"the site refuses an adapter of {name}: it is outside of the transformer blocks "
                "(target_modules); ask within that, or let the site's "
                "operator change this site's policy.yaml",
            )
    after = trained(next_run(site), task(config)).delta
    assert {n: v.tobytes() for n, v in after.items()} == {n: v.tobytes() for n, v in before.items()}


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e4])
def test_tensors_that_are_no_adapter_are_refused(site: Site, value: float) -> None:
    config = asking(evaluation__clients=True, data__validation_fraction=0.33)
    params = {name: np.full_like(tensor, value) for name, tensor in initial(config).items()}

    for kind in ("train", "evaluate"):
        failure = refused(answer(kind, task(config, params=params), site))
        assert failure.reason.startswith("params does not fit the base model")


# What a server can name to have a record lost or made long by its text.
KEEPS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
KEEPS += "{% if add_generation_prompt %}assistant: {% endif %}"
BLOATS = KEEPS.replace(
    "{{ eos_token }}",
    "{% if '" + SECRET + "' in m.content %}{{ ' x' * 4000 }}{% endif %}{{ eos_token }}",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with the attacker's model: a harmless commit, and a branch with a template.

    The template makes a record long if a word is in it; so does the tokenizer of pull request 1.
    """
    root = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = root / "models--evil--model"
    for commit, template in ((COMMIT, KEEPS), (OTHER_COMMIT, BLOATS)):
        folder = repository / "snapshots" / commit
        shutil.copytree(EMBEDDED, folder)
        (folder / "chat_template.jinja").write_text(template)
    for name in ("main", "refs/pr/1"):
        (repository / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(OTHER_COMMIT)
    return root


def test_model_of_the_servers_choice_is_not_loaded(site: Site, hub: Path) -> None:
    """Its chat template keeps a record or bloats it by its text, and the count tells which."""
    for revision in (None, "main", "refs/pr/1", OTHER_COMMIT):
        config = asking(
            model__path="evil/model",
            model__name="x",
            model__revision=revision,
            data__template="chat",
            data__truncation="drop",
        )
        reason = refused(answer("query", pack_query(config), site)).reason
        assert reason.startswith("the site refuses model.path=evil/model")
        assert "it is not among its allowed_models (embedded, own)" in reason
        assert refused(answer("train", task(config, params={}), site)).reason == reason


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/1", OTHER_COMMIT, COMMIT[:10]])
def test_revision_of_an_allowed_model_is_not_swapped(
    with_policy: Callable[..., Site], hub: Path, revision: str | None
) -> None:
    """Whoever may open a pull request at the hub could bring a tokenizer that reads records."""
    site = with_policy(f"allowed_models: [evil/model@{COMMIT}]")
    config = asking(model__path="evil/model", model__name="x", data__template="chat")
    honest = replace(config, model=replace(config.model, revision=COMMIT))
    assert announced(site, honest).model == f"evil/model@{COMMIT}"

    swapped = replace(config, model=replace(config.model, revision=revision))
    reason = refused(answer("query", pack_query(swapped), next_run(site))).reason
    assert reason.startswith("the site refuses model.path=evil/model")
    assert COMMIT in reason


def test_count_does_not_depend_on_a_template_that_reads_records(
    with_policy: Callable[..., Site], hub: Path
) -> None:
    """Even a model that the operator has allowed by mistake: each record counts, however long."""
    site = with_policy(f"allowed_models: [evil/model@{OTHER_COMMIT}]")
    for truncation in ("right", "left"):
        config = asking(
            model__path="evil/model",
            model__name="x",
            model__revision=OTHER_COMMIT,
            data__template="chat",
            data__truncation=truncation,
        )
        assert announced(site, config).num_examples == NUM_RECORDS
        site = next_run(site)


def test_truncation_is_no_oracle(site: Site) -> None:
    """One bit per message: whether a record is longer than a length of the server's choice."""
    told = set()
    for length in (16, 24, 40, 64):
        for template in ("alpaca", "vicuna"):
            for truncation in ("right", "left"):
                config = asking(
                    training__max_length=length,
                    data__template=template,
                    data__truncation=truncation,
                )
                told.add(announced(site, config).num_examples)
                site = next_run(site)
    assert told == {NUM_RECORDS}
    drop = refused(answer("query", pack_query(asking(data__truncation="drop")), site))
    assert drop.reason.startswith("the site refuses data.truncation=drop")


def test_update_counts_no_lengths_either(site: Site) -> None:
    """Examples used and steps follow from the number of records alone."""
    for length in (16, 64):
        epochs = asking(
            training__max_length=length, training__max_steps=-1, training__num_epochs=1.0
        )
        update = trained(site, task(epochs))
        assert (update.num_examples, update.metrics["steps"]) == (NUM_RECORDS, 7)
        site = next_run(site)


def test_how_the_file_is_read_is_the_sites_choice(site: Site, tmp_path: Path) -> None:
    """A server names no columns, preprocessing or labels, nor what becomes of bad records."""
    plain = announced(site, asking())
    others = asking(
        data__columns=ColumnsConfig(instruction="output", output="instruction", label="ward"),
        data__preprocessing="mathinstruct",
        data__on_bad_record="skip",
        data__client_column="ward",
        data__split="test",
        data__max_samples=3,
        data__labels=[SECRET],
    )
    assert announced(next_run(site), others) == plain
    honest, odd = next_run(next_run(site)), next_run(next_run(next_run(site)))
    expected = trained(honest, task(asking()))
    found = trained(odd, task(others))
    assert found.delta.keys() == expected.delta.keys()
    for name, value in expected.delta.items():
        assert found.delta[name].tobytes() == value.tobytes()


def test_a_run_is_told_its_number_once(site: Site) -> None:
    """The same query again gets the same answer, also after the data have changed; others none."""
    config = asking()
    first = announced(site, config)
    write_records(Path(str(site.node_config["data-path"])), 70)
    assert announced(site, config) == first

    for changes in ({"training__max_length": 65}, {"evaluation__clients": True}):
        other = asking(**changes)
        failure = refused(answer("query", pack_query(other), site))
        assert failure.reason == (
            "the site refuses other settings than this run began with; start a new run"
        )
        assert refused(answer("train", task(other), site)).reason == failure.reason
    assert announced(next_run(site), config).num_examples == 70


def test_messages_of_a_run_and_of_a_day_are_counted(with_policy: Callable[..., Site]) -> None:
    site = with_policy("max_messages_per_run: 3", "max_messages_per_day: 5")
    query = pack_query(asking())
    told = [unpack_failure(answer("query", query, site)) for _ in range(4)]
    assert told[:3] == [None, None, None]
    assert told[3] is not None
    assert "message 4 of this run: it is above its max_messages_per_run (3)" in told[3].reason

    others = [replace(site, run_id=site.run_id + 1 + i) for i in range(3)]
    told = [unpack_failure(answer("query", query, other)) for other in others]
    assert told[:2] == [None, None]
    assert told[2] is not None
    assert "message 6 of this day: it is above its max_messages_per_day (5)" in told[2].reason


TOO_FEW = {
    "one record in a step": ({"training__batch_size": 1}, "min_records_per_step"),
    "one step": ({"training__max_steps": 1}, "min_records_per_round"),
    "plain gradients": ({"training__optimizer": "sgd"}, "optimizers"),
    "output layer": ({"lora__target_modules": ["lm_head"]}, "target_modules"),
    "output layer, hidden": ({"lora__target_modules": ["q_proj", "lm_head"]}, "target_modules"),
    "embeddings": ({"lora__target_modules": ["embed_tokens"]}, "target_modules"),
    "one token": ({"training__max_length": 2}, "min_length"),
    "one record in a score": (
        {"evaluation__clients": True, "data__validation_fraction": 0.02},
        "min_records_per_score",
    ),
    "memory of an evaluation": ({"evaluation__batch_tokens": 2**40}, "max_batch_tokens"),
    "every version kept": (
        {"checkpoint__every": 10**6, "federation__num_rounds": 400},
        "max_rounds_kept",
    ),
}


@pytest.mark.parametrize("case", TOO_FEW)
def test_lower_bounds_hold_by_default(site: Site, case: str) -> None:
    """`lm_head`, batch 1, one step and SGD together gave the tokens of one answer."""
    changes, limit = TOO_FEW[case]
    config = asking(**changes)

    for kind, content in (
        ("query", pack_query(config)),
        ("train", task(config, params=initial(asking()))),
    ):
        reason = refused(answer(kind, content, site)).reason
        assert limit in reason
        assert reason.endswith("let the site's operator change this site's policy.yaml")


def test_adapter_of_the_head_under_another_name_is_refused(site: Site) -> None:
    head = initial(asking(lora__target_modules=["lm_head"]))
    reason = refused(answer("train", task(asking(), params=head), site)).reason
    assert "outside of the transformer blocks" in reason


def test_site_with_few_records_does_not_train(site: Site) -> None:
    write_records(Path(str(site.node_config["data-path"])), 63)
    reason = refused(answer("query", pack_query(asking()), site)).reason
    assert "it holds fewer records than its min_records_per_round (64)" in reason
    assert "63" not in reason


def test_threads_are_the_sites(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 CPUs gave 1,001 threads."""
    asked: list[int] = []
    set_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (asked.append(n), set_threads(n)))
    config = asking(federation__client_cpus=500)

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    trained(site, task(config))
    assert max(asked) == 2
    own = Site({**site.node_config, "threads": 1}, site.run_id, site.node_id)
    asked.clear()
    trained(own, task(config))
    assert asked[0] == 1


def test_processes_are_the_sites(site: Site) -> None:
    """No server starts 500 processes at a site, nor learns how many there are."""
    config = asking(federation__client_processes=500)
    assert site.own_config(config).federation.client_processes == 1
    own = Site({**site.node_config, "processes": 2}, site.run_id, site.node_id)
    assert own.own_config(config).federation.client_processes == 2

    failure = refused(answer("query", pack_query(asking(training__batch_size=17)), next_run(own)))
    assert failure.reason == (
        "the number of its processes does not suit training.batch_size or privacy.unit; the site's "
        "log says more"
    )


def drawn(site: Site, config: Config, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The records that the site draws for round 1."""
    found: list[int] = []

    def train(task: Assignment, data: ClientData, state_dir: Path) -> Update:
        found.extend(local._draw(task, data).tolist())
        raise FedLLMError("enough")

    monkeypatch.setattr(local, "train_locally", train)
    refused(answer("train", task(config), site))
    return found


def test_no_two_draws_differ_by_one_known_record(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With draws by the seed alone, a step of 65 records was one of 64 and one record more."""
    write_records(Path(str(site.node_config["data-path"])), 400)
    one_step = {"training__max_steps": 1}
    fewer = drawn(site, asking(training__batch_size=64, **one_step), monkeypatch)
    again = drawn(next_run(site), asking(training__batch_size=64, **one_step), monkeypatch)
    more = drawn(replace(site, run_id=5), asking(training__batch_size=65, **one_step), monkeypatch)
    assert fewer == again  # a run that is resumed, or made again, draws the same
    assert len(set(more) - set(fewer)) > 30
    elsewhere = Site({**site.node_config, "state-dir": str(tmp_path / "other")}, 6, 7)
    assert set(drawn(elsewhere, asking(training__batch_size=64, **one_step), monkeypatch)) != set(
        fewer
    )


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("run", ["tokens", "../ledger", "secret", "..", "runs/../../x"])
def test_a_runs_name_leads_to_no_other_file(site: Site, tmp_path: Path, run: str) -> None:
    config = asking(algorithm__name="scaffold")
    control = {name: np.zeros_like(value) for name, value in initial(config).items()}
    fields = {"sent": {"control": control}}
    before = {file.name for file in tmp_path.iterdir()}
    trained(site, task(config, run=run, **fields))

    assert {file.name for file in tmp_path.iterdir()} == before | {"state"}
    kept = files_below(tmp_path / "state" / "runs")
    assert {name.split("/")[1] for name in kept} == {"ward"}
    assert {name.rpartition("/")[2] for name in kept} == {
        "round-00001.safetensors",
        "data.sha256",
    }


def test_state_is_bounded_and_expires(with_policy: Callable[..., Site], tmp_path: Path) -> None:
    site = with_policy("max_state_gb: 0.0001", "state_days: 10")
    old = tmp_path / "state" / "runs" / "old" / "ward" / "control-00001.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x" * 200_000)

    reason = refused(answer("train", task(asking()), site)).reason
    assert "its state takes more than its max_state_gb (0.0001)" in reason
    ten_days = time.time() - 11 * 86_400
    for path in (old, old.parent, old.parent.parent):
        os.utime(path, (ten_days, ten_days))
    trained(site, task(asking()))
    assert not old.exists()


def test_versions_do_not_pile_up(with_policy: Callable[..., Site]) -> None:
    """Whatever checkpoints the server says that it could go back to."""
    site = with_policy("max_rounds_kept: 3")
    reason = refused(answer("train", task(asking(checkpoint__keep=1), 4), site)).reason
    assert "rounds since the oldest checkpoint=4: it is above its max_rounds_kept (3)" in reason


def test_cache_holds_few_copies_of_the_records(site: Site, tmp_path: Path) -> None:
    """Each length that a server asks for would leave all records on disk once more."""
    for length in range(20, 28):
        announced(site, asking(training__max_length=length))
        site = next_run(site)
    assert len(files_below(tmp_path / "state" / "tokens")) == 4


def test_forgotten_records_are_gone(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenised records lie below the site's directory alone, and an erasure removes them."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "user-cache"))
    (tmp_path / "node.toml").write_text(f'state-dir = "{tmp_path / "state"}"\n')
    config = asking(algorithm__name="scaffold")
    control = {name: np.zeros_like(value) for name, value in initial(config).items()}
    fields = {"sent": {"control": control}}
    announced(site, config)
    for number, name in enumerate(("first", "second")):
        trained(replace(site, run_id=10 + number), task(config, run=name, **fields))
    assert not files_below(tmp_path / "user-cache")
    for name in ("trainer.log", "trainer.log.1"):
        (tmp_path / "state" / name).write_text(f"ValueError: {SECRET}\n")
    runs, tokens = tmp_path / "state" / "runs", tmp_path / "state" / "tokens"
    assert len(files_below(tokens)) == 1

    assert cli.main(["site", "forget", str(tmp_path), "10"]) == 0  # by Flower's id
    assert "Removed state of run first" in capsys.readouterr().out
    assert [folder.name for folder in runs.iterdir()] == ["second"]
    assert cli.main(["site", "forget", str(tmp_path), "first"]) == 2
    assert "no state of such a run here; there are: second" in capsys.readouterr().err
    assert cli.main(["site", "forget", str(tmp_path)]) == 2
    assert cli.main(["site", "forget", str(tmp_path), "--all"]) == 0
    assert "Removed tokenised records" in capsys.readouterr().out
    assert not files_below(runs)
    assert not files_below(tokens)
    assert (tmp_path / "state" / "trainer.log").read_text() == ""
    assert not (tmp_path / "state" / "trainer.log.1").exists()
    assert cli.main(["site", "log", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "forget     run 10  removed  Removed state of run first (" in printed[-3]
    assert "Removed tokenised records" in printed[-2]


def test_own_model_is_told_by_its_fingerprint(site: Site, tmp_path: Path) -> None:
    """Whatever the server calls the model, the site's directory is used, and all can compare."""
    copies = [tmp_path / "copy", tmp_path / "other"]
    for folder in copies:
        shutil.copytree(EMBEDDED, folder)
    (copies[1] / "chat_template.jinja").write_text(KEEPS)
    told = []
    for number, folder in enumerate([copies[0], copies[0], copies[1]]):
        own = Site({**site.node_config, "model-path": str(folder)}, 20 + number, 7)
        told.append(announced(own, asking(model__path="evil/model", model__name="x")).model)
    assert told[0] == told[1] != told[2]
    assert all(model.startswith("sha256:") and len(model) == 71 for model in told)
    assert announced(site, asking()).model == "embedded"


# The site's own account of what its records are spent on

PRIVATE = {"privacy__unit": "record", "privacy__noise_multiplier": 2.0}


def account_folder(site: Site) -> Path:
    return Path(str(site.node_config["state-dir"])) / "privacy"


def spent_by_hand(rounds: int) -> float:
    n = NUM_RECORDS
    return epsilon({Release(2.0, "poisson", 16, n): 4 * rounds}, default_delta(n))


def test_a_site_whose_budget_is_spent_refuses_by_itself(with_policy: Callable[..., Site]) -> None:
    """The limit holds over runs, and a round that is asked for again is charged again."""
    limit = spent_by_hand(3) + 1e-3
    site = with_policy(f"max_epsilon: {limit}", "min_noise_multiplier: 1")
    config = asking(**PRIVATE, data__validation_fraction=0)
    for run, server_round in (("one", 1), ("one", 1), ("two", 1)):
        trained(site if run == "one" else next_run(site), task(config, server_round, run=run))
    reason = refused(answer("train", task(config, run="three"), next_run(next_run(site)))).reason
    assert reason.startswith("the site refuses round 1: it would spend epsilon")
    assert f"above its max_epsilon ({limit:g}; {spent_by_hand(3):.3g} is spent)" in reason
    entries = AuditLog(account_folder(site)).read().entries
    assert [entry["run"] for entry in entries] == ["one", "one", "two"]


@pytest.mark.parametrize(
    ("policy", "changes", "reason"),
    [
        ("max_epsilon: 8", {}, "refuses privacy.unit=none"),
        ("privacy: required", {}, "refuses privacy.unit=none"),
        ("privacy: record", {**PRIVATE, "privacy__unit": "client"}, "refuses privacy.unit=client"),
        ("min_noise_multiplier: 3", PRIVATE, "privacy.noise_multiplier=2"),
        (
            "max_epsilon: 8",
            {**PRIVATE, "privacy__noise_multiplier": None, "privacy__target_epsilon": 1.0},
            "privacy.noise_multiplier=null with privacy.unit=record",
        ),
        (
            "privacy: required",
            {**PRIVATE, "evaluation__clients": True},
            "evaluation.clients=true with privacy.unit=record",
        ),
        ("max_epsilon: 8", {**PRIVATE, "privacy__noise_multiplier": 0.0}, "spend epsilon inf"),
    ],
)
def test_a_policy_that_asks_for_privacy_refuses_less(
    policy: str, changes: dict[str, object], reason: str, with_policy: Callable[..., Site]
) -> None:
    site = with_policy(policy)
    assert reason in refused(answer("train", task(asking(**changes)), site)).reason
    if "privacy" in policy or "epsilon" in policy:
        scores = answer("evaluate", task(asking(**PRIVATE)), site)
        assert "refuses to score" in refused(scores).reason
    assert AuditLog(account_folder(site)).read().entries == []


@pytest.mark.parametrize("how", ["edited", "shortened", "lost"])
def test_an_account_that_was_tampered_with_is_refused_until_the_operator_decides(
    how: str, with_policy: Callable[..., Site], tmp_path: Path
) -> None:
    site = with_policy("max_epsilon: 1000")
    site = Site({**site.node_config, "site-dir": str(tmp_path)}, site.run_id, site.node_id)
    config, folder = asking(**PRIVATE), account_folder(site)
    for server_round in (1, 2):
        trained(site, task(config, server_round, run="one"))
    file = AuditLog(folder).files()[0]
    lines = file.read_bytes().splitlines(keepends=True)
    if how == "edited":
        file.write_bytes(
            b"".join(lines).replace(b'"noise_multiplier": 2.0', b'"noise_multiplier": 9.0')
        )
    elif how == "shortened":
        file.write_bytes(lines[0])
        (folder / "head.json").unlink()
    else:
        shutil.rmtree(folder)
    reason = refused(answer("train", task(config, 3, run="one"), site)).reason
    assert reason.startswith("its privacy account was lost or edited; its operator has to decide")
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "privacy-account.json").unlink()
    trained(site, task(config, 3, run="one"))


def test_the_operator_reads_the_account(
    with_policy: Callable[..., Site], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = with_policy("max_epsilon: 20")
    for server_round in (1, 2):
        trained(site, task(asking(**PRIVATE), server_round, run="f00d"))
    node = {**site.node_config, "site-dir": str(tmp_path)}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in node.items())
    (tmp_path / "node.toml").write_text(text)
    assert cli.main(["site", "ledger", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epsilon ")
    assert " of 20, " in first
    assert second.startswith("  run f00d  2 rounds per record, noise 2 x clip: epsilon ")
