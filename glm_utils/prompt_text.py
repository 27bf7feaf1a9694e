"""The text that a training put before every question: where it is recorded, and that there is only one. No torch.

tokenizer_config.json of an adapter or a merged model holds it, and the tokenizer puts it before every question. Older
adapters have it in run_config.json alone.
"""

from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.model_files.links import check_inside
from glm_utils.model_files.model_json import read_model_json, shown

KEY = "prompt_text"


def check_prompt_text(text: str) -> None:
    """Check the value of --prompt_text.

    Raises:
        UserError: Bytes of the command line that are not UTF-8.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"--{KEY} {text!r}: broken UTF-8. Write it in the terminal's encoding")


def recorded_prompt_text(directory: Path) -> str | None:
    """Return what tokenizer_config.json of a model or an adapter records; None: nothing.

    Raises:
        UserError: The file is broken or a link out of the directory, or its value is not a text.
    """
    path = directory / "tokenizer_config.json"
    check_inside(path)
    settings = read_model_json(path) if path.is_file() else {}
    if KEY not in settings:
        return None
    if not isinstance(settings[KEY], str):
        raise UserError(f"{path}: {KEY} is {shown(settings[KEY])}, expected a text, as the training wrote it")
    return settings[KEY]


def adapter_prompt_text(adapter_dir: Path, run_config: dict) -> str | None:
    """Return the text of an adapter's training; None: nothing is recorded.

    Args:
        adapter_dir: The adapter.
        run_config: What its training recorded, checked; empty if it did not.

    Raises:
        UserError: See `recorded_prompt_text`.
    """
    recorded = recorded_prompt_text(adapter_dir)
    return run_config.get("arguments", {}).get(KEY) if recorded is None else recorded


def log_prompt_text(text: str | None) -> None:
    """Say that a text stands before every question, unless there is none."""
    if text:
        logger.info(f"before every question stands the {KEY} of the training: {shown(text)}")


def check_only_one(text: str, base_dir: Path) -> None:
    """Refuse --prompt_text on a base that has a text of its own: one would stand in front of the other.

    Args:
        text: The flag's value; empty: it was not given.
        base_dir: Directory of the base.

    Raises:
        UserError: There are two.
    """
    recorded = recorded_prompt_text(base_dir)
    if text and recorded:
        raise UserError(
            f"--{KEY} {shown(text)}: {base_dir} puts {shown(recorded)} before every question already "
            f"({KEY} of its tokenizer_config.json). Leave --{KEY} out, or train on a base without one"
        )


def agree_on(recorded: dict[str, str], given: str | None) -> str:
    """Return the one text that two models which are compared get before every question.

    Args:
        recorded: What the models record, which may be empty, with the name of the model.
        given: --prompt_text; empty: none at all; None: what is recorded.

    Raises:
        UserError: Different texts are recorded, or a text is given and another one is recorded, unless none is asked
            for.
    """
    texts = {text: name for text, name in recorded.items() if text}
    if given != "" and len({*texts, given or next(iter(texts), "")}) > 1:
        found = " and ".join(f"{shown(text)} for {name}" for text, name in texts.items())
        raise UserError(
            f"{f'--{KEY} {shown(given)}: ' if given else ''}the training put {found} before every question. Both "
            f'models must get one text: leave --{KEY} out, or give --{KEY} "" for none'
        )
    return next(iter(texts), "") if given is None else given
