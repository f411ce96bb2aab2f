"""Entities and relations that a model finds in financial texts, scored as FinGPT's benchmark does.

Source: github.com/AI4Finance-Foundation/FinGPT, FinGPT_Benchmark/benchmarks/ner.py and finred.py
(Wang et al. 2023, arXiv 2310.04793). As there, what an answer names but its text does not hold
counts neither as right nor as wrong.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fedllm_flwr.errors import DataError

TYPES = ("person", "organization", "location")
RELATIONS = frozenset(
    {
        *("product/material produced", "manufacturer", "distributed by", "industry"),
        *("position held", "original broadcaster", "owned by", "founded by"),
        *("distribution format", "headquarters location", "stock exchange", "currency"),
        *("parent organization", "chief executive officer", "director/manager", "owner of"),
        *("operator", "member of", "employer", "chairperson", "platform", "subsidiary"),
        *("legal form", "publisher", "developer", "brand", "business division"),
        *("location of formation", "creator"),
    }
)
_ENTITY = re.compile(r"(?P<entity>.*\S)\s+is\s+an?\s+(?P<type>\S.*)")
_TRIPLE = re.compile(r"(?P<relation>.*):(?P<subject>.*),(?P<object>.*)")

Entity = tuple[str, str]  # text, type
Triple = tuple[str, str, str]  # relation, subject, object


def ner(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """`match_counts` of entities by place and type; unparsable: none of a type that was asked for.

    Upper and lower case are the same. An entity of another type is wrong.
    """
    found = parse_entities(results[0])
    wanted = _placed(row["input"], parse_entities(row["output"]))
    return {
        "entities": match_counts(wanted, _placed(row["input"], found)),
        "unparsable": float(all(kind not in TYPES for _, kind in found)),
    }


def relation_records(dataset: Any) -> Any:
    """The rows that ask for relations; those that ask to classify one have a name as answer.

    Raises:
        DataError: there are none.
    """
    rows = dataset.filter(lambda row: ":" in row["output"])
    if not len(rows):
        raise DataError("finred: no record has 'relation: subject, object' as output.")
    return rows


def finred(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """`match_counts` of triples, and of their relations; unparsable: no triple of a known relation.

    A triple that is written twice counts once. A relation that several triples have counts once for
    each, and is right wherever the text has it.
    """
    found = parse_relations(results[0])
    wanted_here, found_here = (
        [triple for triple in some if triple[1] in row["input"] and triple[2] in row["input"]]
        for some in (parse_relations(row["output"]), found)
    )
    return {
        "triples": match_counts(wanted_here, found_here),
        "relations": match_counts([t[0] for t in wanted_here], [t[0] for t in found_here]),
        "unparsable": float(not found),
    }


def match_counts(wanted: Collection[Any], found: Collection[Any]) -> list[int]:
    """Right and wrong ones of the items found, and those missed: [TP, FP, FN]."""
    right = sum(item in wanted for item in found)
    return [right, len(found) - right, sum(item not in found for item in wanted)]


def parse_entities(answer: str) -> list[Entity]:
    """Entities of an answer's first line, "X is a person, Y is an organization", in lower case."""
    parts = (part.strip() for part in _line(answer).lower().split(","))
    matches = (_ENTITY.fullmatch(part) for part in parts)
    return [(match["entity"], match["type"]) for match in matches if match]


def parse_relations(answer: str) -> list[Triple]:
    """Distinct triples of an answer's first line, "relation: subject, object; ...".

    A relation may be spelt as the data have it, ``director_/_manager``, or as the question has it,
    ``director/manager``; case does not matter in it, but does in subject and object.
    """
    matches = (_TRIPLE.fullmatch(part) for part in _line(answer).split(";"))
    triples = (
        (_relation(match["relation"]), match["subject"].strip(), match["object"].strip())
        for match in matches
        if match
    )
    return [triple for triple in dict.fromkeys(triples) if triple[0] in RELATIONS and all(triple)]


def _line(answer: str) -> str:
    return answer.strip().partition("\n")[0].rstrip(" .")


def _relation(name: str) -> str:
    words = " ".join(name.lower().replace("_", " ").split())
    return words.replace(" / ", "/").replace("product or material", "product/material")


def _placed(text: str, entities: Iterable[Entity]) -> set[tuple[range, str]]:
    """Positions of entities in a text, in words: each at its first free place."""
    words = text.lower().split()
    placed: dict[range, str] = {}
    for entity, kind in entities:
        size = len(entity.split())
        for start in range(len(words) - size + 1):
            place = range(start, start + size)
            free = all(set(place).isdisjoint(other) for other in placed)
            if free and words[start : place.stop] == entity.split():
                placed[place] = kind
                break
    return set(placed.items())
