"""run_config.json, which every stage writes beside its output and the next one reads: arguments, versions, commit."""

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.family import PROJECT_DIR
from glm_utils.files import check_apart, check_writable, read_json_object

RUN_CONFIG_NAME = "run_config.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "sentencepiece")


def read_run_config(directory: Path) -> dict:
    """Return what a stage of this project recorded in a directory; an empty dict if there is no run_config.json.

    Raises:
        UserError: The file is not a JSON object.
    """
    path = directory / RUN_CONFIG_NAME
    return read_json_object(path) if path.is_file() else {}


def check_replaceable(output_dir: Path, overwrite: bool, stage: str, inputs: Sequence[Path]) -> None:
    """Check before any work that an output directory may be written to.

    Args:
        output_dir: The directory, given as --output_path.
        overwrite: Whether an earlier output of the same stage may be replaced.
        stage: Name of the stage as its run_config.json records it.
        inputs: Directories that are read; the output must lie outside them.

    Raises:
        UserError: It overlaps an input, cannot be written to, or holds something other than an earlier output.
    """
    check_apart(output_dir, inputs, "--output_path")
    check_writable(output_dir, "--output_path")
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--output_path {output_dir}: not empty. Give another directory, or --overwrite")
    if read_run_config(output_dir).get("stage") != stage:
        raise UserError(
            f"--output_path {output_dir}: --overwrite replaces an earlier output of {stage} only, and this directory "
            f"has no {RUN_CONFIG_NAME} of it. Empty it yourself, or give another directory"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages, and the name of the device."""
    import torch  # here, as what a script checks first needs this file too

    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), **found, "device": device}


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
