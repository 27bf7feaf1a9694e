"""What train_qlora.py checks and reads before torch is imported: flags, the JSON file, data."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.data.find_files import find_files, find_parts
from glm_utils.data.forms import Columns
from glm_utils.data.training_data import TrainingData, read_training_data
from glm_utils.early_checks import check_model_dir, local_model_dir, project_path
from glm_utils.family import Family
from glm_utils.limits import EncodingLimits
from glm_utils.prompt_text import check_only_one, check_prompt_text
from glm_utils.report_file import check_report_path
from glm_utils.training.argument_keys import SEEDS
from glm_utils.training.shipped_args import check_args_family
from glm_utils.training.training_args import TrainArgsFile, read_train_args

DEFAULT_BASE = "THUDM/chatglm2-6b"
SAMPLE_TRAIN_PATH, SAMPLE_EVAL_PATH = "data/train.jsonl", "data/dev.jsonl"


@dataclass(frozen=True)
class RunInputs:
    """What the flags name besides the base model, read and checked.

    Attributes:
        arguments: The script's flags by name.
        limits: Limits of the prompt and the answer.
        data: Data files and their examples, before the seed chooses among them.
        args_file: The TrainingArguments file; None: the one shipped for the base's family.
        family: The base's; None: the base is yet to be downloaded.
    """

    arguments: dict
    limits: EncodingLimits
    data: TrainingData
    args_file: TrainArgsFile | None
    family: Family | None


def read_inputs(arguments: dict) -> RunInputs:
    """Read and check what the flags of train_qlora.py name; of the base model only that it is there.

    Args:
        arguments: The flags by name.

    Raises:
        UserError: A flag, the JSON file or the data is wrong.
    """
    flags = SimpleNamespace(**arguments)
    check_lora_settings(flags.lora_rank, flags.lora_alpha, flags.lora_dropout)
    if flags.seed is not None and flags.seed not in SEEDS:
        raise UserError(f"--seed {flags.seed}: expected {SEEDS}")
    limits = EncodingLimits(flags.max_input_length, flags.max_output_length, flags.truncated_answers)
    check_prompt_text(flags.prompt_text)
    args_file = read_train_args(project_path(flags.train_args_json)) if flags.train_args_json else None
    family = check_base(flags.model_name_or_path, flags.prompt_text, args_file)
    columns = Columns(flags.prompt_column, flags.response_column, flags.history_column, flags.sheet)
    train_data_path, eval_data_path = find_data(flags.train_data_path, flags.eval_data_path, flags.eval_ratio)
    if flags.output_json is not None:
        read = [args_file.path] if args_file else []
        read += Path(flags.model_name_or_path).expanduser().glob("*")  # none if it is the name of a hub
        read += [path for part in find_parts(train_data_path) for path in part.paths]
        check_report_path(flags.output_json, [*read, *(find_files(eval_data_path) if eval_data_path else [])])
    data = read_training_data(train_data_path, eval_data_path, flags.eval_ratio, columns)
    if flags.evaluate_after and not data.has_eval:
        raise UserError("--evaluate_after true: no evaluation data. Give --eval_data_path or --eval_ratio")
    return RunInputs(arguments, limits, data, args_file, family)


def check_base(name_or_path: str, prompt_text: str, args_file: TrainArgsFile | None) -> Family | None:
    """Check that the base is there, and what other flags say of it; return its family, None if only a download tells.

    Raises:
        UserError: It is not there, has a prompt_text of its own beside the flag's, or the JSON file ships for another
            family.
    """
    family = check_model_dir(name_or_path)
    if directory := local_model_dir(name_or_path):
        check_only_one(prompt_text, directory)
    if args_file and family:
        check_args_family(args_file, family, name_or_path)
    if name_or_path == DEFAULT_BASE:
        logger.info(f"base model: {DEFAULT_BASE}, the default of --model_name_or_path")
    return family


def check_lora_settings(rank: int, alpha: int, dropout: float) -> None:
    """Check the numbers for `make_lora_config`.

    Raises:
        UserError: A value out of range.
    """
    if rank < 1:
        raise UserError(f"--lora_rank={rank}: expected 1 or more")
    if alpha < 1:
        raise UserError(f"--lora_alpha={alpha}: expected 1 or more")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora_dropout={dropout}: expected 0 to below 1")


def find_data(
    train_data_path: str | None, eval_data_path: str | None, eval_ratio: float | None
) -> tuple[str, str | None]:
    """Return the flags that name data; without training files, those of the project's samples."""
    if train_data_path is not None:
        return train_data_path, eval_data_path
    logger.info(f"no --train_data_path: using the project's sample {SAMPLE_TRAIN_PATH}")
    return SAMPLE_TRAIN_PATH, eval_data_path or (SAMPLE_EVAL_PATH if eval_ratio is None else None)
