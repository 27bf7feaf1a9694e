"""Write data/train.jsonl and data/dev.jsonl, examples in the ADGEN schema, and data/probe_tiny.jsonl.

All are generated from the project's own grammar. The probe holds general questions that the tiny models' pretraining
left out, with their answers: what they cost before and after fine-tuning shows what was forgotten.

python -m tools.make_data --out data
"""

import argparse
import json
import random
from pathlib import Path

from tools.sample_grammar import draw_attributes, write_attributes, write_copy
from tools.tiny_corpus import make_probe

NUM_TRAIN, NUM_DEV, NUM_PROBE_PER_KIND, SEED = 6000, 300, 20, 20231124


def make_examples(num_examples: int, seed: int) -> list[dict[str, str]]:
    """Draw examples with the keys content and summary, no attributes and no copy twice; the seed determines them."""
    rng = random.Random(seed)
    seen: set[str] = set()
    examples: list[dict[str, str]] = []
    while len(examples) < num_examples:
        attributes = draw_attributes(rng)
        content, summary = write_attributes(attributes), write_copy(attributes, rng)
        if content not in seen and summary not in seen:
            seen |= {content, summary}
            examples.append({"content": content, "summary": summary})
    return examples


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "data")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    examples = make_examples(NUM_TRAIN + NUM_DEV, SEED)
    probe = make_probe(NUM_PROBE_PER_KIND, SEED)
    for name, part in (("train", examples[:NUM_TRAIN]), ("dev", examples[NUM_TRAIN:]), ("probe_tiny", probe)):
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in part)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
