"""The repository itself: shared files agree, imports keep their direction, the documentation is true and in step."""

import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chat_demo
import evaluate_adapter
import generate
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
    evaluate_adapter.evaluate_adapter,
    generate.generate,
)
OWN_PACKAGES = {"glm_utils", "remote_scripts", "tests", "tools", "benchmarks"}
REMOTE_PACKAGES = {"torch", "transformers", "sentencepiece"}
# the rooms that may use another one
STANDS_ON = {"export": {"merging"}, "evaluation": {"inference"}, "serving": {"inference"}}
FLOOR_FOLDERS = {"data", "model_files"}
READMES = ("README.md", "README_zh.md")
STAGE_PAGES = {  # the pages with flag tables, in the order of the tables
    "docs/training": (train_qlora.train_qlora,),
    "docs/merging": (merge_lora_and_quantize.merge_lora_and_quantize,),
    "docs/evaluation": (evaluate_adapter.evaluate_adapter,),
    "docs/inference": (chat_demo.chat_demo, generate.generate, inference_test.inference_test),
}
TRANSLATED = (
    "README.md",
    "data/README.md",
    "docs/installation.md",
    "docs/exports.md",
    "docs/robustness.md",
    *(f"{name}.md" for name in STAGE_PAGES),
)
PAGE_DIRS = ("docs", "benchmarks", "data", "models/chatglm-tiny", "models/chatglm2-tiny")
MAPPED = (
    r"(?:(?:glm_utils|glm_utils/\w+|tools|benchmarks|benchmarks/\w+|remote_scripts/chatglm-6b)/)?(?!__init__)\w+\.py"
)
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
        others = {other.name for other in root.glob("glm_utils/*/")} - FLOOR_FOLDERS - {room}
        others -= STANDS_ON.get(room, set())
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
    assert check_copies.compare_files(source, target)[0]
    monkeypatch.setitem(check_copies.EXCEPTIONS, "own.py", "the other family has no such layer")
    assert not check_copies.compare_files(source, target)[0]


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
        ("glm_utils/data/read.py", "from remote_scripts import anything"),
        ("glm_utils/data/read.py", "def late():\n    import train_qlora"),
        ("glm_utils/data/read.py", "from glm_utils.training.trainer import anything"),
        ("glm_utils/data/read.py", "from glm_utils import merging"),
        ("glm_utils/data/read.py", "from glm_utils.merging import shards"),
        ("glm_utils/data/read.py", "from .training import trainer"),
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


@pytest.mark.parametrize(
    ("name", "other"), [("export/glm.py", "merging/shards"), ("training/settings.py", "data/read")]
)
def test_export_may_stand_on_merging_and_all_on_the_floor(tmp_path, name, other):
    folder, module = other.split("/")
    for path, text in ((f"{other}.py", ""), (name, f"from glm_utils.{folder} import {module}\n")):
        (tmp_path / "glm_utils" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "glm_utils" / path).write_text(text, "utf-8")
    assert import_faults(tmp_path) == []


def test_guarded_package_is_allowed(tmp_path):
    path = tmp_path / "remote_scripts/x/quantization.py"
    path.parent.mkdir(parents=True)
    path.write_text("try:\n    import triton\nexcept ImportError:\n    triton = None\n", "utf-8")
    assert import_faults(tmp_path) == []


def page(name):
    """Read a page of the documentation."""
    return (PROJECT_DIR / name).read_text("utf-8")


def pages():
    """Return the pages of the documentation: READMEs, docs/, the notes and what stands beside them."""
    tops = [path.name for path in PROJECT_DIR.glob("*.md")]
    below = [f"{folder}/{path.name}" for folder in PAGE_DIRS for path in (PROJECT_DIR / folder).glob("*.md")]
    return sorted(tops + below)


def blocks(text, language):
    """Return the fenced blocks of a language; the language of a plain block is empty."""
    return [body for found, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if found == language]


def prose(text):
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def flag_tables(text):
    """Return the flag tables of a page: per table the default of each flag."""
    tables = re.findall(r"(?:^\| `--\w+` \|.*\n)+", text, re.M)
    return [dict(re.findall(r"^\| `--(\w+)` \| (.*?) \|", table, re.M)) for table in tables]


