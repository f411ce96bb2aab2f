"""Entities and relations extracted from financial texts, scored as in FinGPT's benchmark.

Source: github.com/AI4Finance-Foundation/FinGPT, FinGPT_Benchmark/benchmarks/ner.py and finred.py
(Wang et al. 2023, arXiv 2310.04793). As there, extracted items that do not occur in the text count
neither as correct nor as wrong.
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
    """`match_counts` of entities by position and type; unparsable without any of a valid type.

    Case is ignored. An entity of another type is wrong.
    """
    found = parse_entities(results[0])
    wanted = _placed(row["input"], parse_entities(row["output"]))
    return {
        "entities": match_counts(wanted, _placed(row["input"], found)),
        "unparsable": float(all(kind not in TYPES for _, kind in found)),
    }


def relation_records(dataset: Any) -> Any:
    """The rows that ask for relations; other rows ask to classify one, and their answer is a name.

    Raises:
        DataError: there are none.
    """
    rows = dataset.filter(lambda row: ":" in row["output"])
    if not len(rows):
        raise DataError("finred: no record has 'relation: subject, object' as output.")
    return rows


def finred(row: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """`match_counts` of triples and of relations; unparsable without a triple of a known relation.

    A repeated triple counts once. A relation counts once per triple, and is correct if the text
    has it in any triple.
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
    """Counts of correct, wrong and missed items: [TP, FP, FN]."""
    right = sum(item in wanted for item in found)
    return [right, len(found) - right, sum(item not in found for item in wanted)]


def parse_entities(answer: str) -> list[Entity]:
    """Lower-case entities of an answer's first line, "X is a person, Y is an organization"."""
    parts = (part.strip() for part in _line(answer).lower().split(","))
    matches = (_ENTITY.fullmatch(part) for part in parts)
    return [(match["entity"], match["type"]) for match in matches if match]


def parse_relations(answer: str) -> list[Triple]:
    """Distinct triples of an answer's first line, "relation: subject, object; ...".

    Relations may be spelt as in the data, ``director_/_manager``, or as in the question,
    ``director/manager``. Case is ignored in relations, but not in subject and object.
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
    """Word positions of entities in a text, each at its first unused occurrence."""
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
