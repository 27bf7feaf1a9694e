"""How long a prompt and an answer may be: limits that training and evaluation share."""

from dataclasses import dataclass
from typing import Literal

from glm_utils.cli import UserError

TruncatedAnswers = Literal["cut_and_end", "cut", "drop"]


@dataclass(frozen=True)
class EncodingLimits:
    """Limits of the prompt and the answer.

    Attributes:
        max_input_length: Longest prompt, in tokens, special tokens included.
        max_output_length: Longest answer, in tokens, end token included.
        truncated_answers: What becomes of a longer answer. cut_and_end: it is truncated, and its end token is trained
            behind the cut; cut: it is truncated and has no end token, so that no model learns to stop in the middle
            of an answer; drop: its example is left out.
    """

    max_input_length: int
    max_output_length: int
    truncated_answers: TruncatedAnswers = "cut_and_end"

    def __post_init__(self) -> None:
        for name in ("max_input_length", "max_output_length"):
            if getattr(self, name) < 2:
                raise UserError(f"--{name}={getattr(self, name)}: at least 2 tokens are needed")
