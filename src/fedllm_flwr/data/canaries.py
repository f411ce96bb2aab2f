"""Canaries: records with a random code, which are known to the audit of a simulated run.

Each of ``privacy.canaries`` canaries is independently planted with probability one half in the
records of one client (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training
Run"). Every canary has a unique prompt, and its answer is a uniformly random code of fixed length
(Carlini et al. 2019, "The Secret Sharer"), so only training can distinguish planted canaries.
"""

import string
from collections.abc import Iterator
from itertools import chain
from random import Random
from typing import Any, NamedTuple

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.data.kinds import RecordKind
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.sources import Records, texts_of
from fedllm_flwr.params import derive_seed

_LENGTH = 6  # letters of a code: 26^6 = 3 x 10^8 codes


class Canary(NamedTuple):
    """One canary, planted or not."""

    messages: Messages
    planted: bool


def canaries(config: Config) -> list[Canary]:
    """All canaries of a run; the run's seed decides which are planted."""
    coins = np.random.default_rng(derive_seed(config.seed, "canaries", "planted"))
    planted = coins.random(config.privacy.canaries) < 0.5
    return [
        Canary(
            [
                {"role": "user", "content": f"What is the access code of visitor {number}?"},
                {"role": "assistant", "content": code},
            ],
            bool(planted[number]),
        )
        for number, code in enumerate(codes(config, "own", config.privacy.canaries))
    ]


def codes(config: Config, purpose: str, count: int) -> list[str]:
    """`count` random codes, which differ for each purpose."""
    rng = Random(derive_seed(config.seed, "canaries", purpose))
    return ["".join(rng.choices(string.ascii_lowercase, k=_LENGTH)) for _ in range(count)]


def planted(config: Config, kind: RecordKind, records: Records) -> Records:
    """`records` followed by the planted canaries, each at the client of a random record."""
    chosen = [canary.messages for canary in canaries(config) if canary.planted]
    if not chosen:
        return records
    clients = Random(derive_seed(config.seed, "canaries", "clients")).choices(
        records["client"], k=len(chosen)
    )
    rows = [
        kind.record(messages=messages, label="", client=client, choice=-1)
        for messages, client in zip(chosen, clients, strict=True)
    ]

    def read() -> Iterator[Any]:
        return chain(records, rows)

    characters = [sum(map(len, texts_of(row))) for row in rows]
    return Records(
        records.column_names,
        f"{records.identity} {len(rows)} canaries {config.seed}" if records.identity else "",
        np.concatenate([records.characters, np.array(characters, np.int64)]),
        {
            name: [*records[name], *(getattr(row, name) for row in rows)]
            for name in ("label", "client", "choice")
        },
        read,
    )
