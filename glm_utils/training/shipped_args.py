"""The TrainingArguments files that ship with the project, one per family: which is taken, and not the other one's."""

from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.early_checks import project_path
from glm_utils.family import FAMILIES, Family
from glm_utils.training.training_args import TrainArgsFile, read_train_args


def shipped_args(family: Family) -> TrainArgsFile:
    """Read the file that ships for a family, and say so."""
    path = project_path(family.train_args_json)
    logger.info(f"no --train_args_json: taking {path}, which ships for {family.title}")
    return read_train_args(path)


def check_args_family(args_file: TrainArgsFile, family: Family, base: str) -> None:
    """Refuse the file that ships for another family; warn of a copy of it that still writes to that one's output_dir.

    Args:
        args_file: The file that was given.
        family: The base's family.
        base: The base, for the message.

    Raises:
        UserError: It is another family's.
    """
    output_dir = args_file.values["output_dir"]
    for other in FAMILIES:
        if other.train_args_json == family.train_args_json:
            continue
        if args_file.path.name == other.train_args_json:
            raise UserError(
                f"{args_file.path}: ships for {other.title}, but the base {base} is {family.title}. Give "
                f"--train_args_json {family.train_args_json}, or a copy with a name and an output_dir of its own"
            )
        if Path(output_dir).name.startswith(Path(other.train_args_json).stem):
            logger.warning(
                f"{args_file.at('output_dir')} is {output_dir}, named after {other.title}, but the base {base} is "
                f"{family.title}"
            )
