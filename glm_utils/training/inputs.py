"""What train_qlora.py checks and reads before torch is imported: flags, the JSON file, data."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from loguru import logger

from glm_utils.cli import UserError, check_minimums
from glm_utils.data import Example, read_examples
from glm_utils.data.forms import Columns
from glm_utils.early_checks import project_path
from glm_utils.hub import check_hub
from glm_utils.limits import EncodingLimits
from glm_utils.training.argument_keys import SEEDS
from glm_utils.training.argument_rules import patience_settings
from glm_utils.training.lora_flags import check_init_apart, resolve_lora_flags
from glm_utils.training.training_args import TrainArgsFile, read_train_args

SAMPLE_TRAIN_PATH, SAMPLE_EVAL_PATH = "data/train.jsonl", "data/dev.jsonl"


@dataclass(frozen=True)
class RunInputs:
    """What the flags name besides the base model, read and checked.

    Attributes:
        arguments: The script's flags by name, those of LoRA and its base resolved.
        limits: Limits of the prompt and the answer.
        data_paths: Data files under "train" and, optionally, "eval".
        examples: Their examples under the same keys.
        args_file: The TrainingArguments file; None: the one shipped for the base's family.
    """

    arguments: dict
    limits: EncodingLimits
    data_paths: dict[str, Path]
    examples: dict[str, list[Example]]
    args_file: TrainArgsFile | None


def read_inputs(arguments: dict) -> RunInputs:
    """Read and check what the flags of train_qlora.py name; of the base model only that it is there.

    Args:
        arguments: The flags by name.

    Raises:
        UserError: A flag, the JSON file or the data is wrong.
    """
    check_hub(arguments["hub"])
    arguments = resolve_lora_flags(arguments)
    flags = SimpleNamespace(**arguments)
    if flags.seed is not None and flags.seed not in SEEDS:
        raise UserError(f"--seed {flags.seed}: expected {SEEDS}")
    check_minimums(arguments, {"early_stopping_patience": 1})
    limits = EncodingLimits(flags.max_input_length, flags.max_output_length, flags.prompt_text)
    args_file = read_train_args(project_path(flags.train_args_json)) if flags.train_args_json else None
    if args_file:
        check_init_apart(flags.init_lora_path, args_file.values["output_dir"])
        patience_settings(args_file, flags.early_stopping_patience)
    data_paths = find_data(flags.train_data_path, flags.eval_data_path)
    columns = Columns(flags.prompt_column, flags.response_column, flags.history_column, flags.sheet)
    examples = {name: read_examples(path, columns=columns) for name, path in data_paths.items()}
    if flags.evaluate_after and "eval" not in data_paths:
        raise UserError("--evaluate_after true: no evaluation data. Give --eval_data_path")
    if flags.early_stopping_patience and "eval" not in data_paths:
        raise UserError(
            f"--early_stopping_patience {flags.early_stopping_patience}: no evaluation data. Give --eval_data_path"
        )
    return RunInputs(arguments, limits, data_paths, examples, args_file)


def find_data(train_data_path: str | None, eval_data_path: str | None) -> dict[str, Path]:
    """Return the data files under "train" and, optionally, "eval"; without a training file, the project's samples."""
    if train_data_path is None:
        logger.info(f"no --train_data_path: using the project's sample {SAMPLE_TRAIN_PATH}")
        train_data_path, eval_data_path = SAMPLE_TRAIN_PATH, eval_data_path or SAMPLE_EVAL_PATH
    given = {"train": train_data_path, "eval": eval_data_path}
    return {name: project_path(path) for name, path in given.items() if path}
