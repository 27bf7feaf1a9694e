"""The verdict in words: did it help, and is there a sign of forgetting? Only intervals that exclude 0 say yes."""

import math
from collections.abc import Sequence

from glm_utils.evaluation.bootstrap import Difference
from glm_utils.evaluation.figures import FIGURES, Comparison
from glm_utils.evaluation.job import EvaluationJob

LEADING = ("rouge-l", "coverage", "ended")  # the first one that the data allows is the verdict's
ADAPTER_WORDS = {1: "helped", 0: "no effect shown", -1: "made it worse"}
MODEL_WORDS = {1: "better", 0: "no difference shown", -1: "worse"}
FAULTS = ("repetition", "ended", "broken")  # what users ask about first, named where it became worse
FORGETTING = ("probe-loss", "probe-advertising", "probe-repetition", "probe-ended")
FEW_EXAMPLES = 30
LARGE = 1e5  # numbers from here on are shown with three digits
TINY_HIDDEN_SIZE = 1024


def describe(comparison: Comparison, keys: Sequence[str]) -> str:
    """Return the changes of figures with their intervals: "ROUGE-L +12.1 [9.8, 14.0], loss ..."."""
    parts = (f"{FIGURES[key].title.removesuffix(', %')} {show_change(key, comparison.figures[key])}" for key in keys)
    return ", ".join(part.replace("probe: ", "probe ") for part in parts)


def show_change(key: str, difference: Difference) -> str:
    """Return a change with its interval: "+12.1 [9.8, 14.0]"."""
    change = show_number(key, difference.change, sign=True)
    if math.isnan(difference.low):
        return change
    return f"{change} [{show_number(key, difference.low)}, {show_number(key, difference.high)}]"


def show_number(key: str, value: float, sign: bool = False) -> str:
    """Return a number with the decimals of its figure, and no minus before a zero."""
    decimals = FIGURES[key].decimals
    return f"{round(value, decimals) + 0.0:{'+' if sign else ''}{f',.{decimals}f' if abs(value) < LARGE else '.2e'}}"


def direction(key: str, difference: Difference) -> int:
    """Return 1 where the change is surely for the better, -1 for the worse, else 0."""
    return difference.sign * FIGURES[key].better


def leading_figure(comparison: Comparison) -> str:
    """Return the key of the figure that the verdict begins with."""
    return next(key for key in LEADING if key in comparison.figures)


def write_verdict(job: EvaluationJob, comparison: Comparison) -> str:
    """Say in one line whether it helped and whether the model has forgotten."""
    words = ADAPTER_WORDS if job.is_adapter else MODEL_WORDS
    leading = leading_figure(comparison)
    found = f"{words[direction(leading, comparison.figures[leading])]}: {describe(comparison, [leading])}"
    if "loss" in comparison.figures:
        found += f", {describe(comparison, ['loss'])}"
    parts, faults = [found], worse_figures(comparison, FAULTS)
    if faults:
        parts.append(f"look at the answers: {describe(comparison, faults)}")
    forgotten = worse_figures(comparison, FORGETTING)
    if forgotten:
        parts.append(f"signs of forgetting: {describe(comparison, forgotten)}")
    elif "probe-loss" in comparison.figures:
        parts.append(f"no sign of forgetting: {describe(comparison, ['probe-loss'])}")
    return "; ".join(parts)


def worse_figures(comparison: Comparison, keys: Sequence[str]) -> list[str]:
    """Return those of the figures that are surely worse than before."""
    figures = comparison.figures
    return [key for key in keys if key in figures and direction(key, figures[key]) < 0]


def write_notes(job: EvaluationJob, comparison: Comparison) -> list[str]:
    """Say what the figures do not show, a sentence each."""
    notes = list(comparison.left_out)
    if len(job.examples) < FEW_EXAMPLES:
        notes.append(
            f"{len(job.examples)} examples are so few that even the intervals are rough: judge {FEW_EXAMPLES} or more."
        )
    if job.generation.temperature != 0:
        notes.append("The answers are sampled: another seed gives other ones, which the intervals do not include.")
    if min(side.source.checkpoint.config["hidden_size"] for side in (job.before, job.after)) < TINY_HIDDEN_SIZE:
        notes.append(
            "This is a tiny model. Its figures show that training, generating and judging work, and how the text "
            "changes; it never knew the answers to general questions, so its probe shows only whether the "
            "probability of ordinary text moved. What a 6B model keeps or forgets can only be seen with a 6B model."
        )
    return notes
