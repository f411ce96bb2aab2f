"""A client's examples: its part of the run's data in simulation, its own file at a site."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.config import Config, changed
from fedllm_flwr.config.schema import ColumnsConfig, DataConfig
from fedllm_flwr.data import client_data as client
from fedllm_flwr.data import record_files
from fedllm_flwr.data.client_data import ClientData, SimulatedData
from fedllm_flwr.data.federated import FederatedData
from fedllm_flwr.data.overlap import overlap
from fedllm_flwr.data.partition import Partition, describe
from fedllm_flwr.data.sources import records_digest
from fedllm_flwr.data.templates import Tokenizer
from fedllm_flwr.data.token_cache import Codec
from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks import find, names
from fedllm_flwr.tasks.dpo.pairs import EncodedPairs
from toys import byte_tokenizer

TOKENIZER = byte_tokenizer()
KINDS = {name: find(name).records for name in names()}


def divided_data(config: Config) -> tuple[FederatedData, Partition]:
    return client.divided_data(config, KINDS[config.task.name])


def simulated_data(config: Config, tokenizer: Tokenizer) -> SimulatedData:
    return client.simulated_data(config, KINDS[config.task.name], tokenizer)


def simulated_client(config: Config, tokenizer: Tokenizer, index: int) -> ClientData:
    return client.simulated_client(config, KINDS[config.task.name], tokenizer, index)


def site_client(config: Config, tokenizer: Tokenizer, name: str) -> ClientData:
    return client.site_client(config, KINDS[config.task.name], tokenizer, name)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An own disk cache, and nothing in memory."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget() -> None:
    for kept in (client._divided, client._simulated, client._site):
        kept.cache_clear()


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of records of each encoding that is made."""
    counts: list[int] = []
    for task, kind in KINDS.items():
        monkeypatch.setitem(KINDS, task, replace(kind, codec=_counting(kind.codec, counts)))
    return counts


def _counting(codec: Codec[Any], counts: list[int]) -> Codec[Any]:
    def encode(records: Any, *options: Any) -> Any:
        counts.append(len(records))
        return codec.encode(records, *options)

    return replace(codec, encode=encode)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """A configuration of `records` records among `clients` clients."""

    def make_config(records: int, clients: int, evaluate: bool = False) -> Config:
        path = tmp_path / f"{records}.jsonl"
        lines = [json.dumps({"instruction": f"q{i}", "output": f"a{i}"}) for i in range(records)]
        path.write_text("\n".join(lines))
        columns = ColumnsConfig(input=None)
        data = DataConfig(path=str(path), columns=columns, validation_fraction=0.2)
        config = Config(data=data, seed=3)
        return changed(
            config,
            evaluation={"central": False, "clients": evaluate},
            federation={"num_clients": clients},
        )

    return make_config


def texts(examples: Any) -> list[str]:
    return [TOKENIZER.decode(examples[i][0]) for i in range(len(examples))]


def whole(data: ClientData) -> list[str]:
    return texts(data.train) + texts(data.held_out)


def test_clients_are_disjoint_and_cover_the_data(make: Callable[..., Config]) -> None:
    config = make(100, 7)
    clients = [simulated_client(config, TOKENIZER, i) for i in range(7)]
    everything = [text for data in clients for text in whole(data)]
    training = texts(simulated_data(config, TOKENIZER).encoded)

    assert len({data.name for data in clients}) == 7
    assert all(len(data.train) > 0 for data in clients)
    assert len(everything) == len(set(everything))
    assert sorted(everything) == sorted(training)


@pytest.mark.parametrize("evaluate", [False, True])
def test_the_server_knows_how_many_examples_each_client_has(
    evaluate: bool, make: Callable[..., Config]
) -> None:
    config = make(41, 8, evaluate=evaluate)
    clients = [simulated_client(config, TOKENIZER, i) for i in range(8)]
    sizes = client.client_sizes(config, simulated_data(config, TOKENIZER))
    assert list(sizes.items()) == [(data.name, len(data.train)) for data in clients]


