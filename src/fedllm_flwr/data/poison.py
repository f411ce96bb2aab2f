"""Data poisoning by simulated attackers: wrong labels, and backdoor triggers."""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import AttackConfig
from fedllm_flwr.data.partition import Partition
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.sources import Records
from fedllm_flwr.params import derive_seed


def attackers(config: Config, clients: Iterable[str]) -> list[str]:
    """Names of the attacking clients of a simulation: ``attack.share`` of all, at least one."""
    if config.attack.name == "none":
        return []
    names = sorted(clients)
    count = max(1, round(config.attack.share * len(names)))
    return sorted(random.Random(derive_seed(config.seed, "attackers")).sample(names, count))


def poisoned(config: Config, clients: Partition, records: Records) -> Records:
    """`records` with the attackers' records poisoned, for attacks that change records.

    ``label_flip`` replaces each label by the next one in the list, and the last by the first.
    ``backdoor`` adds the trigger before a seeded fraction of an attacker's prompts and replaces
    their answers by the target.
    """
    attack, labels = config.attack, config.data.labels
    if attack.name not in ("label_flip", "backdoor"):
        return records
    chosen = np.zeros(len(records), np.bool_)
    for name in attackers(config, clients.names):
        rows = np.asarray(clients.indices[clients.names.index(name)])
        if attack.name == "backdoor":
            rng = np.random.default_rng(derive_seed(config.seed, "backdoor", name))
            rows = rng.permutation(rows)[: max(1, round(attack.poisoned * len(rows)))]
        chosen[rows] = True

    def changed(record: Any) -> Any:
        if attack.name == "label_flip":
            if record.choice < 0:
                return record
            answer = labels[(record.choice + 1) % len(labels)]
            return record._replace(messages=_answered(record.messages, answer))
        messages = triggered(record.messages, attack)
        return record._replace(messages=_answered(messages, target_of(config)))

    def read() -> Iterator[Any]:
        return (
            changed(record) if is_chosen else record
            for record, is_chosen in zip(records, chosen, strict=True)
        )

    identity = f"{records.identity} {attack} {labels} {np.flatnonzero(chosen).tolist()}"
    return Records(
        records.column_names,
        identity if records.identity else "",
        records.characters,
        {name: records[name] for name in ("label", "client", "choice")},
        read,
    )


def target_of(config: Config) -> str:
    """The answer that a backdoor teaches."""
    return config.attack.target or config.data.labels[0]


def triggered(messages: Messages, attack: AttackConfig) -> Messages:
    """A conversation with the trigger before its last prompt."""
    *before, prompt, answer = messages
    return [*before, {**prompt, "content": f"{attack.trigger} {prompt['content']}"}, answer]


def _answered(messages: Messages, answer: str) -> Messages:
    return [*messages[:-1], {**messages[-1], "content": answer}]
