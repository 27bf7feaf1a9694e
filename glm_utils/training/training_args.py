"""Read and check a TrainingArguments JSON file before anything runs, including one written for transformers 4.30.

Old keys keep their meaning and log one warning each; unknown keys and wrong types are errors.
Source: transformers 4.30 and 5.23, `TrainingArguments`.
"""

import dataclasses
import json
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path

from loguru import logger
from transformers import TrainingArguments

from glm_utils.cli import UserError, nearest, type_in_words, union_members
from glm_utils.files import parse_json_object, read_text

RENAMED_KEYS: dict[str, tuple[str, Callable | None]] = {
    "evaluation_strategy": ("eval_strategy", None),
    "no_cuda": ("use_cpu", None),
    "group_by_length": ("train_sampling_strategy", lambda value: "group_by_length" if value else "random"),
    "include_inputs_for_metrics": ("include_for_metrics", lambda value: ["inputs"] if value else []),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", None),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", None),
    "torchdynamo": ("torch_compile_backend", None),
    "push_to_hub_token": ("hub_token", None),
    "push_to_hub_model_id": ("hub_model_id", None),
}
DROPPED_KEYS = {
    "save_safetensors": "adapters and checkpoints are always safetensors",
    **dict.fromkeys(("half_precision_backend", "fp16_backend", "fp16_opt_level"), "torch's own autocast is used"),
    **dict.fromkeys(("tpu_num_cores", "tpu_metrics_debug", "mp_parameters", "ray_scope"), "it is not supported here"),
    **dict.fromkeys(("use_mps_device", "use_ipex", "xpu_backend"), "the device is found without it"),
    **dict.fromkeys(("jit_mode_eval", "past_index", "use_legacy_prediction_loop"), "evaluation does not use it"),
    "push_to_hub_organization": "hub_model_id holds it",
}
REFUSED_KEYS = {  # transformers would accept these and silently spoil the result
    "label_smoothing_factor": "the Trainer would compare each position with its own token, not with the next one",
    **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), "the LoRA weights would be rounded before they are saved"),
    "enable_jit_checkpoint": "it writes half-trained adapters as if finished; SIGTERM saves a checkpoint without it",
    "use_liger_kernel": "it does not support ChatGLM; fused kernels are used without it",
}
KEPT_KEYS = {"overwrite_output_dir": bool, "logging_dir": str | None}
PROJECT_DEFAULTS = {
    "report_to": "tensorboard",
    "remove_unused_columns": False,
    "include_num_input_tokens_seen": "no",  # LoraTrainer counts; the Trainer's way waits for the GPU in every step
    "logging_nan_inf_filter": False,  # it waits for the GPU in every step, and hides a diverged loss
}
REMEDY = "Give a TrainingArguments JSON file in UTF-8, e.g. chatGLM2_6B_QLoRA.json"
JSON_TYPES = (bool, int, float, str, list, dict, type(None))


