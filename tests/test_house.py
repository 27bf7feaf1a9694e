"""The house keeps the laws of docs/development.md: rooms, ceilings, tables of contents; the papers agree."""

import ast
import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import PROJECT_DIR

ROOMS = {  # what each may stand on
    "training": set(),
    "merging": set(),
    "export": {"merging"},
    "inference": set(),
    "evaluation": {"inference"},
}
FLOOR_FOLDERS = {"data", "model_files"}  # parts of the shared floor, which every room may use
MAX_SCRIPT_LINES, MAX_UTILS_LINES, MAX_REMOTE_LINES, MAX_FUNCTION_LINES = 150, 260, 800, 60
MAX_README_CHARACTERS = 12_000
LOCK_NAME = "requirements-linux-cuda.lock"
CUDA_PREFIXES = ("cuda-", "nvidia-", "triton")  # what torch's CUDA build brings along
SCRIPTS = sorted(PROJECT_DIR.glob("*.py"))
SOURCES = sorted([*PROJECT_DIR.glob("glm_utils/**/*.py"), *PROJECT_DIR.glob("remote_scripts/*/*.py")])
DEVELOPMENT = "docs/development.md"


def text_of(name):
    """Read a file of the project."""
    return (PROJECT_DIR / name).read_text("utf-8")


def name_of(path):
    """Return a path as it is written in the texts."""
    return path.relative_to(PROJECT_DIR).as_posix()


def functions_of(path):
    """Return all functions of a file, nested ones too."""
    tree = ast.parse(path.read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def num_head_lines(function):
    """Return the lines of a function's signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[0].lineno if body else function.end_lineno + 1) - function.lineno


def stage_function(path):
    """Return the function that a stage script passes to run_cli."""
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    stage = next(call.args[0].id for call in calls if ast.unparse(call.func) == "run_cli")
    return next(function for function in functions_of(path) if function.name == stage)


def room_of(module):
    """Return the stage folder that a dotted module name lies in, None for any other module."""
    parts = module.split(".")
    return parts[1] if parts[0] == "glm_utils" and len(parts) > 1 and parts[1] in ROOMS else None


def rooms_imported(path):
    """Return the stage folders that a file imports from, imports inside functions included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (room_of(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (room_of(alias.name) for alias in node.names)


def room_faults(root):
    """Return (file, room) of every import into a stage folder that the importing file may not use."""
    faults = []
    for path in sorted(root.glob("glm_utils/**/*.py")):
        own = room_of(".".join(path.relative_to(root).parts))
        allowed = {None, own} | ROOMS.get(own, set())
        faults += [(path.relative_to(root).as_posix(), room) for room in rooms_imported(path) if room not in allowed]
    return faults


# ---- rooms


def test_rooms_keep_apart():
    """The floor imports no stage folder, and stage folders import each other only as ROOMS says."""
    assert room_faults(PROJECT_DIR) == []


def test_every_folder_of_glm_utils_is_a_room_or_of_the_floor():
    assert {path.parent.name for path in PROJECT_DIR.glob("glm_utils/*/*.py")} == set(ROOMS) | FLOOR_FOLDERS


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("glm_utils/data/read.py", "from glm_utils.training.trainer import make_trainer"),
        ("glm_utils/data/read.py", "from glm_utils import training"),
        ("glm_utils/data/read.py", "def late():\n    import glm_utils.training.trainer"),
        ("glm_utils/training/trainer.py", "from glm_utils.merging import merge"),
        ("glm_utils/merging/merge.py", "from glm_utils.export import EXPORTS"),
        ("glm_utils/inference/chat.py", "from glm_utils.training.settings import TrainingSettings"),
        ("glm_utils/export/glm.py", "from glm_utils.inference.chat import ChatSession"),
    ],
)
def test_a_door_between_rooms_is_found(tmp_path, path, line):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line, "utf-8")
    assert len(room_faults(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("glm_utils/export/glm.py", "from glm_utils.merging.merge import MergeJob"),
        ("glm_utils/export/glm.py", "from glm_utils.export import glm_names"),
        ("glm_utils/training/trainer.py", "from glm_utils.data import read_examples"),
    ],
)
def test_an_import_within_the_law_is_allowed(tmp_path, path, line):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line, "utf-8")
    assert room_faults(tmp_path) == []


