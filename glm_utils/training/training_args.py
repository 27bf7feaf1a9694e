"""Read a TrainingArguments JSON file, also one written for transformers 4.30, and check it without transformers.

Old keys keep their meaning and log one warning each. Unknown keys, wrong types, numbers out of range and settings that
this project does not support are errors that name the line. What only transformers knows, build_args.py checks.
"""

import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError, nearest, type_in_words, union_members
from glm_utils.files import read_text
from glm_utils.training.argument_keys import (
    ARGUMENTS,
    CHECKPOINTING_KEYS,
    DROPPED_KEYS,
    FLAGS,
    KEPT_KEYS,
    OTHER_KEYS,
    RENAMED_KEYS,
    Argument,
)
from glm_utils.training.argument_rules import check_together
from glm_utils.training.json_faults import as_json, parse_settings

PROJECT_DEFAULTS = {
    "report_to": "tensorboard",
    "remove_unused_columns": False,
    "include_num_input_tokens_seen": "no",  # LoraTrainer counts; the Trainer's way waits for the GPU in every step
    "logging_nan_inf_filter": False,  # it waits for the GPU in every step, and hides a diverged loss
}
REMEDY = "Give a TrainingArguments JSON file in UTF-8, e.g. chatGLM2_6B_QLoRA.json"
PATH_KEYS = ("output_dir", "logging_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class TrainArgsFile:
    """A checked TrainingArguments file.

    Attributes:
        path: The file.
        text: Its text, to name lines.
        values: Keyword arguments for TrainingArguments, but for activation checkpointing, see below.
        overwrite_output_dir: Whether an earlier run in output_dir may be replaced (a key of transformers 4.30).
        logging_dir: Directory of the TensorBoard files (likewise); None: <output_dir>/runs.
        checkpointing: Whether the file turns activation checkpointing on or off; None: it does not say.
        checkpointing_kwargs: Its settings.
        checkpointing_key: The key that says so; None: neither of both.
    """

    path: Path
    text: str
    values: dict
    overwrite_output_dir: bool = False
    logging_dir: str | None = None
    checkpointing: bool | None = None
    checkpointing_kwargs: dict | None = None
    checkpointing_key: str | None = None

    def at(self, key: str) -> str:
        """Return `file:line: key`."""
        return _at(self.path, self.text, key)


def _at(path: Path, text: str, key: str) -> str:
    """Return `file:line: key` of a key of a JSON text."""
    match = re.search(rf"{re.escape(json.dumps(key, ensure_ascii=False))}\s*:", text)
    return f"{path}:{text.count(chr(10), 0, match.start()) + 1 if match else 1}: {key}"


def read_train_args(path: Path) -> TrainArgsFile:
    """Read, translate and check a TrainingArguments JSON file.

    Raises:
        UserError: A missing or broken file, an unknown or unsupported key, a value of the wrong type or out of range,
            keys that contradict each other, or no output_dir.
    """
    text = read_text(path, REMEDY)
    file = TrainArgsFile(path, text, parse_settings(text, path, REMEDY))
    options = _translate(file)
    for key, value in file.values.items():
        if key not in ARGUMENTS:
            raise UserError(f"{file.at(key)} is not a TrainingArguments key. {_where_it_belongs(key)}")
        _check_value(file, key, value, ARGUMENTS[key])
    if not file.values.get("output_dir"):
        raise UserError(f'{path}: output_dir is missing. Add "output_dir": "saved_files/NAME"')
    options |= _take_checkpointing(file)
    for key, value in PROJECT_DEFAULTS.items():
        file.values.setdefault(key, value)
    checked = TrainArgsFile(path, text, file.values, **options)
    check_together(checked)
    return checked


def _where_it_belongs(key: str) -> str:
    """Say what to do with an unknown key; 120 known ones would be too many to list."""
    if key in FLAGS:
        return f"It is a flag: give --{key} on the command line, and delete the line"
    known = [*ARGUMENTS, *OTHER_KEYS]
    hint = nearest(key, known, "keys")
    return hint if hint.startswith("Did you mean") else "Delete the line, or see docs/training.md"


def _translate(file: TrainArgsFile) -> dict:
    """Translate the keys of transformers 4.30 in place, one warning each; return TrainArgsFile's other fields."""
    options: dict = {}
    values = file.values
    for key in [key for key in values if key in OTHER_KEYS]:
        where = file.at(key)
        if key in RENAMED_KEYS:
            new, change = RENAMED_KEYS[key]
            if new in values:
                raise UserError(f"{where} and its new name {new} are both given. Keep {new}")
            value = values.pop(key)
            values[new] = change(value) if change else value
            logger.warning(f"{where} is now {new}: taken as {as_json(values[new])}")
        elif key == "warmup_ratio":
            ratio = values.pop(key)
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
                raise UserError(f"{where} is {as_json(ratio)}, expected a number from 0 to 1")
            # as before, warmup_steps above 0 wins; a ratio of 1 would now mean one step, so stay below
            values["warmup_steps"] = values.get("warmup_steps") or min(ratio, 1 - 1e-9)
            logger.warning(f"{where} is now warmup_steps, a ratio if below 1: taken as {values['warmup_steps']}")
        elif key == "adafactor":
            values.update({"optim": "adafactor"} if values.pop(key) else {})
            logger.warning(f"{where} is now optim: taken as {values.get('optim', 'the default')}")
        elif key in KEPT_KEYS:
            options[key] = values.pop(key)
            _check_value(file, key, options[key], Argument(KEPT_KEYS[key]))
            logger.warning(f"{where} was removed from transformers; it still works here: {as_json(options[key])}")
        else:
            values.pop(key)
            logger.warning(f"{where} was removed and has no effect: {DROPPED_KEYS[key]}. Delete the line")
    if values.get("optim") == "adamw_hf":
        values["optim"] = "adamw_torch"
        logger.warning(f"{file.at('optim')} adamw_hf was removed: taken as adamw_torch, the same method")
    return options


def _take_checkpointing(file: TrainArgsFile) -> dict:
    """Take the keys of activation checkpointing, which has two names, out of the values; return fields of the file.

    Raises:
        UserError: Both names are given.
    """
    given = [key for key in CHECKPOINTING_KEYS if {key, f"{key}_kwargs"} & file.values.keys()]
    if len(given) > 1:
        raise UserError(f"{file.at(given[1])} and its new name {given[0]} are both given. Keep {given[0]}")
    if not given:
        return {}
    return {
        "checkpointing_key": given[0],
        "checkpointing": file.values.pop(given[0], None),
        "checkpointing_kwargs": file.values.pop(f"{given[0]}_kwargs", None),
    }


def _check_value(file: TrainArgsFile, key: str, value: object, argument: Argument) -> None:
    """Refuse a JSON value of the wrong type or out of range, and one that turns on what is not supported."""
    kinds: set = set()
    for member in union_members(argument.kind):
        kind = typing.get_origin(member) or member
        kinds |= {int, float} if kind is float else {kind}
    found = f"{file.at(key)} is {as_json(value)}"
    if type(value) not in kinds:
        raise UserError(f"{found}, expected {type_in_words(argument.kind)}")
    if value and argument.refused:
        raise UserError(f"{file.at(key)} is not supported: {argument.refused}")
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise UserError(f"{found}, expected a list of texts")
    if argument.range and type(value) is not bool and isinstance(value, int | float) and value not in argument.range:
        raise UserError(f"{found}, expected {argument.range}")
    if argument.choices and isinstance(value, str) and value not in argument.choices:
        hint = nearest(value, argument.choices, "values")
        raise UserError(f"{found}, which is no such value. {hint}")
    if key in PATH_KEYS and isinstance(value, str) and not value.isprintable():
        raise UserError(f"{found}: a backslash begins an escape in JSON. Write / or \\\\ in paths")
