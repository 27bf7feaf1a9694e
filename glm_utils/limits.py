"""How long a prompt and an answer may be: limits that training and evaluation share."""

from dataclasses import dataclass

from glm_utils.cli import UserError


@dataclass(frozen=True)
class EncodingLimits:
    """Limits of the prompt and the answer.

    Attributes:
        max_input_length: Longest prompt, in tokens, special tokens included.
        max_output_length: Longest answer, in tokens, end token included.
    """

    max_input_length: int
    max_output_length: int

    def __post_init__(self) -> None:
        for name in ("max_input_length", "max_output_length"):
            if getattr(self, name) < 2:
                raise UserError(f"--{name}={getattr(self, name)}: at least 2 tokens are needed")