# ---- ceilings


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_stage_script_is_a_table_of_contents(path):
    """It is short without its stage function's signature and docstring; only loops bind a name again there."""
    stage = stage_function(path)
    assert len(path.read_text("utf-8").splitlines()) - num_head_lines(stage) <= MAX_SCRIPT_LINES
    loops = [node for node in ast.walk(stage) if isinstance(node, ast.For | ast.comprehension)]
    loop_names = {id(node) for loop in loops for node in ast.walk(loop.target)}
    stored = [node for node in ast.walk(stage) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    names = [argument.arg for argument in stage.args.kwonlyargs]
    names += [node.id for node in stored if id(node) not in loop_names]
    assert {name for name in names if names.count(name) > 1} == set()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_is_not_too_long(path):
    ceiling = MAX_REMOTE_LINES if name_of(path).startswith("remote_scripts/") else MAX_UTILS_LINES
    assert len(path.read_text("utf-8").splitlines()) <= ceiling


def test_no_function_is_too_long():
    long = {}
    for path in [*SCRIPTS, *SOURCES, *PROJECT_DIR.glob("tools/**/*.py"), *PROJECT_DIR.glob("benchmarks/**/*.py")]:
        for function in functions_of(path):
            num_lines = function.end_lineno - function.lineno + 1 - num_head_lines(function)
            if num_lines > MAX_FUNCTION_LINES:
                long[f"{name_of(path)}: {function.name}"] = num_lines
    assert long == {}


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_readme_is_an_entrance(name):
    assert len(text_of(name)) <= MAX_README_CHARACTERS


@pytest.mark.parametrize(
    ("source", "num_lines"),
    [("def f():\n    pass", 1), ('def f(\n    x,\n):\n    """Say.\n\n    More.\n    """\n    return x', 7)],
)
def test_signature_and_docstring_are_the_head(tmp_path, source, num_lines):
    path = tmp_path / "module.py"
    path.write_text(source, "utf-8")
    assert num_head_lines(functions_of(path)[0]) == num_lines


def test_ceilings_are_those_of_the_page():
    numbers = re.findall(r"^\|.*\| ([\d,]+) (?:lines|characters)", text_of(DEVELOPMENT), re.M)
    ceilings = (MAX_SCRIPT_LINES, MAX_UTILS_LINES, MAX_REMOTE_LINES, MAX_FUNCTION_LINES, MAX_README_CHARACTERS)
    assert [int(number.replace(",", "")) for number in numbers] == list(ceilings)


# ---- papers


def tree_paths():
    """Return the paths of the development page's tree; an indented line lies in the folder that it stands below."""
    blocks = re.findall(r"^```\n(.*?)^```", text_of(DEVELOPMENT), re.M | re.S)
    folders = [""]  # by depth
    for line in next(block for block in blocks if ".py " in block).splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth + 1 :] = [folders[depth] + name]
        yield folders[depth] + name


def test_tree_is_complete():
    """What the tree of docs/development.md names exists, and it names every script and every module."""
    listed = set(tree_paths())
    assert [path for path in listed if not (PROJECT_DIR / path).exists()] == []
    modules = [*SCRIPTS, *SOURCES]
    assert {name_of(path) for path in modules if "chatglm2-6b" not in path.parts} <= listed


