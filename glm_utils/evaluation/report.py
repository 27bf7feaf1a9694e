"""The content of a report, which its pages show and report.json holds."""

import math
from dataclasses import dataclass

from glm_utils.evaluation.bootstrap import Difference
from glm_utils.evaluation.figures import FIGURES, GROUPS, Comparison
from glm_utils.evaluation.job import STAGE, EvaluationJob
from glm_utils.evaluation.sides import SideResult
from glm_utils.evaluation.verdict import direction, show_change, show_number, write_notes, write_verdict
from glm_utils.run_record import git_commit, versions

ARROWS = {1: "better", 0: "", -1: "worse"}


@dataclass(frozen=True)
class Report:
    """What the pages show.

    Attributes:
        job: The evaluation.
        before: What the first model did.
        after: What the second one did.
        comparison: The figures.
        verdict: In a line.
        notes: What the figures do not show.
    """

    job: EvaluationJob
    before: SideResult
    after: SideResult
    comparison: Comparison
    verdict: str
    notes: list[str]

    def groups(self) -> dict[str, dict[str, Difference]]:
        """Return the figures that there are, by group and key."""
        found = {
            title: {key: self.comparison.figures[key] for key in keys if key in self.comparison.figures}
            for title, keys in GROUPS.items()
        }
        return {title: figures for title, figures in found.items() if figures}

    @property
    def subject(self) -> str:
        """What was judged, in a line."""
        job = self.job
        probe = f", {len(job.probe)} general questions" if job.probe else ""
        temperature = job.generation.temperature
        how = "greedy" if temperature == 0 else f"temperature {temperature}, seed {job.generation.seed}"
        return f"{len(job.examples)} examples{probe}; {how}, at most {job.generation.max_new_tokens} new tokens"


def make_report(job: EvaluationJob, before: SideResult, after: SideResult, comparison: Comparison) -> Report:
    """Put a report together."""
    return Report(job, before, after, comparison, write_verdict(job, comparison), write_notes(job, comparison))


def table_rows(figures: dict[str, Difference]) -> list[tuple[str, str, str, str, str]]:
    """Return (title, before, after, change with interval, better or worse) of each figure, as text."""
    return [
        (
            FIGURES[key].title,
            show_number(key, found.before),
            show_number(key, found.after),
            show_change(key, found),
            ARROWS[direction(key, found)],
        )
        for key, found in figures.items()
    ]


def report_values(report: Report) -> dict:
    """Return what report.json holds: all figures, unrounded, and no text of a model."""
    job, comparison = report.job, report.comparison
    return {
        "verdict": report.verdict,
        "notes": report.notes,
        "before": {"label": job.before.label, "weights": job.before.source.weight_format},
        "after": {"label": job.after.label, "weights": job.after.source.weight_format},
        "num_examples": len(job.examples),
        "num_probe_questions": len(job.probe),
        "figures": {key: difference_values(found) for key, found in comparison.figures.items()},
        "probe_losses": {key: difference_values(found) for key, found in comparison.probe_losses.items()},
        **run_values(job),
    }


def difference_values(difference: Difference) -> dict:
    """Return a difference for JSON, which has no NaN."""
    names = ("before", "after", "change", "low", "high")
    values = {name: getattr(difference, name) for name in names}
    known = {name: None if math.isnan(value) else value for name, value in values.items()}
    return {**known, "num_examples": difference.num_examples}


def run_values(job: EvaluationJob) -> dict:
    """Return what every stage records: its arguments, versions and commit."""
    return {"stage": STAGE, "arguments": job.arguments, "versions": versions(), "commit": git_commit()}
