"""What all benchmarks and tools keep to: they are run as modules, and share code through the harness alone."""

import ast
import importlib
import runpy
import sys

import pytest

from glm_utils.family import PROJECT_DIR

SCRIPTS = sorted(path.stem for path in (PROJECT_DIR / "benchmarks").glob("*.py") if path.stem != "__init__")
HARNESS = sorted((PROJECT_DIR / "benchmarks" / "harness").glob("*.py"))
TOOLS = sorted((PROJECT_DIR / "tools").glob("*.py"))
ALL_FILES = [PROJECT_DIR / "benchmarks" / f"{name}.py" for name in SCRIPTS] + HARNESS + TOOLS


def imported(tree):
    """Return the absolute name of everything that a syntax tree imports, inside functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def faults(source):
    """Return the imports of a benchmark, and what touches sys.path, in a source text."""
    tree = ast.parse(source)
    refused = {*SCRIPTS, *(f"benchmarks.{name}" for name in SCRIPTS), "sys.path"}
    found = [name for name in imported(tree) if refused & {name.split(".")[0], ".".join(name.split(".")[:2])}]
    return found + [
        ast.unparse(node) for node in ast.walk(tree) if ast.unparse(node) in ("sys.path", "site.addsitedir")
    ]


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: path.relative_to(PROJECT_DIR).as_posix())
def test_no_file_imports_a_benchmark_or_touches_the_search_path(path):
    assert faults(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import benchmarks.bench_decode",
        "from benchmarks import bench_decode",
        "from benchmarks.bench_decode import CASES",
        "def late():\n    from bench_decode import CASES",
        "import sys\nsys.path.insert(0, '..')",
        "from sys import path",
    ],
)
def test_faults_are_found(line):
    assert faults(line)


def test_the_harness_is_not_run():
    for path in HARNESS:
        assert "if __name__" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_says_how_it_is_run(name):
    """Its first command is the module's; its name is the function's that run_cli gets."""
    module = importlib.import_module(f"benchmarks.{name}")
    assert f"    python -m benchmarks.{name}" in module.__doc__
    assert callable(getattr(module, name))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, monkeypatch):
    """As with python -m, in this process."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert stopped.value.code == 0
