"""Every attack in docs/security.md is tried by a test that exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "security.md"
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| `(\S+?\.py)::(test_\w+)(?:\[(.+)\])?` \|$")
PARTIES = {"server", "site", "outsider", "local user", "generated program"}


def rows() -> list[tuple[str, ...]]:
    """Who, what, what happens, file, test and case of each attack."""
    text = PAGE.read_text("utf-8")
    table = text[text.index("| who | tries to |") :].split("\n\n")[0].splitlines()[2:]
    matches = [ROW.match(line) for line in table]
    assert None not in matches, table[matches.index(None)]
    return [match.groups(default="") for match in matches if match]


def test_there_are_attacks_by_everybody() -> None:
    found = rows()
    assert len(found) >= 40
    assert {who for who, *_ in found} == PARTIES
    assert len({(who, attack) for who, attack, *_ in found}) == len(found)


def test_each_names_a_test_that_exists() -> None:
    """A function of the module that pytest collects, and a case that stands in its file."""
    missing = []
    for _, attack, _, file, name, case in rows():
        text = (TESTS / file).read_text("utf-8")
        functions = {
            node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
        }
        if name not in functions or case not in text:
            missing.append(f"{attack}: {file}::{name}")
    assert missing == []
