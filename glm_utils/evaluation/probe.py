"""The forgetting probe: general questions with reference answers, written for this project (data/probe.jsonl).

A model that has forgotten finds good answers less likely than before, whether or not it still writes some.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_utils.cli import UserError, nearest
from glm_utils.data import Example
from glm_utils.family import PROJECT_DIR
from glm_utils.files import parse_json_object, read_text

PROBE_PATH = PROJECT_DIR / "data" / "probe.jsonl"
KINDS = (
    "travel",
    "health",
    "law",
    "code",
    "arithmetic",
    "translation",
    "summary",
    "opinion",
    "common sense",
    "refusal",
)
LANGUAGE_TITLES = {"zh": "all in Chinese", "en": "all in English"}  # in the report
KEYS = ("kind", "language", "instruction", "output")
SUBJECTS_OF_2023 = (  # those of the questions in the README of the 2023 project
    "我打算去黄山玩三天，请帮我安排一下行程。",
    "大众汽车有哪些车型，各有什么特点？",
    "下雨天骑电动车要注意什么？",
)
REMEDY = "data/README.md describes the probe; restore the file, e.g. git checkout data/probe.jsonl"


@dataclass(frozen=True)
class ProbeQuestion:
    """A general question.

    Attributes:
        kind: One of KINDS.
        language: zh or en.
        example: The question and its reference answer.
    """

    kind: str
    language: str
    example: Example


def read_probe(path: Path = PROBE_PATH) -> list[ProbeQuestion]:
    """Read the probe.

    Raises:
        UserError: The file is missing or broken, with the line.
    """
    lines = read_text(path, REMEDY).splitlines()
    return [_parse_question(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_question(line: str, path: Path, number: int) -> ProbeQuestion:
    """Check one line of the probe."""
    row, where = parse_json_object(line, path, REMEDY, first_line=number), f"{path}:{number}"
    for key in KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{where}: no text under {key!r}. {nearest(key, row, 'keys')}")
    for key, known in (("kind", KINDS), ("language", tuple(LANGUAGE_TITLES))):
        if row[key] not in known:
            raise UserError(f"{where}: {key} {row[key]!r}. {nearest(row[key], known, f'{key}s')}")
    return ProbeQuestion(row["kind"], row["language"], Example(row["instruction"], row["output"], (), where))


def thin_out(questions: Sequence[ProbeQuestion], size: int) -> list[ProbeQuestion]:
    """Return a part of the probe in which every kind has about the same share; the first ones of each kind.

    Args:
        questions: The probe.
        size: How many; the probe's own size or more: all.
    """
    rank: dict[str, int] = {}
    order = []
    for index, question in enumerate(questions):
        rank[question.kind] = rank.get(question.kind, 0) + 1
        order.append((rank[question.kind], index))
    kept = sorted(index for _, index in sorted(order)[:size])
    return [questions[index] for index in kept]
