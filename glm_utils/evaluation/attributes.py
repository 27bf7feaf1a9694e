"""Prompts that list attributes ("type#skirt*color#white", ADGEN): which values the answer takes up, which it invents.

Everything is read from the data that is judged: no list of garments stands here, but for what advertising copy is
recognized by.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm_utils.evaluation.metrics import shares

PAIR_END, KEY_END = "*", "#"
LEAST_SHARE = 0.5  # of the prompts must list attributes
# Copy may call any garment plain or slimming: only what a garment visibly has tells that an answer is wrong.
TELLING_KEYS, TELLING_ENDINGS = ("颜色", "材质"), ("型", "长")
NOT_TELLING = ("版型", "类型")
COPY_MARKERS = (
    "这款", "设计", "面料", "版型", "修身", "显瘦", "时尚", "百搭", "气质", "穿着", "剪裁", "上身", "衣身", "领口",
    "袖口", "腰身", "身材", "肌肤", "优雅", "搭配", "亲肤", "透气", "女性", "款式",
)  # fmt: skip
LEAST_MARKERS = 3


@dataclass(frozen=True)
class AttributeVocabulary:
    """The values that a data file names.

    Attributes:
        values: All values of two or more characters.
        telling: Those of colors, materials, collars and the like that stand under one key only.
    """

    values: frozenset[str]
    telling: frozenset[str]


def parse_attributes(query: str) -> list[tuple[str, str]]:
    """Return the (key, value) pairs of a prompt; empty where it does not list attributes."""
    pairs = [part.split(KEY_END) for part in query.strip().split(PAIR_END)]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        return []
    return [(key, value) for key, value in pairs]


def read_vocabulary(queries: Sequence[str]) -> AttributeVocabulary | None:
    """Collect the values of all prompts; None where the prompts do not list attributes.

    Args:
        queries: All prompts of the data, also those that are not judged.
    """
    parsed = [parse_attributes(query) for query in queries]
    if sum(map(bool, parsed)) < LEAST_SHARE * len(parsed):
        return None
    keys_of: dict[str, set[str]] = {}
    for key, value in (pair for pairs in parsed for pair in pairs):
        if len(value) > 1:
            keys_of.setdefault(value, set()).add(key)
    telling = (value for value, keys in keys_of.items() if len(keys) == 1 and is_telling(next(iter(keys))))
    return AttributeVocabulary(frozenset(keys_of), frozenset(telling))


def is_telling(key: str) -> bool:
    """Return whether a value of this key, in an answer that was not asked for it, is an error."""
    return key not in NOT_TELLING and (key in TELLING_KEYS or key.endswith(TELLING_ENDINGS))


def score_coverage(queries: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Return a row per example of (100 x values of the prompt that the answer holds, values of the prompt)."""
    rows = []
    for query, answer in zip(queries, answers, strict=True):
        values = {value for _, value in parse_attributes(query)}
        rows.append((100 * sum(value in answer for value in values), len(values)))
    return np.array(rows, dtype=float)


def score_unasked(queries: Sequence[str], answers: Sequence[str], vocabulary: AttributeVocabulary) -> np.ndarray:
    """Return a row per example of (100 where the answer names a telling value that was not asked for, 1)."""
    pairs = zip(queries, answers, strict=True)
    return shares(bool(unasked_values(query, answer, vocabulary)) for query, answer in pairs)


def unasked_values(query: str, answer: str, vocabulary: AttributeVocabulary) -> list[str]:
    """Return the telling values that an answer names without being asked.

    Values that were asked for are taken out of the answer first, the longest one first: a garment asked for as a
    bib skirt is no bib that nobody asked for.
    """
    for value in sorted({value for _, value in parse_attributes(query)}, key=len, reverse=True):
        answer = answer.replace(value, "\n")
    return sorted(value for value in vocabulary.telling if value in answer)


def score_advertising(
    questions: Sequence[str], references: Sequence[str], answers: Sequence[str], vocabulary: AttributeVocabulary
) -> np.ndarray:
    """Return a row per question of (100 where the answer has turned into advertising copy, 1).

    It has where it holds LEAST_MARKERS or more different markers (COPY_MARKERS and the data's values) that stand
    neither in the question nor in its reference answer.
    """
    markers = vocabulary.values | set(COPY_MARKERS)
    texts = zip(questions, references, answers, strict=True)
    return shares(
        sum(marker in answer and marker not in question + reference for marker in markers) >= LEAST_MARKERS
        for question, reference, answer in texts
    )
