"""Print the size and the shape of the package: a report to read, not a limit to keep.

    python -m scripts.measure_code [ROOT]

A private function counts as called once if its name occurs in one other place of the package and is
called there; an entry of a table, or a callback, is counted separately.
"""

import argparse
import ast
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PACKAGE = Path(__file__).parents[1] / "src" / "fedllm_flwr"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Sized:
    """A file or a function and its number of lines."""

    name: str
    lines: int


def functions_of(file: Path, root: Path) -> list[tuple[str, Sized]]:
    """Plain name and size of each function in a file."""
    tree = ast.parse(file.read_text("utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, Function))
    return [
        (
            node.name,
            Sized(
                f"{file.relative_to(root)}:{node.lineno} {node.name}",
                (node.end_lineno or node.lineno) - node.lineno + 1,
            ),
        )
        for node in found
    ]


def import_depth(files: list[Path], root: Path) -> int:
    """Modules on the longest chain of imports within the package, circles cut."""
    names = {module_name(file, root): file for file in files}
    graph = {name: imported(file, set(names)) - {name} for name, file in names.items()}
    depths: dict[str, int] = {}

    def depth(name: str, above: frozenset[str]) -> int:
        if name not in depths:
            below = graph[name] - above
            depths[name] = 1 + max((depth(n, above | {name}) for n in below), default=0)
        return depths[name]

    return max(depth(name, frozenset()) for name in graph)


def types_of_one_name(texts: dict[Path, str], root: Path) -> dict[str, list[str]]:
    """Files by the name of a class or a type alias that more than one file defines."""
    found: dict[str, list[str]] = defaultdict(list)
    for file, text in texts.items():
        tree = ast.parse(text)
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                names |= {name} if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) else set()
        for name in names:
            found[name].append(str(file.relative_to(root)))
    return {name: sorted(paths) for name, paths in found.items() if len(paths) > 1}


def module_name(file: Path, root: Path) -> str:
    """Dotted name of a file's module."""
    parts = [root.name, *file.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & known) or {node.module or ""}
    return found & known


def report(root: Path) -> None:
    """Print the tables."""
    files = sorted(root.rglob("*.py"))
    texts = {file: file.read_text("utf-8") for file in files}
    lengths = [Sized(str(f.relative_to(root)), len(t.splitlines())) for f, t in texts.items()]
    functions = [pair for file in files for pair in functions_of(file, root)]
    words = Counter(word for text in texts.values() for word in re.findall(r"\w+", text))
    calls = Counter(
        name for text in texts.values() for name in re.findall(r"(?<!def )\b(\w+)\(", text)
    )
    used_once = [
        name
        for name, _ in functions
        if name.startswith("_") and not name.startswith("__") and words[name] == 2
    ]
    single = [name for name in used_once if calls[name]]
    basenames: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if file.stem not in ("__init__", "__main__"):
            basenames[file.name].append(str(file.relative_to(root)))
    shared = {name: paths for name, paths in basenames.items() if len(paths) > 1}
    top = [
        path.stem
        for path in sorted(root.iterdir())
        if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))
    ]
    parts = [name for name in top if not name.startswith("__")]
    sizes = [sized.lines for _, sized in functions]
    print(f"lines                            {sum(sized.lines for sized in lengths):,}")
    print(f"files                            {len(files)}")
    print(f"parts at the top                 {len(parts)}")
    print(f"import depth                     {import_depth(files, root)}")
    print(f"functions                        {len(functions)}, median {median(sizes):g} lines")
    print(f"private functions called once    {len(single)} ({len(single) / len(functions):.1%})")
    print(f"  entries of tables, callbacks   {len(used_once) - len(single)}")
    print(f"files that share a basename      {sum(len(p) for p in shared.values())}")
    for name, paths in sorted(shared.items()):
        print(f"    {name}: {', '.join(paths)}")
    repeated = types_of_one_name(texts, root)
    print(f"types that share a name          {sum(len(p) for p in repeated.values())}")
    for name, paths in sorted(repeated.items()):
        print(f"    {name}: {', '.join(paths)}")
    for title, sizes_of in (("files", lengths), ("functions", [sized for _, sized in functions])):
        print(f"longest {title}")
        for sized in sorted(sizes_of, key=lambda sized: -sized.lines)[:10]:
            print(f"    {sized.lines:4} {sized.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=PACKAGE, help="a package's folder")
    report(parser.parse_args().root.resolve())
