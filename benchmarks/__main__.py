"""Lists the benchmarks, or runs one and prints the machine and versions.

python -m benchmarks
python -m benchmarks NAME [argument ...]
"""

import ast
import importlib.metadata
import os
import platform
import runpy
import sys
from pathlib import Path

LIBRARIES = ("fedllm-flwr", "flwr", "torch", "transformers", "peft", "ray", "numpy")
FILES = {
    path.stem.removeprefix("bench_"): path
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if not path.stem.startswith("__")
}


def main() -> None:
    """Run the benchmark named by the first argument, with the remaining arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in FILES:
        print("usage: python -m benchmarks NAME [argument ...]\n")
        for name, path in FILES.items():
            print(f"  {name:13} {_purpose(path)}")
        sys.exit(sys.argv[1:] != [])
    path = FILES[sys.argv[1]]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} CPUs {platform.machine()}, {platform.system()}, load {load}")
    print(f"Python {platform.python_version()}, {versions}\n", flush=True)
    sys.argv = [str(path), *sys.argv[2:]]
    runpy.run_path(str(path), run_name="__main__")


def _purpose(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


if __name__ == "__main__":
    main()
