"""Which scripts the characters of the data belong to, by their names in Unicode: what tells its languages apart."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from glm_utils.data import Example

PART_CHARACTERS = 1_000_000  # about so many are counted at once
MAX_CODES = 0x110000
SCRIPTS = {  # by the first word of a letter's name in Unicode
    "CJK": "Chinese characters",
    "IDEOGRAPHIC": "Chinese characters",
    "HIRAGANA": "Japanese kana",
    "KATAKANA": "Japanese kana",
    "KATAKANA-HIRAGANA": "Japanese kana",
    "HANGUL": "Korean Hangul",
    **{name.upper(): name for name in ("Latin", "Cyrillic", "Greek", "Armenian", "Georgian", "Hebrew", "Arabic")},
    **{name.upper(): name for name in ("Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Tamil", "Telugu", "Kannada")},
    **{name.upper(): name for name in ("Malayalam", "Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")},
    **{name.upper(): name for name in ("Mongolian", "Ethiopic", "Bopomofo")},
}
WIDTHS = ("FULLWIDTH ", "HALFWIDTH ")


def script_shares(examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of each script in the characters of questions and answers, the largest first.

    Earlier turns, spaces and control characters are not counted; digits, and punctuation with symbols, are a kind of
    their own.
    """
    counts = np.zeros(MAX_CODES, np.int64)
    for text in parts_of(text for example in examples for text in (example.query, example.answer)):
        part = np.bincount(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32))
        counts[: len(part)] += part
    by_script: dict[str, int] = {}
    for code in np.flatnonzero(counts).tolist():
        if name := script_of(chr(code)):
            by_script[name] = by_script.get(name, 0) + int(counts[code])
    total = sum(by_script.values())
    return {name: count / total for name, count in sorted(by_script.items(), key=lambda item: -item[1])}


def parts_of(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts joined to parts of bounded length: counting is fast for many short ones, and small for long ones."""
    held: list[str] = []
    num_held = 0
    for text in texts:
        for start in range(0, len(text), PART_CHARACTERS):
            held.append(text[start : start + PART_CHARACTERS])
            num_held += len(held[-1])
            if num_held >= PART_CHARACTERS:
                yield "".join(held)
                held, num_held = [], 0
    if held:
        yield "".join(held)


def script_of(character: str) -> str | None:
    """Name the script of a character, or its kind where it belongs to none; None: a space or a control character."""
    category = unicodedata.category(character)
    if category[0] == "Z" or category in ("Cc", "Cf"):
        return None
    if category[0] in "PS":
        return "punctuation and symbols"
    if category[0] == "N":
        return "digits"
    name = unicodedata.name(character, "")
    for prefix in WIDTHS:
        name = name.removeprefix(prefix)
    return SCRIPTS.get(name.split(" ")[0], "other")
