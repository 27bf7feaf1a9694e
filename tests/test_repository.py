"""The repository itself: shared files agree, imports keep their direction, both READMEs say the same."""

import ast
import inspect
import re
import shutil
import subprocess
import sys

import pytest

import merge_lora_and_quantize
import train_qlora
from tests.conftest import PROJECT_DIR

SCRIPTS = ("train_qlora", "merge_lora_and_quantize")
REMOTE_PACKAGES = {"torch", "transformers", "sentencepiece"}


def imports_of(path):
    """Return (module, level, guarded) of every import in a file."""
    tree = ast.parse(path.read_text("utf-8"))
    blocks = [block for block in ast.walk(tree) if isinstance(block, (ast.Try, ast.If))]
    guarded = {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, id(node) in guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, id(node) in guarded


def test_copies_agree_and_drift_is_found(tmp_path):
    """check_copies passes here, finds a planted drift, and repairs it."""
    for name in ("tools", "remote_scripts"):
        shutil.copytree(PROJECT_DIR / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, str(tmp_path / "tools/check_copies.py")]
    assert subprocess.run(command, check=False).returncode == 0
    drifted = tmp_path / "remote_scripts/chatglm2-6b/quantization.py"
    drifted.write_text(drifted.read_text("utf-8") + "\nDRIFT = 1\n", "utf-8")
    tokenizer = tmp_path / "remote_scripts/chatglm2-6b/tokenization_chatglm.py"
    tokenizer.write_text(tokenizer.read_text("utf-8").replace("# endregion", "DRIFT = 1\n# endregion"), "utf-8")
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert "quantization.py" in found.stdout
    assert "tokenization_chatglm.py" in found.stdout
    assert subprocess.run([*command, "--fix"], check=False).returncode == 0
    assert subprocess.run(command, check=False).returncode == 0


def test_imports_keep_their_direction():
    """Scripts import glm_utils, never scripts; glm_utils never the models; models only what ships with them."""
    for path in [*PROJECT_DIR.glob("*.py"), *(PROJECT_DIR / "glm_utils").glob("*.py")]:
        roots = {module.split(".")[0] for module, _, _ in imports_of(path)}
        assert not roots & (set(SCRIPTS) | {"remote_scripts", "tests", "tools"}), path
    for path in (PROJECT_DIR / "remote_scripts").glob("*/*.py"):
        siblings = {sibling.stem for sibling in path.parent.glob("*.py")}
        for module, level, guarded in imports_of(path):
            root = module.split(".")[0]
            if level:
                assert level == 1, (path, module)
                assert module in siblings, (path, module)
            else:
                assert root in REMOTE_PACKAGES or root in sys.stdlib_module_names or guarded, (path, module)


def readme(name):
    """Read a README."""
    return (PROJECT_DIR / name).read_text("utf-8")


def test_readmes_are_in_step():
    """Both languages have the same sections, commands and table sizes."""
    english, chinese = readme("README.md"), readme("README_zh.md")
    for pattern in (r"^(#+) ", r"^(\|-.*)$", r"^```(?:bash|python)\n(.*?)^```"):
        flags = re.MULTILINE | re.DOTALL if "```" in pattern else re.MULTILINE
        assert re.findall(pattern, english, flags) == re.findall(pattern, chinese, flags), pattern


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_readme_names_real_flags_and_files(name):
    """Every flag belongs to a stage, every flag of training is listed, and the named files exist."""
    text = readme(name)
    stages = (train_qlora.train_qlora, merge_lora_and_quantize.merge_lora_and_quantize)
    known = set().union(*(inspect.signature(stage).parameters for stage in stages))
    used = set(re.findall(r"--([a-z]+_[a-z_]+|qbits|seed)", text)) - {"export_format"}
    assert used <= known
    assert set(inspect.signature(train_qlora.train_qlora).parameters) <= set(re.findall(r"`--([a-z_]+)`", text))
    for file_name in re.findall(r"^([\w./-]+?)/? {2,}", text.split("```")[5], re.MULTILINE):
        assert (PROJECT_DIR / file_name).exists(), file_name


def test_no_machine_paths():
    """Tracked text names no directory of a particular machine."""
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT_DIR, capture_output=True, text=True, check=False).stdout
    pattern = re.compile(r"/(?:work|root|home)/[a-z]")
    for name in listed.splitlines():
        path = PROJECT_DIR / name
        if path.suffix in (".py", ".md", ".txt", ".json", ".toml", ".sh", "") and path.is_file():
            assert not pattern.search(path.read_text("utf-8")), name
