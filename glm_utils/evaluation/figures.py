"""The figures of an evaluation: what each one means, which way is better, and its difference between the models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from glm_utils.data import Example
from glm_utils.evaluation import attributes, metrics
from glm_utils.evaluation.bootstrap import Difference, LeftOut, compare_left_out, compare_sums
from glm_utils.evaluation.job import EvaluationJob
from glm_utils.evaluation.sides import SideResult
from glm_utils.evaluation.two_models import Side
from glm_utils.inference.batch import Answer

Scores = np.ndarray | LeftOut  # a row per example, or a figure of all answers together


def perplexity(sums: np.ndarray) -> np.ndarray:
    """Compute the perplexity of summed losses and tokens, [..., 2]."""
    return np.exp(metrics.ratio(sums))


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        key: Its name in report.json.
        title: Its name in the tables.
        meaning: Its definition in a sentence.
        better: 1: more is better; -1: less is; 0: neither.
        decimals: Shown.
        reduce: The figure of summed rows.
    """

    key: str
    title: str
    meaning: str
    better: int
    decimals: int = 1
    reduce: Callable[[np.ndarray], np.ndarray] = metrics.ratio


LOSS = "mean loss of the reference answers' tokens, in nats, end token included"
FIGURES = {
    figure.key: figure
    for figure in (
        Figure("loss", "loss", LOSS, -1, 3),
        Figure("perplexity", "perplexity", "exp(loss)", -1, 2, perplexity),
        Figure("bleu-4", "BLEU-4", "per answer, characters, smoothed (nltk, method3), then averaged", 1),
        Figure("rouge-1", "ROUGE-1", "F of words that agree (jieba, rouge_chinese), averaged", 1),
        Figure("rouge-2", "ROUGE-2", "F of word pairs that agree, averaged", 1),
        Figure("rouge-l", "ROUGE-L", "F of the longest common subsequence of words, averaged", 1),
        Figure("sacrebleu", "sacreBLEU (zh)", "corpus BLEU, sacrebleu's zh tokenizer", 1, 1, metrics.corpus_bleu),
        Figure("length-ratio", "length / reference", "units of all answers over units of all references", 0, 2),
        Figure("coverage", "values used, %", "attribute values of the prompts that the answers hold", 1),
        Figure("unasked", "invented values, %", "answers that name a color, material or cut nobody asked for", -1),
        Figure("distinct-1", "distinct-1, %", "different units over units, all answers together", 0),
        Figure("distinct-2", "distinct-2, %", "different pairs of units over pairs, all answers together", 0),
        Figure("repetition", "repeated 4-grams, %", "4-grams of an answer that stood in it before, averaged", -1),
        Figure("longest-repeat", "longest repeat", "units of the longest stretch that stands twice, averaged", -1),
        Figure("ended", "ended by itself, %", "answers that end with an end token, not at --max_new_tokens", 1),
        Figure("broken", "broken text, %", "answers with <unk> or U+FFFD", -1),
        Figure("probe-loss", "probe: loss", f"general questions: {LOSS}", -1, 3),
        Figure("probe-perplexity", "probe: perplexity", "exp(loss) of the general questions", -1, 2, perplexity),
        Figure("probe-advertising", "probe: turned to ads, %", "answers that became advertising copy", -1),
        Figure("probe-repetition", "probe: repeated 4-grams, %", "as above, of the answers to the probe", -1),
        Figure("probe-ended", "probe: ended by itself, %", "as above, of the answers to the probe", 1),
    )
}

