"""report.html: one file that opens in a browser without a network, its style and its plots inside."""

import base64
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from glm_utils.evaluation.bootstrap import Difference
from glm_utils.evaluation.figures import FIGURES
from glm_utils.evaluation.markdown_page import INTERVALS, PLOT_TITLES
from glm_utils.evaluation.probe import LANGUAGE_TITLES, SUBJECTS_OF_2023
from glm_utils.evaluation.report import Report, table_rows
from glm_utils.evaluation.verdict import direction, leading_figure, show_change, show_number
from glm_utils.inference.batch import Answer
from glm_utils.visible_text import html_text

NUM_OPEN = 8  # answers that are shown without a click
TONES = {1: "good", 0: "even", -1: "bad"}
STYLE = """
:root { --ink: #22303c; --soft: #66727e; --line: #e4e8ec; --paper: #fff; --ground: #f6f7f9; --good: #2c7a5b;
  --bad: #b5483a; --even: #7b8794; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.6;
  font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
  "Microsoft YaHei", sans-serif; font-size: 15px; }
main { max-width: 1040px; margin: 0 auto; padding: 44px 24px 80px; }
h1 { font-size: 15px; font-weight: 600; letter-spacing: .06em; text-transform: uppercase; color: var(--soft);
  margin: 0 0 14px; }
h2 { font-size: 20px; font-weight: 600; margin: 52px 0 14px; }
p { margin: 0 0 10px; }
.soft { color: var(--soft); } .below { margin-top: 12px; }
.verdict { background: var(--paper); border: 1px solid var(--line); border-left: 5px solid var(--even);
  border-radius: 8px; padding: 24px 28px; }
.verdict.good { border-left-color: var(--good); } .verdict.bad { border-left-color: var(--bad); }
.verdict p.line { font-size: 17px; line-height: 1.5; margin: 0 0 4px; }
.verdict p.line:first-child { font-size: 22px; font-weight: 500; }
.verdict p.line:first-letter { text-transform: uppercase; }
.verdict p.soft { margin: 14px 0 0; }
ul.notes { padding-left: 20px; color: var(--soft); margin: 18px 0 0; } ul.notes li { margin: 4px 0; }
table { width: 100%; border-collapse: collapse; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
tr.group th { text-align: left; font-weight: 600; padding-top: 20px; }
td abbr { text-decoration: none; border-bottom: 1px dotted #b8c0c8; cursor: help; }
td .good { color: var(--good); } td .bad { color: var(--bad); } td .even { color: var(--soft); }
td svg { display: block; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; align-items: start; }
figure { margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 14px; }
figure.wide { grid-column: 1 / -1; }
figure img { width: 100%; height: auto; display: block; max-width: 780px; margin: 0 auto; }
figcaption { font-size: 13px; color: var(--soft); margin-bottom: 8px; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 16px 20px;
  margin: 0 0 14px; }
article > p { font-weight: 500; white-space: pre-wrap; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 22px; }
.columns h4 { font-size: 12px; font-weight: 500; color: var(--soft); margin: 0 0 2px; }
.columns div div { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow-y: auto; }
details { margin: 0 0 14px; } summary { cursor: pointer; color: var(--soft); padding: 6px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; } dt { font-weight: 500; }
dd { margin: 0; color: var(--soft); }
@media (max-width: 760px) { .plots { grid-template-columns: 1fr; } td:nth-child(5), th:nth-child(5) { display: none; }
  th, td { padding: 7px 8px; } dl { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } details > * { display: block; } }
"""


def html_page(report: Report, plots: Sequence[Path]) -> str:
    """Write the page.

    Args:
        report: The report.
        plots: The PNG files that it holds.
    """
    leading = leading_figure(report.comparison)
    tone = TONES[direction(leading, report.comparison.figures[leading])]
    first, *others = report.verdict.split("; ")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Evaluation of {html_text(report.job.after.label)}</title>\n<style>{STYLE}</style>\n</head>",
        f'<body>\n<main>\n<h1>Did it help?</h1>\n<section class="verdict {tone}">',
        *(f'<p class="line">{html_text(line)}.</p>' for line in (first, *others)),
        f'<p class="soft">Before: {html_text(report.job.before.label)}. After: {html_text(report.job.after.label)}.',
        f"{html_text(report.subject)}.</p>\n</section>",
        f'<ul class="notes">{"".join(f"<li>{html_text(note)}</li>" for note in report.notes)}</ul>',
        *figure_table(report),
        f'<p class="soft below">{INTERVALS}</p>',
        *plot_section(plots),
        *probe_table(report),
        *answer_section(report),
        *probe_section(report),
        *definitions(report),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def figure_table(report: Report) -> Iterator[str]:
    """Yield the table of all figures, with a drawing of each interval."""
    yield "<h2>Figures</h2>\n<table>\n<thead><tr><th></th><th>before</th><th>after</th><th>difference</th>"
    yield "<th></th></tr></thead>"
    for title, figures in report.groups().items():
        yield f'<tr class="group"><th colspan="5">{title}</th></tr>'
        for (key, found), (name, before, after, change, _) in zip(figures.items(), table_rows(figures), strict=True):
            tone = TONES[direction(key, found)]
            yield f'<tr><td><abbr title="{html_text(FIGURES[key].meaning)}">{name}</abbr></td><td>{before}</td>'
            yield f'<td>{after}</td><td><span class="{tone}">{change}</span></td>'
            yield f"<td>{interval_svg(found, tone)}</td></tr>"
    yield "</table>"


