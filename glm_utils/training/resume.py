"""Resume: find a complete checkpoint, refuse one of another run, and never mix the outputs of two runs."""

import json
import re
import shutil
import zipfile
from pathlib import Path

from loguru import logger

from glm_utils.adapter_config import read_adapter_config
from glm_utils.checkpoint_files import ADAPTER_WEIGHT_NAMES, check_adapter_files
from glm_utils.cli import UserError
from glm_utils.family import FAMILIES
from glm_utils.files import check_writable, read_json_object
from glm_utils.run_record import RUN_CONFIG_NAME, read_run_config
from glm_utils.training.curves import CURVES
from glm_utils.training.settings import TrainingSettings

STATE_NAMES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
RNG_NAMES = ("rng_state.pth", "rng_state_0.pth")
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
RESULT_NAMES = ("train_results.json", "eval_results.json", "all_results.json", *CURVES.values())
REPLACED_NAMES = ("README.md", "tokenizer_config.json", *(family.tokenizer_file for family in FAMILIES))
LORA_KEYS = {"r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}


def choose_checkpoint(settings: TrainingSettings) -> Path | None:
    """Find the checkpoint to resume from, and check that it belongs to this run and has steps left.

    Returns:
        A checkpoint-N directory; None if the run starts from scratch.

    Raises:
        UserError: No such checkpoint, one of another run or of a finished one, or an output directory that holds an
            earlier run without that checkpoint.
    """
    checkpoint = find_checkpoint(settings.resume_from, settings.output_dir)
    if checkpoint:
        check_same_run(checkpoint, settings.identity)
        check_unfinished(checkpoint, settings.num_steps)
    if not is_checkpoint_of(checkpoint, settings.output_dir):
        check_free_of_runs(settings.output_dir, settings.args_file.overwrite_output_dir)
    return checkpoint


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoint-N directories of an output directory, oldest first."""
    found = [
        (match, path) for path in output_dir.glob("checkpoint-*") if (match := CHECKPOINT_NAME.fullmatch(path.name))
    ]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1]))]


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: Path) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        resume_from_checkpoint: A checkpoint-N directory, an output directory (its newest checkpoint), True or
            "latest" (the newest one of output_dir); None, False or "": none.
        output_dir: The run's output directory.

    Returns:
        A complete checkpoint directory, or None.

    Raises:
        UserError: The checkpoint is missing or incomplete.
    """
    if not resume_from_checkpoint:
        return None
    latest = resume_from_checkpoint is True or resume_from_checkpoint == "latest"
    path = output_dir if latest else Path(str(resume_from_checkpoint)).expanduser()
    if CHECKPOINT_NAME.fullmatch(path.name) and not path.is_dir():
        raise UserError(f"--resume_from_checkpoint {path}: no such directory. Give one of {path.parent}, or latest")
    if not (path / "trainer_state.json").is_file() or list_checkpoints(path):
        found = list_checkpoints(path)
        if not found and not CHECKPOINT_NAME.fullmatch(path.name):
            there = "" if path.is_dir() else "; the directory does not exist"
            raise UserError(
                f"--resume_from_checkpoint: no checkpoint-N in {path}{there}. Give a checkpoint directory, or leave "
                "the flag out to start from scratch"
            )
        path = found[-1] if found else path
    missing = [name for name in STATE_NAMES if not _is_complete(path / name)]
    if not any((path / name).is_file() for name in RNG_NAMES):
        missing.append(RNG_NAMES[0])
    if missing:
        raise UserError(
            f"{path}: not a complete checkpoint, {', '.join(missing)} missing or truncated. Give an older one "
            "(save_only_model writes checkpoints that cannot be resumed)"
        )
    check_adapter_files(path)
    return path


def _is_complete(path: Path) -> bool:
    """Return whether a file exists and, if torch wrote it, is not truncated."""
    return zipfile.is_zipfile(path) if path.suffix == ".pt" else path.is_file()


def is_checkpoint_of(checkpoint: Path | None, output_dir: Path) -> bool:
    """Return whether a checkpoint lies in an output directory."""
    return checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()


def check_same_run(checkpoint: Path, identity: dict) -> None:
    """Refuse to resume a run with settings that differ from those it was started with.

    Args:
        checkpoint: A complete checkpoint directory.
        identity: See TrainingSettings.

    Raises:
        UserError: A setting differs.
    """
    adapter_config = read_adapter_config(checkpoint).values
    before = {name: adapter_config.get(key) for key, name in LORA_KEYS.items()}
    before["lora_targets"] = adapter_config.get("target_modules")
    before.update(read_run_config(checkpoint).get("identity", {}))
    for name, value in identity.items():
        old = before.get(name, value)
        old, value = (sorted(item) if isinstance(item, list) else item for item in (old, value))
        if old != value:
            raise UserError(
                f"{checkpoint}: {name} is {json.dumps(old, ensure_ascii=False)} in the checkpoint and "
                f"{json.dumps(value, ensure_ascii=False)} now. Resume with the checkpoint's settings, or start "
                "from scratch with another output_dir"
            )


def check_unfinished(checkpoint: Path, num_steps: int) -> None:
    """Refuse to resume a run that is finished: the Trainer would take one more step each time.

    Args:
        checkpoint: A complete checkpoint directory.
        num_steps: Optimizer steps of the run, those before the checkpoint included.

    Raises:
        UserError: No step is left, or trainer_state.json does not say how many are done.
    """
    state_path = checkpoint / "trainer_state.json"
    num_done = read_json_object(state_path).get("global_step")
    if not isinstance(num_done, int):
        raise UserError(
            f"{state_path}: global_step is {num_done!r}, expected a number of steps. Give an older checkpoint"
        )
    if num_done >= num_steps:
        raise UserError(
            f"{checkpoint}: all {num_steps:,} steps are done. Use it as it is (--lora_path {checkpoint}), or raise "
            "num_train_epochs or max_steps"
        )


def check_free_of_runs(output_dir: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds an earlier run.

    Args:
        output_dir: The run's output directory.
        overwrite: Whether the earlier run may be replaced.

    Raises:
        UserError: It holds an earlier run, a model or other files that the run would replace, or cannot be created.
    """
    check_writable(output_dir, "output_dir")
    is_run = any((output_dir / name).exists() for name in (RUN_CONFIG_NAME, "adapter_config.json"))
    for name in ("config.json", *(() if is_run else REPLACED_NAMES)):
        if (output_dir / name).exists():
            raise UserError(
                f"{output_dir}: output_dir holds {name}, which no run of this script wrote. Choose another output_dir"
            )
    if not overwrite and (list_checkpoints(output_dir) or (output_dir / "adapter_config.json").exists()):
        raise UserError(
            f"{output_dir}: output_dir holds an earlier run. Choose another output_dir, continue it "
            'with --resume_from_checkpoint latest, or set "overwrite_output_dir": true to replace it'
        )


def remove_earlier_run(output_dir: Path) -> None:
    """Delete the checkpoints, adapter and results of an earlier run; other files stay."""
    results = ("adapter_config.json", *ADAPTER_WEIGHT_NAMES, "trainer_state.json", *RESULT_NAMES, RUN_CONFIG_NAME)
    for path in [*list_checkpoints(output_dir), *(output_dir / name for name in results)]:
        if path.exists():
            logger.warning(f"overwrite_output_dir: deleting {path}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()