def test_the_held_out_part_is_seeded_and_disjoint(make: Callable[..., Config]) -> None:
    config = make(100, 4, evaluate=True)
    for i in range(4):
        data, again = (simulated_client(config, TOKENIZER, i) for _ in range(2))
        together = simulated_client(replace(config, evaluation=Config().evaluation), TOKENIZER, i)
        assert whole(data) == whole(again)
        assert len(data.held_out) == round(0.2 * len(whole(data)))
        assert sorted(whole(data)) == sorted(texts(together.train))
        assert len(together.held_out) == 0
    first = [simulated_client(config, TOKENIZER, 0).held_out.source.tolist()]
    other = make(100, 4, evaluate=True)
    other = replace(other, seed=4)
    assert simulated_client(other, TOKENIZER, 0).held_out.source.tolist() != first[0]


def test_a_client_with_two_records_holds_one_back(make: Callable[..., Config]) -> None:
    data = site_client(make(2, 1, evaluate=True), TOKENIZER, "site")
    assert (len(data.train), len(data.held_out)) == (1, 1)


def test_records_left_out_in_encoding_leave_the_others_in_place(
    make: Callable[..., Config],
) -> None:
    """With truncation=drop a long record vanishes from its client and from no other."""
    config = make(40, 4)
    path = Path(str(config.data.path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[5]["output"] = rows[6]["output"] = "long " * 200
    path.write_text("\n".join(map(json.dumps, rows)))
    config = changed(config, data={"truncation": "drop", "validation_fraction": 0.05})

    parts = simulated_data(config, TOKENIZER).partition.indices
    sources = [simulated_client(config, TOKENIZER, i).train.source for i in range(4)]
    encoded = simulated_data(config, TOKENIZER).encoded
    assert len(parts) == 4
    for part, source in zip(parts, sources, strict=True):
        kept = sorted(set(np.asarray(part).tolist()) & set(encoded.source.tolist()))
        assert source.tolist() == kept
    assert sum(map(len, sources)) == len(encoded) < sum(map(len, parts))


def test_clients_of_whom_nothing_is_left_are_refused(make: Callable[..., Config]) -> None:
    """One whose records are all too long is named; so is a site, and a length that fits none."""
    config = make(40, 4)
    config = changed(config, data={"truncation": "drop", "validation_fraction": 0.0})
    client.require_clients_examples(config, simulated_data(config, TOKENIZER))
    path = Path(str(config.data.path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i in divided_data(config)[1].indices[2]:
        rows[i]["output"] = "long " * 200
    path.write_text("\n".join(map(json.dumps, rows)))
    forget()
    data = simulated_data(config, TOKENIZER)
    with pytest.raises(DataError) as caught:
        client.require_clients_examples(config, data)
    assert str(caught.value).startswith(
        f"training.max_length={config.training.max_length} with data.truncation=drop leaves no "
        "example of client-2; "
    )
    dropping = changed(config, partition={"on_empty": "drop"})
    data = simulated_data(dropping, TOKENIZER)
    client.require_clients_examples(dropping, data)
    assert data.left_out == ("client-2",)
    assert [*client.client_sizes(dropping, data)] == ["client-0", "client-1", "client-3"]
    assert simulated_client(dropping, TOKENIZER, 2).name == "client-3"
    config = changed(config, training={"max_length": 3})
    with pytest.raises(DataError, match="leaves no example of any client"):
        client.require_clients_examples(config, simulated_data(config, TOKENIZER))
    with pytest.raises(DataError, match="leaves no example of st-marys"):
        site_client(config, TOKENIZER, "st-marys")


def test_records_are_tokenised_once(make: Callable[..., Config], encodings: list[int]) -> None:
    """Neither other clients and rounds nor, thanks to the disk, other processes repeat it."""
    config = make(50, 5)
    for i in range(5):
        simulated_client(config, TOKENIZER, i)
    assert len(encodings) == 1
    forget()
    simulated_client(config, TOKENIZER, 0)
    simulated_client(replace(config, seed=3, lora=Config().lora), TOKENIZER, 1)
    assert len(encodings) == 1
    config = changed(config, training={"max_length": 40})
    simulated_client(config, TOKENIZER, 0)
    assert len(encodings) == 2


def test_a_second_start_reads_no_record(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in simulation, whose digest and overlap are known as well, and not at a site."""

    def read_all(config: Config) -> list[Any]:
        data = simulated_data(config, TOKENIZER)
        clients = [whole(simulated_client(config, TOKENIZER, i)) for i in range(3)]
        found = overlap(data.source.train, data.source.eval)
        digests = [records_digest(records) for records in (data.source.train, data.source.eval)]
        described = describe(data.partition, data.source.train)
        site = whole(site_client(config, TOKENIZER, "st-marys"))
        return [clients, found, digests, described, data.source.eval["messages"], site]

    config = make(40, 3)
    first = read_all(config)
    forget()
    monkeypatch.setattr(record_files, "_opened", None)
    assert read_all(config) == first


def test_a_site_tokenises_its_file_once(make: Callable[..., Config], encodings: list[int]) -> None:
    config = make(30, 1)
    first = site_client(config, TOKENIZER, "st-marys")
    forget()
    second = site_client(config, TOKENIZER, "st-marys")
    assert encodings == [30]
    assert first.name == "st-marys"
    assert len(first.train) == 30
    assert whole(first) == whole(second)


def test_preference_pairs_go_the_same_way(
    make: Callable[..., Config], encodings: list[int]
) -> None:
    """Divided, held out and cached as pairs; the task is part of what is remembered."""
    config = make(60, 3, evaluate=True)
    rows = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(60)]
    Path(str(config.data.path)).write_text("\n".join(map(json.dumps, rows)))
    config = changed(config, task={"name": "dpo"})
    clients = [simulated_client(config, TOKENIZER, i) for i in range(3)]

    seen = []
    for data in clients:
        assert len(data.held_out) == round(0.2 * (len(data.train) + len(data.held_out)))
        for part in (data.train, data.held_out):
            assert isinstance(part, EncodedPairs)
            for (chosen, better), (rejected, worse) in (part[i] for i in range(len(part))):
                answers = TOKENIZER.decode(chosen[better]), TOKENIZER.decode(rejected[worse])
                number = answers[0][2:].removesuffix("</s>")
                assert answers == (f" a{number}</s>", f" b{number}</s>")
                assert f"q{number} " in TOKENIZER.decode(chosen[~better])
                seen.append(number)
    assert len(set(seen)) == len(seen) == len(divided_data(config)[0].train)
    forget()
    again = simulated_client(config, TOKENIZER, 1)
    np.testing.assert_array_equal(again.train.tokens, clients[1].train.tokens)
    assert len(encodings) == 1
    with pytest.raises(DataError, match="use task=dpo"):
        simulated_client(replace(config, task=Config().task), TOKENIZER, 1)


def test_more_nodes_than_clients(make: Callable[..., Config]) -> None:
    with pytest.raises(DataError, match=r"make 3 clients.*num-supernodes=3"):
        simulated_client(make(30, 3), TOKENIZER, 3)


def test_a_thousand_clients_are_cheap(make: Callable[..., Config]) -> None:
    config = make(3000, 1000)
    simulated_client(config, TOKENIZER, 0)
    started = time.process_time()
    sizes = [len(simulated_client(config, TOKENIZER, i).train) for i in range(1000)]
    assert time.process_time() - started < 3.0  # measured: 0.5 s
    assert sum(sizes) == len(simulated_data(config, TOKENIZER).encoded)