GROUPS = {  # of the report's table
    "Against the references": (
        "loss", "perplexity", "bleu-4", "rouge-1", "rouge-2", "rouge-l", "sacrebleu", "length-ratio",
    ),
    "Attributes of the prompts": ("coverage", "unasked"),
    "The answers themselves": ("distinct-1", "distinct-2", "repetition", "longest-repeat", "ended", "broken"),
    "General questions (forgetting)": (
        "probe-loss", "probe-perplexity", "probe-advertising", "probe-repetition", "probe-ended",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All differences between the two models.

    Attributes:
        figures: By key of FIGURES.
        probe_losses: Loss of the probe by kind and by language.
        left_out: Why figures are missing, a sentence each.
    """

    figures: dict[str, Difference]
    probe_losses: dict[str, Difference]
    left_out: list[str] = field(default_factory=list)


def compare(job: EvaluationJob, before: SideResult, after: SideResult) -> Comparison:
    """Compute every figure of both models and their differences."""
    seed, scored = (
        job.generation.seed,
        [score_side(job, side, result) for side, result in ((job.before, before), (job.after, after))],
    )
    figures = {}
    for key, old in scored[0].items():
        new = scored[1][key]
        if isinstance(old, LeftOut) and isinstance(new, LeftOut):
            figures[key] = compare_left_out(old, new)
        elif isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
            figures[key] = compare_sums(old, new, FIGURES[key].reduce, seed)
    probe_losses = {}
    if job.probe and job.has_same_tokens:
        for name, chosen in probe_parts(job).items():
            probe_losses[name] = compare_sums(
                before.probe_losses[chosen], after.probe_losses[chosen], metrics.ratio, seed
            )
    return Comparison(figures, probe_losses, missing_figures(job))


def probe_parts(job: EvaluationJob) -> dict[str, list[int]]:
    """Return the places of the probe's questions by kind and by language."""
    parts: dict[str, list[int]] = {}
    for name in ("kind", "language"):
        for index, question in enumerate(job.probe):
            parts.setdefault(getattr(question, name), []).append(index)
    return parts


def score_side(job: EvaluationJob, side: Side, result: SideResult) -> dict[str, Scores]:
    """Return the scores of one model by figure, those left out that the data does not allow."""
    texts = [answer.text for answer in result.answers]
    queries = [example.query for example in job.examples]
    scores: dict[str, Scores] = score_losses(job, result)
    with_reference = [index for index, example in enumerate(job.examples) if example.answer]
    if with_reference:
        chosen = [texts[index] for index in with_reference]
        references = [job.examples[index].answer for index in with_reference]
        scores |= metrics.score_overlap(chosen, references)
        scores["sacrebleu"] = metrics.score_sacrebleu(chosen, references)
        scores["length-ratio"] = metrics.score_lengths(chosen, references)
    if job.vocabulary:
        scores["coverage"] = attributes.score_coverage(queries, texts)
        if job.vocabulary.telling:
            scores["unasked"] = attributes.score_unasked(queries, texts, job.vocabulary)
    unk_id = side.source.checkpoint.tokenizer.unk_token_id
    scores |= {
        "distinct-1": metrics.score_distinct(texts, 1),
        "distinct-2": metrics.score_distinct(texts, 2),
        "repetition": metrics.score_repetition(texts),
        "longest-repeat": metrics.score_longest_repeat(texts),
        "ended": metrics.shares(answer.ended for answer in result.answers),
        "broken": metrics.score_broken_text(texts, [answer.token_ids for answer in result.answers], unk_id),
    }
    return scores | score_probe(job, result.probe_answers)


def score_losses(job: EvaluationJob, result: SideResult) -> dict[str, Scores]:
    """Return the losses of the examples and of the probe, where there are any that can be compared."""
    found = {"loss": result.losses, "perplexity": result.losses}
    found |= {"probe-loss": result.probe_losses, "probe-perplexity": result.probe_losses}
    return {key: rows for key, rows in found.items() if job.has_same_tokens and len(rows)}


def score_probe(job: EvaluationJob, answers: Sequence[Answer]) -> dict[str, Scores]:
    """Return the scores of the answers to the probe."""
    if not job.probe:
        return {}
    texts = [answer.text for answer in answers]
    scores: dict[str, Scores] = {
        "probe-repetition": metrics.score_repetition(texts),
        "probe-ended": metrics.shares(answer.ended for answer in answers),
    }
    if job.vocabulary:
        examples: list[Example] = [question.example for question in job.probe]
        scores["probe-advertising"] = attributes.score_advertising(
            [example.query for example in examples], [example.answer for example in examples], texts, job.vocabulary
        )
    return scores


def missing_figures(job: EvaluationJob) -> list[str]:
    """Say which figures are left out, and why."""
    reasons = []
    num_without = sum(not example.answer for example in job.examples)
    if num_without == len(job.examples):
        reasons.append("The data has no reference answers: loss, BLEU, ROUGE and length ratio are left out.")
    elif num_without:
        reasons.append(f"{num_without} examples have no reference answer: loss, BLEU and ROUGE are of the others.")
    if not job.vocabulary:
        reasons.append("The prompts do not list attributes: values used, invented and turned to ads are left out.")
    elif not job.vocabulary.telling:
        reasons.append("The data names no colors, materials or cuts: invented values are left out.")
    if not job.probe:
        reasons.append("The general questions were not asked: signs of forgetting are left out.")
    if not job.has_same_tokens:
        reasons.append("The models have different vocabularies: losses per token are left out.")
    return reasons
