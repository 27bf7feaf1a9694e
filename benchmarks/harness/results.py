"""Where result files go, how they are written and what every one of them records."""

import re
from pathlib import Path

import torch

from glm_utils.cli import UserError
from glm_utils.family import PROJECT_DIR
from glm_utils.files import write_json
from glm_utils.run_record import git_commit, versions

RESULTS_DIR = PROJECT_DIR / "benchmarks" / "results"
FAILED = "failed"  # error of a measurement that an exception ended


def device_name() -> str:
    """Return the GPU's name for a file name, or cpu."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "_", versions()["device"].lower().removeprefix("nvidia ")).strip("_")


def provenance() -> dict:
    """Return what tells one measurement from another of the same code: versions, device, commit."""
    return {"versions": versions(), "commit": git_commit()}


def write_result(path: Path, result: dict) -> None:
    """Write a result file atomically and, if it is missing, the directory that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def check_none_failed(measurements: list[dict]) -> None:
    """End the benchmark with exit code 1 if a case failed other than by running out of memory.

    Raises:
        UserError: A measurement's error is FAILED.
    """
    if failed := [found["label"] for found in measurements if found.get("error") == FAILED]:
        raise UserError(f"failed: {', '.join(failed)}; the log above says why")
