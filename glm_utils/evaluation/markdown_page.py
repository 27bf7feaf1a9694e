"""report.md: the verdict, the tables and a few answers, readable in a terminal and on a code host."""

from collections.abc import Iterator, Sequence

from glm_utils.evaluation.figures import FIGURES
from glm_utils.evaluation.probe import LANGUAGE_TITLES
from glm_utils.evaluation.report import Report, table_rows
from glm_utils.evaluation.verdict import show_change, show_number
from glm_utils.visible_text import markdown_text

NUM_SHOWN = 5
INTERVALS = (
    "Differences with 95 % intervals, from resampling the examples (distinct-1 and -2: from leaving each one out). An "
    "interval that holds 0 shows no difference."
)
PLOT_TITLES = {
    "scores.png": "Change of the scores",
    "example_losses.png": "Loss of each example",
    "probe_losses.png": "Change of the probe's loss",
}


def markdown_page(report: Report, plot_names: Sequence[str]) -> str:
    """Write the page.

    Args:
        report: The report.
        plot_names: File names of the plots beside it.
    """
    labels = [markdown_text(side.label) for side in (report.job.before, report.job.after)]
    lines = [
        "# Evaluation",
        "",
        f"**{report.verdict}**",
        "",
        f"Before: {labels[0]}. After: {labels[1]}. {report.subject}.",
        "",
        *(f"- {note}" for note in report.notes),
        "",
        *figure_table(report),
        "",
        INTERVALS,
        "",
        *probe_table(report),
        *(f"![{PLOT_TITLES[name]}]({name})\n" for name in plot_names),
        "## Answers",
        "",
        *answers(report),
        "## What the figures mean",
        "",
        *definitions(report),
    ]
    return "\n".join(lines).rstrip() + "\n"


def figure_table(report: Report) -> Iterator[str]:
    """Yield the lines of the table of all figures."""
    yield "| | before | after | difference | |"
    yield "|---|---:|---:|---:|---|"
    for title, figures in report.groups().items():
        yield f"| **{title}** | | | | |"
        for row in table_rows(figures):
            yield f"| {' | '.join(row)} |"


def probe_table(report: Report) -> Iterator[str]:
    """Yield the lines of the table of the probe's losses by kind."""
    if not report.comparison.probe_losses:
        return
    yield from ("| general questions | number | loss before | after | difference |", "|---|---:|---:|---:|---:|")
    for name, found in report.comparison.probe_losses.items():
        numbers = (show_number("probe-loss", value) for value in (found.before, found.after))
        cells = (LANGUAGE_TITLES.get(name, name), str(found.num_examples), *numbers, show_change("probe-loss", found))
        yield f"| {' | '.join(cells)} |"
    yield ""


def answers(report: Report) -> Iterator[str]:
    """Yield the first answers, which nobody selected."""
    rows = zip(report.job.examples, report.before.answers, report.after.answers, strict=True)
    for number, (example, before, after) in enumerate(rows, start=1):
        if number > NUM_SHOWN:
            return
        yield f"{number}. {markdown_text(example.query)}"
        yield f"   - before: {markdown_text(before.text) or '(empty)'}"
        yield f"   - after: {markdown_text(after.text) or '(empty)'}"
        if example.answer:
            yield f"   - reference: {markdown_text(example.answer)}"
        yield ""


def definitions(report: Report) -> Iterator[str]:
    """Yield what each figure of the report means."""
    for key in report.comparison.figures:
        yield f"- **{FIGURES[key].title}**: {FIGURES[key].meaning}"
