"""What train_qlora.py checks and reads before torch is imported: flags, the JSON file, data."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from loguru import logger

from glm_utils.cli import UserError, check_minimums
from glm_utils.data.find_files import find_files, find_parts
from glm_utils.data.forms import Columns
from glm_utils.data.training_data import TrainingData, read_training_data
from glm_utils.early_checks import local_model_dir, project_path
from glm_utils.family import FAMILIES, Family
from glm_utils.hub import check_hub
from glm_utils.limits import EncodingLimits
from glm_utils.prompt_text import check_only_one, check_prompt_text
from glm_utils.report_file import check_report_path
from glm_utils.training.argument_keys import SEEDS
from glm_utils.training.argument_rules import patience_settings
from glm_utils.training.lora_flags import DEFAULTS, check_base_dir, check_init_apart, resolve_lora_flags
from glm_utils.training.shipped_args import check_args_family
from glm_utils.training.training_args import TrainArgsFile, read_train_args

SAMPLE_TRAIN_PATH, SAMPLE_EVAL_PATH = "data/train.jsonl", "data/dev.jsonl"


@dataclass(frozen=True)
class RunInputs:
    """What the flags name besides the base model, read and checked.

    Attributes:
        arguments: The script's flags by name, those of LoRA and its base resolved.
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
    check_hub(arguments["hub"])
    given, arguments = arguments, resolve_lora_flags(arguments)
    flags = SimpleNamespace(**arguments)
    if flags.seed is not None and flags.seed not in SEEDS:
        raise UserError(f"--seed {flags.seed}: expected {SEEDS}")
    check_minimums(arguments, {"early_stopping_patience": 1})
    limits = EncodingLimits(flags.max_input_length, flags.max_output_length, flags.truncated_answers)
    check_prompt_text(flags.prompt_text)
    args_file = read_train_args(project_path(flags.train_args_json)) if flags.train_args_json else None
    family = check_base(given, flags, args_file)
    if args_file:
        check_init_apart(flags.init_lora_path, args_file.values["output_dir"])
        patience_settings(args_file, flags.early_stopping_patience)
    columns = Columns(flags.prompt_column, flags.response_column, flags.history_column, flags.sheet)
    train_data_path, eval_data_path = find_data(flags.train_data_path, flags.eval_data_path, flags.eval_ratio)
    if flags.output_json is not None:
        data_paths = [path for part in find_parts(train_data_path) for path in part.paths]
        data_paths += find_files(eval_data_path) if eval_data_path else []
        check_report_path(flags.output_json, [*data_paths, *files_of(flags, args_file)])
    data = read_training_data(train_data_path, eval_data_path, flags.eval_ratio, columns)
    for name, value in (("evaluate_after", "true"), ("early_stopping_patience", flags.early_stopping_patience)):
        if getattr(flags, name) and not data.has_eval:
            raise UserError(f"--{name} {value}: no evaluation data. Give --eval_data_path or --eval_ratio")
    return RunInputs(arguments, limits, data, args_file, family)


def files_of(flags: SimpleNamespace, args_file: TrainArgsFile | None) -> list[Path]:
    """Return the files that a run reads beside its data, as far as they are there."""
    found = [args_file.path] if args_file else [project_path(family.train_args_json) for family in FAMILIES]
    for directory in (flags.model_name_or_path, flags.init_lora_path):
        found += project_path(directory).glob("*") if directory else []  # none if it is the name of a hub
    if args_file:
        output_dir = Path(args_file.values["output_dir"]).expanduser()
        found += [output_dir / name for name in ("run_config.json", "trainer_state.json", "adapter_config.json")]
        found += output_dir.glob("checkpoint-*/*")
    return found


def check_base(given: dict, flags: SimpleNamespace, args_file: TrainArgsFile | None) -> Family | None:
    """Check that the base is there, and what other flags say of it; return its family, None if only a download tells.

    Args:
        given: The flags as they were given.
        flags: The same with what was left out.
        args_file: The TrainingArguments file; None: the family's.

    Raises:
        UserError: It is not there, has a prompt_text of its own beside the flag's, or the JSON file ships for another
            family.
    """
    name, init = flags.model_name_or_path, flags.init_lora_path
    family = check_base_dir(name, None if given["model_name_or_path"] else init)
    directory = local_model_dir(name)
    if directory and init is None:
        check_only_one(flags.prompt_text, directory)
    if args_file and family:
        check_args_family(args_file, family, name)
    if name == DEFAULTS["model_name_or_path"] and init is None:
        logger.info(f"base model: {name}, the default of --model_name_or_path")
    return family


def find_data(
    train_data_path: str | None, eval_data_path: str | None, eval_ratio: float | None
) -> tuple[str, str | None]:
    """Return the flags that name data; without training files, those of the project's samples."""
    if train_data_path is not None:
        return train_data_path, eval_data_path
    logger.info(f"no --train_data_path: using the project's sample {SAMPLE_TRAIN_PATH}")
    return SAMPLE_TRAIN_PATH, eval_data_path or (SAMPLE_EVAL_PATH if eval_ratio is None else None)
