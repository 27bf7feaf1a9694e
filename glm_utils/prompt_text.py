"""The text in front of every question that a training recorded beside its adapter. Needs no torch."""

from pathlib import Path

from glm_utils.files import peek_json_object
from glm_utils.run_record import RUN_CONFIG_NAME


def recorded_prompt_text(directory: Path) -> str | None:
    """Return the prompt_text with which the adapter in a directory was trained; None: nothing was recorded."""
    arguments = peek_json_object(directory / RUN_CONFIG_NAME).get("arguments")
    text = arguments.get("prompt_text") if isinstance(arguments, dict) else None
    return text if isinstance(text, str) else None
