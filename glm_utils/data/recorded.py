"""The examples that an adapter was trained on, found again by its run_config.json."""

from collections.abc import Sequence
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError, as_list
from glm_utils.data.example import Example
from glm_utils.data.forms import Columns
from glm_utils.data.read import read_data
from glm_utils.data.selection import hold_out, select
from glm_utils.data.shared import warn_of_shared
from glm_utils.run_record import sha256_of_files

MAX_BYTES = 1 << 30  # that are read again


def warn_of_recorded(record: dict, evaluation: Sequence[Example]) -> None:
    """Warn of examples that stand in the files that an adapter was trained on, if those are still what they were.

    Args:
        record: run_config.json of the adapter.
        evaluation: The examples that it is judged by.
    """
    try:
        trained = read_recorded(record)
    except UserError as error:
        logger.info(f"not compared with the training data: {error.message}")
        return
    if trained:
        warn_of_shared(trained, evaluation)


def read_recorded(record: dict) -> Sequence[Example]:
    """Return the examples that a run was trained on; nothing if it did not record them.

    Held-out ones are left out; those that a mixture left are not.

    Args:
        record: Its run_config.json.

    Raises:
        UserError: The files are gone, have changed, are large, or cannot be read.
    """
    arguments, identity = record.get("arguments"), record.get("identity")
    given = arguments.get("train_data_path") if isinstance(arguments, dict) else None
    paths = [Path(name) for name in as_list(given) if isinstance(name, str)] if isinstance(given, str | list) else []
    if not paths or not isinstance(arguments, dict) or not isinstance(identity, dict):
        return []
    try:
        gone = [path for path in paths if not path.is_file()]
        if gone:
            raise UserError(f"{gone[0]} is not there any more")
        if sum(path.stat().st_size for path in paths) > MAX_BYTES:
            raise UserError(f"{paths[0]} is large")
        if sha256_of_files(paths) != identity.get("train_data_sha256"):
            raise UserError(f"{paths[0]} has changed, or another file of it")
    except OSError as error:
        raise UserError(f"{paths[0]} cannot be read") from error
    flags = ("prompt_column", "response_column", "history_column", "sheet")
    named = (arguments[flag] if isinstance(arguments.get(flag), str) else None for flag in flags)
    examples = read_data(paths, columns=Columns(*named)).examples
    ratio, seed = identity.get("eval_ratio"), identity.get("seed")
    if not isinstance(ratio, float) or not 0 < ratio < 1 or not isinstance(seed, int) or not 0 <= seed < 2**32:
        return examples
    return select(examples, hold_out(examples, ratio, seed)[0])
