"""What train_qlora.py recorded beside an adapter, checked. No torch."""

from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.model_files.links import check_inside
from glm_utils.model_files.model_json import read_model_json, shown
from glm_utils.run_record import RUN_CONFIG_NAME

RECORDED = {  # what is read of the run_config.json of a training: its kind, and the lowest number
    ("identity", "base_fingerprint"): (str, None),
    ("arguments", "compute_dtype"): (str, None),
    ("arguments", "prompt_text"): (str, None),
    ("arguments", "max_input_length"): (int, 1),
    ("arguments", "max_output_length"): (int, 1),
    ("training_args", "use_cpu"): (bool, None),
}


def read_training_record(adapter_dir: Path) -> dict:
    """Return what train_qlora.py recorded beside an adapter, empty if it did not.

    Raises:
        UserError: run_config.json is a link out of the directory, no JSON object, or a value is of another type.
    """
    path = adapter_dir / RUN_CONFIG_NAME
    check_inside(path)
    record = read_model_json(path) if path.is_file() else {}
    remedy = "Copy it again from the training's directory, or delete it: then the base is taken to be unchanged"
    for (section, key), (kind, lowest) in RECORDED.items():
        part = record.get(section, {})
        if not isinstance(part, dict):
            raise UserError(f"{path}: {section} is {shown(part)}, expected an object. {remedy}")
        value = part.get(key)
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not (is_right and (lowest is None or value >= lowest)):
            expected = {str: "text", int: f"a whole number of at least {lowest}", bool: "true or false"}[kind]
            raise UserError(f"{path}: {section}.{key} is {shown(value)}, expected {expected}. {remedy}")
    return record