def interval_svg(difference: Difference, tone: str, half_width: int = 64) -> str:
    """Draw an interval around 0, which stands in the middle; each row has a scale of its own."""
    reach = max(abs(difference.low), abs(difference.high), 1e-12)
    if not reach < float("inf"):
        return ""
    places = [
        half_width + 8 + half_width * value / reach for value in (difference.low, difference.change, difference.high)
    ]
    low, middle, high = (f"{place:.1f}" for place in places)
    return (
        f'<svg width="{2 * half_width + 16}" height="16" aria-hidden="true">'
        f'<line x1="{half_width + 8}" x2="{half_width + 8}" y1="0" y2="16" stroke="#cfd6dc"/>'
        f'<line x1="{low}" x2="{high}" y1="8" y2="8" stroke="var(--{tone})" stroke-width="2.5" opacity=".5"/>'
        f'<circle cx="{middle}" cy="8" r="3.5" fill="var(--{tone})"/></svg>'
    )


def plot_section(plots: Sequence[Path]) -> Iterator[str]:
    """Yield the plots, their bytes in the page."""
    if not plots:
        return
    yield '<h2>Plots</h2>\n<div class="plots">'
    for number, path in enumerate(plots):
        wide = ' class="wide"' if number == len(plots) - 1 and len(plots) % 2 else ""
        data, title = base64.b64encode(path.read_bytes()).decode("ascii"), PLOT_TITLES[path.name]
        yield f'<figure{wide}><figcaption>{title}</figcaption><img alt="{title}" src="data:image/png;base64,{data}">'
        yield "</figure>"
    yield "</div>"


def probe_table(report: Report) -> Iterator[str]:
    """Yield the table of the probe's losses by kind."""
    if not report.comparison.probe_losses:
        return
    yield "<h2>General questions by kind</h2>\n<table>\n<thead><tr><th></th><th>number</th><th>loss before</th>"
    yield "<th>after</th><th>difference</th></tr></thead>"
    for name, found in report.comparison.probe_losses.items():
        before, after = (show_number("probe-loss", value) for value in (found.before, found.after))
        tone = TONES[-found.sign]
        yield f"<tr><td>{LANGUAGE_TITLES.get(name, name)}</td><td>{found.num_examples}</td><td>{before}</td>"
        yield f'<td>{after}</td><td><span class="{tone}">{show_change("probe-loss", found)}</span></td></tr>'
    yield "</table>"


def answer_section(report: Report) -> Iterator[str]:
    """Yield the answers side by side: the first ones, which nobody selected, the others behind a click."""
    rows = zip(report.job.examples, report.before.answers, report.after.answers, strict=True)
    articles = [article(example.query, before, after, example.answer) for example, before, after in rows]
    yield "<h2>Answers, in the order of the data</h2>"
    yield from articles[:NUM_OPEN]
    if articles[NUM_OPEN:]:
        yield f"<details><summary>{len(articles) - NUM_OPEN} more</summary>"
        yield from articles[NUM_OPEN:]
        yield "</details>"


def probe_section(report: Report) -> Iterator[str]:
    """Yield the answers to the probe: the subjects of 2023, then all by kind behind a click each."""
    if not report.job.probe:
        return
    rows = list(zip(report.job.probe, report.before.probe_answers, report.after.probe_answers, strict=True))

    def show(chosen: Sequence[tuple]) -> list[str]:
        texts = [(question.example, before, after) for question, before, after in chosen]
        return [article(example.query, before, after, example.answer) for example, before, after in texts]

    yield "<h2>Answers to general questions</h2>"
    yield from show([row for row in rows if row[0].example.query in SUBJECTS_OF_2023])
    for kind, members in groupby(rows, key=lambda row: row[0].kind):
        articles = show(list(members))
        yield f"<details><summary>{kind} ({len(articles)})</summary>"
        yield from articles
        yield "</details>"


def article(query: str, before: Answer, after: Answer, reference: str) -> str:
    """Return one question with its answers side by side."""
    columns = [(f"before, {ending(before)}", before.text), (f"after, {ending(after)}", after.text)]
    columns += [("reference", reference)] if reference else []
    cells = "".join(f"<div><h4>{title}</h4><div>{html_text(text) or '(empty)'}</div></div>" for title, text in columns)
    return f'<article><p>{html_text(query)}</p><div class="columns">{cells}</div></article>'


def ending(answer: Answer) -> str:
    """Say how long an answer is and how it ended."""
    return f"{answer.num_tokens} tokens{'' if answer.ended else ', not ended'}"


def definitions(report: Report) -> Iterator[str]:
    """Yield what each figure of the report means."""
    yield "<h2>What the figures mean</h2>\n<dl>"
    for key in report.comparison.figures:
        yield f"<dt>{FIGURES[key].title}</dt><dd>{html_text(FIGURES[key].meaning)}</dd>"
    yield "</dl>"
