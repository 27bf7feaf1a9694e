"""The report on the data of a run as a page for the terminal and as a JSON document."""

import sys
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from glm_utils.limits import EncodingLimits
from glm_utils.run_record import git_commit, versions
from glm_utils.tables import MAX_TABLE_CELLS, render
from glm_utils.training.data_report import BatchFigures, Bin, Duplicates, TrainingDataReport
from glm_utils.training.settings import TrainingSettings
from glm_utils.visible_text import one_line

BAR_WIDTH = 40
LEAST_SHOWN_SHARE = 0.0005  # of a script; smaller ones are shown together


def data_page(name: str, report: TrainingDataReport) -> str:
    """Return the page about one part of the data.

    Args:
        name: The part: train or eval.
        report: What its examples are like.
    """
    sample = report.num_reported < report.num_examples
    part = f" (of the first {report.num_reported:,} of {report.num_examples:,} examples)" if sample else ""
    num_encoded = report.num_reported - report.dropped.count
    share = report.num_trained_tokens / report.num_tokens
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    for title, value in (
        ("examples", f"{num_encoded if not sample else report.num_examples:,}"),
        ("tokens", f"{report.num_tokens:,}, {report.num_trained_tokens:,} of them trained ({share:.1%})"),
        (
            "per example",
            f"{report.mean_tokens:,.1f} on average, median {report.median_tokens:,.0f}, 95 % at most "
            f"{report.p95_tokens:,}",
        ),
        ("longest", f"{report.longest_tokens:,} tokens, {report.longest_place}"),
        ("truncated", f"{report.truncated_prompts.count:,} prompts, {report.truncated_answers.count:,} answers"),
        ("left out", f"{report.dropped.count:,} (--truncated_answers drop)" if report.dropped.count else "0"),
        ("duplicates", duplicates_in_words(report.duplicates)),
        ("batches", batches_in_words(report.batches) if report.batches else ""),
        ("characters", scripts_in_words(report.scripts)),
    ):
        if value:
            table.add_row(Text(title), Text(one_line(value)))
    lines = [f"{name} data{part}", *render(table, MAX_TABLE_CELLS).splitlines(), "", "tokens per example"]
    return "\n".join(line.rstrip() for line in [*lines, *histogram_lines(report.histogram), ""])


def duplicates_in_words(duplicates: Duplicates) -> str:
    """Say how many examples repeat another one, and where the first does."""
    if not duplicates.count:
        return "0"
    first, second = duplicates.first_pair
    return (
        f"{duplicates.count:,} repeat an earlier example, {duplicates.num_distinct:,} of them distinct; the first: "
        f"{second} repeats {first}"
    )


def batches_in_words(batches: BatchFigures) -> str:
    """Say what a batch holds, and what padding costs."""
    means = f"{batches.num_examples:,} examples, {batches.num_tokens:,.0f} tokens on average"
    if batches.packing:
        return f"{means}, packed; padded, {batches.padding_share:.1%} of a batch would be padding"
    return f"{means}; {batches.padding_share:.1%} of a batch is padding"


def scripts_in_words(scripts: dict[str, float]) -> str:
    """List the scripts that matter."""
    shown = [f"{name} {share:.1%}" for name, share in scripts.items() if share >= LEAST_SHOWN_SHARE]
    return ", ".join(shown)


def histogram_lines(bins: tuple[Bin, ...]) -> list[str]:
    """Return one line per bin: its range, a bar, how many examples it has and their share."""
    total, most = sum(each.num_examples for each in bins), max(each.num_examples for each in bins)
    starts, ends = ([f"{getattr(each, key):,}" for each in bins] for key in ("shortest", "longest"))
    counts = [f"{each.num_examples:,}" for each in bins]
    widths = [max(map(len, column)) for column in (starts, ends, counts)]
    lines = []
    for start, end, count, each in zip(starts, ends, counts, bins, strict=True):
        bar = "#" * -(-each.num_examples * BAR_WIDTH // most)  # at least one character for one example
        lines.append(
            f"{start:>{widths[0]}} - {end:>{widths[1]}} |{bar:<{BAR_WIDTH}} {count:>{widths[2]}} "
            f"{each.num_examples / total:6.1%}"
        )
    return lines


def print_page(page: str) -> None:
    """Print a page at once, also where the terminal's encoding lacks some of its characters."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{page}\n".encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def truncation_warnings(name: str, report: TrainingDataReport, limits: EncodingLimits) -> list[str]:
    """Return the warnings about truncated examples: how many, where the first are, and what becomes of them.

    Args:
        name: The part of the data: train or eval.
        report: What its examples are like.
        limits: The limits that they exceed.
    """
    treatment = {
        "cut_and_end": "are truncated, with a trained end token behind the cut (--truncated_answers cut trains none)",
        "cut": "are truncated, without an end token",
        "drop": "are left out with their examples",
    }
    prompts = f"prompts exceed --max_input_length {limits.max_input_length}"
    answers = f"answers exceed --max_output_length {limits.max_output_length}"
    lost = "lose their oldest turns, then the end of the question"
    return [
        f"{name}: {places.count:,} of {report.num_reported:,} {exceeding} and {what}: {places}"
        for places, exceeding, what in (
            (report.truncated_prompts, prompts, lost),
            (report.truncated_answers, answers, treatment[limits.truncated_answers]),
            (report.dropped, answers, treatment[limits.truncated_answers]),
        )
        if places.count
    ]


def report_document(settings: TrainingSettings, reports: dict[str, TrainingDataReport]) -> dict:
    """Return the JSON document.

    Args:
        settings: The run's settings.
        reports: The reports on "train" and, optionally, "eval".
    """
    return {
        "arguments": settings.described_arguments,
        "base": {"name": settings.base.name, "family": settings.base.family.name},
        "num_steps": settings.num_steps,
        "data": {name: asdict(report) for name, report in reports.items()},
        "versions": versions(),
        "commit": git_commit(),
    }
