"""The verdict in words: did it help, and is there a sign of forgetting? Only intervals that exclude 0 say yes."""

from glm_utils.evaluation.bootstrap import Difference
from glm_utils.evaluation.figures import FIGURES, Comparison
from glm_utils.evaluation.job import EvaluationJob

LEADING = ("rouge-l", "coverage", "ended")  # the first one that the data allows is the verdict's
ADAPTER_WORDS = {1: "helped", 0: "no effect shown", -1: "made it worse"}
MODEL_WORDS = {1: "better", 0: "no difference shown", -1: "worse"}
FEW_EXAMPLES = 30
TINY_HIDDEN_SIZE = 1024


def describe(key: str, difference: Difference) -> str:
    """Return a figure's change with its interval: "ROUGE-L +12.1 [9.8, 14.0]"."""
    figure = FIGURES[key]
    return f"{figure.title} {show_change(key, difference)}"


def show_change(key: str, difference: Difference) -> str:
    """Return a change with its interval: "+12.1 [9.8, 14.0]"."""
    low, high = show_number(key, difference.low), show_number(key, difference.high)
    return f"{show_number(key, difference.change, sign=True)} [{low}, {high}]"


def show_number(key: str, value: float, sign: bool = False) -> str:
    """Return a number with the decimals of its figure, and no minus before a zero."""
    decimals = FIGURES[key].decimals
    return f"{round(value, decimals) + 0.0:{'+' if sign else ''},.{decimals}f}"


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
    verdict = f"{words[direction(leading, comparison.figures[leading])]}: "
    verdict += describe(leading, comparison.figures[leading])
    if "loss" in comparison.figures:
        verdict += f", loss {show_change('loss', comparison.figures['loss'])}"
    parts = [verdict]
    if "probe-loss" in comparison.figures:
        loss = comparison.figures["probe-loss"]
        sign = "a sign of forgetting" if loss.sign > 0 else "no sign of forgetting"
        parts.append(f"{sign}: {describe('probe-loss', loss).replace('probe: ', 'probe ')}")
    ads = comparison.figures.get("probe-advertising")
    if ads and ads.sign > 0:
        parts.append(f"{ads.after:.0f} % of the general answers have turned into advertising copy")
    return "; ".join(parts)


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
            "probability of ordinary text moved. What a 6B model keeps or forgets can be seen with a 6B model alone."
        )
    return notes