def flags_of(script):
    """Return the flags of a script: the keyword-only arguments of what run_cli gets, or argparse's."""
    tree = ast.parse((PROJECT_DIR / script).read_text("utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        if ast.unparse(call.func) == "run_cli":
            return {argument.arg for argument in functions[call.args[0].id].args.kwonlyargs}
    names = [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func).endswith(".add_argument")]
    return {name[2:] for name in names if name.startswith("--")}


def script_of(words):
    """Return the project's file that a command line runs and the words after it, or None for another program's."""
    words = words[words.index("torchrun") :] if "torchrun" in words else words
    if Path(words[0]).name == "python" and words[1] == "-m":
        package = words[2].split(".")[0]
        return (words[2].replace(".", "/") + ".py", words[3:]) if package in OWN_PACKAGES else None
    if Path(words[0]).name == "python" and not words[1].startswith("-"):
        return words[1], words[2:]
    if words[0] == "torchrun":
        script = next(index for index, word in enumerate(words) if word.endswith(".py"))
        return words[script], words[script + 1 :]
    return None


def tracked_files():
    """Return the paths that git tracks."""
    if not (PROJECT_DIR / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT_DIR, capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


@pytest.mark.parametrize("name", TRANSLATED)
def test_languages_are_in_step(name):
    """Both languages have the same headings' levels, commands, outputs, table rows and names in code marks."""
    english, chinese = page(name), page(name.replace(".md", "_zh.md"))
    assert blocks(english, "bash")
    for language in ("bash", "python", "json", "text", ""):
        assert blocks(english, language) == blocks(chinese, language)
    texts = [prose(text) for text in (english, chinese)]
    for pattern in (r"^(#+) ", r"^(\||-) ", r"`(--\w+)`", r"^\| `(\w+)`", r"<!-- (\w+) -->"):
        assert len({tuple(re.findall(pattern, text, re.M)) for text in texts}) == 1, pattern


def test_every_translation_is_compared():
    """A Chinese page has an English one, and the list of translated pages names it."""
    chinese = {name for name in pages() if name.endswith("_zh.md")}
    assert chinese == {name.replace(".md", "_zh.md") for name in TRANSLATED}


@pytest.mark.parametrize("name", READMES)
def test_readme_is_an_entrance(name):
    assert len(page(name)) <= 12_000


@pytest.mark.parametrize("name", STAGE_PAGES)
@pytest.mark.parametrize("ending", [".md", "_zh.md"])
def test_flag_tables_are_complete(name, ending):
    """Each stage has a table of all its flags with their defaults, on its page in both languages."""
    tables = flag_tables(page(name + ending))
    assert len(tables) == len(STAGE_PAGES[name])
    for stage, cells in zip(STAGE_PAGES[name], tables, strict=True):
        parameters = inspect.signature(stage).parameters
        assert list(cells) == list(parameters)
        for key, parameter in parameters.items():
            if parameter.default not in (None, "", inspect.Parameter.empty):
                assert cells[key].strip("`") == str(parameter.default), key


def test_every_stage_has_a_flag_table():
    assert {stage for stages in STAGE_PAGES.values() for stage in stages} == set(STAGES)


@pytest.mark.parametrize("name", [name for name in pages() if not name.startswith("CHANGELOG")])
def test_pages_name_real_flags(name):
    """Every flag in the running text belongs to a stage, a benchmark or a tool."""
    scripts = [path for folder in ("benchmarks", "tools") for path in (PROJECT_DIR / folder).glob("*.py")]
    known = {flag for stage in STAGES for flag in inspect.signature(stage).parameters}
    known |= {flag for script in scripts for flag in flags_of(script.relative_to(PROJECT_DIR))}
    assert set(re.findall(r"--(\w+)", prose(page(name)))) <= known | {"help"}


@pytest.mark.parametrize("name", pages())
def test_commands_name_real_scripts_flags_and_files(name):
    """Each command calls a script, module or make target that exists, with its flags and shipped files."""
    targets = re.findall(r"^([\w-]+):", (PROJECT_DIR / "Makefile").read_text("utf-8"), re.M)
    output_dirs = {json.loads((PROJECT_DIR / family.train_args_json).read_text())["output_dir"] for family in FAMILIES}
    for line in "".join(blocks(page(name), "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        found = script_of(words)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        elif words[0] == "tensorboard":
            assert words[2].removesuffix("/runs") in output_dirs, line
        elif found:
            script, arguments = found
            assert (PROJECT_DIR / script).is_file(), line
            assert "/" not in script or "-m" in words, f"a module is run with python -m: {line}"
            assert {word[2:] for word in arguments if word.startswith("--")} <= flags_of(script), line
        for word in (word.rpartition("=")[2] for word in words):
            if word.endswith((".json", ".jsonl", ".txt", ".py")) and "$" not in word:  # a loop makes such files
                assert (PROJECT_DIR / word).is_file(), line


@pytest.mark.parametrize("name", pages())
def test_imports_in_pages_exist(name):
    """What a Python block takes from the project is there."""
    for block in blocks(page(name), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OWN_PACKAGES:
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", pages())
def test_links_resolve(name):
    """Every relative link leads to a file, and its anchor to a heading."""
    text = prose(page(name))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (PROJECT_DIR / name).parent / target if target else PROJECT_DIR / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text("utf-8")), link


@pytest.mark.parametrize("name", pages())
def test_named_paths_exist(name):
    """Paths of the project that a page puts in code marks are there."""
    folders = "glm_utils|remote_scripts|benchmarks|tools|tests|models|data|docs"
    for word in re.findall(rf"`((?:{folders})/[^`\s]*)`", page(name)):
        assert list(PROJECT_DIR.glob(re.sub(r"<\w+>", "*", word.rstrip("/")))), word


def mapped_files(text):
    """Return the lines of the map in docs/development.md: per path, directories with a slash, the text behind it.

    A line is a path and its duty, indented below its directory; a line without a path goes on with the last one.
    """
    found, parents, last = {}, [], 0
    tree = next(block for block in blocks(text, "") if block.startswith("train_qlora.py"))
    for line in tree.splitlines():
        indent, (name, *rest) = len(line) - len(line.lstrip()), line.split() or [""]
        is_path = re.fullmatch(r"[\w.<>-]+(/[\w.<>-]+)*/?", name) and ("/" in name or "." in name)
        if is_path and indent <= last + 4:
            last = indent
            parents = [parent for parent in parents if parent[0] < indent]
            path = "".join(parent for _, parent in parents) + name
            parents += [(indent, name)] if name.endswith("/") else []
            found[path] = " ".join(rest)
        elif found:
            found[path] += " " + line.strip()
    return found


def test_map_is_complete():
    """docs/development.md: every file in the map exists, every folder, script and shipped JSON file has its line.

    A module has a line of its own or is named in the line of its folder; docs/benchmarks.md names the benchmarks.
    """
    listed = mapped_files(page("docs/development.md"))
    for path in listed:
        pattern = re.sub(r"<\w+>", "*", path.rstrip("/"))
        assert list(PROJECT_DIR.glob(pattern)), path
    shipped = [family.train_args_json for family in FAMILIES]
    modules = [path for path in tracked_files() if re.fullmatch(MAPPED, path)]
    for folder in {path.split("/")[0] for path in tracked_files() if "/" in path and not path.startswith(".")}:
        assert [path for path in listed if path.startswith(f"{folder}/")], f"{folder}/ has no line in the map"
    for path in [*shipped, *modules]:
        folder, _, name = path.rpartition("/")
        lines = {folder + "/", folder.replace("chatglm-6b", "<family>") + "/"} & set(listed) if folder else set()
        assert not folder or lines, f"{folder}/ has no line in the map"
        words = {word.removesuffix(".py") for line in lines for word in re.findall(r"[\w.]+", listed[line])}
        own = {line + name for line in lines} | {path}
        on_page = folder == "benchmarks" and f"`{path}`" in page("docs/benchmarks.md")
        assert own & set(listed) or Path(name).stem in words or on_page, f"{path} has no line in the map"


def test_every_benchmark_is_described():
    for path in (PROJECT_DIR / "benchmarks").glob("bench_*.py"):
        assert f"benchmarks/{path.name}" in page("docs/benchmarks.md"), path.name


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
