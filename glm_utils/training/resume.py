"""Resume: find the newest complete checkpoint, refuse one of another run, and never mix the outputs of two runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.family import FAMILIES
from glm_utils.files import peek_json_object
from glm_utils.model_files.adapter_config import read_adapter_config
from glm_utils.model_files.checkpoint_files import ADAPTER_WEIGHT_NAMES
from glm_utils.run_record import FORMAT_VERSION, RUN_CONFIG_NAME, git_commit, versions
from glm_utils.training.best_step import has_stopped_early
from glm_utils.training.checkpoints import list_checkpoints, remove_checkpoint, step_of
from glm_utils.training.curves import CURVES
from glm_utils.training.manifest import MANIFEST_NAME, checkpoint_fault, is_own
from glm_utils.training.settings import IDENTITY_DEFAULTS, TrainingSettings

ADAPTER_NAMES = ("adapter_config.json", *ADAPTER_WEIGHT_NAMES)
RESULT_NAMES = ("train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", *CURVES.values())
REPLACED_NAMES = (RUN_CONFIG_NAME, *ADAPTER_NAMES, *RESULT_NAMES, "README.md", "tokenizer_config.json")
REPLACED_NAMES += tuple(family.tokenizer_file for family in FAMILIES)
LORA_KEYS = {"r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
REMEDIES = {  # what to do about a setting that differs from the run that is to be resumed; else, `OTHER_REMEDY`
    "init_lora_sha256": "Give --init_lora_path as the run did that wrote the checkpoint, or leave it out as that did",
    "train_data_sha256": "Resume with the checkpoint's data; to train its adapter further on other data, give "
    "--init_lora_path {directory} in place of --resume_from_checkpoint, and another output_dir",
}
OTHER_REMEDY = "Resume with the checkpoint's settings, or start from scratch with another output_dir"
Log = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: The checkpoint-N directory from which it goes on; None: from scratch.
        is_finished: Whether there is nothing left to do.
        notes: What the log should say about it: (level, message).
    """

    checkpoint: Path | None = None
    is_finished: bool = False
    notes: list[tuple[str, str]] = field(default_factory=list)

    def log(self) -> None:
        """Log the notes."""
        for level, message in self.notes:
            logger.log(level, message)


