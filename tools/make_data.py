"""Make data/train.jsonl and data/dev.jsonl: rows in the ADGEN schema, drawn from the project's own grammar.

python tools/make_data.py --out data
"""

import argparse
import json
import random
from pathlib import Path

from sample_grammar import draw_attributes, write_attributes, write_copy

NUM_TRAIN, NUM_DEV, SEED = 6000, 300, 20231124


def make_rows(num_rows: int, seed: int) -> list[dict[str, str]]:
    """Draw rows whose attributes and copies are all different.

    Args:
        num_rows: How many.
        seed: The same seed gives the same rows.

    Returns:
        Rows with the keys content and summary.
    """
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < num_rows:
        attributes = draw_attributes(rng)
        content, summary = write_attributes(attributes), write_copy(attributes, rng)
        if content not in seen and summary not in seen:
            seen |= {content, summary}
            rows.append({"content": content, "summary": summary})
    return rows


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = make_rows(NUM_TRAIN + NUM_DEV, SEED)
    for name, part in (("train", rows[:NUM_TRAIN]), ("dev", rows[NUM_TRAIN:])):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
