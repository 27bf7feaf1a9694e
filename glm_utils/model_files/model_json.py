"""JSON files of models and adapters: plain values only, and how a message quotes them. Needs no torch."""

import codecs
import math
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.files import download_again, read_json_object

MAX_JSON_BYTES = 16_000_000
MAX_DEPTH = 32  # of lists and objects in each other; json itself gives up near 1,000


def read_model_json(path: Path, byte_order_mark: bool = True) -> dict:
    """Read a JSON file of a model directory; its values are plain: finite numbers, encodable texts, little nesting.

    Args:
        path: The file.
        byte_order_mark: Whether it may begin with one; transformers, where it reads the file too, does not accept it.

    Raises:
        UserError: The file is missing, broken, too large, or holds another value.
    """
    if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,} of JSON")
    found = read_json_object(path)
    if not byte_order_mark and path.read_bytes().startswith(codecs.BOM_UTF8):
        raise UserError(f"{path}:1: begins with a byte order mark. Save it as UTF-8 without one")
    pending: list[tuple[str, object, int]] = [(key, value, 1) for key, value in found.items()]
    while pending:
        key, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{path}: {shown(key)} is nested more than {MAX_DEPTH} deep. {download_again(path)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {shown(key)} is {value}, expected a finite number. {download_again(path)}")
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        texts = [key, *value] if isinstance(value, dict) else [key, value]
        if any(isinstance(text, str) and not text.isascii() and not _is_unicode(text) for text in texts):
            raise UserError(f"{path}: {shown(key)} holds half a character (a lone surrogate). {download_again(path)}")
        pending += [(f"{key}.{name}" if depth == 1 else key, item, depth + 1) for name, item in inner]
    return found


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Return a value of a file for a message: on one line, control characters escaped, shortened."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_config(checkpoint_dir: Path) -> dict:
    """Read config.json of a model directory.

    Raises:
        UserError: It is missing or broken. If the directory is a LoRA adapter, the message names its base.
    """
    config_path, adapter_config_path = checkpoint_dir / "config.json", checkpoint_dir / "adapter_config.json"
    if config_path.is_file():
        return read_model_json(config_path)
    if adapter_config_path.is_file():
        base = read_model_json(adapter_config_path).get("base_model_name_or_path")
        raise UserError(f"{checkpoint_dir}: a LoRA adapter, not a base model. Give its base: {shown(base)}")
    raise UserError(f"{config_path} is missing: not a model directory. Give a complete checkpoint directory")
