"""The repository itself: shared files agree, imports keep their direction, both READMEs say the same."""

import ast
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import chat_demo
import inference_test
import merge_lora_and_quantize
import train_qlora
from glm_utils.family import FAMILIES
from tests.conftest import PROJECT_DIR
from tools import check_copies

STAGES = (
    train_qlora.train_qlora,
    merge_lora_and_quantize.merge_lora_and_quantize,
    inference_test.inference_test,
    chat_demo.chat_demo,
)
OWN_PACKAGES = {"glm_utils", "remote_scripts", "tests", "tools", "benchmarks"}
REMOTE_PACKAGES = {"torch", "transformers", "sentencepiece"}
# the rooms that may use another one
STANDS_ON = {"export": {"merging"}, "evaluation": {"inference"}, "serving": {"inference"}}
READMES = ("README.md", "README_zh.md")
TEXT_SUFFIXES = {"", ".py", ".md", ".txt", ".json", ".toml", ".sh", ".yml", ".yaml", ".cfg", ".ini"}


def catches_import_error(node):
    """Whether a try statement handles a missing package."""
    handlers = node.handlers if isinstance(node, ast.Try) else []
    return any(handler.type is None or "Import" in ast.unparse(handler.type) for handler in handlers)


def imports_of(path):
    """Return (module, level, guarded) of every import in a file, those inside functions too."""
    tree = ast.parse(path.read_text("utf-8"))
    guards = [node for node in ast.walk(tree) if catches_import_error(node) or isinstance(node, ast.If)]
    guarded = {id(node) for guard in guards for statement in guard.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, id(node) in guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            if node.module == "glm_utils":  # from glm_utils import training
                names = [f"glm_utils.{alias.name}" for alias in node.names]
            yield from ((name, node.level, id(node) in guarded) for name in names)


def import_faults(root):
    """Return the imports below a project directory that break the law of imports."""
    scripts = {path.stem for path in root.glob("*.py")}
    faults = []
    refused = scripts | OWN_PACKAGES - {"glm_utils"}
    for path in [*root.glob("*.py"), *root.glob("glm_utils/**/*.py")]:
        faults += [(path.name, name) for name, _, _ in imports_of(path) if name.split(".")[0] in refused]
    for path in root.glob("glm_utils/**/*.py"):
        room = path.parent.name if path.parent.parent.name == "glm_utils" else None
        others = {other.name for other in root.glob("glm_utils/*/")} - {room} - STANDS_ON.get(room, set())
        for name, level, _ in imports_of(path):
            parts = name.split(".")
            if level or (parts[0] == "glm_utils" and len(parts) > 1 and parts[1] in others):
                faults.append((str(path.relative_to(root)), name))
    for path in root.glob("remote_scripts/*/*.py"):
        siblings = {sibling.stem for sibling in path.parent.glob("*.py")}
        for name, level, guarded in imports_of(path):
            package = name.split(".")[0]
            allowed = package in REMOTE_PACKAGES or package in sys.stdlib_module_names
            if level:
                allowed = level == 1 and name in siblings
            elif guarded:
                allowed = package not in OWN_PACKAGES | scripts
            if not allowed:
                faults.append((path.name, name))
    return faults


@pytest.fixture
def copied_scripts(tmp_path):
    """A copy of remote_scripts, and the command that checks it."""
    scripts_dir = tmp_path / "remote_scripts"
    shutil.copytree(PROJECT_DIR / "remote_scripts", scripts_dir, ignore=shutil.ignore_patterns("__pycache__"))

    def check(*options):
        command = [sys.executable, PROJECT_DIR / "tools/check_copies.py", "--scripts_dir", scripts_dir, *options]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    return scripts_dir, check


def test_copies_agree():
    command = [sys.executable, PROJECT_DIR / "tools/check_copies.py"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_drift_of_copies_is_found_and_repaired(copied_scripts):
    scripts_dir, check = copied_scripts
    identical, with_region = (
        scripts_dir / "chatglm2-6b" / name for name in ("quantization.py", "tokenization_chatglm.py")
    )
    before = identical.read_bytes(), with_region.read_bytes()
    identical.write_bytes(before[0].replace(b"\n", b"\r\n"))
    with_region.write_bytes(before[1].replace(b"# endregion", b"DRIFT = 1\n# endregion"))
    found = check()
    assert found.returncode == 1
    assert "quantization.py: differs" in found.stdout
    assert "tokenization_chatglm.py: region" in found.stdout
    assert check("--fix").returncode == 0
    assert (identical.read_bytes(), with_region.read_bytes()) == before
    assert check().returncode == 0


def test_missing_copy_is_found_and_repaired(copied_scripts):
    scripts_dir, check = copied_scripts
    (scripts_dir / "chatglm2-6b/attention_chatglm.py").unlink()
    assert "attention_chatglm.py: missing" in check().stdout
    assert check("--fix").returncode == 0
    (scripts_dir / "chatglm-6b/attention_chatglm.py").unlink()
    assert check("--fix").returncode == 1


@pytest.mark.parametrize("family", ["chatglm-6b", "chatglm2-6b"])
@pytest.mark.parametrize("marker", ["# region", "# endregion"])
def test_damaged_region_is_not_called_repaired(copied_scripts, family, marker):
    scripts_dir, check = copied_scripts
    path = scripts_dir / family / "tokenization_chatglm.py"
    damaged = "\n".join(line for line in path.read_text("utf-8").split("\n") if not line.startswith(marker))
    path.write_text(damaged, "utf-8")
    found = check("--fix")
    assert found.returncode == 1
    assert "tokenization_chatglm.py" in found.stdout
    assert path.read_text("utf-8") == damaged


@pytest.mark.parametrize("family", ["chatglm-6b", "chatglm2-6b"])
def test_a_file_of_one_family_is_a_fault(copied_scripts, family):
    scripts_dir, check = copied_scripts
    (scripts_dir / family / "new_chatglm.py").write_text("NEW = 1\n")
    found = check()
    assert found.returncode == 1
    assert "new_chatglm.py: missing" in found.stdout
    assert check("--fix").returncode == (family != "chatglm-6b")  # copies go one way


def test_a_missing_file_with_regions_is_left_to_a_person(copied_scripts):
    scripts_dir, check = copied_scripts
    (scripts_dir / "chatglm2-6b/modeling_chatglm.py").unlink()
    found = check("--fix")
    assert found.returncode == 1
    assert "modeling_chatglm.py: missing" in found.stdout
    assert not (scripts_dir / "chatglm2-6b/modeling_chatglm.py").exists()


def test_files_without_regions_must_be_identical(copied_scripts):
    """A file whose regions are gone in both directories does not pass as one that shares nothing."""
    scripts_dir, check = copied_scripts
    for family in ("chatglm-6b", "chatglm2-6b"):
        path = scripts_dir / family / "tokenization_chatglm.py"
        lines = path.read_text("utf-8").split("\n")
        path.write_text("\n".join(line for line in lines if "region" not in line), "utf-8")
    assert "tokenization_chatglm.py: differs" in check().stdout


def test_exceptions_of_the_copies(tmp_path, monkeypatch):
    """A file that is named with a reason may differ, or be one family's alone."""
    source, target = tmp_path / "own.py", tmp_path / "other" / "own.py"
    source.write_text("OWN = 1\n")
    assert check_copies.compare(source, target)[0]
    monkeypatch.setitem(check_copies.EXCEPTIONS, "own.py", "the other family has no such layer")
    assert not check_copies.compare(source, target)[0]


def test_check_copies_runs_as_a_module_and_needs_two_families(tmp_path):
    command = [sys.executable, "-m", "tools.check_copies"]
    assert subprocess.run(command, check=False, cwd=PROJECT_DIR, capture_output=True).returncode == 0
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "own.py").write_text("")
    for scripts_dir in (tmp_path, tmp_path / "absent"):
        options = [*command, "--scripts_dir", scripts_dir]
        result = subprocess.run(options, check=False, cwd=PROJECT_DIR, capture_output=True, text=True)
        assert result.returncode == 2
        assert "expected at least two directories" in result.stderr


def test_imports_keep_their_direction():
    assert import_faults(PROJECT_DIR) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("train_qlora.py", "import merge_lora_and_quantize"),
        ("train_qlora.py", "from tools.make_data import make_data"),
        ("glm_utils/data.py", "from remote_scripts import anything"),
        ("glm_utils/data.py", "def late():\n    import train_qlora"),
        ("glm_utils/data.py", "from glm_utils.training.trainer import anything"),
        ("glm_utils/data.py", "from glm_utils import merging"),
        ("glm_utils/data.py", "from glm_utils.merging import shards"),
        ("glm_utils/data.py", "from .training import trainer"),
        ("glm_utils/training/trainer.py", "from glm_utils.merging import shards"),
        ("glm_utils/merging/shards.py", "def late():\n    import glm_utils.inference.chat"),
        ("glm_utils/merging/shards.py", "from glm_utils.export.glm import write"),
        ("glm_utils/export/glm.py", "from glm_utils.training.trainer import anything"),
        ("remote_scripts/x/quantization.py", "import numpy"),
        ("remote_scripts/x/quantization.py", "from ..y import quantization"),
        ("remote_scripts/x/quantization.py", "from .absent import name"),
        ("remote_scripts/x/quantization.py", "try:\n    import glm_utils\nexcept ImportError:\n    pass"),
        ("remote_scripts/x/quantization.py", "try:\n    import numpy\nexcept ValueError:\n    pass"),
    ],
)
def test_import_in_the_wrong_direction_is_found(tmp_path, path, line):
    rooms = [f"glm_utils/{room}/__init__.py" for room in ("training", "merging", "export", "inference")]
    for name in ("train_qlora.py", "merge_lora_and_quantize.py", *rooms, path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", "utf-8")
    (tmp_path / path).write_text(line, "utf-8")
    assert len(import_faults(tmp_path)) == 1


def test_export_may_stand_on_merging(tmp_path):
    for name, text in (("merging/shards.py", ""), ("export/glm.py", "from glm_utils.merging import shards\n")):
        (tmp_path / "glm_utils" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "glm_utils" / name).write_text(text, "utf-8")
    assert import_faults(tmp_path) == []


def test_guarded_package_is_allowed(tmp_path):
    path = tmp_path / "remote_scripts/x/quantization.py"
    path.parent.mkdir(parents=True)
    path.write_text("try:\n    import triton\nexcept ImportError:\n    triton = None\n", "utf-8")
    assert import_faults(tmp_path) == []


def readme(name):
    """Read a README."""
    return (PROJECT_DIR / name).read_text("utf-8")


def blocks(text, language):
    """Return the fenced blocks of a language; the language of a plain block is empty."""
    return [body for found, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if found == language]


def listed_files(text):
    """Return the paths that the file tree names, directories with a slash."""
    paths, directory = [], ""
    for line in blocks(text, "")[0].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            directory = name if name.endswith("/") else ""
            paths.append(name)
        else:
            paths.append(directory + name)
    return paths


def tracked_files():
    """Return the paths that git tracks."""
    if not (PROJECT_DIR / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT_DIR, capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


def test_readmes_are_in_step():
    """Both languages have the same headings' levels, commands, trees, table rows and names in code marks."""
    english, chinese = (readme(name) for name in READMES)
    for language in ("bash", "python"):
        assert blocks(english, language)
        assert blocks(english, language) == blocks(chinese, language)
    assert listed_files(english) == listed_files(chinese)
    prose = [re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for text in (english, chinese)]
    for pattern in (r"^(#+) ", r"^(\||-) ", r"`(--\w+)`", r"^\| `(\w+)`", r"<!-- (\w+) -->"):
        assert len({tuple(re.findall(pattern, text, re.M)) for text in prose}) == 1, pattern


@pytest.mark.parametrize("name", READMES)
def test_readme_names_real_flags(name):
    """Every flag belongs to a stage, and each stage's table lists all its flags with their defaults."""
    text = readme(name)
    commands_removed = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    parameters = {key: value for stage in STAGES for key, value in inspect.signature(stage).parameters.items()}
    assert set(re.findall(r"--(\w+)", commands_removed)) <= {*parameters, "help"}
    cells = dict(re.findall(r"^\| `--(\w+)` \| (.*?) \|", text, re.M))
    assert set(cells) == set(parameters)
    for key, parameter in parameters.items():
        if parameter.default not in (None, "", inspect.Parameter.empty):
            assert cells[key].strip("`") == str(parameter.default), key


def flags_of(script):
    """Return the flags of a script: the keyword-only arguments of the function that run_cli gets."""
    tree = ast.parse((PROJECT_DIR / script).read_text("utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_cli"]
    return {argument.arg for argument in functions[calls[0].args[0].id].args.kwonlyargs}


def test_readme_commands_name_real_scripts_flags_and_files():
    """Each command calls a script or make target that exists, with its flags and shipped files."""
    targets = re.findall(r"^(\w+):", (PROJECT_DIR / "Makefile").read_text("utf-8"), re.M)
    output_dirs = {json.loads((PROJECT_DIR / family.train_args_json).read_text())["output_dir"] for family in FAMILIES}
    for line in "".join(blocks(readme("README.md"), "bash")).splitlines():
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), line
        elif words[0] == "python" and words[1] != "-m":  # another project's module
            assert {word[2:] for word in words if word.startswith("--")} <= flags_of(words[1]), line
        elif words[0] == "tensorboard":
            assert words[2].removesuffix("/runs") in output_dirs, line
        for word in words:
            if word.endswith((".json", ".jsonl", ".txt", ".py")):
                assert (PROJECT_DIR / word).is_file(), line


def test_readme_file_tree_is_whole():
    """Every file in the tree exists, and every script and module has its line."""
    listed = listed_files(readme("README.md"))
    for path in listed:
        assert (PROJECT_DIR / path).exists(), path
    shipped = [family.train_args_json for family in FAMILIES]
    modules = [
        path
        for path in tracked_files()
        if re.fullmatch(r"((glm_utils|tools|benchmarks|remote_scripts/chatglm-6b)/)?(?!__init__)\w+\.py", path)
    ]
    for path in [*shipped, *modules]:
        assert path in listed, f"{path} has no line in the README's file tree"


def test_no_machine_paths():
    """Tracked text names no directory of a particular machine; tests may name temporary ones."""
    machine, temporary = re.compile(r"(?<![\w.])/(?:work|root|home)/"), re.compile(r"(?<![\w.])/tmp/")
    for name in tracked_files():
        path = PROJECT_DIR / name
        if path.suffix not in TEXT_SUFFIXES or not path.is_file():
            continue
        text = path.read_text("utf-8")
        assert not machine.search(text), name
        assert name.startswith("tests/") or not temporary.search(text), name
