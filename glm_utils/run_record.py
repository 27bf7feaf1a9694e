"""What a run leaves beside its weights: run_config.json (arguments, versions, commit), the model card, whole files.

The next stage reads run_config.json; resume compares it. Files are written to a temporary name and renamed, so that
a directory never holds half of one.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import TrainingArguments

from glm_utils.checkpoint import project_path
from glm_utils.checkpoint_files import fingerprint
from glm_utils.family import PROJECT_DIR, Family
from glm_utils.training_args import rows_per_step

RUN_CONFIG_NAME = "run_config.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "sentencepiece")
CARD_KEYS = ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim")

IDENTITY_ARGUMENTS = ("lora_rank", "lora_alpha", "lora_dropout", "max_input_length", "max_output_length")
IDENTITY_ARGUMENTS += ("prompt_text", "compute_dtype", "packing")
IDENTITY_TRAINING_ARGS = ("seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy")


def make_record(
    arguments: dict,
    base_dir: Path,
    family: Family,
    data_paths: dict[str, Path],
    lora_targets: list[str],
    training_args: TrainingArguments,
) -> dict:
    """Build the content of run_config.json; its part `identity` is what a resumed run must share.

    Args:
        arguments: The stage's arguments as given.
        base_dir: The base model's directory.
        family: Its family.
        data_paths: Data files by use, "train" and perhaps "eval".
        lora_targets: Module names.
        training_args: The resolved TrainingArguments.
    """
    given = arguments["model_name_or_path"]
    identity = {
        "base_fingerprint": fingerprint(base_dir),
        "lora_targets": lora_targets,
        "train_data_sha256": sha256(data_paths["train"]),
        **{key: arguments[key] for key in IDENTITY_ARGUMENTS},
        **{key: getattr(training_args, key) for key in IDENTITY_TRAINING_ARGS},
        "rows_per_step": rows_per_step(training_args),
    }
    return {
        "stage": "train_qlora",
        "arguments": {**arguments, **{f"{name}_data_path": str(path) for name, path in data_paths.items()}},
        "base": {"name": str(base_dir) if project_path(given).is_dir() else given, "family": family.name},
        "identity": identity,
        "training_args": training_args.to_dict(),
        "versions": versions(),
        "commit": git_commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, the packages and the device's name."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), **found, "device": device}


def git_commit() -> str | None:
    """Return the commit of this project's directory, with "+changes" if files differ; None outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PROJECT_DIR), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file whole or not at all.

    Args:
        path: The file.
        value: What it holds.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def whole_files(target_dir: Path, last: str) -> Iterator[Path]:
    """Collect files in a temporary directory and rename them into place when all are written.

    Args:
        target_dir: Where the files go; other files there stay.
        last: Name of the file that is moved last: a reader that needs it never sees half of the set.

    Yields:
        The temporary directory, inside target_dir.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    temporary_dir = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=target_dir))
    try:
        yield temporary_dir
        for path in sorted(temporary_dir.iterdir(), key=lambda path: path.name == last):
            os.replace(path, target_dir / path.name)
    finally:
        shutil.rmtree(temporary_dir, ignore_errors=True)


def model_card(record: dict, results: dict) -> str:
    """Write the README.md of an adapter.

    Args:
        record: The content of run_config.json.
        results: Metrics as in all_results.json.
    """
    identity = record["identity"]
    settings = {key: value for key, value in identity.items() if not key.endswith(("sha256", "fingerprint"))}
    settings.update({key: record["training_args"][key] for key in CARD_KEYS})
    rows = "\n".join(f"| {key} | {json.dumps(value, ensure_ascii=False)} |" for key, value in settings.items())
    losses = "\n".join(f"| {key} | {value:.4f} |" for key, value in results.items() if key.endswith("loss"))
    data = "\n".join(
        f"- {name}: {Path(record['arguments'][f'{name}_data_path']).name}, {counts['num_rows']} rows, "
        f"{counts['num_tokens']} tokens ({counts['num_trained_tokens']} trained)"
        for name, counts in record["data"].items()
    )
    base = record["base"]["name"] if not Path(record["base"]["name"]).is_dir() else Path(record["base"]["name"]).name
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, qlora, chatglm]
---
# LoRA adapter for {base}

A LoRA adapter for {record["base"]["family"]}, trained by `train_qlora.py` on the base in 4-bit NF4 with double
quantisation. Load it on the base with `peft.PeftModel.from_pretrained(base, adapter_directory)`.

## Data

{data}

## Losses

| | |
|---|---|
{losses}

## Settings

| setting | value |
|---|---|
{rows}

{RUN_CONFIG_NAME} holds all arguments, package versions and the commit.
"""
