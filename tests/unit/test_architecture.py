"""The structure of the package: who may import whom, and what stays lazy."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import fedllm_flwr

PACKAGE = Path(fedllm_flwr.__file__).parent
NAME = PACKAGE.name

# From the bottom up: a module imports from its own layer and from those above it in this list.
LAYERS = (
    ("errors", "environment"),
    ("files", "params"),
    ("factors",),
    ("plugins",),
    ("flower",),
    ("config", "privacy"),
    ("data",),
    ("models",),
    ("training",),
    ("tasks",),
    ("federation",),
    ("evaluation",),
    ("reporting",),
    ("runs",),
    ("deployment",),
    ("client",),
    ("simulation",),
    ("server",),
    ("commands",),
    ("api",),
)
RANKS = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

# Which parts import a library when they are imported, and which only inside functions.
LIBRARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "flwr": (("flower", "federation", "server", "client", "simulation", "deployment"), ()),
    "hydra": (("config",), ("commands",)),
    "omegaconf": (("config", "commands"), ()),
    "torch": (
        ("models", "training", "tasks", "evaluation", "client", "commands"),
        ("data", "reporting"),
    ),
    "transformers": (("models", "training", "tasks", "evaluation", "commands"), ("data", "api")),
    "peft": (("models", "training", "evaluation"), ("api",)),
    "trl": ((), ()),
    "bitsandbytes": (("models",), ("commands",)),
    "datasets": ((), ("data", "evaluation", "runs", "api")),
    "lm_eval": ((), ("evaluation",)),
    "matplotlib": ((), ("reporting",)),
    "ray": (("simulation",), ("commands",)),
    "openai": ((), ("evaluation",)),
    "prometheus_client": ((), ("commands",)),
    "starlette": ((), ("commands",)),
    "uvicorn": ((), ("commands",)),
    "dp_accounting": ((), ("privacy",)),
}


@dataclass(frozen=True)
class Import:
    """One import of an absolute module name; `lazy` if importing the file does not run it."""

    file: Path
    line: int
    module: str
    lazy: bool

    @property
    def part(self) -> str:
        """The module or subpackage of this package that the file belongs to."""
        return part_of(self.file)

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE)}:{self.line} imports {self.module}"


def part_of(file: Path) -> str:
    first, *rest = file.relative_to(PACKAGE).parts
    return first if rest else file.stem


@cache
def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def imports_below(node: ast.AST, file: Path, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, lazy)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}:{child.lineno}: relative import"
            module = child.module or ""
            for alias in child.names:
                # `from fedllm_flwr.data import sources` is an import of fedllm_flwr.data.sources
                name = f"{module}.{alias.name}" if module == NAME else module
                yield Import(file, child.lineno, name, lazy)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from imports_below(child, file, lazy or function or typing_only)


@cache
def all_imports() -> list[Import]:
    return [found for file in files() for found in imports_below(tree_of(file), file, lazy=False)]


def imported_part(found: Import) -> str | None:
    """Part of this package that is imported; None for a library, or for the version."""
    root, *rest = found.module.split(".")
    if root != NAME or not rest or rest[0].startswith("__"):
        return None
    return rest[0]


def test_every_part_has_a_layer() -> None:
    parts = {part_of(file) for file in files()} - {"__init__", "__main__", "assets"}

    assert sorted(parts - set(RANKS)) == []


def test_imports_go_down() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if (target := imported_part(found)) and found.part in RANKS
        if RANKS.get(target, 0) > RANKS[found.part]
    ]

    assert wrong == []


def test_parts_of_one_layer_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        target = imported_part(found)
        if target and target != found.part:
            graph.setdefault(found.part, set()).add(target)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            for target in graph.get(queue.pop(), set()) - seen:
                seen.add(target)
                queue.append(target)
        return seen

    assert [part for part in graph if part in reachable(part)] == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_is_imported_where_it_may_be(library: str) -> None:
    anywhere, lazily = LIBRARIES[library]
    wrong = [
        str(found)
        for found in all_imports()
        if found.module.split(".")[0] == library
        if found.part not in anywhere and not (found.lazy and found.part in lazily)
    ]

    assert wrong == []


def test_checks_see_the_imports_that_are_there() -> None:
    """Without this, a parser that finds nothing would pass."""
    seen = {(found.part, found.module.split(".")[0], found.lazy) for found in all_imports()}

    assert ("config", "hydra", False) in seen
    assert ("federation", "flwr", False) in seen
    assert ("data", "datasets", True) in seen
    assert {imported_part(found) for found in all_imports()} >= {"errors", "params", "config"}


def imported_by(statement: str) -> set[str]:
    """Top-level names that `python -X importtime` lists for a statement."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in lines}


LIGHT = [
    ("client.app", {"torch", "transformers", "peft", "trl", "datasets", "ray", "hydra"}),
    ("federation.strategies", {"torch", "transformers", "peft", "trl", "datasets", "ray", "hydra"}),
    ("federation.wire", {"torch", "transformers", "datasets", "ray", "hydra"}),
    ("config.compose", {"torch", "transformers", "datasets", "ray", "flwr", "numpy"}),
    ("config.parsing", {"torch", "transformers", "datasets", "ray", "flwr", "numpy", "hydra"}),
    ("commands.main", {"torch", "transformers", "datasets", "ray"}),
    ("evaluation.judging.open_ended", {"torch", "transformers", "datasets", "ray", "openai"}),
    ("evaluation.judging.endpoint", {"torch", "transformers", "datasets", "ray", "openai"}),
]


@pytest.mark.parametrize(("module", "heavy"), LIGHT)
def test_import_is_light(module: str, heavy: set[str]) -> None:
    path = PACKAGE.joinpath(*module.split("."))
    if not path.is_dir() and not path.with_suffix(".py").is_file():
        pytest.skip(f"{module} is not there yet")

    imported = imported_by(f"import {NAME}.{module}")

    assert NAME in imported
    assert sorted(imported & heavy) == []


PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")


def test_non_public_names_of_flower_are_used_in_one_place() -> None:
    """Imported names, and names in texts, outside Flower's public packages: `flower` finds them."""
    used = set()
    for file in files():
        if part_of(file) == "flower":
            continue
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                used |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used |= {node.value} if re.fullmatch(r"flwr(\.\w+)+", node.value) else set()
    public = re.compile(rf"({'|'.join(map(re.escape, PUBLIC_FLOWER))})(\.strategy)?\.\w+")
    private = {name for name in used if name.split(".")[0] == "flwr" and not public.fullmatch(name)}
    assert private == set()