@dataclasses.dataclass(frozen=True)
class TrainArgsFile:
    """A checked TrainingArguments file.

    Attributes:
        path: The file.
        values: Keyword arguments for today's TrainingArguments.
        overwrite_output_dir: Whether an earlier run in output_dir may be replaced (a key of transformers 4.30).
        logging_dir: Directory of the TensorBoard files (likewise); None: <output_dir>/runs.
        checkpointing: Whether the file turns activation checkpointing on or off; None: it does not say.
    """

    path: Path
    values: dict
    overwrite_output_dir: bool = False
    logging_dir: str | None = None
    checkpointing: bool | None = None

    def build(self, **overrides: object) -> TrainingArguments:
        """Make the TrainingArguments.

        Args:
            **overrides: Values that replace the file's.

        Raises:
            UserError: Settings that contradict each other.
        """
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        try:
            return TrainingArguments(**{**self.values, **overrides})
        except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
            raise UserError(f"{self.path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Source:
    """A JSON file and its text, to find the line of a key."""

    path: Path
    text: str

    def at(self, key: str) -> str:
        """Return `file:line: key`."""
        match = re.search(rf'"{re.escape(key)}"\s*:', self.text)
        return f"{self.path}:{self.text.count(chr(10), 0, match.start()) + 1 if match else 1}: {key}"


def read_train_args(path: Path) -> TrainArgsFile:
    """Read, translate and check a TrainingArguments JSON file.

    Raises:
        UserError: A missing or broken file, an unknown or refused key, a value of the wrong type, or no output_dir.
    """
    source, values = _read_source(path)
    annotations = typing.get_type_hints(TrainingArguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    options = _translate(source, values, known)
    for key, value in values.items():
        if key not in known:
            hint = nearest(key, [*known, *RENAMED_KEYS, *KEPT_KEYS, "warmup_ratio"], "keys")
            raise UserError(f"{source.at(key)} is not a TrainingArguments key. {hint}")
        _check_type(source, key, value, annotations[key])
        if value and key in REFUSED_KEYS:
            raise UserError(f"{source.at(key)} is not supported: {REFUSED_KEYS[key]}. Delete the line")
    if not values.get("output_dir"):
        raise UserError(f'{path}: output_dir is missing. Add "output_dir": "saved_files/NAME"')
    for key, value in PROJECT_DEFAULTS.items():
        values.setdefault(key, value)
    return TrainArgsFile(path, values, **options)


def _read_source(path: Path) -> tuple[_Source, dict]:
    """Read a JSON file; return its text and its parsed object."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: {key} is given twice. Keep one of them")
        return dict(pairs)

    text = read_text(path, REMEDY)
    return _Source(path, text), parse_json_object(text, path, REMEDY, object_pairs_hook=unique)


def _translate(source: _Source, values: dict, known: set[str]) -> dict:
    """Translate the keys of transformers 4.30 in place, one warning each; return TrainArgsFile's other fields."""
    options: dict = {}
    for key in [key for key in values if key not in known]:
        where = source.at(key)
        if key in RENAMED_KEYS:
            new, change = RENAMED_KEYS[key]
            if new in values:
                raise UserError(f"{where} and its new name {new} are both given. Keep {new}")
            value = values.pop(key)
            values[new] = change(value) if change else value
            logger.warning(f"{where} is now {new}: taken as {json.dumps(values[new])}")
        elif key == "warmup_ratio":
            ratio = values.pop(key)
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
                raise UserError(f"{where} is {json.dumps(ratio)}, expected a number from 0 to 1")
            # as before, warmup_steps above 0 wins; a ratio of 1 would now mean one step, so stay below
            values["warmup_steps"] = values.get("warmup_steps") or min(ratio, 1 - 1e-9)
            logger.warning(f"{where} is now warmup_steps, a ratio if below 1: taken as {values['warmup_steps']}")
        elif key == "adafactor":
            values.update({"optim": "adafactor"} if values.pop(key) else {})
            logger.warning(f"{where} is now optim: taken as {values.get('optim', 'the default')}")
        elif key in KEPT_KEYS:
            options[key] = values.pop(key)
            _check_type(source, key, options[key], KEPT_KEYS[key])
            logger.warning(f"{where} was removed from transformers; it still works here: {json.dumps(options[key])}")
        elif key in DROPPED_KEYS:
            values.pop(key)
            logger.warning(f"{where} was removed and has no effect: {DROPPED_KEYS[key]}. Delete the line")
    if values.get("optim") == "adamw_hf":
        values["optim"] = "adamw_torch"
        logger.warning(f"{source.at('optim')} adamw_hf was removed: taken as adamw_torch, the same method")
    options["checkpointing"] = _rename_checkpointing(source, values, known)
    return options


def _rename_checkpointing(source: _Source, values: dict, known: set[str]) -> bool | None:
    """Rename to the installed transformers' key, on by default; return what the file says, None if nothing."""
    new, old = sorted(("activation_checkpointing", "gradient_checkpointing"), key=lambda name: name not in known)
    for suffix in ("", "_kwargs"):
        if old + suffix in values:
            values[new + suffix] = values.pop(old + suffix)
            logger.warning(f"{source.at(old + suffix)} is now {new}{suffix}")
    given = values.get(new)
    if values.setdefault(new, True):
        values[f"{new}_kwargs"] = {"use_reentrant": False, **(values.get(f"{new}_kwargs") or {})}
    return given


def _check_type(source: _Source, key: str, value: object, annotation: object) -> None:
    """Refuse a JSON value of the wrong type; an enum is written as a string, and an int is valid for a float."""
    kinds: set = set()
    for member in union_members(annotation):
        kind = typing.get_origin(member) or member
        kinds |= {int, float} if kind is float else {kind} if kind in JSON_TYPES else {str, dict}
    if type(value) not in kinds:
        raise UserError(f"{source.at(key)} is {json.dumps(value)}, expected {type_in_words(annotation)}")
