"""run_config.json, which every stage writes beside its output and the next one reads: arguments, versions, commit."""

import hashlib
import importlib.metadata
import platform
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

from glm_utils.family import PROJECT_DIR
from glm_utils.files import read_json_object

RUN_CONFIG_NAME = "run_config.json"
FORMAT_VERSION = 2  # of run_config.json; before it had this key, a checkpoint had no manifest.json
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "sentencepiece")


def read_run_config(directory: Path) -> dict:
    """Return what a stage of this project recorded in a directory; an empty dict if there is no run_config.json.

    Raises:
        UserError: The file is not a JSON object.
    """
    path = directory / RUN_CONFIG_NAME
    return read_json_object(path) if path.is_file() else {}


def versions() -> dict[str, str]:
    """Return the versions of Python, this project and the packages, and the name of the device."""
    import torch  # here, as what a script checks first needs this file too

    project = tomllib.loads((PROJECT_DIR / "pyproject.toml").read_text("utf-8"))["project"]
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), project["name"]: project["version"], **found, "device": device}


def git_commit() -> str | None:
    """Return the commit of the checkout, with "+changes" if tracked files differ; None outside a git repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PROJECT_DIR), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of a file, or that of the hashes of several in their order, as a hexadecimal string."""
    hashes = [sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
