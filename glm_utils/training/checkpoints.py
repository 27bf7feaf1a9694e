"""Checkpoints on the disk: filled in a hidden directory, renamed when they are complete, rotated, cleaned up.

A run that is killed leaves hidden directories at most; the next one removes them. What another program wrote is never
deleted.
"""

import os
import re
import shutil
from pathlib import Path

from loguru import logger

from glm_utils.disk import sync, sync_tree
from glm_utils.file_modes import give_usual_modes
from glm_utils.run_record import RUN_CONFIG_NAME
from glm_utils.training.manifest import is_own, write_manifest

CHECKPOINT_NAME = re.compile(r"checkpoint-([0-9]+)")
LEFTOVER_NAME = re.compile(  # of checkpoints; of adapters and curves, which are moved into place together; of files
    r"\.checkpoint-[0-9]+\.(incomplete|removed)|\.(adapter_config\.json|eval_loss\.png)\.incomplete"
    r"|\.incomplete-[0-9a-z_]+"
)


def step_of(checkpoint: Path) -> int:
    """Return N of checkpoint-N; -1 for any other name."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoint-N directories of an output directory, oldest first, those of other programs included."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of)


def hidden_dir(output_dir: Path, step: int) -> Path:
    """Return the directory in which the Trainer makes the directory checkpoint-N."""
    return output_dir / f".checkpoint-{step}.incomplete"


def make_hidden_dir(output_dir: Path, step: int) -> None:
    """Make the directory for a checkpoint that is due, empty."""
    directory = hidden_dir(output_dir, step)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def publish_checkpoint(output_dir: Path, step: int) -> None:
    """Complete a checkpoint with run_config.json and manifest, and make it visible under its name.

    Args:
        output_dir: The run's output directory, with run_config.json.
        step: Its step; every process has written its part.
    """
    hidden = hidden_dir(output_dir, step)
    filled, target = hidden / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
    shutil.copyfile(output_dir / RUN_CONFIG_NAME, filled / RUN_CONFIG_NAME)
    give_usual_modes(filled)
    sync_tree(filled)
    write_manifest(filled)
    if os.path.lexists(target):  # damaged, or of a run that went on from an earlier checkpoint
        make_room(target)
    filled.rename(target)
    sync(output_dir)
    shutil.rmtree(hidden)


def make_room(target: Path) -> None:
    """Remove an earlier checkpoint of this name; move aside what no run of this project wrote."""
    if is_own(target):
        remove_checkpoint(target)
        return
    free = (target.with_name(f"{target.name}.old{number}") for number in range(1, 1 << 20))
    aside = next(path for path in free if not os.path.lexists(path))
    logger.warning(f"{target}: no complete run of this script wrote it; moved to {aside.name}")
    target.rename(aside)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, never by half: it gets a hidden name first. Of a link only the link is removed."""
    if path.is_symlink():
        path.unlink()
        return
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def rotate_checkpoints(output_dir: Path, limit: int | None, step: int, best: str | None) -> None:
    """Remove the oldest checkpoints of this project's runs above a limit.

    Args:
        output_dir: The run's output directory.
        limit: Checkpoints that stay (save_total_limit); None, 0 or less: all.
        step: The step of the newest one, which stays; those of later steps are not counted, as this run did not write
            them.
        best: The best checkpoint, which stays too; None: there is none.
    """
    if not limit or limit < 1:
        return
    own = [path for path in list_checkpoints(output_dir) if step_of(path) <= step and is_own(path)]
    kept = [path for path in own if step_of(path) == step or (best and path.resolve() == Path(best).resolve())]
    others = [path for path in own if path not in kept]
    for path in others[: max(0, len(own) - max(limit, len(kept)))]:
        try:
            remove_checkpoint(path)
        except OSError as error:  # no reason to end a run
            logger.warning(f"{path} is above save_total_limit and cannot be removed: {error.strerror}")


def remove_leftovers(output_dir: Path) -> None:
    """Remove the hidden files and directories of runs that were killed; the output directory must be locked."""
    for path in output_dir.iterdir():
        if LEFTOVER_NAME.fullmatch(path.name):
            logger.info(f"removing {path}, left by a run that was killed")
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
