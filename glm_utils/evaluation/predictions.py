"""generated_predictions.jsonl: one line per answer, in the shapes that LLaMA-Factory and the P-tuning evaluation read.

LLaMA-Factory writes and reads prompt, predict and label; the evaluation published with the P-tuning code reads
predict and labels. A line holds all four.
"""

from collections.abc import Sequence
from pathlib import Path

from glm_utils.data import Example
from glm_utils.evaluation.probe import ProbeQuestion
from glm_utils.inference.batch import Answer
from glm_utils.visible_text import json_line

AFTER_NAME, BEFORE_NAME = "generated_predictions.jsonl", "generated_predictions_before.jsonl"
PROBE_NAME = "probe_predictions.jsonl"


def write_predictions(path: Path, examples: Sequence[Example], answers: Sequence[Answer]) -> None:
    """Write one model's answers.

    Args:
        path: The file.
        examples: What was asked; the label is empty where there is no reference answer.
        answers: In the same order.
    """
    _write_lines(
        path,
        (
            {
                "prompt": example.query,
                "predict": answer.text,
                "label": example.answer,
                "labels": example.answer,
                "num_tokens": answer.num_tokens,
                "ended": answer.ended,
            }
            for example, answer in zip(examples, answers, strict=True)
        ),
    )


def write_probe(
    path: Path, questions: Sequence[ProbeQuestion], before: Sequence[Answer], after: Sequence[Answer]
) -> None:
    """Write both models' answers to the probe, side by side."""
    _write_lines(
        path,
        (
            {
                "kind": question.kind,
                "language": question.language,
                "prompt": question.example.query,
                "label": question.example.answer,
                "before": old.text,
                "after": new.text,
            }
            for question, old, new in zip(questions, before, after, strict=True)
        ),
    )


def _write_lines(path: Path, rows) -> None:
    """Write objects as JSON lines."""
    path.write_text("".join(json_line(row) + "\n" for row in rows), encoding="utf-8")
