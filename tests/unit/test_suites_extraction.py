"""Entities and relations in answers, against counts by hand."""

import pytest
from datasets import Dataset

from fedllm_flwr.errors import DataError
from fedllm_flwr.evaluation.suites.statistics import estimate
from fedllm_flwr.evaluation.suites.tasks.extraction import (
    RELATIONS,
    finred,
    match_counts,
    ner,
    parse_entities,
    parse_relations,
    relation_records,
)

LOAN = {
    "input": "Silicon Valley Bank lends to Ann Lee , and Bank may assign to Bank of Iowa .",
    "output": "Silicon Valley Bank is an organization, Ann Lee is a person, Iowa is a location.",
}
NEWS = {
    "input": "Acme Corp. of Jane Doe makes nails and screws.",
    "output": "product_or_material_produced: Acme Corp, nails; "
    "product_or_material_produced: Acme Corp, screws; director_/_manager: Acme Corp, Jane Doe",
}


@pytest.mark.parametrize(
    ("answer", "entities"),
    [
        (
            "Ann is a person, Acme is an organization.",
            [("ann", "person"), ("acme", "organization")],
        ),
        ("  ANN  is a Person ,\nAcme is an organization", [("ann", "person")]),
        ("Ann is a person,Ann is a person", [("ann", "person")] * 2),
        ("Ann is a bird", [("ann", "bird")]),
        ("Ann, a person", []),
        ("is a person", []),
        ("", []),
    ],
)
def test_entities_in_answers(answer: str, entities: list[tuple[str, str]]) -> None:
    assert parse_entities(answer) == entities


@pytest.mark.parametrize(
    ("answer", "counts", "unparsable"),
    [
        (LOAN["output"], [3, 0, 0], 0),
        ("ann lee is a person", [1, 0, 2], 0),
        ("Ann Lee is a location, Iowa is a location", [1, 1, 2], 0),
        ("Ann Lee is a person, Ann Lee is a person", [1, 0, 2], 0),
        ("Bank is an organization, Bank is an organization", [0, 2, 3], 0),
        ("Bob is a person, Iowa is a location", [1, 0, 2], 0),
        ("Iowa is a state", [0, 1, 3], 1),
        ("I cannot tell", [0, 0, 3], 1),
        ("", [0, 0, 3], 1),
    ],
)
def test_entities_are_right_wrong_or_missed(
    answer: str, counts: list[int], unparsable: int
) -> None:
    assert ner(LOAN, [answer]) == {"entities": counts, "unparsable": unparsable}


@pytest.mark.parametrize(
    ("answer", "triples"),
    [
        ("brand: a b, c.", [("brand", "a b", "c")]),
        (" Brand :a,b ;OWNED_BY: c ,d", [("brand", "a", "b"), ("owned by", "c", "d")]),
        ("brand: a, b; brand: a, b", [("brand", "a", "b")]),
        ("product/material produced: a, b", [("product/material produced", "a", "b")]),
        ("brand: a, Inc., b", [("brand", "a, Inc.", "b")]),
        ("friend: a, b; brand: a; brand: , b", []),
        ("nothing here", []),
        ("", []),
    ],
)
def test_relations_in_answers(answer: str, triples: list[tuple[str, str, str]]) -> None:
    assert parse_relations(answer) == triples


def test_both_spellings_of_every_relation_are_known() -> None:
    spelt = {name.replace("product/", "product_or_").replace("/", "_/_") for name in RELATIONS}
    answer = "; ".join(f"{name.replace(' ', '_')}: a, b" for name in spelt)

    assert len(RELATIONS) == 29
    assert {relation for relation, _, _ in parse_relations(answer)} == RELATIONS


@pytest.mark.parametrize(
    ("answer", "triples", "relations", "unparsable"),
    [
        (NEWS["output"], [3, 0, 0], [3, 0, 0], 0),
        # the relation is right though the triple is not, and of two with it none is missed
        ("product/material produced: nails, screws", [0, 1, 3], [1, 0, 1], 0),
        (
            "director/manager: Acme Corp, Jane Doe" + "; brand: nails, screws" * 2,
            [1, 1, 2],
            [1, 1, 2],
            0,
        ),
        ("director/manager: Acme Corp, John", [0, 0, 3], [0, 0, 3], 0),
        ("director/manager: acme corp, Jane Doe", [0, 0, 3], [0, 0, 3], 0),
        ("Jane Doe leads it", [0, 0, 3], [0, 0, 3], 1),
    ],
)
def test_relations_are_right_wrong_or_missed(
    answer: str, triples: list[int], relations: list[int], unparsable: int
) -> None:
    found = finred(NEWS, [answer])
    assert found == {"triples": triples, "relations": relations, "unparsable": unparsable}


def test_f1_over_a_corpus_by_hand() -> None:
    """Right 3 + 1 + 0, wrong 0 + 1 + 0, missed 0 + 2 + 3: F1 2 * 4 / (8 + 1 + 5)."""
    answers = (LOAN["output"], "Ann Lee is a location, Iowa is a location", "none")
    counts = [ner(LOAN, [answer])["entities"] for answer in answers]

    assert estimate("set_precision", counts, "x").value == pytest.approx(4 / 5)
    assert estimate("set_recall", counts, "x").value == pytest.approx(4 / 9)
    assert estimate("set_f1", counts, "x").value == pytest.approx(8 / 14)


def test_counts_of_lists() -> None:
    assert match_counts("aab", "acc") == [1, 2, 1]


def test_only_records_that_ask_for_relations() -> None:
    rows = [{"instruction": "?", "input": "", "output": text} for text in ("brand: a, b", "brand")]

    assert relation_records(Dataset.from_list(rows))["output"][:] == ["brand: a, b"]
    with pytest.raises(DataError, match="no record has 'relation: subject, object'"):
        relation_records(Dataset.from_list(rows[1:]))