def test_where_to_change_what():
    """In the page's first table every path exists, and every name in a cell stands in one of the cell's files."""
    table = re.findall(r"^\|.*\|$", text_of(DEVELOPMENT).split("\n## Layout")[0], re.M)[2:]
    assert len(table) > 10
    for cell in (cell for line in table for cell in line.strip("|").split("|")):
        marked = re.findall(r"`([^`]+)`", cell)
        paths = [mark for mark in marked if "/" in mark or re.search(r"\.(py|json|txt|toml)$", mark)]
        assert [path for path in paths if not (PROJECT_DIR / path).exists()] == []
        texts = [text_of(path) for path in paths if (PROJECT_DIR / path).is_file()]
        names = [mark for mark in marked if re.fullmatch(r"\w+", mark)]
        assert [name for name in names if not any(re.search(rf"\b{name}\b", text) for text in texts)] == []


def test_links_lead_somewhere():
    """Relative links of tracked Markdown files lead to files of the project."""
    if not (PROJECT_DIR / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        prose = re.sub(r"^```.*?^```", "", text_of(name), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
            assert "://" in link or ((PROJECT_DIR / name).parent / link).exists(), f"{name}: {link}"


def project():
    """Return the project table of pyproject.toml."""
    return tomllib.loads(text_of("pyproject.toml"))["project"]


def pins(name):
    """Return the versions of a constraints file by canonical package name."""
    found = [Requirement(line) for line in text_of(name).splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in found}


def test_every_requirement_is_pinned_within_its_range():
    """constraints.txt covers dependencies and extras; the oldest versions are the lower ends of their ranges."""
    table, pinned, oldest = project(), pins("constraints.txt"), pins("constraints-oldest.txt")
    extras = [line for lines in table["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*table["dependencies"], *extras]):
        name = canonicalize_name(requirement.name)
        if name not in (table["name"], "triton"):
            assert pinned[name] in requirement.specifier, requirement
        if name in oldest:
            lower = next(Version(part.version) for part in requirement.specifier if part.operator == ">=")
            assert oldest[name].release[: len(lower.release)] == lower.release, requirement


def test_lock_file_is_that_of_the_constraints():
    """It pins what pyproject.toml asks for, at the versions of constraints.txt, each file by hash, from no index."""
    text, pinned, table = text_of(LOCK_NAME), pins("constraints.txt"), project()
    entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M)
    assert len(entries) == text.count("==")
    assert "://" not in text  # hashes say what is installed, wherever it comes from
    locked = {canonicalize_name(name): Version(version) for name, version, _ in entries}
    differing = {name: version for name, version in locked.items() if pinned.get(name, version) != version}
    assert differing == {}
    assert [name for name in locked.keys() - pinned.keys() if not name.startswith(CUDA_PREFIXES)] == []
    extras = table["optional-dependencies"]
    asked = map(Requirement, [*table["dependencies"], *extras["eval"], *extras["gguf"], *extras["xlsx"]])
    assert {canonicalize_name(requirement.name) for requirement in asked} <= locked.keys()
    assert {"nvidia-cublas", "triton"} <= locked.keys()  # torch of the CPU build needs neither


def test_workflow_runs_make_targets():
    """Each job is a make target, and the tests run on the Pythons that pyproject.toml names."""
    workflow = text_of(".github/workflows/checks.yml")
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.M))
    commands = re.findall(r"- run: (.*)", workflow)
    assert {command.removeprefix("make ") for command in commands} <= targets
    assert {"make lint", "make test", "make test-oldest", "make test-newest", "make audit"} <= set(commands)
    tested = re.findall(r'"([\d.]+)"', re.search(r"python-version: \[(.*)\]", workflow)[1])
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project()["classifiers"]]
    assert tested == [match[1] for match in named if match]
    assert project()["requires-python"] == f">={tested[0]}"


def test_changelog_knows_the_version():
    """A released version has its heading; one in development stands under Unreleased."""
    version = Version(project()["version"])
    heading = "Unreleased" if version.is_devrelease else str(version)
    assert f"\n## [{heading}]" in text_of("CHANGELOG.md")