def choose_start(settings: TrainingSettings) -> Start:
    """Find the checkpoint to resume from, and check that it belongs to this run and has something left to do.

    Raises:
        UserError: No such checkpoint, one of another run or of a finished one, or an output directory that holds an
            earlier run without that checkpoint.
    """
    output_dir, given, num_steps, notes = settings.output_dir, settings.resume_from, settings.num_steps, []
    done, patience = num_finished_steps(output_dir), settings.arguments["early_stopping_patience"]
    if given == "auto" and done is not None and (done >= num_steps or has_stopped_early(output_dir, patience)):
        check_same_run(output_dir, settings.identity)
        note = f"{output_dir}: finished already, {done:,} steps are done and the adapter is written; nothing to do"
        return Start(is_finished=True, notes=[("INFO", note)])
    checkpoint = find_checkpoint(given, output_dir, lambda note: notes.append(("WARNING", note)))
    if checkpoint:
        check_same_run(checkpoint, settings.identity)
        check_unfinished(checkpoint, num_steps, output_dir, patience)
        notes += [("INFO", note) for note in (f"going on from {checkpoint}", *differences(checkpoint))]
    if checkpoint is None or not is_checkpoint_of(checkpoint, output_dir):
        check_free_of_runs(output_dir, settings.args_file.overwrite_output_dir)
    elif newer := [path.name for path in list_checkpoints(output_dir) if step_of(path) > step_of(checkpoint)]:
        notes.append(("WARNING", f"{', '.join(newer)} will be replaced when this run gets to the same step"))
    return Start(checkpoint, notes=notes)


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: Path, warn: Log) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        resume_from_checkpoint: A checkpoint-N directory; an output directory, for its newest complete checkpoint; True
            or "latest" for that of output_dir; "auto" for the same, where one is; None, False or "": none.
        output_dir: The run's output directory.
        warn: Called with a message for each checkpoint that is passed over.

    Returns:
        A complete checkpoint directory, or None.

    Raises:
        UserError: The checkpoint is missing or incomplete.
    """
    if not resume_from_checkpoint:
        return None
    by_word = resume_from_checkpoint is True or resume_from_checkpoint in ("latest", "auto")
    path = output_dir if by_word else Path(str(resume_from_checkpoint)).expanduser()
    found = list_checkpoints(path)
    if step_of(path) >= 0 and not found:
        if not path.is_dir():
            raise UserError(
                f"--resume_from_checkpoint {path}: no such directory. Give one of {path.parent}, or latest"
            )
        if fault := checkpoint_fault(path):
            raise UserError(f"{fault}. Give an older one, or latest for the newest complete one")
        return path
    for checkpoint in reversed(found):
        fault = checkpoint_fault(checkpoint)
        if not fault:
            return checkpoint
        warn(f"passed over: {fault}")
    if resume_from_checkpoint == "auto":
        return None
    if (path / "adapter_config.json").is_file() and not by_word:
        raise UserError(
            f"--resume_from_checkpoint {path}: an adapter without the states of a run. To go on from it, give "
            f"--init_lora_path {path} instead"
        )
    there = "" if path.is_dir() else "; the directory does not exist"
    none = (
        f"no complete checkpoint in {path}: {checkpoint_fault(found[-1])}" if found else f"no checkpoint-N in {path}"
    )
    raise UserError(
        f"--resume_from_checkpoint: {none}{there}. Give a checkpoint directory, leave the flag out to start from "
        "scratch, or give auto, which does so where there is none"
    )


def is_checkpoint_of(checkpoint: Path | None, output_dir: Path) -> bool:
    """Return whether a checkpoint lies in an output directory."""
    return checkpoint is not None and checkpoint.absolute().parent.resolve() == output_dir.resolve()


def check_same_run(directory: Path, identity: dict) -> None:
    """Refuse to resume a run with settings that differ from those it was started with.

    Args:
        directory: A complete checkpoint, or the output directory of a finished run.
        identity: See TrainingSettings.

    Raises:
        UserError: A setting differs.
    """
    adapter_config, recorded = read_adapter_config(directory).values, peek_json_object(directory / RUN_CONFIG_NAME)
    before = IDENTITY_DEFAULTS | {name: adapter_config.get(key) for key, name in LORA_KEYS.items()}
    before["lora_targets"] = adapter_config.get("target_modules")
    before |= recorded["identity"] if isinstance(recorded.get("identity"), dict) else {}
    for name, value in identity.items():
        old = before.get(name, value)
        old, value = (sorted(map(str, item)) if isinstance(item, list) else item for item in (old, value))
        if old != value:
            raise UserError(
                f"{directory}: {name} is {json.dumps(old, ensure_ascii=False)} in the checkpoint and "
                f"{json.dumps(value, ensure_ascii=False)} now. "
                f"{REMEDIES.get(name, OTHER_REMEDY).format(directory=directory)}"
            )


def differences(checkpoint: Path) -> list[str]:
    """Say in at most one line what differs between the versions that wrote a checkpoint and those of now."""
    recorded = peek_json_object(checkpoint / RUN_CONFIG_NAME)
    old = {"format": recorded.get("format_version", 1), "commit": recorded.get("commit")}
    now = {"format": FORMAT_VERSION, "commit": git_commit(), **versions()}
    old |= recorded["versions"] if isinstance(recorded.get("versions"), dict) else {}
    changed = [f"{name} {old.get(name)} -> {value}" for name, value in now.items() if old.get(name) != value]
    if not (checkpoint / MANIFEST_NAME).is_file():
        changed.append(f"no {MANIFEST_NAME}, so only the structure of its files was checked")
    return [f"{checkpoint}: written by another version: {', '.join(changed)}"] if changed else []


def check_unfinished(checkpoint: Path, num_steps: int, output_dir: Path, patience: int | None) -> None:
    """Refuse to resume a run that is finished; one whose adapter is still to be written goes on.

    Args:
        checkpoint: A complete checkpoint.
        num_steps: Optimizer steps of the run, those before the checkpoint included.
        output_dir: The run's output directory.
        patience: See `has_stopped_early`.

    Raises:
        UserError: No step is left, and the adapter is written or would not be that of this many steps.
    """
    num_done = peek_json_object(checkpoint / "trainer_state.json")["global_step"]
    is_written = (output_dir / "adapter_config.json").exists() or not is_checkpoint_of(checkpoint, output_dir)
    is_early = has_stopped_early(checkpoint, patience)
    if num_done > num_steps or ((num_done == num_steps or is_early) and is_written):
        done, more = f"all {num_steps:,} steps are done", "num_train_epochs or max_steps"
        if is_early and num_done < num_steps:
            done, more = f"the run stopped early, at step {num_done:,}", "--early_stopping_patience"
        raise UserError(
            f"{checkpoint}: {done}. Use it as it is (--lora_path {checkpoint}), raise {more}, or train it further on "
            f"other data with --init_lora_path {checkpoint}"
        )


def num_finished_steps(output_dir: Path) -> int | None:
    """Return the steps of the run whose adapter is in an output directory; None if none of this project is there.

    adapter_config.json is written last, and removed first when a run goes on.
    """
    step = peek_json_object(output_dir / "trainer_state.json").get("global_step")
    is_written = is_own(output_dir) and (output_dir / "adapter_config.json").is_file()
    return step if is_written and isinstance(step, int) else None


def check_free_of_runs(output_dir: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds an earlier run; incomplete checkpoints are none.

    Args:
        output_dir: The run's output directory.
        overwrite: Whether the earlier run may be replaced.

    Raises:
        UserError: It holds an earlier run, a model or other files that the run would replace.
    """
    for name in ("config.json", *(() if is_own(output_dir) else REPLACED_NAMES)):
        if (output_dir / name).exists():
            raise UserError(
                f"{output_dir}: output_dir holds {name}, which no run of this script wrote. Choose another output_dir"
            )
    if overwrite:
        return
    complete = any(is_own(path) and not checkpoint_fault(path) for path in list_checkpoints(output_dir))
    if complete or (output_dir / "adapter_config.json").exists():
        raise UserError(
            f"{output_dir}: output_dir holds an earlier run. Choose another output_dir, continue it "
            'with --resume_from_checkpoint latest, or set "overwrite_output_dir": true to replace it'
        )


def remove_earlier_run(output_dir: Path, overwrite: bool) -> None:
    """Delete the adapter and results of an earlier run; to overwrite it, its checkpoints too. Other files stay."""
    checkpoints = [path for path in list_checkpoints(output_dir) if overwrite and is_own(path)]
    for path in checkpoints:
        logger.warning(f"overwrite_output_dir: deleting {path}")
        remove_checkpoint(path)
    remove_files(output_dir, (*ADAPTER_NAMES, *RESULT_NAMES))


def remove_files(output_dir: Path, names: tuple[str, ...]) -> None:
    """Delete files of an earlier run, links among them without what they point to."""
    for path in (output_dir / name for name in names):
        if path.is_symlink() or path.is_file():
            logger.warning(f"deleting {path} of an earlier run")
            path.unlink()
