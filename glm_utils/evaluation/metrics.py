"""Score answers: BLEU-4 and ROUGE against references, and without references variety, repetition and broken text.

Each function returns a matrix with one row per example whose column sums give the figure of any selection of
examples. So a bootstrap resamples rows and never scores a text twice.

A unit is a Chinese character, a punctuation mark, or a word or number in Latin script.
"""

import importlib
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from glm_utils.cli import UserError
from glm_utils.evaluation.bootstrap import LeftOut

PACKAGES = ("rouge_chinese", "jieba", "nltk", "sacrebleu", "matplotlib")  # of the extra "eval"
ROUGE_KINDS = ("rouge-1", "rouge-2", "rouge-l")
UNIT = re.compile(r"[A-Za-z0-9]+|\S")
BROKEN_TEXT = re.compile(r"<unk>|\ufffd", re.IGNORECASE)
NUM_BLEU_ORDERS = 4


def check_packages() -> None:
    """Check before any work that the optional packages are there.

    Raises:
        UserError: One is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not installed. Evaluation needs the optional packages: pip install "
            '"chatglm-qlora-toolkit[eval]", or in a checkout pip install -e ".[eval]" -c constraints.txt'
        )


# ---- against a reference


def score_overlap(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Score BLEU-4 and ROUGE per example, as the evaluation of the published P-tuning code defines them.

    Source: nltk's sentence_bleu of characters with SmoothingFunction().method3; the f of rouge_chinese over
    jieba's words. An empty answer counts 0.

    Args:
        answers: What the model said.
        references: What it should have said.

    Returns:
        Rows of (100 x score, 1) by "bleu-4", "rouge-1", "rouge-2" and "rouge-l".
    """
    jieba, bleu_score = importlib.import_module("jieba"), importlib.import_module("nltk.translate.bleu_score")
    jieba.setLogLevel(logging.WARNING)
    rouge, smoothing = importlib.import_module("rouge_chinese").Rouge(), bleu_score.SmoothingFunction().method3
    rows: dict[str, list[float]] = {key: [] for key in ("bleu-4", *ROUGE_KINDS)}
    for answer, reference in zip(answers, references, strict=True):
        if not answer.strip() or not reference.strip():
            scores = dict.fromkeys(rows, 0.0)
        else:
            words = [" ".join(jieba.cut(text)) for text in (answer, reference)]
            scores = {kind: value["f"] for kind, value in rouge.get_scores(*words)[0].items()}
            scores["bleu-4"] = float(
                bleu_score.sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)
            )
        for key, values in rows.items():
            values.append(100 * scores[key])
    return {key: with_weights(values) for key, values in rows.items()}


def score_sacrebleu(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Collect what corpus BLEU with sacrebleu's Chinese tokenizer is computed from; `corpus_bleu` computes it.

    Returns:
        A row per example: matching n-grams and n-grams of orders 1 to 4, length of answer and reference.
    """
    metric = importlib.import_module("sacrebleu").BLEU(tokenize="zh", effective_order=True)
    scores = [
        metric.sentence_score(answer, [reference]) for answer, reference in zip(answers, references, strict=True)
    ]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], dtype=float)


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """Compute sacrebleu's corpus BLEU from summed rows of `score_sacrebleu`, [..., 10]."""
    bleu = importlib.import_module("sacrebleu").BLEU
    scores = [
        bleu.compute_bleu(
            correct=[int(count) for count in row[:NUM_BLEU_ORDERS]],
            total=[int(count) for count in row[NUM_BLEU_ORDERS : 2 * NUM_BLEU_ORDERS]],
            sys_len=int(row[-2]),
            ref_len=int(row[-1]),
            smooth_method="exp",
        ).score
        for row in sums.reshape(-1, sums.shape[-1])
    ]
    return np.array(scores).reshape(sums.shape[:-1])


def score_lengths(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return a row per example of (units of the answer, units of the reference)."""
    return np.array(
        [(len(units(answer)), len(units(reference))) for answer, reference in zip(answers, references, strict=True)],
        dtype=float,
    )


# ---- of the answer alone


def units(text: str) -> list[str]:
    """Split a text into units."""
    return UNIT.findall(text)


def ngrams(text: str, order: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a text's units, in order."""
    parts = units(text)
    return list(zip(*(parts[start:] for start in range(order)), strict=False))


def score_distinct(answers: Sequence[str], order: int) -> LeftOut:
    """Compute distinct-n: different n-grams over n-grams, of all answers together.

    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055

    Returns:
        The share in percent.
    """
    counters = [Counter(ngrams(answer, order)) for answer in answers]
    total: Counter = sum(counters, Counter())
    num_ngrams, num_distinct = total.total(), len(total)
    left_out = []
    for counter in counters:
        num_only_here = sum(total[ngram] == count for ngram, count in counter.items())
        left_out.append(100 * (num_distinct - num_only_here) / max(num_ngrams - counter.total(), 1))
    return LeftOut(100 * num_distinct / max(num_ngrams, 1), np.array(left_out))


def score_repetition(answers: Sequence[str]) -> np.ndarray:
    """Return a row per answer of (percent of its 4-grams that stood in it before, 1).

    Source: seq-rep-4, Welleck et al. 2020, https://arxiv.org/abs/1908.04319
    """
    shares = []
    for answer in answers:
        found = ngrams(answer, 4)
        shares.append(100 * (1 - len(set(found)) / len(found)) if found else 0.0)
    return with_weights(shares)


def score_longest_repeat(answers: Sequence[str]) -> np.ndarray:
    """Return a row per answer of (units of the longest stretch that stands twice in it, without overlap, 1)."""
    return with_weights([float(longest_repeat(units(answer))) for answer in answers])


def longest_repeat(parts: Sequence[str]) -> int:
    """Return the length of the longest stretch that occurs twice without overlapping itself.

    Where a stretch does, so do all shorter ones in it: the length is found by bisection.
    """
    least, most = 0, len(parts) // 2
    while least < most:
        length = (least + most + 1) // 2
        first_places: dict[tuple[str, ...], int] = {}
        places = ((tuple(parts[start : start + length]), start) for start in range(len(parts) - length + 1))
        if any(start - first_places.setdefault(stretch, start) >= length for stretch, start in places):
            least = length
        else:
            most = length - 1
    return least


def score_broken_text(answers: Sequence[str], token_ids: Sequence[Sequence[int]], unk_id: int | None) -> np.ndarray:
    """Return a row per answer of (100 where it holds <unk> or U+FFFD, 1).

    Args:
        answers: What the model said.
        token_ids: Its tokens: decoding leaves the unknown token out of the text.
        unk_id: Id of the unknown token; None: the vocabulary has none.
    """
    return shares(
        bool(BROKEN_TEXT.search(answer)) or unk_id in ids for answer, ids in zip(answers, token_ids, strict=True)
    )


# ---- rows


def with_weights(values: Sequence[float]) -> np.ndarray:
    """Return rows of (value, 1), whose sums give the mean."""
    return np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1)


def shares(flags) -> np.ndarray:
    """Return rows of (100 or 0, 1), whose sums give the share in percent."""
    return with_weights([100.0 * bool(flag) for flag in flags])


def ratio(sums: np.ndarray) -> np.ndarray:
    """Compute a mean or a ratio from summed rows, [..., 2]; NaN where there is nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]
