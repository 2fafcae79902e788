"""The rules of the house: imports point one way, no cycles, no training stack behind `import pixelprune`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "pixelprune": set(),
    "training": {"pixelprune"},
    "data_tools": {"pixelprune"},
    "launch": {"training", "pixelprune", "data_tools"},
}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its start or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from package import module` leans on the module, `from package import name` on the package's __init__.
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module or "" for name in below]
        found |= {name for name in names if name in MODULES}
    return found


def test_imports_point_one_way():
    for path in FILES:
        package = path.relative_to(ROOT).parts[0]
        for name in imports_of(path):
            other = name.split(".")[0]
            assert other == package or other in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


def test_there_are_no_import_cycles_not_even_by_late_imports():
    graph = {module_of(path): imports_of(path) - {module_of(path)} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", ["pixelprune", "pixelprune.pack", "pixelprune.images.image", "pixelprune.codec"])
def test_pixelprune_imports_without_the_training_stack(module):
    blocked = ["deepspeed", "datasets", "wandb", "omegaconf", "peft", "pyarrow"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_environment_is_read_in_launch_only():
    pattern = re.compile(r"os\.environ|os\.getenv|from os import environ")
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "launch":
            assert not pattern.search(path.read_text()), path.relative_to(ROOT)


def lengths(path: Path) -> dict[str, int]:
    """Lines of a file ("") and of each function in it."""
    text = path.read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {"": len(text.splitlines())} | {
        f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions
    }


def test_no_function_and_no_file_is_too_long_to_read():
    for path in FILES:
        assert path.name != "utils.py", "a file is named by its noun"
        for name, length in lengths(path).items():
            # numba's cache on disk does not see changes in other files: all kernels stay in one, or stale code would
            # run.
            limit = 80 if name else 450 if path.name == "kernels.py" else 400
            assert length <= limit, f"{path.relative_to(ROOT)}: {name} has {length} lines"


def test_no_folder_is_a_hall():
    count = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): number for folder, number in count.items() if number > 16} == {}


def test_one_file_sets_up_consoles():
    owners = {str(path.relative_to(ROOT)) for path in FILES if re.search(r"\bConsole\(", path.read_text())}
    assert owners == {"pixelprune/command/console.py"}, "text in [brackets] gets lost on others"


def test_one_file_knows_how_a_file_appears_whole():
    pattern = re.compile(r"os\.fsync|\.partial\b|\{PARTIAL\}")
    owners = {str(path.relative_to(ROOT)) for path in FILES if pattern.search(path.read_text())}
    # Two ask what a killed run left: one before it writes to the folder, one to remove it. One times the disk.
    asking = {"data_tools/render/output.py", "training/loop/teacher_cache.py", "training/diagnosis/machine.py"}
    assert owners == {"pixelprune/files.py", *asking}
